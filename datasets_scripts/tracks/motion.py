"""Which tracks of a clip move: the camera's motion is estimated and removed, then tracks are classified.

Tracks are `(F, n, 3)`: x and y as image fractions, z in meters; their visibility is `(F, n)` bool. Image
distances are in px at a scale of 224 px, whatever the resolution.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from datasets_scripts.columns import REFERENCE_PX

MOVING_PX, STILL_PX = 4.0, 1.5
MOVING_DEPTH_M, MOVING_DEPTH_FRACTION = 0.05, 0.05
STILL_DEPTH_M, STILL_DEPTH_FRACTION = 0.02, 0.02
SMOOTH_PATH_RATIO = 3.0  # a depth path longer than this many times its range is noise, not motion
MIN_VISIBLE_FRACTION = 0.3
MIN_CONFIDENCE = 0.5  # mean over the frames in which a track is visible
MAX_JUMP_FRACTION = 0.1
MIN_COMMON_TRACKS, MIN_COMMON_FRACTION = 12, 0.3  # visible both in a frame and in its reference
RANSAC_TRACKS = 250  # for the first fit, which all tracks then refine
REFINEMENTS = 3
NEAREST_M = 0.01  # nothing is divided by less
BLOCK_TRACKS = 256  # processed together


@dataclass(frozen=True)
class CameraMotion:
    """Maps from every frame of a clip to its first one.

    Positions are (x z, y z, z), x and y from the center of the image in units of its shorter side. In these,
    any camera motion is one affine map of all that stands still, near or far, whatever the focal length.

    Attributes:
        to_first (`np.ndarray`): `(F, 3, 4)` float64, from a frame's positions to the first frame's.
        size (`np.ndarray`): `(2,)` width and height of the image; the shorter one is 1.
    """

    to_first: np.ndarray
    size: np.ndarray

    def remove(self, points: np.ndarray, visible: np.ndarray) -> np.ndarray:
        """Tracks as the first frame's camera would see them, x and y projected at a track's median depth.

        The median, because that camera may stand beyond the point.
        """
        place = _in_space(points, self.size) @ self.to_first[..., :3].swapaxes(1, 2)
        place += self.to_first[:, None, :, 3]
        seen_at_m = _seen_quantile(points[..., 2], visible | ~visible.any(axis=0), 0.5)
        place[..., :2] /= np.maximum(seen_at_m, NEAREST_M)[:, None] * self.size
        return place


def _in_space(points: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Tracks `(..., 3)` as (x z, y z, z), float64; see [`CameraMotion`]."""
    place = (points[..., :2] - 0.5) * size * points[..., 2:]
    return np.concatenate([place, points[..., 2:]], axis=-1).astype(np.float64)


def camera_shift_px(points: np.ndarray, visible: np.ndarray, height: int, width: int) -> np.ndarray:
    """How far the image as a whole has moved in each frame: `(F,)` px at 224 px.

    The mean shift of the corners and the center under the similarity that most tracks follow (RANSAC).
    """
    scale_px = REFERENCE_PX * np.array([width, height]) / min(height, width)

    def fit(frame: int, reference: int, common: np.ndarray) -> np.ndarray | None:
        here, there = (points[index, common, :2] * scale_px for index in (frame, reference))
        return cv2.estimateAffinePartial2D(here, there, ransacReprojThreshold=STILL_PX)[0]

    similarity = _chain_maps(visible, 2, fit)
    places = np.array([[0, 0], [1, 0], [0, 1], [1, 1], [0.5, 0.5]]) * scale_px
    moved = places @ similarity[:, :2, :2].swapaxes(1, 2) + similarity[:, None, :2, 2]
    return np.linalg.norm(moved - places, axis=-1).mean(axis=1)


