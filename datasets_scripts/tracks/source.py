"""The interface of every source of tracks: pixels in, their paths through the clip out."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

__all__ = ["TrackSource"]


class TrackSource(Protocol):
    """Where tracks come from. Opening one may take long; it then serves any number of clips."""

    def describe(self) -> dict[str, Any]:
        """JSON-able facts for the provenance: models, their revisions and licenses, versions of packages."""
        ...

    def track(
        self, video: Sequence[np.ndarray], depth_m: Sequence[np.ndarray], queries: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Follow pixels through a clip, forwards and backwards in time.

        Args:
            video (`Sequence[np.ndarray]`): F frames `(H, W, 3)` uint8 RGB, best read in order.
            depth_m (`Sequence[np.ndarray]`): F frames `(H, W)` float32 meters, 0 where invalid.
            queries (`np.ndarray`): `(n, 3)` float: frame, x, y in pixels counted from the image's outer edge.

        Returns:
            `tuple`: Positions `(F, n, 3)` float32 (x, y in pixels like the queries, z in meters), visibility
            `(F, n)` bool, and confidence `(F, n)` float32 in [0, 1].
        """
        ...
