"""Exact 3D tracks from a simulator: attach pixels to the bodies they show, and follow the bodies.

A pixel of some frame is lifted to 3D with the rendered depth, held fast in the frame of the rigid body it
lies on, moved with that body's pose and projected into every frame. Visibility is a depth test. Nothing is
estimated: errors come from the depth buffer alone.
"""

from dataclasses import dataclass

import numpy as np

from datasets_scripts.tracks.sampling import TrackChoice, sample_tracks

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
    """Exact tracks of a clip, chosen by [`sampling.sample_tracks`].

    Args:
        clip (`RigidClip`): The episode.
        generator (`np.random.Generator`): Seeded per episode.
        n_points (`int`): Most tracks to choose.
        moving_fraction (`float`): Wanted share of moving ones.

    Returns:
        `tuple`: Chosen tracks `(F, k, 3)` float64 (x, y image fractions, z metres), their visibility `(F, k)`
        bool, and the choice itself.
    """
    return sample_tracks(
        lambda seeds: (*follow_pixels(clip, seeds), None),
        clip.depth_m.shape,
        generator,
        n_points,
        moving_fraction,
    )


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
