"""Which tracks of a clip to keep: about 1250 of them, a quarter of them moving (3D Foresight, training data).

The ratio is the paper's; the criterion of motion and the way of spreading the choice are ours. The functions
look at track arrays alone, so that exact tracks of a simulator and estimated tracks of real video are chosen
alike.

Tracks are `(F, n, 3)`: x and y as image fractions, z in metres. Distances in the image are measured at a
scale of 224 px, whatever the resolution of the video.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

REFERENCE_PX = 224.0
MOVING_PX, STILL_PX = 4.0, 1.5
MOVING_DEPTH_M, MOVING_DEPTH_FRACTION = 0.05, 0.05
STILL_DEPTH_M, STILL_DEPTH_FRACTION = 0.02, 0.02
# A depth path longer than this many times its range is noise, not motion.
SMOOTH_PATH_RATIO = 3.0
MIN_VISIBLE_FRACTION = 0.3
MAX_JUMP_FRACTION = 0.1
START_CELLS = 31
GRID_SIDE = 40
N_RANDOM = 800
RESEED_ROUNDS = 3
RESEED_NOISE = 0.05  # of the image
MIN_TRACKS = 256
# How much the direction of a path counts beside its place in the image when moving tracks are spread.
DIRECTION_WEIGHT = 0.25


@dataclass(frozen=True)
class TrackChoice:
    """Tracks chosen from the candidates of one clip.

    Attributes:
        index (`np.ndarray`): `(k,)` int64, candidates kept, in ascending order.
        moving (`np.ndarray`): `(k,)` bool, which of them move.
        has_motion (`bool`): False for a clip in which nothing moves.
    """

    index: np.ndarray
    moving: np.ndarray
    has_motion: bool


def usable_tracks(points: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Tracks that are seen long enough and never jump.

    Args:
        points (`np.ndarray`): `(F, n, 3)` float tracks.
        visible (`np.ndarray`): `(F, n)` bool.

    Returns:
        `np.ndarray`: `(n,)` bool: visible in at least 30 % of the frames and moving at most 10 % of the image
        between two frames.
    """
    steps = np.linalg.norm(np.diff(points[..., :2], axis=0), axis=-1)  # (F-1, n)
    largest = steps.max(axis=0, initial=0.0)
    return (visible.mean(axis=0) >= MIN_VISIBLE_FRACTION) & (largest <= MAX_JUMP_FRACTION)


