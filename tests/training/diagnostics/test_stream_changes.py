"""What the policy gets from each change."""

import numpy as np
import pytest
import torch

from goal_images.control import GoalStream
from modeling_foresight import ForesightForActionPrediction
from tests.tiny import TASKS, tiny_config, tiny_processor
from training.diagnostics.stream_changes import FrozenCamera, OtherInstruction, SwappedViews, shorten_history


class NotingStream:
    """Notes what robots are told and shown since their last reset."""

    model, state_dim = None, 1

    def __init__(self):
        self.told, self.shown = {}, {}

    def reset(self, instruction, envs):
        for env in envs:
            self.told[env], self.shown[env] = instruction, []

    def step_chunk(self, images, state, envs):
        for i, env in enumerate(envs):
            self.shown[env].append((int(images["main"][i]), int(images["wrist"][i]), int(state[i, 0])))
        return torch.tensor(state)


def feed(changed, steps, envs=(0, 2)):
    """Main shows 10 * robot + step, wrist a hundred more, the state is the step."""
    for step in steps:
        main = np.array([10 * env + step for env in envs])
        chunk = changed.step_chunk(
            {"main": main, "wrist": main + 100}, np.full((len(envs), 1), step), list(envs)
        )
        assert chunk.shape == (len(envs), 1)
    return changed.stream


def test_a_frozen_camera_shows_the_first_images_of_each_episode_with_present_states():
    changed = FrozenCamera(NotingStream())
    changed.reset("go", [0, 2])
    stream = feed(changed, [1, 2])
    assert stream.shown == {0: [(1, 101, 1), (1, 101, 2)], 2: [(21, 121, 1), (21, 121, 2)]}
    changed.reset("again", [2])
    stream = feed(changed, [3])
    assert stream.shown[2] == [(23, 123, 3)] and stream.shown[0][-1] == (1, 101, 3)


def test_swapped_views_show_each_other():
    changed = SwappedViews(NotingStream())
    changed.reset("go", [0, 2])
    assert feed(changed, [4]).shown == {0: [(104, 4, 4)], 2: [(124, 24, 4)]}


def test_another_instruction_is_given_in_its_place():
    changed = OtherInstruction(NotingStream(), {"open": "close", "close": "open"})
    changed.reset("open", [0])
    assert changed.stream.told == {0: "close"}


def test_a_short_history_begins_with_the_oldest_frame_that_is_remembered():
    changed = shorten_history(NotingStream(), frames=2)
    changed.reset("go", [0, 2])
    stream = feed(changed, [1, 2, 3])
    assert [step for *_, step in stream.shown[0]] == [2, 3] and stream.told == {0: "go", 2: "go"}
    changed.reset("again", [2])
    stream = feed(changed, [4])
    assert [step for *_, step in stream.shown[0]] == [3, 4] and stream.shown[2] == [(24, 124, 4)]


def test_a_short_history_gets_the_goals_of_the_whole_episode():
    """Goals are asked for at the same steps, from the same start, and hold until the next one."""
    torch.manual_seed(0)
    config = tiny_config(goal_image=True)
    model, processor = ForesightForActionPrediction(config).eval(), tiny_processor(config)

    class Source:
        needs_progress = True

        def __init__(self):
            self.asked = []

        def draw(self, requests):
            self.asked += [
                (request.steps, request.start.mean(), request.progress > 0) for request in requests
            ]
            return np.stack([one.picture for one in requests])

    asked, actions = [], []
    for wrap in (lambda stream: stream, lambda stream: shorten_history(stream, config.history_length)):
        source = Source()
        stream = wrap(GoalStream(model.stream(processor, num_envs=2, with_progress=True), source, every=3))
        stream.reset(TASKS[0], envs=[0, 1])
        for step in range(5):
            images = {view: np.full((2, 40, 40, 3), 10 * step, np.uint8) for view in config.views}
            state = np.full((2, config.state_dim), step, np.float32)
            chunk = stream.step_chunk(images, state, envs=[0, 1])
        asked.append(source.asked)
        actions.append(chunk.numpy())
    assert asked[0] == asked[1] == 2 * [(0, 0, False)] + 2 * [(3, 0, True)]
    assert actions[0] == pytest.approx(actions[1], abs=1e-5)


def test_a_history_as_long_as_that_of_the_policy_changes_nothing():
    torch.manual_seed(0)
    config = tiny_config()
    model, processor = ForesightForActionPrediction(config).eval(), tiny_processor(config)
    plain, short = model.stream(processor, num_envs=1), model.stream(processor, num_envs=1)
    for stream in (plain, remembering := shorten_history(short, frames=config.history_length)):
        stream.reset(TASKS[0], envs=[0])
    random = np.random.default_rng(0)
    for _ in range(config.history_length + 2):
        images = {view: random.integers(0, 256, (1, 40, 40, 3), dtype=np.uint8) for view in config.views}
        state = random.normal(size=(1, config.state_dim)).astype(np.float32)
        chunks = [stream.step_chunk(images, state, envs=[0]) for stream in (plain, remembering)]
        assert chunks[0].numpy() == pytest.approx(chunks[1].numpy(), abs=1e-5)
