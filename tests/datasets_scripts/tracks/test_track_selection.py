"""Which tracks are moving, and which are kept."""

import numpy as np
import pytest

from datasets_scripts.tracks.motion import (
    camera_shift_px,
    classify_motion,
    fit_camera_motion,
    sort_tracks,
    usable_tracks,
)
from datasets_scripts.tracks.track_selection import MIN_TRACKS, Candidates, choose_tracks, sample_tracks

FRAMES = 21


def still_tracks(n: int, generator: np.random.Generator) -> np.ndarray:
    return np.repeat(generator.uniform([0, 0, 0.5], [1, 1, 2], size=(1, n, 3)), FRAMES, axis=0)


def scene(n_still: int, n_moving: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Still tracks all over the image and tracks that travel a fifth of it, all visible."""
    generator = np.random.default_rng(seed)
    points = still_tracks(n_still + n_moving, generator)
    direction = generator.normal(size=(n_moving, 3)) * [1, 1, 0.2]
    direction /= np.linalg.norm(direction[:, :2], axis=-1, keepdims=True)
    points[:, n_still:] += 0.2 * np.linspace(-0.5, 0.5, FRAMES)[:, None, None] * direction
    return points, np.ones(points.shape[:2], dtype=bool)


def choose(points, visible, generator, **options):
    candidates = Candidates.from_tracks(points, visible, *sort_tracks(points, visible))
    return choose_tracks(candidates, generator, **options)


def classify_one(path: np.ndarray, seen: np.ndarray) -> tuple[bool, bool]:
    """The published criterion for a single track, word for word."""
    if not seen.any():
        return False, False
    px = 224 * path[seen, :2]
    away = np.linalg.norm(px - np.median(px, axis=0), axis=-1).max()
    z = path[seen, 2]
    low, high = np.percentile(z, [5, 95])
    depth_range, depth = high - low, np.median(z)
    length = np.abs(np.diff(z)).sum()
    deep = depth_range > max(0.05, 0.05 * depth) and length < 3 * depth_range
    moving = away > 4 or deep
    return moving, not moving and away < 1.5 and depth_range < max(0.02, 0.02 * depth)


def test_classification_equals_a_plain_loop():
    generator = np.random.default_rng(1)
    n = 300
    points = still_tracks(n, generator)
    scale = generator.choice([0, 0.002, 0.006, 0.02, 0.1], size=(2, n))
    walk = np.cumsum(generator.normal(size=(FRAMES, n, 3)), axis=0) / np.sqrt(FRAMES)
    ramp = np.linspace(0, 1, FRAMES)[:, None]
    points[..., :2] += walk[..., :2] * scale[0][:, None]
    points[..., 2] += np.where(generator.random(n) < 0.5, walk[..., 2], ramp) * scale[1]
    visible = generator.random((FRAMES, n)) < generator.choice([0, 0.4, 1.0], size=n)
    moving, still = classify_motion(points, visible)
    expected = np.array([classify_one(points[:, i], visible[:, i]) for i in range(n)])
    assert (moving == expected[:, 0]).all()
    assert (still == expected[:, 1]).all()
    assert min(moving.sum(), still.sum(), (~moving & ~still).sum()) > 20  # every kind occurred


def test_depth_noise_is_not_motion_but_a_smooth_approach_is():
    points, visible = scene(2, 0)
    points[:, 0, 2] += 0.2 * np.linspace(0, 1, FRAMES)
    points[:, 1, 2] += 0.1 * (-1.0) ** np.arange(FRAMES)
    moving, still = classify_motion(points, visible)
    assert moving.tolist() == [True, False]
    assert still.tolist() == [False, False]


def test_rarely_seen_and_jumping_tracks_are_not_usable():
    points, visible = scene(4, 0)
    visible[5:, 0] = False  # 5 of 21 frames
    visible[7:, 1] = False  # 7 of 21 frames
    points[10:, 2, 0] += 0.11
    points[10:, 3, 0] += 0.09
    assert usable_tracks(points, visible).tolist() == [False, True, False, True]


def test_before_a_fast_camera_neither_the_scene_nor_what_the_camera_carries_jumps():
    seen, visible = scene(3, 0)
    steady = seen.copy()
    pan = np.linspace(0, 3, FRAMES)  # more than a tenth of the image per frame
    seen[:, 0, 0], steady[:, 1, 0] = -pan, pan  # of the scene; of the gripper
    seen[:, 2, 0], steady[:, 2, 0] = -pan, (-1.0) ** np.arange(FRAMES)  # neither: lost
    visible[8:, 0] = False
    steady[8:, 0, 0] = np.arange(FRAMES - 8)  # where it may be while hidden does not matter
    assert usable_tracks(seen, visible, steady).tolist() == [True, True, False]
    assert usable_tracks(seen, visible).tolist() == [False, True, False]


def test_a_quarter_of_the_chosen_tracks_moves():
    points, visible = scene(1500, 700)
    choice = choose(points, visible, np.random.default_rng(0))
    assert len(choice.index) == 1250
    assert choice.moving.sum() == 312
    assert choice.has_motion
    assert (choice.moving == (choice.index >= 1500)).all()
    assert (np.diff(choice.index) > 0).all()


def test_few_moving_tracks_are_all_kept_with_three_still_ones_each():
    points, visible = scene(1500, 100)
    choice = choose(points, visible, np.random.default_rng(0))
    assert choice.moving.sum() == 100
    assert len(choice.index) == 400


@pytest.mark.parametrize("n_moving", [0, 3])
def test_hardly_any_motion_still_keeps_256_tracks(n_moving):
    points, visible = scene(1500, n_moving)
    choice = choose(points, visible, np.random.default_rng(0))
    assert len(choice.index) == MIN_TRACKS
    assert choice.has_motion == bool(n_moving)


def test_a_clip_with_few_tracks_keeps_them_all():
    points, visible = scene(20, 5)
    choice = choose(points, visible, np.random.default_rng(0))
    assert len(choice.index) == 25
    nothing = choose(points[:, :0], visible[:, :0], np.random.default_rng(0))
    assert len(nothing.index) == 0


def test_still_tracks_are_spread_over_the_image():
    points, visible = scene(2000, 0)
    points[:, 1000:, :2] = 0.1 + 0.05 * points[:, 1000:, :2]  # half of them crowd into one corner
    choice = choose(points, visible, np.random.default_rng(0), n_points=500)
    assert (choice.index >= 1000).mean() < 0.2


def test_one_big_arm_does_not_take_all_moving_slots():
    points, visible = scene(900, 900)
    points[:, 900:1780, :2] = 0.5 + 0.1 * (
        points[:, 900:1780, :2] - 0.5
    )  # still far more than 4 px of travel
    choice = choose(points, visible, np.random.default_rng(0), n_points=160)
    far = choice.index[choice.moving] >= 1780
    assert far.sum() >= 18  # nearly all of the 20 elsewhere, though they are 2 % of the candidates


def test_the_choice_depends_on_the_seed_alone():
    points, visible = scene(1500, 700)
    first, again, other = (choose(points, visible, np.random.default_rng(seed)).index for seed in (4, 4, 5))
    assert (first == again).all()
    assert (first != other).any()


HEIGHT, WIDTH = 48, 64


FOCAL = 0.9  # of the shorter side


def travelled(points: np.ndarray, way_m: np.ndarray, turn_rad: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """The same tracks and which of them are seen, by a camera that travels, turns and rolls on its way.

    It stays where it is during the first quarter.
    """
    time = np.linspace(-0.33, 1, FRAMES).clip(0)
    size = np.array([WIDTH, HEIGHT]) / HEIGHT
    z = points[..., 2:]
    world = np.concatenate([(points[..., :2] - 0.5) * size / FOCAL * z, z], axis=-1)
    world = world - time[:, None, None] * way_m
    roll, yaw = 2 * turn_rad * time, turn_rad * time
    zero, one = np.zeros(FRAMES), np.ones(FRAMES)
    rolled = [[np.cos(roll), -np.sin(roll), zero], [np.sin(roll), np.cos(roll), zero], [zero, zero, one]]
    turned = [[np.cos(yaw), zero, -np.sin(yaw)], [zero, one, zero], [np.sin(yaw), zero, np.cos(yaw)]]
    x, y, z = np.einsum("ijf,jkf,fnk->ifn", np.array(rolled), np.array(turned), world)
    seen = np.stack([FOCAL * x / z / size[0] + 0.5, FOCAL * y / z / size[1] + 0.5, z], axis=-1)
    return seen, ((seen[..., :2] >= 0) & (seen[..., :2] < 1)).all(axis=-1) & (z > 0.05)


def test_near_and_far_things_stand_still_before_a_camera_that_travels():
    points, _ = scene(600, 150)
    seen, visible = travelled(points, np.array([0.1, -0.05, 0.2]), turn_rad=0.1)
    assert np.median(camera_shift_px(seen, visible, HEIGHT, WIDTH)) > 5
    moving, still = sort_tracks(seen, visible)
    assert still[:600].mean() < 0.1
    moving, still = sort_tracks(seen, visible, None, fit_camera_motion(seen, visible, HEIGHT, WIDTH))
    usable = usable_tracks(seen, visible)
    assert usable.sum() > 600
    assert still[:600][usable[:600]].all() and not moving[:600].any()
    assert moving[600:][usable[600:]].mean() > 0.95


def test_the_camera_is_followed_when_nothing_of_the_first_frame_is_left():
    draw = np.random.default_rng(0)
    points = np.repeat(draw.uniform([0, 0, 1], [4, 1, 1.5], (1, 2000, 3)), FRAMES, axis=0)
    seen, visible = travelled(points, np.array([4.0, 0, 0]))
    assert not visible[[0, -1]].all(axis=0).any()
    removed = fit_camera_motion(seen, visible, HEIGHT, WIDTH).remove(seen, visible)
    assert np.abs(removed - removed[0])[visible].max() < 1e-4


@pytest.mark.parametrize("pan", [False, True])
def test_a_moving_camera_is_noticed_and_does_not_make_everything_move(pan):
    def follow(pixels):
        """A wall, and a square in its middle that rises; pixels keep what they lie on."""
        start = (pixels[:, [2, 1]] + 0.5) / [WIDTH, HEIGHT]
        on_square = (np.abs(start - 0.5) < 0.15).all(axis=-1)
        points = np.tile(np.c_[start, np.ones(len(start))], (FRAMES, 1, 1))
        time = (np.arange(FRAMES)[:, None] - pixels[:, 0]) / FRAMES
        points[..., 1] -= 0.3 * np.where(on_square, time, 0)
        return *travelled(points, np.array([0.15, -0.1, 0.1]) * pan, 0.1 * pan), None

    _, visible, choice = sample_tracks(follow, (FRAMES, HEIGHT, WIDTH), np.random.default_rng(0), 400)
    assert choice.moving_camera == pan
    assert choice.moving.sum() == 100 and len(choice.index) == 400 and visible.any(axis=0).all()


def test_tracks_of_low_confidence_are_not_used():
    points, visible = scene(40, 10)
    confidence = np.full(visible.shape, 0.9)
    confidence[:, :5] = confidence[:, 45:] = 0.3
    visible[10:, 6], confidence[10:, 6] = False, 0.0  # not trusted where it is not seen anyway
    moving, still = sort_tracks(points, visible, confidence)
    assert moving.sum() == 5 and still.sum() == 35 and still[6]


def test_the_choice_does_not_depend_on_the_size_of_blocks(monkeypatch):
    points, visible = scene(700, 400)
    visible &= np.random.default_rng(0).random(visible.shape) < 0.8
    made = []
    for size in (37, 10_000):
        monkeypatch.setattr("datasets_scripts.tracks.motion.BLOCK_TRACKS", size)
        made.append(choose(points, visible, np.random.default_rng(0), n_points=300))
    assert (made[0].index == made[1].index).all() and (made[0].moving == made[1].moving).all()
