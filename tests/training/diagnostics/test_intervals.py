"""Intervals against values worked out by hand."""

import numpy as np
import pytest

from training.diagnostics.intervals import bootstrap_mean, paired_difference, rank_correlation


def test_without_variation_the_interval_is_the_mean():
    assert bootstrap_mean(np.ones((2, 3, 4))) == {"mean": 1.0, "ci95": [1.0, 1.0], "trials": 24}


def test_an_interval_over_two_starts_has_the_quantiles_of_the_binomial():
    # Draws of two starts from {0, 1} have means 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4.
    outcomes = np.array([[[0, 1]]])
    assert bootstrap_mean(outcomes, confidence=0.95)["ci95"] == [0.0, 1.0]
    assert bootstrap_mean(outcomes, confidence=0.4)["ci95"] == [0.5, 0.5]


def test_an_interval_over_many_starts_is_that_of_the_normal_distribution():
    outcomes = np.tile([0, 1], 200).reshape(1, 1, 400)
    half = 1.96 * 0.5 / np.sqrt(400)  # 0.049
    assert bootstrap_mean(outcomes)["ci95"] == pytest.approx([0.5 - half, 0.5 + half], abs=0.004)


def test_seeds_that_differ_widen_the_interval_although_their_starts_agree():
    outcomes = np.zeros((2, 1, 100))
    outcomes[1] = 1
    assert bootstrap_mean(outcomes)["ci95"] == [0.0, 1.0]


def test_a_difference_is_taken_between_outcomes_of_one_task_start_and_seed():
    first, second = np.array([[[1, 1, 0, 0]]]), np.array([[[1, 0, 0, 0]]])
    found = paired_difference(first, second)
    assert (found["mean"], found["won"], found["lost"], found["trials"]) == (0.25, 1, 0, 4)
    # Four draws without the third outcome that differs: (3/4)^4 = 0.32; all bounds are multiples of 1/4.
    assert found["ci95"] == [0.0, 0.75]
    assert paired_difference(second, first)["ci95"] == [-0.75, 0.0]


def test_pairs_that_agree_make_a_difference_certain_however_often_both_fail():
    outcomes = np.random.default_rng(0).integers(0, 2, (3, 2, 10))
    assert paired_difference(outcomes, outcomes)["ci95"] == [0.0, 0.0]


def test_rank_correlation_needs_three_pairs_that_vary():
    assert rank_correlation([0.1, 0.2, 0.3], [1.0, 5.0, 6.0]) == 1.0
    assert rank_correlation([0.1, 0.2, 0.3], [3.0, 1.0, 2.0]) == -0.5  # 1 - 6 * (4 + 1 + 1) / (3 * 8)
    assert rank_correlation([0.1, 0.2, 0.3], [1.0, 1.0, 1.0]) is None
    assert rank_correlation([0.1, 0.2], [1.0, 2.0]) is None
