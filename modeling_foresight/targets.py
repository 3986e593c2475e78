# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""3D flow targets: which tracked point answers for which node of the query grid, and where it goes.

3D Foresight asks at inference for the flow of a uniform grid, and trains with tracked points "near grids"
drawn at random. Both happen here in *augmented* coordinates and for every frame of a window on its own. For
node `j` at `g_j`, with grid spacing `a`:

    candidates = points visible at that frame inside the node's cell (within a/2 of g_j)
                 else the nearest visible point within 2a
    none                                     -> g_j itself, weight 0
    a moving one among them, and rand < p_mov -> one of the moving ones at random
    otherwise                                -> any of them at random

Cells are half open, so a point on a border belongs to exactly one node; distances are measured in spacings,
so grids of any aspect work. Points that the shift has pushed out of the picture count as not visible.
"""

import functools

import numpy as np

from .encoders import flow_grid_points

__all__ = ["blank_flow_targets", "build_flow_targets", "choose_points", "grid_nodes"]

NEAREST_WITHIN_SPACINGS = 2.0


@functools.cache
def grid_nodes(grid: tuple[int, int]) -> np.ndarray:
    """Centres of the cells of a grid `(rows, cols)`, row-major: float32 `(P, 2)` image fractions x, y."""
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
    """Choose one tracked point per grid node and frame (see the module's docstring).

    Args:
        xy (`numpy.ndarray`): `(T, n, 2)` float32 augmented image fractions.
        visible (`numpy.ndarray`): `(T, n)` bool.
        moving (`numpy.ndarray`): `(n,)` bool, the label of the whole episode.
        grid (`tuple[int, int]`): `(rows, cols)`, `P = rows * cols`.
        p_moving (`float`): Probability to insist on a moving point where a node's cell holds one.
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
    """Give every empty node the nearest usable point within two spacings; edits and returns `choice`."""
    rows, cols = grid
    column_centres = np.arange(cols, dtype=np.float32)[:, None] + np.float32(0.5)  # in spacings
    row_centres = np.arange(rows, dtype=np.float32)[:, None] + np.float32(0.5)
    for frame in np.flatnonzero((choice < 0).any(1) & usable.any(1)):
        empty = np.flatnonzero(choice[frame] < 0)
        candidates = np.flatnonzero(usable[frame])
        x, y = xy[frame, candidates].T
        # The largest of two axes separates: columns and rows are measured once, not once per node.
        along_x = np.abs(column_centres - x * np.float32(cols))  # (cols, n')
        along_y = np.abs(row_centres - y * np.float32(rows))
        distance = np.maximum(along_x[empty % cols], along_y[empty // cols])  # (E, n')
        nearest = distance.argmin(1)
        near = distance[np.arange(len(empty)), nearest] <= NEAREST_WITHIN_SPACINGS
        choice[frame, empty[near]] = candidates[nearest[near]]
    return choice


def build_flow_targets(
    points: np.ndarray,
    visible: np.ndarray,
    moving: np.ndarray,
    n_frames: int,
    flow_length: int,
    grid: tuple[int, int],
    rng: np.random.Generator,
    p_moving: float = 0.5,
    occluded_weight: float = 1.0,
    shift: tuple[float, float] = (0.0, 0.0),
) -> dict[str, np.ndarray]:
    """Targets of the flow head for all frames of one window.

    Args:
        points (`numpy.ndarray`): `(R, n, 3)` float of any size, the tracks at the window's frames and after,
            oldest first: x, y image fractions, z metres. `R` is `n_frames + flow_length - 1`, or less where
            the episode ends earlier.
        visible (`numpy.ndarray`): `(R, n)` bool; false for padding points at all times.
        moving (`numpy.ndarray`): `(n,)` bool.
        n_frames (`int`): T, history frames.
        flow_length (`int`): L, steps `s, s+1, ..., s+L-1`; step 0 is now.
        grid (`tuple[int, int]`): `(rows, cols)`, `P = rows * cols`.
        rng (`numpy.random.Generator`): Source of randomness.
        p_moving (`float`): See `choose_points`.
        occluded_weight (`float`): Weight of steps at which the chosen point is hidden. 1 keeps the paper's
            plain mean, ATM uses 0.1.
        shift (`tuple[float, float]`): How far the augmented picture looks to the right and down, as fractions
            of the image; taken from x and y.

    Returns:
        `dict`: `track_start` `(T, P, 2)` float32 fractions, the chosen point at step 0 or the node itself;
        `track` `(T, L, P, 3)` float32; `track_weight` `(T, L, P)` float32, 0 for nodes without a candidate,
        past the episode's end, and where a track is not finite or has no depth; `track_moving` `(T, P)` bool.
    """
    n_rows, n_points = points.shape[:2]
    moved = np.float32([*shift, 0])
    xy_now = points[:n_frames, :, :2].astype(np.float32) - moved[:2]
    choice = choose_points(xy_now, visible[:n_frames], moving, grid, p_moving, rng)  # (T, P)
    chosen = choice >= 0
    safe = np.where(chosen, choice, 0)
    step = np.arange(n_frames)[:, None] + np.arange(flow_length)  # (T, L) row of frame t at step k
    exists = (step < n_rows)[..., None] & chosen[:, None]  # (T, L, P)
    if n_points == 0:  # nothing tracked in this episode: all nodes are empty
        track = np.zeros((*exists.shape, 3), np.float32)
        seen = np.zeros(exists.shape, bool)
        start = np.zeros((*choice.shape, 2), np.float32)
    else:
        # Only what was chosen is converted and moved: a window has several times as many points.
        place = np.minimum(step, n_rows - 1)[..., None] * n_points + safe[:, None]  # (T, L, P)
        track = points.reshape(-1, 3).take(place, axis=0).astype(np.float32) - moved
        seen = visible.reshape(-1).take(place)
        start = np.take_along_axis(xy_now, safe[..., None], axis=1)
    x, y, z = np.moveaxis(track, -1, 0)
    exists &= np.isfinite(x) & np.isfinite(y) & np.isfinite(z) & (z > 0)
    weight = np.where(seen, np.float32(1), np.float32(occluded_weight)) * exists
    track[~exists] = 0
    return {
        "track_start": np.where(chosen[..., None], start, grid_nodes(grid)),
        "track": track,
        "track_weight": weight,
        "track_moving": chosen & (moving[safe] if len(moving) else False),
    }


def blank_flow_targets(n_frames: int, flow_length: int, grid: tuple[int, int]) -> dict[str, np.ndarray]:
    """Targets that teach nothing, as [`build_flow_targets`] has them: grid nodes as starts, weight 0."""
    nodes = grid_nodes(grid)
    return {
        "track_start": np.repeat(nodes[None], n_frames, axis=0),
        "track": np.zeros((n_frames, flow_length, len(nodes), 3), np.float32),
        "track_weight": np.zeros((n_frames, flow_length, len(nodes)), np.float32),
        "track_moving": np.zeros((n_frames, len(nodes)), bool),
    }
