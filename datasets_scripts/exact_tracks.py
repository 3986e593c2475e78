"""Exact 3D tracks from a simulator: attach pixels to the bodies they show, and follow the bodies.

A pixel of some frame is lifted to 3D with the rendered depth, held fast in the frame of the rigid body it
lies on, moved with that body's pose and projected into every frame. Visibility is a depth test. Nothing is
estimated: errors come from the depth buffer alone.
"""

from dataclasses import dataclass

import numpy as np

from datasets_scripts.sampling import TrackChoice, choose_tracks, classify_motion, usable_tracks

GRID_SIDE = 40
N_RANDOM = 800
RESEED_ROUNDS = 3
RESEED_NOISE = 0.05  # of the image
NEAR_M = 0.02
DEPTH_TOLERANCE_M = 0.01
# Positions of points beside or behind the camera are cut here, so that they stay small numbers in float16.
OUTSIDE_LIMITS = (-2.0, 3.0)


@dataclass(frozen=True)
class RigidClip:
    """Everything known about one camera's view of one episode of F frames.

    Attributes:
        depth_m (`np.ndarray`): `(F, H, W)` float32 metres along the optical axis, 0 = invalid.
        bodies (`np.ndarray`): `(F, H, W)` int body shown by each pixel, -1 = none.
        body_positions (`np.ndarray`): `(F, bodies, 3)` metres, world frame.
        body_rotations (`np.ndarray`): `(F, bodies, 3, 3)` body to world.
        camera_positions (`np.ndarray`): `(F, 3)` metres, world frame.
        camera_rotations (`np.ndarray`): `(F, 3, 3)` camera (x right, y down, z forward) to world.
        intrinsics (`dict`): fx, fy, cx, cy in pixels counted from the image's outer edge.
    """

    depth_m: np.ndarray
    bodies: np.ndarray
    body_positions: np.ndarray
    body_rotations: np.ndarray
    camera_positions: np.ndarray
    camera_rotations: np.ndarray
    intrinsics: dict[str, float]


def make_tracks(
    clip: RigidClip, generator: np.random.Generator, n_points: int = 1250, moving_fraction: float = 0.25
) -> tuple[np.ndarray, np.ndarray, TrackChoice]:
    """Candidate tracks of a clip, and the choice among them.

    Candidates are a jittered 40x40 grid in frame 0 and 800 pixels at random frames; while too few of them
    move, up to three more rounds look around the moving ones.

    Args:
        clip (`RigidClip`): The episode.
        generator (`np.random.Generator`): Seeded per episode.
        n_points (`int`): Most tracks to choose.
        moving_fraction (`float`): Wanted share of moving ones.

    Returns:
        `tuple`: Chosen tracks `(F, k, 3)` float64 (x, y image fractions, z metres), their visibility `(F, k)`
        bool, and the choice itself.
    """
    n_frames, height, width = clip.depth_m.shape
    seeds = [
        _grid_seeds(height, width, generator),
        _random_seeds(N_RANDOM, n_frames, height, width, generator),
    ]
    points, visible = follow_pixels(clip, np.unique(np.concatenate(seeds), axis=0))
    for _ in range(RESEED_ROUNDS):
        moving = classify_motion(points, visible)[0] & usable_tracks(points, visible)
        missing = round(n_points * moving_fraction) - int(moving.sum())
        if missing <= 0 or not moving.any():
            break
        around = _seeds_around(points[:, moving], 4 * missing, height, width, generator)
        more_points, more_visible = follow_pixels(clip, np.unique(around, axis=0))
        points = np.concatenate([points, more_points], axis=1)
        visible = np.concatenate([visible, more_visible], axis=1)
    choice = choose_tracks(points, visible, generator, n_points, moving_fraction)
    return points[:, choice.index], visible[:, choice.index], choice


