"""Which tracks of a clip to keep: about 1250 of them, a quarter of them moving (3D Foresight, training data).

The ratio is the paper's; the motion criterion and the spreading are ours. Exact tracks of a simulator and
estimated tracks of real video are chosen alike, from the arrays alone.

Tracks are `(F, n, 3)`: x and y as image fractions, z in meters; their visibility is `(F, n)` bool. Image
distances are in px at a scale of 224 px, whatever the resolution. A clip may have tens of thousands of
frames: arrays are processed in blocks, and tracks that cannot be chosen are dropped after each round.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

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
CAMERA_SHIFT_PX = 2.0  # median over the clip above which its camera is moving
MIN_COMMON_TRACKS, MIN_COMMON_FRACTION = 12, 0.3  # visible both in a frame and in its reference
RANSAC_TRACKS = 250  # for the first fit, which all tracks then refine
REFINEMENTS = 3
NEAREST_M = 0.01  # nothing is divided by less
START_CELLS = 31
GRID_SIDE = 40
N_RANDOM = 800
RESEED_ROUNDS = 3
RESEED_NOISE = 0.05  # of the image
MIN_TRACKS = 256
DIRECTION_WEIGHT = 0.25  # of a path, relative to its place in the image, when moving tracks are spread
BLOCK_TRACKS = 256  # processed together


@dataclass(frozen=True)
class TrackChoice:
    """Tracks chosen from the candidates of one clip.

    Attributes:
        index (`np.ndarray`): `(k,)` int64, candidates kept, in ascending order.
        moving (`np.ndarray`): `(k,)` bool, which of them move.
        has_motion (`bool`): False for a clip in which nothing moves.
        moving_camera (`bool`): Whether the camera's motion was removed before motion was measured.
    """

    index: np.ndarray
    moving: np.ndarray
    has_motion: bool
    moving_camera: bool = False


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
    for block in _blocks(np.arange(points.shape[1])):
        path, seen = points[:, block], visible[:, block]
        steady = None if camera is None else camera.remove(path, seen)
        usable = usable_tracks(path, seen, steady)
        if confidence is not None:
            trust = (confidence[:, block] * seen).sum(axis=0) / np.maximum(seen.sum(axis=0), 1)
            usable &= trust >= MIN_CONFIDENCE
        kinds = classify_motion(path if steady is None else steady, seen)
        moving[block], still[block] = (kind & usable for kind in kinds)
    return moving, still


@dataclass(frozen=True)
class Candidates:
    """Features of the tracks of which some are chosen.

    Attributes:
        moving (`np.ndarray`): `(n,)` bool.
        still (`np.ndarray`): `(n,)` bool.
        start (`np.ndarray`): `(n, 2)` image fractions where each is first visible.
        path (`np.ndarray`): `(n, 5)` mean place and weighted direction of the moving ones, 0 for the others.
    """

    moving: np.ndarray
    still: np.ndarray
    start: np.ndarray
    path: np.ndarray

    @classmethod
    def from_tracks(
        cls, points: np.ndarray, visible: np.ndarray, moving: np.ndarray, still: np.ndarray
    ) -> "Candidates":
        """Features of tracks and of what [`sort_tracks`] found."""
        start = points[visible.argmax(axis=0), np.arange(points.shape[1]), :2]
        path = np.zeros((points.shape[1], 5))
        for block in _blocks(np.flatnonzero(moving)):
            path[block] = _path_features(points[:, block], visible[:, block])
        return cls(moving, still, start, path)

    def __add__(self, others: "Candidates") -> "Candidates":
        pairs = ((getattr(self, field.name), getattr(others, field.name)) for field in fields(self))
        return Candidates(*map(np.concatenate, pairs))


def choose_tracks(
    candidates: Candidates,
    generator: np.random.Generator,
    n_points: int = 1250,
    moving_fraction: float = 0.25,
) -> TrackChoice:
    """Choose tracks: still ones spread over where they start, moving ones over places and directions.

    When fewer move than wanted, all of those are kept with at most three still ones each, but at least 256
    tracks altogether if the clip has as many.

    Args:
        candidates (`Candidates`): Tracks to choose from.
        generator (`np.random.Generator`): Seeded per clip.
        n_points (`int`): Most tracks to keep.
        moving_fraction (`float`): Wanted share of moving ones.
    """
    moving, still = np.flatnonzero(candidates.moving), np.flatnonzero(candidates.still)
    wanted_moving = round(n_points * moving_fraction)
    kept_moving = moving[_spread_paths(candidates.path[moving], wanted_moving, generator)]
    n_still = n_points - wanted_moving
    if len(kept_moving) < wanted_moving:
        per_moving = (1 - moving_fraction) / moving_fraction if moving_fraction else 0.0
        at_least = min(MIN_TRACKS, n_points) - len(kept_moving)
        n_still = min(n_still, max(round(per_moving * len(kept_moving)), at_least))
    kept_still = still[_spread_starts(candidates.start[still], n_still, generator)]
    index = np.concatenate([kept_moving, kept_still])
    flags = np.arange(len(index)) < len(kept_moving)
    order = np.argsort(index)
    return TrackChoice(index[order], flags[order], has_motion=len(moving) > 0)


def sample_tracks(
    follow: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray | None]],
    shape: tuple[int, int, int],
    generator: np.random.Generator,
    n_points: int = 1250,
    moving_fraction: float = 0.25,
) -> tuple[np.ndarray, np.ndarray, TrackChoice]:
    """Follow pixels through a clip and choose some of their tracks.

    The pixels are a jittered 40x40 grid in frame 0 and 800 at random frames; while too few of them move, up
    to three more rounds follow pixels around the moving ones. If the first tracks show that the camera moves
    (by more than 2 px in the median), its motion is removed before motion is measured.

    Args:
        follow (`Callable`): From pixels `(m, 3)` int64 (frame, row, column) to their tracks `(F, n, 3)`,
            visibility `(F, n)` and confidence `(F, n)` in [0, 1] or `None`, n <= m: a simulator's geometry or
            a tracker.
        shape (`tuple[int, int, int]`): Frames, rows and columns of the clip.
        generator (`np.random.Generator`): Seeded per clip.
        n_points (`int`): Most tracks to choose.
        moving_fraction (`float`): Wanted share of moving ones.

    Returns:
        `tuple`: Chosen tracks `(F, k, 3)` (x, y image fractions, z meters), their visibility `(F, k)` bool,
        and the choice itself.
    """
    n_frames, height, width = shape
    grid = _grid_seeds(height, width, generator)
    at_random = generator.integers(0, shape, size=(N_RANDOM, 3))
    found = follow(np.unique(np.concatenate([grid, at_random]), axis=0))
    camera = None
    if np.median(camera_shift_px(*found[:2], height, width)) > CAMERA_SHIFT_PX:
        camera = fit_camera_motion(*found[:2], height, width)
    rounds = [_keep(*found, camera)]
    del found  # as large as the clip is long
    candidates = rounds[0].candidates
    for _ in range(RESEED_ROUNDS):
        missing = round(n_points * moving_fraction) - int(candidates.moving.sum())
        if missing <= 0 or not candidates.moving.any():
            break
        around = _seeds_around(rounds, 4 * missing, height, width, generator)
        rounds.append(_keep(*follow(np.unique(around, axis=0)), camera))
        candidates += rounds[-1].candidates
    choice = choose_tracks(candidates, generator, n_points, moving_fraction)
    points, visible = _gather(rounds, choice.index)
    return points, visible, replace(choice, moving_camera=camera is not None)


@dataclass(frozen=True)
class _Round:
    """Tracks of one round that may be chosen; joining rounds would take the memory twice."""

    points: np.ndarray
    visible: np.ndarray
    candidates: Candidates


def _keep(
    points: np.ndarray, visible: np.ndarray, confidence: np.ndarray | None, camera: CameraMotion | None
) -> _Round:
    """Drop the tracks that can never be chosen."""
    moving, still = sort_tracks(points, visible, confidence, camera)
    kept = np.flatnonzero(moving | still)
    points, visible = points[:, kept], visible[:, kept]
    return _Round(points, visible, Candidates.from_tracks(points, visible, moving[kept], still[kept]))


def _gather(rounds: Sequence[_Round], index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points and visibility of the tracks `index` (ascending), numbered through all rounds."""
    parts, first = [], 0
    for one in rounds:
        n = one.visible.shape[1]
        own = index[(index >= first) & (index < first + n)] - first
        parts.append((one.points[:, own], one.visible[:, own]))
        first += n
    points, visible = zip(*parts, strict=True)
    return np.concatenate(points, axis=1), np.concatenate(visible, axis=1)


