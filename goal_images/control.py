"""A policy's stream of observations that gets a new goal image every 20 control steps."""

import time
from collections.abc import Sequence

import numpy as np

from goal_images.background import GoalWorker
from goal_images.source import REFRESH_STEPS, GoalRequest, GoalSource

__all__ = ["GoalStream"]


class GoalStream:
    """Acts as a `ForesightStream`, and gives it goals.

    ```python
    with GoalWorker(functools.partial(GoalGenerator, "outputs/goal_generator")) as worker:
        stream = GoalStream(model.stream(processor, with_progress=True), worker)
        stream.reset("open the drawer")
        while not done:
            action = stream.step({"main": main_rgb, "wrist": wrist_rgb}, state)
    ```

    The first goal of an instruction is awaited. With a `GoalWorker` later ones are drawn beside the control
    loop, and each holds from the first step at which it is ready. What becomes due meanwhile is asked for
    afterwards in one batch, with the newest pictures. With any other source every goal is awaited, and the
    same observations give the same goals.

    Args:
        stream (`ForesightStream`): Made `with_progress` if the source needs it.
        source (`GoalSource` or `GoalWorker`): Where goals come from.
        every (`int`): Control steps from one goal to the next.

    Attributes:
        model, num_envs, state_dim, with_progress, progress: The stream's.
        waits_s (`list[float]`): Seconds that the control loop has waited for goals, each time it did.

    Raises:
        ValueError: If the source needs the progress, which the stream does not predict.
    """

    def __init__(self, stream, source: GoalSource | GoalWorker, every: int = REFRESH_STEPS):
        if source.needs_progress and not stream.with_progress:
            raise ValueError("This goal source reads the progress: make the stream with_progress=True.")
        self.stream, self.model, self.source, self.every = stream, stream.model, source, every
        self.worker = source if isinstance(source, GoalWorker) else None
        self.num_envs, self.state_dim, self.waits_s = stream.num_envs, stream.state_dim, []
        robots = range(stream.num_envs)
        self._instructions = ["" for _ in robots]
        self._starts: list = [None for _ in robots]
        self._steps, self._episodes = [0 for _ in robots], [0 for _ in robots]
        self._next = [0 for _ in robots]  # steps at which goals are due
        self._has_goal = [False for _ in robots]
        self._due: dict[int, GoalRequest] = {}
        self._asked: dict[int, int] = {}  # robots whose goals are being drawn -> their episodes

    @property
    def with_progress(self) -> bool:
        """Whether the stream predicts progress."""
        return self.stream.with_progress

    @property
    def progress(self):
        """What the stream predicted at the newest step of each robot."""
        return self.stream.progress

    @property
    def is_outdated(self) -> bool:
        """See `ForesightStream.is_outdated`."""
        return self.stream.is_outdated

    def reset(self, instruction: str | Sequence[str], envs: Sequence[int] | None = None) -> None:
        """Starts an instruction, see `ForesightStream.reset`."""
        self.stream.reset(instruction, envs)
        robots = self._list_robots(envs)
        texts = [instruction] * len(robots) if isinstance(instruction, str) else instruction
        for robot, text in zip(robots, texts, strict=True):
            self._instructions[robot], self._starts[robot], self._has_goal[robot] = text, None, False
            self._steps[robot] = self._next[robot] = 0
            self._episodes[robot] += 1
            self._due.pop(robot, None)

    def step(self, images: dict, state=None, envs: Sequence[int] | None = None, **options):
        """As [`step_chunk`], but returns the next action alone: `(A,)` or `(robots, A)`."""
        return self.step_chunk(images, state, envs, **options)[..., 0, :]

    def step_chunk(
        self, images: dict, state=None, envs: Sequence[int] | None = None, again: bool = False, **options
    ):
        """See `RobotStream.step_chunk`; without the first view, a goal that is due has to wait for it.

        Raises:
            RuntimeError: If the source failed; says why.
        """
        robots = self._list_robots(envs)
        self._note_due(images, robots, again)
        begun = time.perf_counter()
        if self._draw_awaited() if self.worker is None else self._draw_beside(robots):
            self.waits_s.append(time.perf_counter() - begun)
        return self.stream.step_chunk(images, state, envs, again=again, **options)

    def _list_robots(self, envs: Sequence[int] | None) -> list[int]:
        if envs is None:
            return list(range(self.num_envs))
        robots = np.asarray(envs)  # numbers, or one boolean for each
        return (np.flatnonzero(robots) if robots.dtype == bool else robots).tolist()

    def _note_due(self, images: dict, robots: list[int], again: bool) -> None:
        """Counts a step of these robots, and notes the goals that are due."""
        # With `again`, nothing has happened since the last step.
        acting = [(place, robot) for place, robot in enumerate(robots) if not (again and self._steps[robot])]
        view = self.model.config.views[0]
        due = [
            (place, robot)
            for place, robot in acting
            # Those that wait for the worker get a newer picture.
            if self._steps[robot] >= self._next[robot] or robot in self._due
        ]
        for place, robot in due if view in images else ():
            picture = read_picture(images[view], None if self.stream.single else place)
            steps, progress = self._steps[robot], None
            if self._starts[robot] is None:
                self._starts[robot] = picture
            if self.stream.with_progress:  # at first, the stream's is that of the last instruction
                progress = float(self.stream.progress[robot]) if steps else 0.0
            text = self._instructions[robot]
            self._due[robot] = GoalRequest(picture, self._starts[robot], text, steps, progress)
            self._next[robot] = steps + self.every
        for _, robot in acting:
            self._steps[robot] += 1

    def _draw_awaited(self) -> bool:
        """Draws the goals that are due; says whether there were any."""
        if not self._due:
            return False
        due, self._due = self._due, {}
        self._set_goals(list(due), self.source.draw(list(due.values())))
        return True

    def _draw_beside(self, robots: list[int]) -> bool:
        """Takes and asks for goals, and waits for robots without any; says whether it waited."""
        self._exchange()
        waited = False
        while self.worker.busy and not all(self._has_goal[robot] for robot in robots):
            self._receive()
            self._exchange()
            waited = True
        return waited

    def _exchange(self) -> None:
        if self.worker.is_ready():
            self._receive()
        if self._due and not self.worker.busy:
            due, self._due = self._due, {}
            self._asked = {robot: self._episodes[robot] for robot in due}
            self.worker.send(list(due.values()))

    def _receive(self) -> None:
        """Waits for the goals that were asked for; those of episodes that have ended are dropped."""
        goals = self.worker.receive()
        current = [self._episodes[robot] == episode for robot, episode in self._asked.items()]
        robots = [robot for robot, is_current in zip(self._asked, current, strict=True) if is_current]
        self._set_goals(robots, goals[current])

    def _set_goals(self, robots: list[int], goals: np.ndarray) -> None:
        if robots:
            self.stream.set_goal(goals[0] if self.stream.single else goals, envs=robots)
        for robot in robots:
            self._has_goal[robot] = True


def read_picture(images, place: int | None) -> np.ndarray:
    """A copy of one robot's picture as uint8 `(H, W, 3)`.

    Args:
        images (array or tensor): uint8 `(H, W, 3)` or `(3, H, W)`, with an axis for the robots unless `place`
            is `None`.
        place (`int`, *optional*): Position of the robot.
    """
    picture = images if place is None else images[place]
    picture = np.array(picture.cpu() if hasattr(picture, "cpu") else picture)
    return np.ascontiguousarray(picture if picture.shape[-1] == 3 else picture.transpose(1, 2, 0))
