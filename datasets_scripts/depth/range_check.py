"""Whether what a depth model gives can be meters, judged by a whole clip."""

import math

import numpy as np

from datasets_scripts.columns import DEPTH_FLOOR_M, IMPLAUSIBLE_MEDIAN_M, clean_depth
from datasets_scripts.storage.dataset_rows import BrokenEpisodeError

__all__ = ["DepthRange"]

# Models put the sky at 80 m or at 10 km, and it may fill most of a picture outdoors, but not nearly all of
# an episode. In millimeters only what is nearer than 10 cm stays below `IMPLAUSIBLE_MEDIAN_M`.
MOST_FAR = 0.9


class DepthRange:
    """The range of one clip's depth, gathered run by run: single frames may be dark, or show the sky alone.

    Args:
        limit_m (`float`): Farthest depth that is kept, meters.
    """

    def __init__(self, limit_m: float):
        self.limit_m = limit_m
        self._nearest, self._farthest = math.inf, 0.0
        self._n_measured = self._n_far = self._n_kept = 0

    def add(self, depth_m: np.ndarray, valid: np.ndarray) -> None:
        """Add some frames: `(k, H, W)` float32 and bool."""
        measured = depth_m[valid]
        if measured.size:
            self._nearest = min(self._nearest, float(measured.min()))
            self._farthest = max(self._farthest, float(measured.max()))
            self._n_measured += measured.size
            self._n_far += np.count_nonzero(measured > IMPLAUSIBLE_MEDIAN_M)
            self._n_kept += np.count_nonzero(clean_depth(measured, self.limit_m))

    def check(self, source: str, clip: str) -> None:
        """Refuse what was added, if it cannot be meters or if none of it is kept.

        Args:
            source (`str`): Of the depth, for the message.
            clip (`str`): Camera and episode, for the message.

        Raises:
            ValueError: If the depth is that of another unit, which is the same in every episode.
            BrokenEpisodeError: If no pixel has a depth that is kept.
        """
        seen = f"its values are {self._nearest:.3g} to {self._farthest:.4g}"
        if self._n_far > MOST_FAR * self._n_measured:
            raise ValueError(
                f"{source} gives depth of {clip} that is farther than {IMPLAUSIBLE_MEDIAN_M:g} m in "
                f"{self._n_far / self._n_measured:.1%} of the pixels ({seen}); this looks like millimeters: "
                "depth must be in meters"
            )
        if not self._n_kept:
            raise BrokenEpisodeError(
                f"{source} gives no depth of {clip} between {DEPTH_FLOOR_M:g} and {self.limit_m:g} m "
                f"({seen if self._n_measured else 'none is finite and positive'}): depth must be in meters; "
                "where the scene is farther away, raise --depth-max"
            )
