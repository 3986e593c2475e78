"""Depth of tracked pixels: past edges, and through occlusions."""

from collections.abc import Sequence

import cv2
import numpy as np

from datasets_scripts.columns import DEPTH_FLOOR_M

# How much nearer or farther a point may be one frame later; beyond that, it is another surface.
DEPTH_JUMP_M, DEPTH_JUMP_FRACTION = 0.04, 0.04


def depth_at(depth_m: np.ndarray, place: np.ndarray, expected_m: np.ndarray | None = None) -> np.ndarray:
    """Depth of places in a map.

    Of the 3x3 pixels around a place, the one nearest to the expected depth counts, so that a point on an edge
    does not jump from the object to what lies behind it.

    Args:
        depth_m (`np.ndarray`): `(H, W)` meters, 0 where invalid.
        place (`np.ndarray`): `(n, 2)` x, y in pixels counted from the image's outer edge.
        expected_m (`np.ndarray`, *optional*): `(n,)` meters; without it, or where it is 0, the place's own
            pixel counts.

    Returns:
        `np.ndarray`: `(n,)` float32 meters, 0 where there is none.
    """
    height, width = depth_m.shape
    column = np.clip(place[:, 0].astype(np.int64), 0, width - 1)
    row = np.clip(place[:, 1].astype(np.int64), 0, height - 1)
    own = np.where(depth_m[row, column] > DEPTH_FLOOR_M, depth_m[row, column], np.float32(0))
    if expected_m is None:
        return own
    best = np.zeros(len(place), np.float32)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            value = depth_m[np.clip(row + down, 0, height - 1), np.clip(column + right, 0, width - 1)]
            nearer = np.abs(value - expected_m) < np.abs(best - expected_m)
            best = np.where((value > DEPTH_FLOOR_M) & nearer, value, best)
    return np.where(expected_m > 0, best, own)


def is_same_surface(depth_m: np.ndarray, before_m: np.ndarray, n_frames: np.ndarray | int = 1) -> np.ndarray:
    """Whether depths `(n,)` may belong to the same points as `n_frames` before."""
    return np.abs(depth_m - before_m) <= n_frames * np.maximum(DEPTH_JUMP_M, DEPTH_JUMP_FRACTION * before_m)


def lift_tracks(
    places: np.ndarray, visible: np.ndarray, depth_m: Sequence[np.ndarray], start: np.ndarray
) -> np.ndarray:
    """Depth along 2D tracks.

    It is read where a track is visible and the map is within 4 cm or 4 % per frame of the track's last known
    depth. Everywhere else it is interpolated in time, and held at the ends.

    Args:
        places (`np.ndarray`): `(F, n, 2)` x, y in pixels counted from the image's outer edge.
        visible (`np.ndarray`): `(F, n)` bool.
        depth_m (`Sequence[np.ndarray]`): F maps `(H, W)` meters, 0 where invalid; read in order, once
            forwards and once backwards.
        start (`np.ndarray`): `(n,)` int, frame of a track's query.

    Returns:
        `np.ndarray`: `(F, n)` float32 meters; 0 for a track without any depth.
    """
    n_frames = len(places)
    z = np.zeros(visible.shape, np.float32)
    for step, first in ((1, 0), (-1, n_frames - 1)):
        expected = np.zeros(len(start), np.float32)
        hidden = np.ones(len(start), np.int64)  # frames since the depth was known, this one included
        for frame in range(first, first + step * n_frames, step):
            index = np.flatnonzero(((start - frame) * step <= 0) & visible[frame])
            near = depth_at(depth_m[frame], places[frame, index], expected[index])
            unknown = expected[index] == 0
            agrees = (near > 0) & (unknown | is_same_surface(near, expected[index], hidden[index]))
            z[frame, index[agrees]] = expected[index[agrees]] = near[agrees]
            hidden += 1
            hidden[index[agrees]] = 1
    for track in np.flatnonzero((z > 0).any(axis=0)):
        known = np.flatnonzero(z[:, track])
        z[:, track] = np.interp(np.arange(n_frames), known, z[known, track])
    return z


def fill_holes(depth_m: np.ndarray) -> np.ndarray:
    """Give every invalid pixel of `(F, H, W)` depth in meters (0 where invalid) that of a valid one near it.

    A frame without any depth takes that of the nearest frame with some, or 1 m if there is none.
    """
    filled = depth_m.copy()
    known = (depth_m > 0).any(axis=(1, 2))
    frames = np.flatnonzero(known)
    for frame in frames:
        holes = depth_m[frame] <= 0
        if holes.any():
            _, label = cv2.distanceTransformWithLabels(
                holes.astype(np.uint8), cv2.DIST_L2, 3, labelType=cv2.DIST_LABEL_PIXEL
            )
            of_label = np.zeros(label.max() + 1, np.float32)
            of_label[label[~holes]] = depth_m[frame][~holes]
            filled[frame] = of_label[label]
    for frame in np.flatnonzero(~known):
        filled[frame] = filled[frames[np.abs(frames - frame).argmin()]] if len(frames) else 1.0
    return filled
