"""Flow targets of a window from tracked points: which point a node of the grid follows, and where to."""

import functools
from typing import NamedTuple

import numpy as np

from modeling_foresight.encoders import flow_grid_points

__all__ = ["FlowSampling", "blank_flow_targets", "build_flow_targets", "choose_points", "grid_nodes"]

NEAREST_WITHIN_SPACINGS = 2.0


@functools.cache
def grid_nodes(grid: tuple[int, int]) -> np.ndarray:
    """Centers of the cells of a grid `(rows, cols)`, row-major: float32 `(P, 2)` image fractions x, y."""
    nodes = flow_grid_points(*grid).numpy()
    nodes.setflags(write=False)  # all callers share it
    return nodes


def choose_points(
    xy: np.ndarray,
    visible: np.ndarray,
    moving: np.ndarray,
    grid: tuple[int, int],
    p_moving: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Chooses one tracked point per grid node and frame.

    3D Foresight predicts the flow of a uniform grid, and trains with tracked points "near grids" drawn at
    random. Both use *augmented* coordinates, separately for every frame. For node `j` at `g_j`, with grid
    spacing `a`:

        candidates = points visible at that frame inside the node's cell (within a/2 of g_j)
                     otherwise the nearest visible point within 2a
        none                                     -> g_j itself, weight 0
        a moving one among them, and rand < p_mov -> one of the moving ones at random
        otherwise                                -> any of them at random

    Cells are half open, so a point on a border belongs to exactly one node; distances are measured in
    spacings, so grids of any aspect ratio work. Points outside the shifted picture are not visible.

    Args:
        xy (`numpy.ndarray`): `(T, n, 2)` float32 augmented image fractions.
        visible (`numpy.ndarray`): `(T, n)` bool.
        moving (`numpy.ndarray`): `(n,)` bool, the label of the whole episode.
        grid (`tuple[int, int]`): `(rows, cols)`, `P = rows * cols`.
        p_moving (`float`): Probability to require a moving point where a node's cell holds one.
        rng (`numpy.random.Generator`): Source of randomness.

    Returns:
        `numpy.ndarray`: `(T, P)` int64 point numbers, -1 where a node has no candidate.
    """
    n_frames, n_points = visible.shape
    rows, cols = grid
    n_nodes = rows * cols
    column, row = xy[..., 0] * np.float32(cols), xy[..., 1] * np.float32(rows)  # (T, n), in cells
    # NaN compares false.
    usable = visible & (column >= 0) & (column < cols) & (row >= 0) & (row < rows)

    # The last write to a slot wins, so one shuffled order makes a uniform choice in all cells of all frames.
    order = rng.permutation(n_frames * n_points)
    order = order[usable.ravel()[order]]
    frames, points = np.divmod(order, max(n_points, 1))
    cells = row.ravel()[order].astype(np.int64) * cols + column.ravel()[order].astype(np.int64)
    slots = frames * n_nodes + cells
    any_choice = np.full(n_frames * n_nodes, -1, np.int64)
    any_choice[slots] = points
    is_moving = moving[points]
    moving_choice = np.full(n_frames * n_nodes, -1, np.int64)
    moving_choice[slots[is_moving]] = points[is_moving]
    insist = rng.random(n_frames * n_nodes) < p_moving
    choice = np.where(insist & (moving_choice >= 0), moving_choice, any_choice).reshape(n_frames, n_nodes)
    return _fill_from_nearest(choice, xy, usable, grid)


def _fill_from_nearest(
    choice: np.ndarray, xy: np.ndarray, usable: np.ndarray, grid: tuple[int, int]
) -> np.ndarray:
    """Gives every empty node the nearest usable point within two spacings; edits and returns `choice`."""
    rows, cols = grid
    column_centers = np.arange(cols, dtype=np.float32)[:, None] + np.float32(0.5)  # in spacings
    row_centers = np.arange(rows, dtype=np.float32)[:, None] + np.float32(0.5)
    for frame in np.flatnonzero((choice < 0).any(1) & usable.any(1)):
        empty = np.flatnonzero(choice[frame] < 0)
        candidates = np.flatnonzero(usable[frame])
        x, y = xy[frame, candidates].T
        # The largest of two axes separates: columns and rows are measured once, not once per node.
        along_x = np.abs(column_centers - x * np.float32(cols))  # (cols, n')
        along_y = np.abs(row_centers - y * np.float32(rows))
        distance = np.maximum(along_x[empty % cols], along_y[empty // cols])  # (E, n')
        nearest = distance.argmin(1)
        near = distance[np.arange(len(empty)), nearest] <= NEAREST_WITHIN_SPACINGS
        choice[frame, empty[near]] = candidates[nearest[near]]
    return choice


class FlowSampling(NamedTuple):
    """How flow targets are drawn from tracked points.

    Attributes:
        frames: T, history frames.
        length: L, steps of a trajectory; step 0 is the frame itself.
        grid: (rows, columns), P = rows * columns.
        p_moving: See [`choose_points`].
        occluded_weight: Weight of steps at which the chosen point is hidden. 1 keeps the paper's plain mean,
            ATM uses 0.1.
    """

    frames: int
    length: int
    grid: tuple[int, int]
    p_moving: float = 0.5
    occluded_weight: float = 1.0


def build_flow_targets(
    points: np.ndarray,
    visible: np.ndarray,
    moving: np.ndarray,
    sampling: FlowSampling,
    rng: np.random.Generator,
    shift: tuple[float, float] = (0.0, 0.0),
) -> dict[str, np.ndarray]:
    """Targets of the flow head for all frames of one window.

    Args:
        points (`numpy.ndarray`): `(R, n, 3)` float of any size, the tracks at the window's frames and after,
            oldest first: x, y image fractions, z meters. `R` is T + L - 1, or less where the episode ends
            earlier.
        visible (`numpy.ndarray`): `(R, n)` bool; false for padding points at all times.
        moving (`numpy.ndarray`): `(n,)` bool.
        sampling (`FlowSampling`): Sizes and probabilities.
        rng (`numpy.random.Generator`): Source of randomness.
        shift (`tuple[float, float]`): How far the augmented picture looks to the right and down, as fractions
            of the image; taken from x and y.

    Returns:
        `dict`: `track_start` `(T, P, 2)` float32 fractions, the chosen point at step 0 or the node itself;
        `track` `(T, L, P, 3)` float32; `track_weight` `(T, L, P)` float32, 0 for nodes without a candidate,
        past the episode's end, and where a track is not finite or has no depth; `track_moving` `(T, P)` bool.
    """
    n_rows, n_points = points.shape[:2]
    if n_points == 0:
        return blank_flow_targets(sampling)
    moved = np.float32([*shift, 0])
    xy_now = points[: sampling.frames, :, :2].astype(np.float32) - moved[:2]
    visible_now = visible[: sampling.frames]
    choice = choose_points(xy_now, visible_now, moving, sampling.grid, sampling.p_moving, rng)  # (T, P)
    chosen = choice >= 0
    safe = np.where(chosen, choice, 0)
    # Row of frame t at step k. Only what was chosen is converted and moved: a window has more points.
    step = np.arange(sampling.frames)[:, None] + np.arange(sampling.length)  # (T, L)
    place = np.minimum(step, n_rows - 1)[..., None] * n_points + safe[:, None]  # (T, L, P)
    track = points.reshape(-1, 3).take(place, axis=0).astype(np.float32) - moved
    start = np.take_along_axis(xy_now, safe[..., None], axis=1)  # (T, P, 2)
    x, y, z = np.moveaxis(track, -1, 0)
    exists = (step < n_rows)[..., None] & chosen[:, None]
    exists &= np.isfinite(x) & np.isfinite(y) & np.isfinite(z) & (z > 0)
    seen = visible.reshape(-1).take(place)
    track[~exists] = 0
    return {
        "track_start": np.where(chosen[..., None], start, grid_nodes(sampling.grid)),
        "track": track,
        "track_weight": np.where(seen, np.float32(1), np.float32(sampling.occluded_weight)) * exists,
        "track_moving": chosen & moving[safe],
    }


def blank_flow_targets(sampling: FlowSampling) -> dict[str, np.ndarray]:
    """Flow targets of weight 0 that start at the grid nodes, as [`build_flow_targets`] makes them."""
    frames, nodes = sampling.frames, grid_nodes(sampling.grid)
    shape = (frames, sampling.length, len(nodes))
    return {
        "track_start": np.repeat(nodes[None], frames, axis=0),
        "track": np.zeros((*shape, 3), np.float32),
        "track_weight": np.zeros(shape, np.float32),
        "track_moving": np.zeros((frames, len(nodes)), bool),
    }
