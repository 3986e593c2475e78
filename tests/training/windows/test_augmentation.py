import numpy as np
import pytest
import torch

from training.windows.augmentation import draw_shift, shift_fraction, shift_frames, shift_px

HEIGHT, WIDTH, PADDING = 9, 12, 3


def pad_and_crop(frames, s_x, s_y, padding):
    """The definition: edge padding, then a crop at (s_x, s_y)."""
    widths = [(0, 0)] * (frames.ndim - 2) + [(padding, padding)] * 2
    padded = np.pad(frames, widths, mode="edge")
    height, width = frames.shape[-2:]
    return padded[..., s_y : s_y + height, s_x : s_x + width]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_shift_equals_edge_padding_and_cropping_for_every_offset(dtype):
    frames = np.random.default_rng(0).integers(0, 255, (2, 3, HEIGHT, WIDTH)).astype(dtype)
    for s_x in range(2 * PADDING + 1):
        for s_y in range(2 * PADDING + 1):
            expected = pad_and_crop(frames, s_x, s_y, PADDING)
            np.testing.assert_array_equal(shift_frames(frames, s_x - PADDING, s_y - PADDING), expected)


def test_shift_equals_sampling_a_padded_picture_on_a_grid_as_drq_v2_and_grmg_do():
    side = 10
    frames = torch.from_numpy(
        np.random.default_rng(2).integers(0, 255, (2, 3, side, side)).astype(np.float32)
    )
    padded = torch.nn.functional.pad(frames, [PADDING] * 4, mode="replicate")
    centres = (2 * torch.arange(side) + 1) / (side + 2 * PADDING) - 1  # of the crop at (0, 0), in -1..1
    rows, columns = torch.meshgrid(centres, centres, indexing="ij")
    for s_x, s_y in [(0, 0), (2 * PADDING, 1), (PADDING, PADDING), (1, 2 * PADDING)]:
        grid = torch.stack([columns + 2 * s_x / padded.shape[-1], rows + 2 * s_y / padded.shape[-2]], dim=-1)
        sampled = torch.nn.functional.grid_sample(padded, grid.expand(2, -1, -1, -1), align_corners=False)
        moved = shift_frames(frames.numpy(), s_x - PADDING, s_y - PADDING)
        np.testing.assert_allclose(moved, sampled.numpy(), atol=1e-2)  # interpolation of values up to 255


def test_points_follow_the_pixel_they_lie_on():
    frame = np.zeros((HEIGHT, WIDTH), np.float32)
    column, row = 7, 4
    frame[row, column] = 1
    point = np.float32([[(column + 0.5) / WIDTH, (row + 0.5) / HEIGHT, 1.25]])
    for d_x, d_y in [(2, -3), (-1, 2), (0, 0), (3, 3)]:
        moved = point - np.float32([*shift_fraction(d_x, d_y, HEIGHT, WIDTH), 0])
        new_row, new_column = np.unravel_index(shift_frames(frame, d_x, d_y).argmax(), frame.shape)
        assert moved[0, 0] * WIDTH == pytest.approx(new_column + 0.5, abs=1e-5)
        assert moved[0, 1] * HEIGHT == pytest.approx(new_row + 0.5, abs=1e-5)
        assert moved[0, 2] == np.float32(1.25)


def test_padding_is_five_percent_as_in_grmg():
    assert shift_px(0.05, 200, 200) == (10, 10)
    assert shift_px(0.05, 84, 84) == (4, 4)
    assert shift_px(0.05, 128, 128) == (6, 6)
    assert shift_px(0.05, 100, 200) == (10, 5)


def test_offsets_are_uniform_over_0_to_2p_on_each_axis():
    rng = np.random.default_rng(1)
    draws = np.array([draw_shift(rng, (2, 1)) for _ in range(6000)])
    assert set(draws[:, 0]) == set(range(-2, 3)) and set(draws[:, 1]) == set(range(-1, 2))
    counts = np.bincount(draws[:, 0] + 2)
    assert counts.min() > 1000 and counts.max() < 1400  # 1200 expected of each of five


def test_no_padding_draws_nothing_but_advances_the_generator_alike():
    with_padding, without = np.random.default_rng(3), np.random.default_rng(3)
    draw_shift(with_padding, (5, 5))
    assert draw_shift(without, (0, 0)) == (0, 0)