def _blocks(index: np.ndarray) -> Iterator[np.ndarray]:
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


def _spread_starts(start: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Pick tracks evenly over a 31x31 grid of their starts `(n, 2)`: indices `(<=count,)`."""
    n = len(start)
    if n == 0 or count <= 0:
        return np.empty(0, dtype=np.int64)
    cell = np.clip((start * START_CELLS).astype(np.int64), 0, START_CELLS - 1) @ np.array([1, START_CELLS])
    order = generator.permutation(n)
    # Rank of each track within its cell: take all first ones, then all second ones, and so on.
    by_cell = order[np.argsort(cell[order], kind="stable")]
    firsts = np.concatenate([[True], np.diff(cell[by_cell]) != 0])
    rank = np.arange(n) - np.maximum.accumulate(np.where(firsts, np.arange(n), 0))
    round_robin = by_cell[np.lexsort((generator.random(n), rank))]
    return round_robin[:count]


def _spread_paths(features: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Farthest-point sampling on places and directions `(n, 5)`: indices `(<=count,)`."""
    n = len(features)
    if n <= count:
        return np.arange(n)
    if count <= 0:
        return np.empty(0, dtype=np.int64)
    chosen = np.empty(count, dtype=np.int64)
    chosen[0] = generator.integers(n)
    distance = np.full(n, np.inf)
    for k in range(1, count):
        distance = np.minimum(distance, ((features - features[chosen[k - 1]]) ** 2).sum(axis=-1))
        distance[chosen[:k]] = -1.0  # never twice, even among identical tracks
        chosen[k] = distance.argmax()
    return chosen


def _path_features(points: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Mean visible position and weighted direction of each track: `(n, 5)`."""
    weight = visible[..., None] / visible.sum(axis=0)[:, None]
    mean = (points[..., :2] * weight).sum(axis=0)  # (n, 2)
    first = visible.argmax(axis=0)
    last = len(visible) - 1 - visible[::-1].argmax(axis=0)
    columns = np.arange(points.shape[1])
    travel = points[last, columns] - points[first, columns]
    direction = travel / np.maximum(np.linalg.norm(travel, axis=-1, keepdims=True), 1e-9)
    return np.concatenate([mean, DIRECTION_WEIGHT * direction], axis=-1)


def _grid_seeds(height: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """A 40x40 grid over frame 0, each node moved within its cell: `(1600, 3)` frame, row, column."""
    node = np.stack(np.meshgrid(np.arange(GRID_SIDE), np.arange(GRID_SIDE), indexing="ij"), axis=-1)
    place = (node.reshape(-1, 2) + generator.random((GRID_SIDE**2, 2))) / GRID_SIDE
    pixel = (place * [height, width]).astype(np.int64)
    return np.concatenate([np.zeros((len(pixel), 1), dtype=np.int64), pixel], axis=1)


def _seeds_around(
    rounds: Sequence[_Round], count: int, height: int, width: int, generator: np.random.Generator
) -> np.ndarray:
    """Pixels near moving tracks at random frames, with noise of 5 % of the image: `(count, 3)`."""
    moving = [np.flatnonzero(one.candidates.moving) for one in rounds]
    frame = generator.integers(0, len(rounds[0].points), size=count)
    track = generator.integers(0, sum(map(len, moving)), size=count)
    place, first = np.empty((count, 2)), 0
    for one, columns in zip(rounds, moving, strict=True):
        own = (track >= first) & (track < first + len(columns))
        place[own] = one.points[frame[own], columns[track[own] - first], :2]
        first += len(columns)
    place = place + generator.normal(0.0, RESEED_NOISE, size=place.shape)
    row = np.clip((place[:, 1] * height).astype(np.int64), 0, height - 1)
    column = np.clip((place[:, 0] * width).astype(np.int64), 0, width - 1)
    return np.stack([frame, row, column], axis=-1)
