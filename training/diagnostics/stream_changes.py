"""Streams whose robots see, hear or remember something else than what is there.

Each acts in place of the `ForesightStream` that it is given; `run_episodes` does not notice the difference.
"""

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

from goal_images.control import GoalStream

__all__ = ["ChangedStream", "FrozenCamera", "OtherInstruction", "SwappedViews", "shorten_history"]


class ChangedStream:
    """Hands everything on unchanged.

    Args:
        stream (`ForesightStream` or `GoalStream`): What acts, for several robots.
    """

    def __init__(self, stream):
        self.stream, self.model, self.state_dim = stream, stream.model, stream.state_dim

    def reset(self, instruction: str, envs: Sequence[int]) -> None:
        """Starts an instruction."""
        self.stream.reset(instruction, envs=envs)

    def step_chunk(self, images: Mapping, state, envs: Sequence[int]):
        """Action chunks of these robots, see `RobotStream.step_chunk`."""
        return self.stream.step_chunk(images, state, envs=envs)


class FrozenCamera(ChangedStream):
    """The images of an episode's first step are shown at every step; the state is the present one."""

    def __init__(self, stream):
        super().__init__(stream)
        self._first: dict[int, dict[str, np.ndarray]] = {}

    def reset(self, instruction: str, envs: Sequence[int]) -> None:
        """Starts an instruction and forgets the images."""
        super().reset(instruction, envs)
        for env in envs:
            self._first.pop(env, None)

    def step_chunk(self, images: Mapping, state, envs: Sequence[int]):
        """Action chunks for the first images."""
        for i, env in enumerate(envs):
            self._first.setdefault(env, {view: frames[i] for view, frames in images.items()})
        frozen = {view: np.stack([self._first[env][view] for env in envs]) for view in images}
        return super().step_chunk(frozen, state, envs)


class SwappedViews(ChangedStream):
    """Every view shows what the camera after it sees, and the last one what the first sees."""

    def step_chunk(self, images: Mapping, state, envs: Sequence[int]):
        """Action chunks for the images of the wrong cameras."""
        views = list(images)
        moved = dict(zip(views, views[1:] + views[:1], strict=True))
        return super().step_chunk({view: images[moved[view]] for view in views}, state, envs)


class OtherInstruction(ChangedStream):
    """An instruction is replaced by another one.

    Args:
        stream (`ForesightStream` or `GoalStream`): What acts.
        replaced (`Mapping[str, str]`): Instruction -> the one that the policy gets.
    """

    def __init__(self, stream, replaced: Mapping[str, str]):
        super().__init__(stream)
        self.replaced = replaced

    def reset(self, instruction: str, envs: Sequence[int]) -> None:
        """Starts the other instruction."""
        super().reset(self.replaced[instruction], envs)


def shorten_history(stream, frames: int):
    """The stream with a [`ShortHistory`]; a `GoalStream` draws its goals as for the whole episode."""
    if not isinstance(stream, GoalStream):
        return ShortHistory(stream, frames)
    stream.stream = ShortHistory(stream.stream, frames)
    return stream


class ShortHistory(ChangedStream):
    """The policy remembers the last `frames` steps, as if the episode had begun with the oldest of them.

    Args:
        stream (`ForesightStream`): What acts, for several robots.
        frames (`int`): What is remembered, the present one included.
    """

    def __init__(self, stream, frames: int):
        super().__init__(stream)
        self.frames = frames
        self._seen: dict[int, tuple[str, deque]] = {}
        self._goals: dict[int, np.ndarray] = {}

    def __getattr__(self, name: str):
        return getattr(self.stream, name)  # what a `GoalStream` asks of its stream

    def reset(self, instruction: str | Sequence[str], envs: Sequence[int]) -> None:
        """Starts an instruction without any step."""
        super().reset(instruction, envs)
        texts = [instruction] * len(envs) if isinstance(instruction, str) else instruction
        for env, text in zip(envs, texts, strict=True):
            self._seen[env] = text, deque(maxlen=self.frames)
            self._goals.pop(env, None)

    def set_goal(self, images: np.ndarray, envs: Sequence[int]) -> None:
        """See `ForesightStream.set_goal`."""
        self._goals |= dict(zip(envs, images, strict=True))

    def step_chunk(self, images: Mapping, state, envs: Sequence[int], again: bool = False):
        """Action chunks from windows of at most `frames` frames."""
        for i, env in enumerate(envs):
            pictures = {view: frames[i] for view, frames in images.items()}
            remembered = self._seen[env][1]
            if again and remembered:
                remembered.pop()
            remembered.append((pictures, None if state is None else state[i]))
        for env in envs:
            self.stream.reset(self._seen[env][0], envs=[env])
            if env in self._goals:
                self.stream.set_goal(self._goals[env][None], envs=[env])
        for age in range(self.frames - 1, -1, -1):  # the newest step, which all of them have, comes last
            older = [env for env in envs if len(self._seen[env][1]) > age]
            if not older:
                continue
            steps = [self._seen[env][1][-1 - age] for env in older]
            shown = {view: np.stack([pictures[view] for pictures, _ in steps]) for view in images}
            known = None if state is None else np.stack([row for _, row in steps])
            chunks = self.stream.step_chunk(shown, known, envs=older)
        return chunks
