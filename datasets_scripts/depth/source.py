"""The interface of every source of depth: frames in, metric depth out, in runs that fit into memory."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

__all__ = ["DepthClip", "DepthSource"]


@dataclass
class DepthClip:
    """Depth of one clip, made while it is read; read it once.

    Attributes:
        runs (`Iterable[tuple[np.ndarray, np.ndarray]]`): `(meters, valid)` of successive frames, until all
            are done: `(k, H, W)` float32 along the optical axis and `(k, H, W)` bool, at the frames'
            resolution.
        facts (`dict[str, Any]`): JSON-able: alignment, its error, whether a fallback was taken. Complete once
            `runs` is exhausted.
    """

    runs: Iterable[tuple[np.ndarray, np.ndarray]]
    facts: dict[str, Any] = field(default_factory=dict)


class DepthSource(Protocol):
    """Where depth comes from. Opening one may take long; it then serves any number of clips."""

    def describe(self) -> dict[str, Any]:
        """JSON-able facts for the provenance: models, their revisions and licenses, versions of packages."""
        ...

    def estimate(self, frames: Sequence[np.ndarray], fps: float) -> DepthClip:
        """Metric depth of a clip that has no cuts and one camera.

        Args:
            frames (`Sequence[np.ndarray]`): F frames `(H, W, 3)` uint8 RGB, which may be decoded on demand
                and exceed memory; best read in order. A source may read them from another thread until
                `runs` is exhausted or closed.
            fps (`float`): Frames per second.
        """
        ...
