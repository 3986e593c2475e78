"""Tracks without weights and without a GPU: pyramidal Lucas-Kanade, lifted to 3D with the depth.

It works everywhere and suits a fixed camera and textured scenes. Learned trackers follow points through
occlusions; here a lost point is found again only where it was lost, as the background behind a passing arm.

Bouguet, "Pyramidal implementation of the affine Lucas Kanade feature tracker", 2001, as in OpenCV; the
forward-backward check is that of Kalal et al., "Forward-backward error", ICPR 2010.
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from datasets_scripts.tracks.lifting import depth_at, is_same_surface

WINDOW_FRACTION = 21 / 224  # side of the matched window, of the image's shorter side
PYRAMID_LEVELS = 3
STOP = (cv2.TERM_CRITERIA_COUNT + cv2.TERM_CRITERIA_EPS, 30, 0.05)  # px; finer is slower and not better
MAX_ERROR_FRACTION = 1.0 / 224  # forward-backward error above which a point is lost
PATCH_PX = 9  # side of the patch that is kept of a lost point
MAX_CHANGE = 3.0  # mean difference of gray levels between that patch and the same point found again


class LucasKanade:
    """The tracker; it has no weights and no settings."""

    def describe(self) -> dict[str, Any]:
        """Method, license and package."""
        return {
            "model": "pyramidal Lucas-Kanade",
            "license": "apache-2.0",
            "package": f"opencv {cv2.__version__}",
        }

    def track(
        self, video: Sequence[np.ndarray], depth_m: Sequence[np.ndarray], queries: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See [`TrackSource.track`]; frames are read in order, once forwards and once backwards.

        Confidence is 1 where tracking back ends exactly at the start, 0 where a point is lost. A lost point
        keeps its last position; a query without depth is lost at once.
        """
        tracks = _Tracks(len(video), len(queries))
        start = queries[:, 0].astype(np.int64)
        for step, first in ((1, 0), (-1, len(video) - 1)):
            before = None
            tracks.has_patch[:] = False
            for frame in range(first, first + step * len(video), step):
                gray = cv2.cvtColor(np.ascontiguousarray(video[frame]), cv2.COLOR_RGB2GRAY)
                if before is not None:
                    started = np.flatnonzero((start - frame) * step < 0)
                    tracks.advance(started, (frame - step, frame), (before, gray), depth_m[frame])
                here = np.flatnonzero(start == frame)
                z = depth_at(depth_m[frame], queries[here, 1:])
                tracks.points[frame, here] = np.c_[queries[here, 1:], z]
                here = here[z > 0]
                tracks.mark_seen(frame, here, tracks.points[frame, here], np.ones(len(here)))
                before = gray
        return tracks.points, tracks.visible, tracks.confidence


class _Tracks:
    """Tracks of a clip, with a patch of each lost point, to find those that did not move."""

    def __init__(self, n_frames: int, n: int):
        self.points = np.zeros((n_frames, n, 3), np.float32)
        self.visible = np.zeros((n_frames, n), bool)
        self.confidence = np.zeros((n_frames, n), np.float32)
        self.has_patch = np.zeros(n, bool)
        self.patches = np.zeros((n, PATCH_PX, PATCH_PX), np.uint8)

    def mark_seen(self, frame: int, index: np.ndarray, points: np.ndarray, confidence: np.ndarray) -> None:
        """Set visible points `index` of a frame."""
        self.points[frame, index] = points
        self.confidence[frame, index] = confidence
        self.visible[frame, index] = True

    def advance(
        self,
        index: np.ndarray,
        frames: tuple[int, int],
        images: tuple[np.ndarray, np.ndarray],
        depth_m: np.ndarray,
    ) -> None:
        """Track points `index` from one frame (gray image) into the next; lost ones keep their place."""
        (before, frame), (gray_before, gray) = frames, images
        self.points[frame, index] = self.points[before, index]
        seen = self.visible[before, index]
        self._find_lost(frame, index[~seen & self.has_patch[index]], gray, depth_m)
        index = index[seen]
        if not len(index):
            return
        height, width = gray.shape
        side = min(height, width)
        window = max(7, int(side * WINDOW_FRACTION) | 1)
        options = {"winSize": (window, window), "maxLevel": PYRAMID_LEVELS, "criteria": STOP}
        here = self.points[before, index, :2] - 0.5  # OpenCV counts from the center of the first pixel
        there, arrived, _ = cv2.calcOpticalFlowPyrLK(gray_before, gray, here, None, **options)
        back, returned, _ = cv2.calcOpticalFlowPyrLK(gray, gray_before, there, None, **options)
        error = np.linalg.norm(back - here, axis=-1)
        limit = MAX_ERROR_FRACTION * side
        there += 0.5
        inside = ((there >= 0) & (there < [width, height])).all(axis=-1)
        z_before = self.points[before, index, 2]
        z = depth_at(depth_m, there, z_before)
        good = (arrived[:, 0] > 0) & (returned[:, 0] > 0) & (error <= limit) & inside
        good &= is_same_surface(z, z_before)
        lost = index[~good]
        self.patches[lost] = _cut_patches(gray_before, here[~good] + 0.5)
        self.has_patch[lost] = True
        index = index[good]
        self.mark_seen(frame, index, np.c_[there[good], z[good]], 1 - error[good] / limit)

    def _find_lost(self, frame: int, index: np.ndarray, gray: np.ndarray, depth_m: np.ndarray) -> None:
        """Mark lost points as seen where their last place looks as before, in the image and in depth."""
        place = self.points[frame, index]
        z = depth_at(depth_m, place[:, :2], place[:, 2])
        same = is_same_surface(z, place[:, 2])
        index, place, z = index[same], place[same], z[same]
        change = _cut_patches(gray, place[:, :2]).astype(np.float32) - self.patches[index]
        change -= change.mean(axis=(1, 2), keepdims=True)  # the light may have changed
        likeness = 1 - np.abs(change).mean(axis=(1, 2)) / MAX_CHANGE
        again = likeness > 0
        self.mark_seen(frame, index[again], np.c_[place[again, :2], z[again]], likeness[again])


def _cut_patches(gray: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Patches around places `(m, 2)`: `(m, 9, 9)` uint8; the image's border is repeated."""
    half = PATCH_PX // 2
    padded = np.pad(gray, half, mode="edge")
    column, row = np.clip(place.astype(np.int64), 0, np.array(gray.shape[::-1]) - 1).T
    return np.lib.stride_tricks.sliding_window_view(padded, (PATCH_PX, PATCH_PX))[row, column]