def classify_motion(points: np.ndarray, visible: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tell moving tracks from still ones, over their visible frames.

    A is the largest distance from the median position at 224-px scale, Z the 5-95 % range of the depth. A
    track moves if A > 4 px, or if Z exceeds 5 cm and 5 % of its depth along a smooth path; it is still if A <
    1.5 px and Z stays below 2 cm or 2 % of its depth. Tracks in between are neither.

    Args:
        points (`np.ndarray`): `(F, n, 3)` float tracks, camera motion already removed.
        visible (`np.ndarray`): `(F, n)` bool.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: moving and still, `(n,)` bool each; a track that is never visible is
        neither.
    """
    seen_once = visible.any(axis=0)
    mask = visible | ~seen_once  # never-seen tracks are ruled out at the end
    centre = np.stack([_seen_quantile(points[..., axis], mask, 0.5) for axis in (0, 1)], axis=-1)
    away_px = REFERENCE_PX * (np.linalg.norm(points[..., :2] - centre, axis=-1) * mask).max(axis=0)
    near, depth, far = (_seen_quantile(points[..., 2], mask, q) for q in (0.05, 0.5, 0.95))
    depth_range = far - near
    path_length = _path_length(points[..., 2], mask)
    moves_in_depth = depth_range > np.maximum(MOVING_DEPTH_M, MOVING_DEPTH_FRACTION * depth)
    moves_in_depth &= path_length < SMOOTH_PATH_RATIO * depth_range
    moving = (away_px > MOVING_PX) | moves_in_depth
    still = away_px < STILL_PX
    still &= depth_range < np.maximum(STILL_DEPTH_M, STILL_DEPTH_FRACTION * depth)
    return moving & seen_once, still & ~moving & seen_once


def choose_tracks(
    points: np.ndarray,
    visible: np.ndarray,
    generator: np.random.Generator,
    n_points: int = 1250,
    moving_fraction: float = 0.25,
) -> TrackChoice:
    """Choose tracks: still ones spread over where they start, moving ones over places and directions.

    When fewer move than wanted, all of those are kept and the still ones are limited to three for each of
    them, but at least 256 tracks are kept together (less only if the clip has no more); a clip without motion
    keeps 256 still ones.

    Args:
        points (`np.ndarray`): `(F, n, 3)` float candidate tracks.
        visible (`np.ndarray`): `(F, n)` bool.
        generator (`np.random.Generator`): Seeded per clip.
        n_points (`int`): Most tracks to keep.
        moving_fraction (`float`): Wanted share of moving ones.

    Returns:
        `TrackChoice`: Candidates kept and which of them move.
    """
    usable = usable_tracks(points, visible)
    moving, still = (np.flatnonzero(kind & usable) for kind in classify_motion(points, visible))
    wanted_moving = round(n_points * moving_fraction)
    kept_moving = moving[_spread_paths(points[:, moving], visible[:, moving], wanted_moving, generator)]
    n_still = n_points - wanted_moving
    if len(kept_moving) < wanted_moving:
        per_moving = (1 - moving_fraction) / moving_fraction if moving_fraction else 0.0
        at_least = min(MIN_TRACKS, n_points) - len(kept_moving)
        n_still = min(n_still, max(round(per_moving * len(kept_moving)), at_least))
    kept_still = still[_spread_starts(points[:, still], visible[:, still], n_still, generator)]
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
    """Candidate tracks of a clip, and the choice among them.

    Candidates are a jittered 40x40 grid in frame 0 and 800 pixels at random frames; while too few of them
    move, up to three more rounds look around the moving ones.

    Args:
        follow (`Callable`): From pixels `(m, 3)` int64 (frame, row, column) to their tracks `(F, n, 3)`,
            visibility `(F, n)` and confidence `(F, n)` in [0, 1] or `None`, n <= m: a simulator's geometry or
            a tracker.
        shape (`tuple[int, int, int]`): Frames, rows and columns of the clip.
        generator (`np.random.Generator`): Seeded per clip.
        n_points (`int`): Most tracks to choose.
        moving_fraction (`float`): Wanted share of moving ones.

    Returns:
        `tuple`: Chosen tracks `(F, k, 3)` (x, y image fractions, z metres), their visibility `(F, k)` bool,
        and the choice itself.
    """
    n_frames, height, width = shape
    seeds = [
        _grid_seeds(height, width, generator),
        _random_seeds(N_RANDOM, n_frames, height, width, generator),
    ]
    points, visible, _ = follow(np.unique(np.concatenate(seeds), axis=0))
    for _ in range(RESEED_ROUNDS):
        moving = classify_motion(points, visible)[0] & usable_tracks(points, visible)
        missing = round(n_points * moving_fraction) - int(moving.sum())
        if missing <= 0 or not moving.any():
            break
        around = _seeds_around(points[:, moving], 4 * missing, height, width, generator)
        more_points, more_visible, _ = follow(np.unique(around, axis=0))
        points = np.concatenate([points, more_points], axis=1)
        visible = np.concatenate([visible, more_visible], axis=1)
    choice = choose_tracks(points, visible, generator, n_points, moving_fraction)
    return points[:, choice.index], visible[:, choice.index], choice


def _seen_quantile(values: np.ndarray, mask: np.ndarray, quantile: float) -> np.ndarray:
    """Quantile of the unmasked values of each column, linearly interpolated: `(F, n)` -> `(n,)`."""
    # As np.nanquantile, which takes a hundred times longer because it goes column by column.
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


def _spread_starts(
    points: np.ndarray, visible: np.ndarray, count: int, generator: np.random.Generator
) -> np.ndarray:
    """Pick tracks evenly over a 31x31 grid of the cells they are first seen in: indices `(<=count,)`."""
    n = points.shape[1]
    if n == 0 or count <= 0:
        return np.empty(0, dtype=np.int64)
    start = points[visible.argmax(axis=0), np.arange(n), :2]
    cell = np.clip((start * START_CELLS).astype(np.int64), 0, START_CELLS - 1) @ np.array([1, START_CELLS])
    order = generator.permutation(n)
    # Rank of each track within its cell: take all first ones, then all second ones, and so on.
    by_cell = order[np.argsort(cell[order], kind="stable")]
    firsts = np.concatenate([[True], np.diff(cell[by_cell]) != 0])
    rank = np.arange(n) - np.maximum.accumulate(np.where(firsts, np.arange(n), 0))
    round_robin = by_cell[np.lexsort((generator.random(n), rank))]
    return round_robin[:count]


def _spread_paths(
    points: np.ndarray, visible: np.ndarray, count: int, generator: np.random.Generator
) -> np.ndarray:
    """Farthest-point sampling on (mean position, path direction): indices `(<=count,)`."""
    n = points.shape[1]
    if n <= count:
        return np.arange(n)
    if count <= 0:
        return np.empty(0, dtype=np.int64)
    weight = visible[..., None] / visible.sum(axis=0)[:, None]
    mean = (points[..., :2] * weight).sum(axis=0)  # (n, 2)
    first = visible.argmax(axis=0)
    last = len(visible) - 1 - visible[::-1].argmax(axis=0)
    columns = np.arange(n)
    travel = points[last, columns] - points[first, columns]
    direction = travel / np.maximum(np.linalg.norm(travel, axis=-1, keepdims=True), 1e-9)
    features = np.concatenate([mean, DIRECTION_WEIGHT * direction], axis=-1)
    chosen = np.empty(count, dtype=np.int64)
    chosen[0] = generator.integers(n)
    distance = np.full(n, np.inf)
    for k in range(1, count):
        distance = np.minimum(distance, ((features - features[chosen[k - 1]]) ** 2).sum(axis=-1))
        distance[chosen[:k]] = -1.0  # never twice, even among identical tracks
        chosen[k] = distance.argmax()
    return chosen


def _grid_seeds(height: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """A 40x40 grid over frame 0, each node moved within its cell: `(1600, 3)` frame, row, column."""
    node = np.stack(np.meshgrid(np.arange(GRID_SIDE), np.arange(GRID_SIDE), indexing="ij"), axis=-1)
    place = (node.reshape(-1, 2) + generator.random((GRID_SIDE**2, 2))) / GRID_SIDE
    pixel = (place * [height, width]).astype(np.int64)
    return np.concatenate([np.zeros((len(pixel), 1), dtype=np.int64), pixel], axis=1)


def _random_seeds(
    count: int, n_frames: int, height: int, width: int, generator: np.random.Generator
) -> np.ndarray:
    """Pixels at random frames: `(count, 3)` frame, row, column."""
    return generator.integers(0, [n_frames, height, width], size=(count, 3))


def _seeds_around(
    points: np.ndarray, count: int, height: int, width: int, generator: np.random.Generator
) -> np.ndarray:
    """Pixels near given tracks at random frames, with noise of 5 % of the image: `(count, 3)`."""
    n_frames, n = points.shape[:2]
    frame = generator.integers(0, n_frames, size=count)
    place = points[frame, generator.integers(0, n, size=count), :2]
    place = place + generator.normal(0.0, RESEED_NOISE, size=place.shape)
    row = np.clip((place[:, 1] * height).astype(np.int64), 0, height - 1)
    column = np.clip((place[:, 0] * width).astype(np.int64), 0, width - 1)
    return np.stack([frame, row, column], axis=-1)