def fit_camera_motion(points: np.ndarray, visible: np.ndarray, height: int, width: int) -> CameraMotion:
    """The camera motion that most tracks follow (RANSAC), frame by frame.

    A similarity of the image suits a camera that turns. When it travels, near things pass faster than far
    ones, which the depth of the tracks accounts for.
    """
    size = np.array([width, height]) / min(height, width)

    def fit(frame: int, reference: int, common: np.ndarray) -> np.ndarray | None:
        tracks = np.flatnonzero(common)
        here, there = (_in_space(points[index, tracks], size) for index in (frame, reference))
        few = slice(None, None, -(-len(tracks) // RANSAC_TRACKS))
        tolerance = STILL_PX / REFERENCE_PX
        fitted = cv2.estimateAffine3D(
            here[few].copy(),
            there[few].copy(),
            ransacThreshold=tolerance * np.median(there[:, 2]),
            confidence=0.99,
        )[1]
        for _ in range(REFINEMENTS if fitted is not None else 0):
            off = np.linalg.norm(here @ fitted[:, :3].T + fitted[:, 3] - there, axis=-1)
            agree = off < tolerance * there[:, 2]
            if agree.sum() < MIN_COMMON_TRACKS:
                return None
            known = np.c_[here[agree], np.ones(agree.sum())]
            fitted = np.linalg.lstsq(known, there[agree], rcond=None)[0].T
        return fitted

    return CameraMotion(_chain_maps(visible, 3, fit)[:, :3], size)


def _chain_maps(
    visible: np.ndarray, n: int, fit: Callable[[int, int, np.ndarray], np.ndarray | None]
) -> np.ndarray:
    """Maps of positions in `n` dimensions from every frame to the first one, `(F, n + 1, n + 1)`.

    The reference of a frame is the first one while enough tracks are visible in both, then the last frame for
    which that held, so that errors do not add up where the camera stays.

    Args:
        visible (`np.ndarray`): `(F, tracks)` bool.
        n (`int`): Dimensions of a position.
        fit (`Callable`): From a frame, its reference and the tracks visible in both, `(tracks,)` bool, to the
            `(n, n + 1)` map between them, or `None`.
    """
    maps = np.tile(np.eye(n + 1), (len(visible), 1, 1))
    reference = 0
    for frame in range(1, len(visible)):
        common = visible[reference] & visible[frame]
        if common.sum() < max(MIN_COMMON_TRACKS, MIN_COMMON_FRACTION * visible[reference].sum()):
            reference = frame - 1
            common = visible[reference] & visible[frame]
        fitted = fit(frame, reference, common) if common.sum() >= MIN_COMMON_TRACKS else None
        if fitted is None:  # too few tracks: keep the map of the frame before
            maps[frame] = maps[frame - 1]
        else:
            maps[frame] = maps[reference] @ np.vstack([fitted, maps[0, -1]])
    return maps


def usable_tracks(points: np.ndarray, visible: np.ndarray, steady: np.ndarray | None = None) -> np.ndarray:
    """Tracks visible in 30 % of the frames that move at most 10 % of the image per frame: `(n,)` bool.

    If the camera moves, a track may do so either in the image, like what the camera carries, or while it is
    visible in `steady`, the tracks `(F, n, 3)` without the camera's motion, like the scene.
    """
    largest = np.linalg.norm(np.diff(points[..., :2], axis=0), axis=-1).max(axis=0, initial=0.0)  # (n,)
    if steady is not None:
        steps = np.linalg.norm(np.diff(steady[..., :2], axis=0), axis=-1) * (visible[1:] & visible[:-1])
        largest = np.minimum(largest, steps.max(axis=0, initial=0.0))
    return (visible.mean(axis=0) >= MIN_VISIBLE_FRACTION) & (largest <= MAX_JUMP_FRACTION)


def classify_motion(points: np.ndarray, visible: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moving and still tracks, `(n,)` bool each, from their visible frames without the camera's motion.

    A is the largest distance from the median position at 224-px scale, Z the 5-95 % range of the depth. A
    track moves if A > 4 px, or if Z exceeds 5 cm and 5 % of its depth along a smooth path; it is still if
    A < 1.5 px and Z stays below 2 cm or 2 % of its depth. Tracks in between, or never visible, are neither.
    """
    seen_once = visible.any(axis=0)
    mask = visible | ~seen_once  # tracks that are never visible are ruled out at the end
    center = np.stack([_seen_quantile(points[..., axis], mask, 0.5) for axis in (0, 1)], axis=-1)
    away_px = REFERENCE_PX * (np.linalg.norm(points[..., :2] - center, axis=-1) * mask).max(axis=0)
    near, depth, far = (_seen_quantile(points[..., 2], mask, q) for q in (0.05, 0.5, 0.95))
    depth_range = far - near
    path_length = _path_length(points[..., 2], mask)
    moves_in_depth = depth_range > np.maximum(MOVING_DEPTH_M, MOVING_DEPTH_FRACTION * depth)
    moves_in_depth &= path_length < SMOOTH_PATH_RATIO * depth_range
    moving = (away_px > MOVING_PX) | moves_in_depth
    still = away_px < STILL_PX
    still &= depth_range < np.maximum(STILL_DEPTH_M, STILL_DEPTH_FRACTION * depth)
    return moving & seen_once, still & ~moving & seen_once


def sort_tracks(
    points: np.ndarray,
    visible: np.ndarray,
    confidence: np.ndarray | None = None,
    camera: CameraMotion | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Moving and still tracks among the usable ones, `(n,)` bool each.

    Args:
        points (`np.ndarray`): `(F, n, 3)` float tracks.
        visible (`np.ndarray`): `(F, n)` bool.
        confidence (`np.ndarray`, *optional*): `(F, n)` float in [0, 1]; a track whose mean over its visible
            frames is below 0.5 is not used.
        camera (`CameraMotion`, *optional*): Removed before motion is measured.
    """
    moving, still = np.zeros((2, points.shape[1]), bool)
    for block in split_blocks(np.arange(points.shape[1])):
        path, seen = points[:, block], visible[:, block]
        steady = None if camera is None else camera.remove(path, seen)
        usable = usable_tracks(path, seen, steady)
        if confidence is not None:
            trust = (confidence[:, block] * seen).sum(axis=0) / np.maximum(seen.sum(axis=0), 1)
            usable &= trust >= MIN_CONFIDENCE
        kinds = classify_motion(path if steady is None else steady, seen)
        moving[block], still[block] = (kind & usable for kind in kinds)
    return moving, still


def split_blocks(index: np.ndarray) -> Iterator[np.ndarray]:
    """Parts of at most 256 tracks."""
    yield from np.array_split(index, -(-len(index) // BLOCK_TRACKS)) if len(index) else ()


def _seen_quantile(values: np.ndarray, mask: np.ndarray, quantile: float) -> np.ndarray:
    """Quantile of the unmasked values of each column, linearly interpolated: `(F, n)` -> `(n,)`."""
    # np.nanquantile takes a hundred times longer because it goes column by column.
    ordered = np.sort(np.where(mask, values, np.inf), axis=0)
    place = quantile * (mask.sum(axis=0) - 1)
    below = np.floor(place).astype(np.int64)
    above = np.ceil(place).astype(np.int64)
    low, high = (np.take_along_axis(ordered, row[None], axis=0)[0] for row in (below, above))
    return low + (place - below) * (high - low)


def _path_length(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Sum of absolute steps between successive unmasked values of each column: `(F, n)` -> `(n,)`."""
    # Carry the last seen value through hidden frames, and the first one backwards, so gaps add one step.
    rows = np.where(mask, np.arange(len(values))[:, None], -1)
    last_seen = np.maximum.accumulate(rows, axis=0)
    first_seen = mask.argmax(axis=0)
    filled = np.take_along_axis(values, np.where(last_seen < 0, first_seen, last_seen), axis=0)
    return np.abs(np.diff(filled, axis=0)).sum(axis=0)
