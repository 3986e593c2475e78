"""The arithmetic of windows against GR-MG's rules, written as plain loops."""

import numpy as np
import pytest

from training.windows.slicing import GOAL_WITHIN_FRAMES, action_chunks, goal_rows, progress, window_starts

T, K, A = 4, 3, 2


@pytest.mark.parametrize("first", [0, 17])
def test_starts_are_grmgs_at_stride_one(first):
    for last in range(first, first + 15):
        skipped = last - T - K + 2 <= first
        expected = [] if skipped else list(range(first, last - T + 1))
        assert list(window_starts(first, last, T, chunk_size=K)) == expected


def test_a_segment_too_short_for_a_whole_chunk_is_kept_unless_a_chunk_is_asked_for():
    assert len(window_starts(5, 5 + T, T, 1)) == 1
    assert len(window_starts(5, 5 + T - 1, T, 1)) == 0
    assert len(window_starts(5, 5 + T + K - 2, T, chunk_size=K)) == 0
    assert len(window_starts(5, 5 + T + K - 1, T, chunk_size=K)) == K


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_every_window_stays_inside_and_never_has_the_last_frame(stride):
    first, last = 6, 29
    starts = window_starts(first, last, T, 1, stride)
    newest = [start + (T - 1) * stride for start in starts]
    assert starts[0] == first and newest[-1] == last - 1
    assert len(starts) == last - first - (T - 1) * stride


def test_goals_are_the_25_frames_after_the_window_cut_at_the_end():
    assert GOAL_WITHIN_FRAMES == 25
    assert goal_rows(10, 100).tolist() == list(range(11, 36))
    assert goal_rows(10, 35).tolist() == list(range(11, 36))
    assert goal_rows(10, 20).tolist() == list(range(11, 21))
    assert goal_rows(10, 11).tolist() == [11]
    assert goal_rows(10, 17, stride=3).tolist() == [13, 16, 17]
    assert goal_rows(10, 16, stride=3).tolist() == [13, 16]
    assert goal_rows(10, 500, stride=2)[-1] == 60


def test_progress_is_the_share_of_the_segment():
    share = progress(np.arange(7, 12), 7, 15)
    assert share.dtype == np.float32 and share.tolist() == [0, 0.125, 0.25, 0.375, 0.5]
    assert progress(np.array([15]), 7, 15) == 1


@pytest.mark.parametrize("rows", [0, 1, 3, T + K - 1, T + K + 2])
def test_a_chunk_holds_the_next_actions_and_masked_zeros_past_the_end(rows):
    actions = 1 + np.arange(rows * A, dtype=np.float64).reshape(rows, A)
    chunks, mask = action_chunks(actions, T, K)
    assert chunks.shape == (T, K, A) and chunks.dtype == np.float32 and mask.shape == (T, K)
    for t in range(T):
        for k in range(K):
            assert mask[t, k] == (t + k < rows)
            assert chunks[t, k].tolist() == (actions[t + k].tolist() if t + k < rows else [0, 0])
