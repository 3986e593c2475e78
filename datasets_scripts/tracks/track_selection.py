"""Which tracks of a clip to keep: about 1250 of them, a quarter of them moving (3D Foresight, training data).

The ratio is the paper's; the motion criterion (`motion.py`) and the spreading are ours. Exact tracks of a
simulator and estimated tracks of real video are chosen alike, from the arrays alone.

A clip may have tens of thousands of frames: arrays are processed in blocks, and tracks that cannot be chosen
are dropped after each round.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from datasets_scripts.tracks.motion import (
    CameraMotion,
    camera_shift_px,
    fit_camera_motion,
    sort_tracks,
    split_blocks,
)

MOVING_FRACTION = 0.25  # of the tracks, the paper's
CAMERA_SHIFT_PX = 2.0  # median over the clip above which its camera is moving
START_CELLS = 31
GRID_SIDE = 40
N_RANDOM = 800
RESEED_ROUNDS = 3
RESEED_NOISE = 0.05  # of the image
MIN_TRACKS = 256
DIRECTION_WEIGHT = 0.25  # of a path, relative to its place in the image, when moving tracks are spread


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
        for block in split_blocks(np.flatnonzero(moving)):
            path[block] = _path_features(points[:, block], visible[:, block])
        return cls(moving, still, start, path)

    def __add__(self, others: "Candidates") -> "Candidates":
        pairs = ((getattr(self, field.name), getattr(others, field.name)) for field in fields(self))
        return Candidates(*map(np.concatenate, pairs))


def choose_tracks(
    candidates: Candidates,
    generator: np.random.Generator,
    n_points: int = 1250,
    moving_fraction: float = MOVING_FRACTION,
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
    moving_fraction: float = MOVING_FRACTION,
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
