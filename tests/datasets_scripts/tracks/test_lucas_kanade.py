"""The built-in tracker on a moving texture and on simulated episodes with exact tracks."""

import cv2
import numpy as np
import pytest

from datasets_scripts.inspection.source_errors import ExactEpisodes, measure_sources
from datasets_scripts.simulation.job import simulate
from datasets_scripts.simulation.simulators import MetaWorldRecording
from datasets_scripts.storage.dataset_rows import DatasetRows
from datasets_scripts.storage.videos.frame_decoding import FrameDecoder
from datasets_scripts.tracks import open_tracker
from datasets_scripts.tracks.track_selection import sample_tracks

track = open_tracker("lucas-kanade").track
SIDE, FRAMES = 96, 6
STEP = np.array([1.5, -0.75])  # px per frame
NEARER_M = 0.02


@pytest.fixture(scope="module")
def moving_texture():
    """A patch of texture that moves over a still wall, comes nearer, and slides behind a post at the end."""
    draw = np.random.default_rng(0)
    texture = [
        cv2.GaussianBlur(draw.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8), (0, 0), 2) for _ in "ab"
    ]
    wall, patch = (cv2.normalize(t, None, 0, 255, cv2.NORM_MINMAX) for t in texture)
    video, depth = [], []
    for t in range(FRAMES):
        shift = np.array([[1, 0, STEP[0] * t], [0, 1, STEP[1] * t]])
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[30:70, 20:60] = 1
        mask = cv2.warpAffine(mask, shift, (SIDE, SIDE), flags=cv2.INTER_NEAREST).astype(bool)
        image = np.where(mask[..., None], cv2.warpAffine(patch, shift, (SIDE, SIDE)), wall)
        z = np.where(mask, 1.0 - NEARER_M * t, 2.0).astype(np.float32)
        if t >= 4:
            image[:, 50:], z[:, 50:] = 128, 0.5
        video.append(image)
        depth.append(z)
    return np.stack(video), np.stack(depth)


def test_points_follow_what_they_lie_on_in_three_dimensions(moving_texture):
    video, depth = moving_texture
    queries = np.array([[0, 36.5, 46.5], [0, 80.5, 12.5], [2, 40.0, 50.0]])
    points, visible, confidence = track(video, depth, queries)
    assert points.shape == (FRAMES, 3, 3) and visible.shape == confidence.shape == (FRAMES, 3)
    times = np.arange(4)
    np.testing.assert_allclose(points[:4, 0, :2], queries[0, 1:] + times[:, None] * STEP, atol=0.3)
    np.testing.assert_allclose(points[:4, 0, 2], 1.0 - NEARER_M * times, atol=1e-4)
    np.testing.assert_allclose(points[:4, 1], np.tile([80.5, 12.5, 2.0], (4, 1)), atol=0.1)
    # A point that starts in the third frame is followed back to the first.
    np.testing.assert_allclose(points[:4, 2, :2], queries[2, 1:] + (times - 2)[:, None] * STEP, atol=0.3)
    assert visible[:4].all() and (confidence[:4] > 0.5).all()


def test_a_point_that_is_covered_is_lost_and_stays_where_it_was(moving_texture):
    points, visible, confidence = track(*moving_texture, np.array([[0, 52.5, 40.5]]))
    assert visible[:4, 0].all() and not visible[4:, 0].any() and (confidence[4:] == 0).all()
    assert (points[4:] == points[3]).all()


def test_a_still_point_is_found_after_an_occlusion_and_a_moving_one_is_not(moving_texture):
    video, depth = (part[[0, 1, 4, 5, 2, 3]] for part in moving_texture)
    points, visible, confidence = track(video, depth, np.array([[0, 80.5, 12.5], [0, 52.5, 40.5]]))
    assert visible[:, 0].tolist() == [True, True, False, False, True, True]
    np.testing.assert_allclose(points[:, 0], np.tile([80.5, 12.5, 2.0], (FRAMES, 1)), atol=0.1)
    assert (confidence[4:, 0] > 0.5).all()
    assert not visible[2:, 1].any()


def test_a_pixel_without_depth_gives_no_track(moving_texture):
    video, depth = moving_texture
    depth = depth.copy()
    depth[0, 46, 36] = 0
    _, visible, _ = track(video, depth, np.array([[0, 36.5, 46.5]]))
    assert not visible.any()


def assert_accurate(root, episodes, moving_px=1.5, still_px=0.2):
    errors = measure_sources(ExactEpisodes(str(root)), episodes, None, open_tracker("lucas-kanade"))["tracks"]
    assert errors["moving"]["positions"] > 1000
    assert errors["moving"]["epe_px"]["median"] <= moving_px  # at 224 px
    assert errors["moving"]["epe_cm"]["median"] <= 1.5
    assert errors["still"]["epe_px"]["median"] <= still_px


@pytest.mark.sim
def test_moving_points_are_close_over_six_steps_in_images_of_64_px(simulated_dataset):
    assert_accurate(simulated_dataset.root, [0, 1], moving_px=2.5, still_px=0.5)


@pytest.mark.sim
@pytest.mark.slow  # renders two episodes at full size
def test_moving_points_are_within_a_pixel_and_a_half_over_six_steps(simulator, tmp_path):
    root = tmp_path / "dataset"
    tasks, cameras = ("drawer-open-v3", "push-v3"), ("main",)
    simulate(MetaWorldRecording(tasks, episodes=1, image_size=224, n_points=400, cameras=cameras), root)
    assert_accurate(root, [0, 1])


@pytest.mark.sim
def test_tracks_of_an_episode_are_chosen_like_exact_ones(simulated_dataset):
    rows = DatasetRows(simulated_dataset.root)
    pictures, depths = (FrameDecoder(rows, f"observation.{kind}.main") for kind in ("images", "depth"))
    frames = range(int(rows.episode_stops[0]))
    video = pictures.decode(frames).transpose(0, 2, 3, 1)
    depth = depths.meters(depths.decode(frames))

    def follow(seeds):
        points, visible, confidence = track(video, depth, seeds[:, [0, 2, 1]] + [0, 0.5, 0.5])
        return points / [*video.shape[2:0:-1], 1], visible, confidence

    made = [sample_tracks(follow, depth.shape, np.random.default_rng(0), n_points=200) for _ in range(2)]
    (points, visible, choice), again = made
    assert points.shape == (len(frames), len(choice.index), 3) and len(choice.index) <= 200
    assert choice.has_motion and 0.1 < choice.moving.mean() <= 0.26
    assert (visible.mean(axis=0) >= 0.3).all()
    assert (points == again[0]).all()
