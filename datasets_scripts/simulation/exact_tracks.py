"""Exact 3D tracks from a simulator: attach pixels to the bodies they show, and follow the bodies.

A pixel of any frame is lifted to 3D with the rendered depth, attached to the rigid body it shows, moved with
that body's pose and projected into every frame. Visibility is a depth test. Nothing is estimated: errors come
from the depth buffer alone.
"""

from dataclasses import dataclass

import numpy as np

from datasets_scripts.columns import POINT_LIMITS
from datasets_scripts.tracks.track_selection import TrackChoice, sample_tracks

NEAR_M = 0.02
DEPTH_TOLERANCE_M = 0.01


@dataclass(frozen=True)
class RigidClip:
    """One camera's view of one episode of F frames.

    Attributes:
        depth_m (`np.ndarray`): `(F, H, W)` float32 meters along the optical axis, 0 = invalid.
        bodies (`np.ndarray`): `(F, H, W)` int body shown by each pixel, -1 = none.
        body_positions (`np.ndarray`): `(F, bodies, 3)` meters, world frame.
        body_rotations (`np.ndarray`): `(F, bodies, 3, 3)` body to world.
        camera_positions (`np.ndarray`): `(F, 3)` meters, world frame.
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
    clip: RigidClip, generator: np.random.Generator, n_points: int = 1250
) -> tuple[np.ndarray, np.ndarray, TrackChoice]:
    """Exact tracks of a clip, chosen by [`sample_tracks`], which documents arguments and results."""

    def follow(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, None]:
        return *follow_pixels(clip, pixels), None

    return sample_tracks(follow, clip.depth_m.shape, generator, n_points)


def follow_pixels(clip: RigidClip, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Follow pixels `(m, 3)` int64 (frame, row, column) through the whole clip, forwards and backwards.

    Returns:
        `tuple`: Tracks `(F, n, 3)` float64 and visibility `(F, n)` bool, n <= m: pixels without a body or
        valid depth (goal markers, background) are left out.
    """
    frame, row, column = pixels.T
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
    """World positions `(n, 3)` in meters of pixels `(n,)` with known depth, each in its own frame."""
    k = clip.intrinsics
    depth_m = depth_m.astype(np.float64)
    rays = np.stack([(x_px - k["cx"]) / k["fx"], (y_px - k["cy"]) / k["fy"], np.ones(len(depth_m))], axis=-1)
    turned = np.einsum("nij,nj->ni", clip.camera_rotations[frame], rays * depth_m[:, None])
    return turned + clip.camera_positions[frame]


def project(clip: RigidClip, world: np.ndarray) -> np.ndarray:
    """Project world positions `(F, n, 3)` into the camera: `(F, n, 3)` x, y image fractions, z meters.

    Points nearer than 2 cm or behind the camera get a finite position, clipped, and their true z.
    """
    k = clip.intrinsics
    height, width = clip.depth_m.shape[1:]
    seen = np.einsum("fji,fnj->fni", clip.camera_rotations, world - clip.camera_positions[:, None])
    z = seen[..., 2]
    in_front = np.maximum(z, NEAR_M)
    x = (k["fx"] * seen[..., 0] / in_front + k["cx"]) / width
    y = (k["fy"] * seen[..., 1] / in_front + k["cy"]) / height
    return np.stack([np.clip(x, *POINT_LIMITS), np.clip(y, *POINT_LIMITS), z], axis=-1)


def depth_test(points: np.ndarray, depth_m: np.ndarray) -> np.ndarray:
    """Visibility `(F, n)`: inside the image and within 1 cm of the depth `(F, H, W)` of a pixel around."""
    n_frames, height, width = depth_m.shape
    x, y, z = points[..., 0], points[..., 1], points[..., 2]
    inside = (x >= 0) & (x < 1) & (y >= 0) & (y < 1) & (z > NEAR_M)
    column = np.clip((x * width).astype(np.int64), 0, width - 1)
    row = np.clip((y * height).astype(np.int64), 0, height - 1)
    padded = np.pad(depth_m, ((0, 0), (1, 1), (1, 1)))  # 3x3 pixels around; no depth beyond the border
    frames = np.arange(n_frames)[:, None]
    nearest = np.full(z.shape, np.inf)
    for down in range(3):
        for right in range(3):
            nearest = np.minimum(nearest, np.abs(padded[frames, row + down, column + right] - z))
    return inside & (nearest <= DEPTH_TOLERANCE_M)
