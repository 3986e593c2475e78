"""When goals are asked for, of what, and when they hold; with and without a worker."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from goal_images.background import GoalWorker
from goal_images.control import GoalStream
from modeling_foresight import ForesightForActionPrediction, ForesightStream
from tests.tiny import TASKS, tiny_config, tiny_processor

EVERY = 3


class NotedStream:
    """Acts with zeros, and notes goals; `progress` is that of the last step."""

    def __init__(self, robots=None, with_progress=True):
        self.model = SimpleNamespace(config=SimpleNamespace(views=["main", "wrist"]))
        self.single, self.num_envs, self.with_progress = robots is None, robots or 1, with_progress
        self.progress, self.goals = torch.zeros(self.num_envs), [[] for _ in range(self.num_envs)]
        self.now, self.state_dim = [-1] * self.num_envs, 0

    def reset(self, instruction, envs=None):
        self.progress[:] = 0.9  # of the instruction before

    def set_goal(self, image, envs):
        for robot, goal in zip(envs, [image] if self.single else image, strict=True):
            self.goals[robot].append((self.now[robot] + 1, int(goal[0, 0, 0])))

    def step_chunk(self, images, state=None, envs=None, again=False):
        robots = range(self.num_envs) if envs in (None, [True] * self.num_envs) else envs
        for robot in robots:
            self.now[robot] += not again
            self.progress[robot] = self.now[robot] / 10
        return torch.zeros(*(() if self.single else (len(robots),)), 4, 7)


class NumberedSource:
    """Draws the first pixel of the picture plus 100, and notes what it was asked."""

    def __init__(self, needs_progress=True):
        self.needs_progress, self.asked = needs_progress, []

    def draw(self, requests):
        self.asked.append(requests)
        return np.stack([np.full((4, 4, 3), request.picture[0, 0, 0] + 100) for request in requests])


class SlowWorker(GoalWorker):
    """Draws as `NumberedSource`, and is ready when a test says so, or when it is waited for."""

    def __init__(self):
        self.source, self.busy, self.done, self.waited = NumberedSource(), False, False, 0
        self.needs_progress, self.sent = True, []

    def send(self, requests):
        assert not self.busy
        self.sent.append(requests)
        self.busy, self.done = True, False

    def is_ready(self):
        return self.busy and self.done

    def receive(self):
        assert self.busy, "nothing was asked for"
        self.waited += not self.done
        self.busy = False
        return self.source.draw(self.sent[-1])


def picture(value, robots=None):
    shape = (5, 6, 3) if robots is None else (robots, 5, 6, 3)
    return {"main": np.full(shape, value, np.uint8), "wrist": np.zeros(shape, np.uint8)}


def test_a_goal_is_drawn_at_the_start_and_every_few_steps():
    source, plain = NumberedSource(), NotedStream()
    stream = GoalStream(plain, source, EVERY)
    stream.reset("open it")
    for step in range(7):
        assert stream.step(picture(step)).shape == (7,)
    assert plain.goals == [[(0, 100), (3, 103), (6, 106)]]
    first, second, third = (request for (request,) in source.asked)
    assert (first.steps, second.steps, third.steps) == (0, 3, 6)
    assert first.progress == 0 and second.progress == pytest.approx(0.2), "that of the step before"
    assert third.instruction == "open it" and third.picture.shape == (5, 6, 3)
    assert third.picture[0, 0, 0] == 6 and third.start[0, 0, 0] == 0
    assert len(stream.waits_s) == 3


def test_an_instruction_begins_with_a_goal_of_its_own():
    source, plain = NumberedSource(), NotedStream()
    stream = GoalStream(plain, source, EVERY)
    for text, value in (("open it", 1), ("close it", 5)):
        stream.reset(text)
        for step in range(2):
            stream.step(picture(value + step))
    assert [(r.instruction, r.progress, r.start[0, 0, 0]) for (r,) in source.asked] == [
        ("open it", 0.0, 1),
        ("close it", 0.0, 5),
    ]


def test_every_robot_has_its_own_steps_and_those_due_together_are_drawn_together():
    source, plain = NumberedSource(), NotedStream(robots=3)
    stream = GoalStream(plain, source, EVERY)
    stream.reset(["a", "b"], envs=[0, 2])
    stream.step_chunk(picture(1, 2), envs=[0, 2])
    stream.reset("c", envs=[1])
    for value in (2, 3, 4):
        stream.step_chunk(picture(value, 3), envs=[True] * 3)
    asked = [[(request.instruction, request.steps) for request in requests] for requests in source.asked]
    assert asked == [[("a", 0), ("b", 0)], [("c", 0)], [("a", 3), ("b", 3)]]
    assert plain.goals == [[(0, 101), (3, 104)], [(0, 102)], [(0, 101), (3, 104)]]


def test_an_observation_that_replaces_the_newest_one_is_no_step():
    source = NumberedSource()
    stream = GoalStream(NotedStream(), source, EVERY)
    stream.reset("open it")
    for again in (True, False, True, False, True):  # the first of an instruction is a step in any case
        stream.step_chunk(picture(0), again=again)
    assert len(source.asked) == 1
    stream.step_chunk(picture(0))
    assert len(source.asked) == 2


def test_without_the_first_camera_a_goal_waits_for_it():
    source, plain = NumberedSource(), NotedStream()
    stream = GoalStream(plain, source, EVERY)
    stream.reset("open it")
    for step in range(7):
        images = picture(step)
        if step in (0, 4):
            del images["main"]
        stream.step(images)
    assert plain.goals == [[(1, 101), (5, 105)]]
    assert source.asked[1][0].start[0, 0, 0] == 1


def test_pictures_may_have_their_channels_first_and_are_copied():
    source, plain = NumberedSource(), NotedStream(robots=1)
    stream = GoalStream(plain, source, EVERY)
    stream.reset("open it")
    buffer = torch.full((1, 3, 5, 6), 7, dtype=torch.uint8)
    stream.step_chunk({"main": buffer})
    buffer.zero_()
    request = source.asked[0][0]
    assert request.start.shape == (5, 6, 3) and (request.start == 7).all()


def test_without_a_head_for_it_requests_have_no_progress():
    source = NumberedSource(needs_progress=False)
    stream = GoalStream(NotedStream(with_progress=False), source)
    stream.reset("open it")
    stream.step(picture(0))
    assert source.asked[0][0].progress is None
    with pytest.raises(ValueError, match="with_progress=True"):
        GoalStream(NotedStream(with_progress=False), NumberedSource())


def test_beside_the_loop_the_first_goal_is_awaited_and_later_ones_are_taken_when_ready():
    worker, plain = SlowWorker(), NotedStream()
    stream = GoalStream(plain, worker, EVERY)
    stream.reset("open it")
    for step in range(6):
        stream.step(picture(step))
        worker.done = step == 4
    assert worker.waited == 1 and len(stream.waits_s) == 1
    assert plain.goals == [[(0, 100), (5, 103)]], "due at step 3, ready before step 5"


def test_what_becomes_due_while_goals_are_drawn_is_asked_for_afterwards_with_the_newest_picture():
    worker, plain = SlowWorker(), NotedStream()
    stream = GoalStream(plain, worker, EVERY)
    stream.reset("open it")
    for step in range(11):
        stream.step(picture(step))
        worker.done = step == 9
    assert [requests[0].picture[0, 0, 0] for requests in worker.sent] == [0, 3, 10]
    assert plain.goals == [[(0, 100), (10, 103)]]


def test_goals_of_an_ended_episode_are_dropped():
    worker, plain = SlowWorker(), NotedStream(robots=2)
    stream = GoalStream(plain, worker, EVERY)
    stream.reset("open it")
    for step in range(4):
        stream.step_chunk(picture(step, 2))
    assert worker.busy
    stream.reset("close it", envs=[1])
    stream.step_chunk(picture(50, 2))  # waits for the goals of step 3, then for the first one of the new task
    assert plain.goals == [[(0, 100), (4, 103)], [(0, 100), (4, 150)]]
    assert [request.instruction for request in worker.sent[-1]] == ["close it"]


def test_a_stream_with_goals_acts_as_one_that_is_given_them():
    torch.manual_seed(0)
    config = tiny_config(goal_image=True)
    model, processor = ForesightForActionPrediction(config).eval(), tiny_processor(config)
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (4, 40, 40, 3), dtype=np.uint8)
    goals = rng.integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    state = np.zeros(config.state_dim, np.float32)
    source = SimpleNamespace(needs_progress=True, draw=lambda requests: goals[[requests[0].steps // EVERY]])
    ours = GoalStream(ForesightStream(model, processor, with_progress=True), source, EVERY)
    theirs = ForesightStream(model, processor, with_progress=True)
    for stream in (ours, theirs):
        stream.reset(TASKS[0])
    for step, frame in enumerate(frames):
        if step % EVERY == 0:
            theirs.set_goal(goals[step // EVERY])
        images = {"main": frame, "wrist": frame}
        assert torch.equal(ours.step(images, state), theirs.step(images, state))
