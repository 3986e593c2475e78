"""Goal images from recorded demonstrations of the same instruction."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from datasets_scripts.columns import find_image_key, list_cameras
from datasets_scripts.storage.dataset_rows import DatasetRows
from datasets_scripts.storage.videos.frame_decoding import FrameDecoder
from goal_images.source import GoalRequest

__all__ = ["GOAL_AHEAD_STEPS", "RecordedGoals"]

# What GR-MG's generator draws on average. Until the next refresh the goal is then 21 to 2 steps ahead, within
# the 1 to 25 steps of the policy's training.
GOAL_AHEAD_STEPS = 21
THUMBNAIL_PX = 16


class RecordedGoals:
    """The frame of a demonstration 21 control steps after the one that corresponds to now.

    The demonstration is the one of the same instruction whose first picture is most like the robot's first
    one (mean absolute difference at 16 px). The frame that corresponds to now is the one at the progress that
    the policy predicts; without prediction, the one as many control steps after the demonstration's start. At
    the end, the goal is the last frame.

    Args:
        dataset (`str` or `Path`): Folder or Hub id.
        control_hz (`float`): Control steps per second.
        camera (`str`): The dataset's camera of the policy's first view.

    Raises:
        ValueError: If the dataset or the camera does not exist; names it.
    """

    needs_progress = False

    def __init__(self, dataset: str | Path, control_hz: float, camera: str = "main"):
        self.rows = DatasetRows(dataset)
        key = find_image_key(self.rows.features, camera)
        if key is None:
            raise ValueError(
                f"goal dataset {dataset} has no camera {camera!r}: name the one of the policy's first view "
                f"with --goal_camera, among {list_cameras(self.rows.features)}"
            )
        self.rows_per_step = self.rows.fps / control_hz
        self._decoder = FrameDecoder(self.rows, key)
        self._starts: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # by instruction: episodes, thumbnails

    def draw(self, requests: Sequence[GoalRequest]) -> np.ndarray:
        """Goals `(robots, H, W, 3)` uint8 RGB, see `GoalSource`.

        Raises:
            ValueError: If there is no demonstration of an instruction, or it cannot be read; names it.
        """
        return np.stack([self._read(self.choose_row(request)) for request in requests])

    def choose_row(self, request: GoalRequest) -> int:
        """Global frame number of a goal."""
        episodes, thumbnails = self._find_starts(request.instruction)
        apart = np.abs(thumbnails - make_thumbnail(request.start)).mean(axis=(1, 2, 3))
        episode = episodes[apart.argmin()]
        span = self.rows.rows_of(episode)
        first, last = span.start, span.stop - 1
        passed = request.steps * self.rows_per_step
        if request.progress is not None:
            passed = request.progress * (last - first)
        return min(first + round(passed + GOAL_AHEAD_STEPS * self.rows_per_step), last)

    def _find_starts(self, instruction: str) -> tuple[np.ndarray, np.ndarray]:
        """Episodes of an instruction, and thumbnails `(n, 16, 16, 3)` of their first pictures."""
        if instruction not in self._starts:
            wanted = [number for number, text in self.rows.instructions.items() if text == instruction]
            numbers = self.rows.column("task_index").read(range(len(self.rows)))[self.rows.episode_starts]
            episodes = np.flatnonzero(np.isin(numbers, wanted))
            if not len(episodes):
                raise ValueError(
                    f"goal dataset {self.rows.name} has no demonstration of {instruction!r}; it has "
                    f"{len(self.rows.tasks)} instructions such as {self.rows.tasks[:3]}"
                )
            firsts = [self._read(int(self.rows.episode_starts[episode])) for episode in episodes]
            self._starts[instruction] = episodes, np.stack([make_thumbnail(first) for first in firsts])
        return self._starts[instruction]

    def _read(self, row: int) -> np.ndarray:
        return self._decoder.decode(range(row, row + 1))[0].transpose(1, 2, 0)


def make_thumbnail(picture: np.ndarray) -> np.ndarray:
    """float32 `(16, 16, 3)`: means over the areas of a picture."""
    small = cv2.resize(
        np.ascontiguousarray(picture), (THUMBNAIL_PX, THUMBNAIL_PX), interpolation=cv2.INTER_AREA
    )
    return small.astype(np.float32)
