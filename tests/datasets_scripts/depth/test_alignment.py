"""Relative and metric depth of clips whose true depth is known."""

import numpy as np
import pytest

from datasets_scripts.depth.alignment import choose_key_frames, fit_alignment, invert_depth, steady_ratio

SCALE, SHIFT = 0.37, 0.21  # 1 / depth = SCALE * q + SHIFT


@pytest.fixture
def clip():
    """True meters of a scene between 0.4 and 4 m, and the video model's view of it."""
    draw = np.random.default_rng(0)
    ramp = np.linspace(0.4, 4.0, 40 * 30).reshape(40, 30)
    depth = np.stack([ramp + 0.02 * t for t in range(8)]) + draw.normal(0, 0.005, (8, 40, 30))
    return depth.astype(np.float32), ((1 / depth - SHIFT) / SCALE).astype(np.float32)


def fit(relative, metric):
    return fit_alignment(relative, metric, np.random.default_rng(1))


def test_scale_shift_and_depth_are_recovered(clip):
    depth, relative = clip
    found = fit(relative, depth)
    assert (found.scale, found.shift) == pytest.approx((SCALE, SHIFT), abs=1e-4)
    assert found.is_good and found.error < 1e-3
    np.testing.assert_allclose(invert_depth(relative, found.scale, found.shift), depth, rtol=1e-3)


def test_outliers_and_flicker_do_not_change_scale_and_shift(clip):
    depth, relative = clip
    draw = np.random.default_rng(2)
    metric = depth * draw.normal(1, 0.05, (len(depth), 1, 1)).astype(np.float32)  # flickers by frame
    wrong = draw.random(depth.shape) < 0.2
    metric[wrong] = draw.uniform(0.2, 9.0, wrong.sum())
    found = fit(relative, metric)
    plain = np.polyfit(relative.ravel(), 1 / metric.ravel(), 1)
    depth_found, depth_plain = (invert_depth(relative, *pair) for pair in ((found.scale, found.shift), plain))
    error = np.abs(depth_found / depth - 1).mean()
    assert error < 0.06 < np.abs(depth_plain / depth - 1).mean()
    # One pair for the clip: the video model's steadiness stays.
    ratio = np.median(depth_found / depth, axis=(1, 2))
    assert ratio.std() < 0.2 * np.median(metric / depth, axis=(1, 2)).std()


def test_invalid_pixels_do_not_count(clip):
    depth, relative = clip
    metric, q = depth.copy(), relative.copy()
    metric[:, :10], q[:, -10:] = 0, 0
    found = fit(q, metric)
    assert (found.scale, found.shift) == pytest.approx((SCALE, SHIFT), abs=1e-3)


@pytest.mark.parametrize("case", ["upside down", "nothing valid", "unrelated", "constant"])
def test_a_clip_that_cannot_be_aligned_is_not_good(clip, case):
    depth, relative = clip
    metric = {
        "upside down": 1 / (4 - 1 / depth),  # far where it should be near
        "nothing valid": np.zeros_like(depth),
        "unrelated": np.random.default_rng(3).uniform(0.2, 9, depth.shape).astype(np.float32),
        "constant": depth,
    }[case]
    if case == "constant":
        relative = np.ones_like(relative)
    assert not fit(relative, metric).is_good


def test_depth_stays_within_its_range():
    assert invert_depth(np.array([0.0, 1e3], np.float32), 1.0, -0.5) == pytest.approx([100.0, 0.05])


def test_shapes_must_agree(clip):
    with pytest.raises(ValueError, match="shape"):
        fit(clip[1][:2], clip[0])


def test_key_frames_span_the_clip():
    assert choose_key_frames(5).tolist() == [0, 1, 2, 3, 4]
    long = choose_key_frames(1000)
    assert (len(long), long[0], long[-1]) == (32, 0, 999)


def test_flicker_is_removed_without_an_alignment(clip):
    depth, _ = clip
    flicker = np.array([1, 1.1, 0.9, 1, 1.08, 0.93, 1, 1.05])[:, None, None]
    metric = depth * flicker
    metric[3] = 0  # a frame without any
    steady = metric * steady_ratio(metric)[:, None, None]
    known = [0, 1, 2, 4, 5, 6, 7]
    before, after = (np.median(m / depth, axis=(1, 2))[known] for m in (metric, steady))
    assert after.std() < 0.5 * before.std()
    assert steady_ratio(np.zeros_like(depth)).tolist() == [1.0] * len(depth)
