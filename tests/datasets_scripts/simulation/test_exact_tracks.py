"""Tracks attached to rigid bodies, in scenes whose geometry is a formula."""

import numpy as np
import pytest

from datasets_scripts.simulation.exact_tracks import RigidClip, depth_test, follow_pixels, make_tracks

FRAMES, HEIGHT, WIDTH, FOCAL = 7, 20, 30, 25.0


def make_clip(camera_path: np.ndarray, box_path: np.ndarray) -> RigidClip:
    """A wall 2 m away (body 0) and a square facing it at 1 m (body 1); the camera looks along the world's
    z."""
    column, row = np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5)
    intrinsics = {"fx": FOCAL, "fy": FOCAL, "cx": WIDTH / 2, "cy": HEIGHT / 2}
    depth = np.empty((FRAMES, HEIGHT, WIDTH), dtype=np.float32)
    bodies = np.empty((FRAMES, HEIGHT, WIDTH), dtype=np.int32)
    for t in range(FRAMES):
        box_z = box_path[t, 2] - camera_path[t, 2]
        x = (column - WIDTH / 2) / FOCAL * box_z + camera_path[t, 0] - box_path[t, 0]
        y = (row - HEIGHT / 2) / FOCAL * box_z + camera_path[t, 1] - box_path[t, 1]
        hit = (np.abs(x) < 0.15) & (np.abs(y) < 0.15)
        depth[t] = np.where(hit, box_z, 2.0 - camera_path[t, 2])
        bodies[t] = hit
    positions = np.stack([np.zeros_like(box_path), box_path], axis=1)
    rotations = np.broadcast_to(np.eye(3), (FRAMES, 2, 3, 3))
    camera_rotations = np.broadcast_to(np.eye(3), (FRAMES, 3, 3))
    return RigidClip(depth, bodies, positions, rotations, camera_path, camera_rotations, intrinsics)


def rest(z: float = 0.0) -> np.ndarray:
    return np.tile([0.0, 0.0, z], (FRAMES, 1))


def sideways(step: float) -> np.ndarray:
    return np.arange(FRAMES)[:, None] * np.array([step, 0.0, 0.0])


def all_pixels(frame: int) -> np.ndarray:
    row, column = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([np.full(row.size, frame), row.ravel(), column.ravel()], axis=-1)


def test_points_of_a_still_scene_do_not_move():
    points, visible = follow_pixels(make_clip(rest(), rest(1.0)), all_pixels(2))
    assert points.shape == (FRAMES, HEIGHT * WIDTH, 3)
    assert np.abs(points - points[2]).max() < 1e-12
    assert visible.all()


def test_points_start_at_the_center_of_their_pixel_and_at_its_depth():
    clip = make_clip(sideways(0.02), rest(1.0) + sideways(0.03))
    seeds = all_pixels(3)
    points, _ = follow_pixels(clip, seeds)
    assert np.abs(points[3, :, 0] * WIDTH - seeds[:, 2] - 0.5).max() < 1e-9
    assert np.abs(points[3, :, 1] * HEIGHT - seeds[:, 1] - 0.5).max() < 1e-9
    assert np.abs(points[3, :, 2] - clip.depth_m[3].ravel()).max() < 1e-6


def test_points_follow_their_body_and_not_the_wall():
    step = 0.04
    clip = make_clip(rest(), rest(1.0) + sideways(step))
    points, _ = follow_pixels(clip, all_pixels(0))
    on_box = clip.bodies[0].ravel() == 1
    travel_px = (points[-1, :, 0] - points[0, :, 0]) * WIDTH
    assert np.allclose(travel_px[on_box], (FRAMES - 1) * step * FOCAL / 1.0)
    assert np.allclose(travel_px[~on_box], 0)


def test_still_points_move_against_a_moving_camera():
    step = 0.04
    points, _ = follow_pixels(make_clip(sideways(step), rest(1.0)), all_pixels(0))
    travel_px = (points[-1, :, 0] - points[0, :, 0]) * WIDTH
    assert np.allclose(travel_px, -(FRAMES - 1) * step * FOCAL / points[0, :, 2])


def test_hidden_points_are_not_visible_and_come_back():
    path = rest(1.0) + (np.arange(FRAMES)[:, None] - 3) * np.array([0.12, 0.0, 0.0])
    clip = make_clip(rest(), path)
    wall = all_pixels(0)[(clip.bodies[0] == 0).ravel() & (clip.bodies[3] == 1).ravel()]
    inner = wall[(np.abs(wall[:, 1] - 10) < 3) & (np.abs(wall[:, 2] - 15) < 2)]
    points, visible = follow_pixels(clip, inner)
    assert points.shape[1] > 5
    assert visible[0].all()
    assert not visible[3].any()
    assert visible[-1].all()


def test_points_beside_the_image_are_invisible():
    points = np.array([[[-0.01, 0.5, 2.0], [1.0, 0.5, 2.0], [0.5, 1.2, 2.0], [0.5, 0.5, 2.0]]])
    assert depth_test(points, np.full((1, HEIGHT, WIDTH), 2.0, np.float32))[0].tolist() == [0, 0, 0, 1]


def test_points_behind_the_camera_stay_finite_and_invisible():
    forward = np.arange(FRAMES)[:, None] * np.array([0.0, 0.0, 0.3])
    clip = make_clip(rest(), rest(1.0))
    passed = RigidClip(**{**clip.__dict__, "camera_positions": forward})
    points, visible = follow_pixels(passed, all_pixels(0))
    on_box = clip.bodies[0].ravel() == 1
    assert np.isfinite(points).all()
    assert np.abs(points).max() <= 3.0
    assert (points[-1, on_box, 2] < 0).all()
    assert not visible[-1, on_box].any()


@pytest.mark.parametrize("what", ["no body", "no depth"])
def test_pixels_without_body_or_depth_give_no_track(what):
    clip = make_clip(rest(), rest(1.0))
    (clip.bodies if what == "no body" else clip.depth_m)[:, :, :4] = -1 if what == "no body" else 0
    points, _ = follow_pixels(clip, all_pixels(0))
    assert points.shape[1] == HEIGHT * (WIDTH - 4)


def test_rounds_around_moving_tracks_find_more_of_a_small_mover():
    clip = make_clip(rest(), rest(1.0) + sideways(0.03))
    points, visible, choice = make_tracks(clip, np.random.default_rng(0), n_points=1250)
    first_round = 1600 + 800
    assert choice.moving.sum() > 0
    assert points.shape == (FRAMES, len(choice.index), 3)
    assert visible.shape == points.shape[:2]
    assert choice.index.max() < 4 * first_round
