"""Tracks without weights and without a GPU: pyramidal Lucas-Kanade, lifted to 3D with the depth.

Good enough for a fixed camera and textured scenes, and the source that works everywhere. Learned trackers
follow points through occlusions; here a point that is lost is seen again only where it was lost, which is
what happens to the background when an arm passes.

Bouguet, "Pyramidal implementation of the affine Lucas Kanade feature tracker", 2001, as in OpenCV; the
forward-backward check is that of Kalal et al., "Forward-backward error", ICPR 2010.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from datasets_scripts.tracks.lifting import depth_at, is_same_surface

WINDOW_FRACTION = 21 / 224  # side of the matched window, of the image's shorter side
PYRAMID_LEVELS = 3
STOP = (cv2.TERM_CRITERIA_COUNT + cv2.TERM_CRITERIA_EPS, 30, 0.05)  # px; finer costs time and gains nothing
MAX_ERROR_FRACTION = 1.0 / 224  # a point that does not come back to within this was lost
PATCH_PX = 9  # side of what is remembered of a lost point
MAX_CHANGE = 3.0  # mean difference of grey levels between it and the same point seen again


class LucasKanade:
    """The tracker; it has no weights and nothing to set."""

    def describe(self) -> dict[str, Any]:
        """Method, package and licence."""
        return {
            "model": "pyramidal Lucas-Kanade",
            "licence": "apache-2.0",
            "package": f"opencv {cv2.__version__}",
        }

    def track(
        self, video: Sequence[np.ndarray], depth_m: Sequence[np.ndarray], queries: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As [`TrackSource.track`]: frames are asked for in order, once forwards and once backwards.

        Confidence is 1 where a point came back to its start exactly, 0 where it was lost. A lost point keeps
        its last position, and a query without depth is lost at once.
        """
        shape = (len(video), len(queries))
        found = _Tracks(np.zeros((*shape, 3), np.float32), np.zeros(shape, bool), np.zeros(shape, np.float32))
        start = queries[:, 0].astype(np.int64)
        for step, first in ((1, 0), (-1, len(video) - 1)):
            before = None
            lost = _LostPoints(len(queries))
            for frame in range(first, first + step * len(video), step):
                now = cv2.cvtColor(np.ascontiguousarray(video[frame]), cv2.COLOR_RGB2GRAY)
                if before is not None:
                    going = np.flatnonzero((start - frame) * step < 0)
                    _advance(found, lost, going, frame - step, frame, before, now, depth_m[frame])
                here = np.flatnonzero(start == frame)
                z = depth_at(depth_m[frame], queries[here, 1:])
                found.points[frame, here] = np.c_[queries[here, 1:], z]
                found.visible[frame, here] = found.confidence[frame, here] = z > 0
                before = now
        return found.points, found.visible, found.confidence


@dataclass
class _Tracks:
    points: np.ndarray
    visible: np.ndarray
    confidence: np.ndarray


class _LostPoints:
    """What lost points looked like, so that those which did not move are seen again.

    Args:
        n (`int`): Points, lost or not.
    """

    def __init__(self, n: int):
        self.known = np.zeros(n, bool)
        self._looks = np.zeros((n, PATCH_PX, PATCH_PX), np.uint8)

    def remember(self, index: np.ndarray, grey: np.ndarray, place: np.ndarray) -> None:
        """Points `index` were last seen at `place` `(m, 2)` of this image."""
        self._looks[index] = _patches(grey, place)
        self.known[index] = True

    def likeness(self, index: np.ndarray, grey: np.ndarray, place: np.ndarray) -> np.ndarray:
        """How much the places look as the points did: `(m,)`, 1 for the same, 0 or less for others."""
        change = _patches(grey, place).astype(np.float32) - self._looks[index]
        change -= change.mean(axis=(1, 2), keepdims=True)  # a shadow is no other point
        return 1 - np.abs(change).mean(axis=(1, 2)) / MAX_CHANGE


def _patches(grey: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Surroundings of places `(m, 2)`: `(m, 9, 9)` uint8; the image's border is repeated."""
    half = PATCH_PX // 2
    padded = np.pad(grey, half, mode="edge")
    column, row = np.clip(place.astype(np.int64), 0, np.array(grey.shape[::-1]) - 1).T
    return np.lib.stride_tricks.sliding_window_view(padded, (PATCH_PX, PATCH_PX))[row, column]


def _advance(
    found: _Tracks,
    lost: _LostPoints,
    index: np.ndarray,
    before: int,
    frame: int,
    grey_before: np.ndarray,
    grey: np.ndarray,
    depth_m: np.ndarray,
) -> None:
    """One frame further, for the tracks `index`; those that are lost stay where they were."""
    found.points[frame, index] = found.points[before, index]
    seen = found.visible[before, index]
    _see_again(found, lost, index[~seen & lost.known[index]], frame, grey, depth_m)
    index = index[seen]
    if not len(index):
        return
    height, width = grey.shape
    side = min(height, width)
    window = max(7, int(side * WINDOW_FRACTION) | 1)
    options = {"winSize": (window, window), "maxLevel": PYRAMID_LEVELS, "criteria": STOP}
    here = found.points[before, index, :2] - 0.5  # OpenCV counts from the centre of the first pixel
    there, arrived, _ = cv2.calcOpticalFlowPyrLK(grey_before, grey, here, None, **options)
    back, returned, _ = cv2.calcOpticalFlowPyrLK(grey, grey_before, there, None, **options)
    error = np.linalg.norm(back - here, axis=-1)
    limit = MAX_ERROR_FRACTION * side
    there += 0.5
    inside = ((there >= 0) & (there < [width, height])).all(axis=-1)
    z_before = found.points[before, index, 2]
    z = depth_at(depth_m, there, z_before)
    good = (arrived[:, 0] > 0) & (returned[:, 0] > 0) & (error <= limit) & inside
    good &= is_same_surface(z, z_before)
    lost.remember(index[~good], grey_before, here[~good] + 0.5)
    index = index[good]
    found.points[frame, index] = np.c_[there[good], z[good]]
    found.visible[frame, index] = True
    found.confidence[frame, index] = 1 - error[good] / limit


def _see_again(
    found: _Tracks, lost: _LostPoints, index: np.ndarray, frame: int, grey: np.ndarray, depth_m: np.ndarray
) -> None:
    """Lost points whose last place looks as it did, in the image and in depth, are visible there again."""
    place = found.points[frame, index]
    z = depth_at(depth_m, place[:, :2], place[:, 2])
    same = is_same_surface(z, place[:, 2])
    index, place, z = index[same], place[same], z[same]
    likeness = lost.likeness(index, grey, place[:, :2])
    again = likeness > 0
    found.points[frame, index[again], 2] = z[again]
    found.visible[frame, index[again]] = True
    found.confidence[frame, index[again]] = likeness[again]