def follow_pixels(clip: RigidClip, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Follow pixels through the whole clip, forwards and backwards.

    Args:
        clip (`RigidClip`): The episode.
        seeds (`np.ndarray`): `(m, 3)` int64: frame, row, column. Pixels without a body or without valid depth
            (goal markers, background) are left out.

    Returns:
        `tuple`: Tracks `(F, n, 3)` float64 and visibility `(F, n)` bool, n <= m.
    """
    frame, row, column = seeds.T
    on_body = (clip.bodies[frame, row, column] >= 0) & (clip.depth_m[frame, row, column] > 0)
    frame, row, column = frame[on_body], row[on_body], column[on_body]
    body = clip.bodies[frame, row, column]
    world = unproject(clip, frame, column + 0.5, row + 0.5, clip.depth_m[frame, row, column])
    offset = world - clip.body_positions[frame, body]
    local = np.einsum("nji,nj->ni", clip.body_rotations[frame, body], offset)
    moved = np.einsum("fnij,nj->fni", clip.body_rotations[:, body], local) + clip.body_positions[:, body]
    points = project(clip, moved)
    return points, depth_test(points, clip.depth_m)


def unproject(
    clip: RigidClip, frame: np.ndarray, x_px: np.ndarray, y_px: np.ndarray, depth_m: np.ndarray
) -> np.ndarray:
    """World positions `(n, 3)` in metres of pixels `(n,)` with known depth, each in its own frame."""
    k = clip.intrinsics
    depth_m = depth_m.astype(np.float64)
    rays = np.stack([(x_px - k["cx"]) / k["fx"], (y_px - k["cy"]) / k["fy"], np.ones(len(depth_m))], axis=-1)
    turned = np.einsum("nij,nj->ni", clip.camera_rotations[frame], rays * depth_m[:, None])
    return turned + clip.camera_positions[frame]


def project(clip: RigidClip, world: np.ndarray) -> np.ndarray:
    """Project `(F, n, 3)` world positions, one set per frame, into the camera.

    Returns:
        `np.ndarray`: `(F, n, 3)`: x, y image fractions, z metres. Points nearer than 2 cm or behind the
        camera have no place in the image: they get a finite position cut at the limits, and their true z.
    """
    k = clip.intrinsics
    height, width = clip.depth_m.shape[1:]
    seen = np.einsum("fji,fnj->fni", clip.camera_rotations, world - clip.camera_positions[:, None])
    z = seen[..., 2]
    in_front = np.maximum(z, NEAR_M)
    x = (k["fx"] * seen[..., 0] / in_front + k["cx"]) / width
    y = (k["fy"] * seen[..., 1] / in_front + k["cy"]) / height
    return np.stack([np.clip(x, *OUTSIDE_LIMITS), np.clip(y, *OUTSIDE_LIMITS), z], axis=-1)


def depth_test(points: np.ndarray, depth_m: np.ndarray) -> np.ndarray:
    """Which points are seen: inside the image and within 1 cm of the depth in their 3x3 neighbourhood.

    Args:
        points (`np.ndarray`): `(F, n, 3)` tracks.
        depth_m (`np.ndarray`): `(F, H, W)` rendered depth, 0 = invalid.

    Returns:
        `np.ndarray`: `(F, n)` bool.
    """
    n_frames, height, width = depth_m.shape
    x, y, z = points[..., 0], points[..., 1], points[..., 2]
    inside = (x >= 0) & (x < 1) & (y >= 0) & (y < 1) & (z > NEAR_M)
    column = np.clip((x * width).astype(np.int64), 0, width - 1)
    row = np.clip((y * height).astype(np.int64), 0, height - 1)
    padded = np.pad(depth_m, ((0, 0), (1, 1), (1, 1)))  # zeros: no depth beyond the border
    frames = np.arange(n_frames)[:, None]
    nearest = np.full(z.shape, np.inf)
    for down in range(3):
        for right in range(3):
            nearest = np.minimum(nearest, np.abs(padded[frames, row + down, column + right] - z))
    return inside & (nearest <= DEPTH_TOLERANCE_M)


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
