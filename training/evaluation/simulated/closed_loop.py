"""Closed loop: one policy, several simulators side by side, one forward pass per control step.

As GR-MG controls: every observation enters a window of at most T frames that starts empty with the
instruction, style z = 0, and the chunk of the newest frame counts.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from goal_images.control import GoalStream
from modeling_foresight.streaming import ForesightStream
from training.evaluation.simulated.simulation_pool import WorkerPool

__all__ = ["Episode", "Timing", "run_episodes"]


@dataclasses.dataclass
class Episode:
    """One trial.

    Attributes:
        task, seed: Task of the simulator and start.
        following (`tuple[str, ...]`): Tasks that follow without a reset, each once the one before is solved:
            the rest of a CALVIN chain.
        solved (`int`): Tasks solved in a row.
        success (`bool`): Whether the last task tried was solved at any simulation step (LeRobot's rule).
        steps, simulation_steps (`int`): Control steps, one action each, and those of the simulation.
        failed_at (`int`, *optional*): Of a filmed failure, the number of actions after which the progress
            that the policy predicts was highest: from then on it came no nearer to its goal, as it sees it.
            All of them if the stream predicts no progress.
        frames (`list`): Pictures of the first view before every step and after the last one, `(H, W, 3)`
            uint8, if they were asked for.
        actions (`list`): The actions, `(A,)` float32.
        progress (`list`): The progress that the policy predicted before each of them, if it did.
    """

    task: str
    seed: int
    following: tuple[str, ...] = ()
    solved: int = 0
    success: bool = False
    steps: int = 0
    simulation_steps: int = 0
    failed_at: int | None = None
    frames: list[np.ndarray] = dataclasses.field(default_factory=list, repr=False)
    actions: list[np.ndarray] = dataclasses.field(default_factory=list, repr=False)
    progress: list[float] = dataclasses.field(default_factory=list, repr=False)

    def find_failure(self) -> int | None:
        """The step at which a failure that was filmed failed, for `failed_at`."""
        if self.success:
            return None
        return int(np.argmax(self.progress)) if self.progress else self.steps


@dataclasses.dataclass
class Timing:
    """Seconds of each forward pass (`policy`) and of each control step with simulation (`step`).

    `goal` has the seconds of each wait for goal images, which are part of these.
    """

    policy: list[float] = dataclasses.field(default_factory=list)
    step: list[float] = dataclasses.field(default_factory=list)
    goal: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Slot:
    """A busy simulator and its task: the last answer (see `WorkerPool.receive`), and the actions planned."""

    episode: Episode
    task: str
    seen: Mapping | None = None
    steps: int = 0
    planned: deque = dataclasses.field(default_factory=deque)

    def count_step(self, action: np.ndarray, stream: ForesightStream | GoalStream, worker: int) -> None:
        """Notes an action, and the progress that the stream predicted before it, if it does."""
        self.steps += 1
        self.episode.steps += 1
        self.episode.actions.append(action)
        if getattr(stream, "with_progress", False):
            self.episode.progress.append(float(stream.progress[worker]))


def run_episodes(
    stream: ForesightStream | GoalStream,
    pool: WorkerPool,
    trials: Sequence[tuple],
    stride: int,
    max_steps: Mapping[str, int],
    execute_steps: int = 1,
    film: Collection[tuple[str, int]] = (),
    on_done: Callable[[Episode], None] | None = None,
) -> tuple[list[Episode], Timing]:
    """Runs a policy from given starts. What happens in a trial does not depend on the others.

    Args:
        stream (`ForesightStream` or `GoalStream`): Acts; one robot for each simulator.
        pool (`WorkerPool`): Renders the policy's views.
        trials (`Sequence[tuple]`): Task and seed of each episode; for a `CalvinPool` also the tasks that
            follow in the same scene.
        stride (`int`): Simulation steps per control step.
        max_steps (`Mapping[str, int]`): Control steps after which a task has failed, by task.
        execute_steps (`int`): Actions of a chunk that are executed before the next chunk is followed; 1 as in
            GR-MG. Every observation enters the window either way.
        film (`Collection`): Trials whose pictures are kept.
        on_done (`Callable`, *optional*): Called with every finished episode, in order of finishing.

    Returns:
        Episodes in the order of `trials`, and durations.

    Raises:
        RuntimeError: If a simulator fails.
    """
    episodes = [Episode(*trial) for trial in trials]
    waiting = deque(episodes)
    slots: dict[int, _Slot] = {}
    timing = Timing()

    def begin(worker: int) -> None:
        slots.pop(worker, None)
        if waiting:
            episode = waiting.popleft()
            slots[worker] = _Slot(episode, episode.task)
            pool.reset(worker, episode.task, episode.seed)

    for worker in range(len(pool)):
        begin(worker)
    while slots:
        started = time.perf_counter()
        for worker, slot in slots.items():
            is_new = slot.seen is None
            slot.seen = pool.receive(worker)
            if is_new:
                stream.reset(slot.seen["instruction"], envs=[worker])
            episode = slot.episode
            episode.success, episode.simulation_steps = slot.seen["success"], slot.seen["simulation_steps"]
            if (episode.task, episode.seed) in film:
                episode.frames.append(slot.seen["images"][stream.model.config.views[0]])
        for worker, slot in list(slots.items()):
            episode = slot.episode
            episode.solved += episode.success
            if episode.success and episode.solved <= len(episode.following):
                slots[worker] = _Slot(episode, episode.following[episode.solved - 1])
                pool.follow(worker, slots[worker].task)
            elif episode.success or slot.steps >= max_steps[slot.task]:
                if on_done is not None:
                    on_done(episode)
                begin(worker)
        ready = {worker: slot for worker, slot in slots.items() if slot.seen is not None}
        if ready:
            asked = time.perf_counter()
            chunks = _act(stream, ready)
            timing.policy.append(time.perf_counter() - asked)
            for slot, chunk in zip(ready.values(), chunks, strict=True):
                if not slot.planned:
                    slot.planned.extend(chunk[:execute_steps])
        for worker, slot in ready.items():
            action = slot.planned.popleft()
            pool.step(worker, action, stride)
            slot.count_step(action, stream, worker)
        timing.step.append(time.perf_counter() - started)
    timing.goal.extend(getattr(stream, "waits_s", ()))
    return episodes, timing


def _act(stream: ForesightStream | GoalStream, ready: dict[int, _Slot]) -> np.ndarray:
    """Action chunks `(robots, K, A)` after the stream has seen what the robots see."""
    seen = [slot.seen for slot in ready.values()]
    images = {view: np.stack([one["images"][view] for one in seen]) for view in seen[0]["images"]}
    state = np.stack([one["state"] for one in seen]) if stream.state_dim else None
    return stream.step_chunk(images, state, envs=list(ready)).numpy()
