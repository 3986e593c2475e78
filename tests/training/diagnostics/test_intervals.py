"""Intervals against values worked out by hand."""

import numpy as np
import pytest

from training.diagnostics.intervals import (
    bootstrap_bounds,
    mean_difference,
    paired_difference,
    rank_correlation,
    success_rate,
)


def test_the_bootstrap_over_two_starts_has_the_quantiles_of_the_binomial():
    # Draws of two starts from {0, 1} have means 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4.
    outcomes = np.array([[[0, 1]]])
    assert bootstrap_bounds(outcomes, confidence=0.95) == (0.0, 1.0)
    assert bootstrap_bounds(outcomes, confidence=0.4) == (0.5, 0.5)


def test_the_bootstrap_over_many_starts_is_the_normal_distribution():
    outcomes = np.tile([0, 1], 200).reshape(1, 1, 400)
    half = 1.96 * 0.5 / np.sqrt(400)  # 0.049
    assert bootstrap_bounds(outcomes) == pytest.approx([0.5 - half, 0.5 + half], abs=0.004)


def test_seeds_that_differ_widen_the_interval_although_their_starts_agree():
    outcomes = np.zeros((2, 1, 100))
    outcomes[1] = 1
    assert success_rate(outcomes)["ci95"] == [0.0, 1.0]


def test_trials_of_one_start_are_no_starts_of_their_own():
    once = np.tile([0, 1], 20).reshape(1, 1, 40)
    four_times = np.repeat(once[..., None], 4, axis=-1)  # the same start decides all four
    assert bootstrap_bounds(four_times) == bootstrap_bounds(once)
    assert success_rate(four_times)["ci95"] == pytest.approx(bootstrap_bounds(once), abs=1e-4)


def test_success_without_variation_is_not_certain():
    # Wilson's bounds for 24 of 24: 24 / (24 + 1.96^2)
    figures = success_rate(np.ones((2, 3, 4), int))
    assert figures == {"success_rate": 1.0, "ci95": [0.862, 1.0], "successes": 24, "episodes": 24}


def test_a_difference_is_taken_between_outcomes_of_one_task_start_and_seed():
    first, second = np.array([[[1, 1, 0, 0]]]), np.array([[[1, 0, 0, 0]]])
    found = paired_difference(first, second)
    assert (found["mean"], found["won"], found["lost"], found["trials"]) == (0.25, 1, 0, 4)
    # Four draws without the third outcome that differs: (3/4)^4 = 0.32; all bounds are multiples of 1/4.
    assert bootstrap_bounds(first - second) == (0.0, 0.75)
    # Agresti and Min: (1 - 0) / 6, and a standard error of sqrt(1 + 1 - 1 / 6) / 6 = 0.226
    assert found["ci95"] == pytest.approx([1 / 6 - 1.96 * 0.2257, 0.75], abs=1e-3)
    mirrored = paired_difference(second, first)["ci95"]
    assert mirrored == [-found["ci95"][1], -found["ci95"][0]]


def test_pairs_that_all_agree_leave_the_doubt_of_their_number():
    outcomes = np.random.default_rng(0).integers(0, 2, (1, 5, 10))
    assert paired_difference(outcomes, outcomes)["ci95"] == pytest.approx([-1.96 / 52, 1.96 / 52], abs=1e-4)


def test_four_trials_lost_and_none_won_are_no_evidence():
    # McNemar's exact test gives p = 0.125; the bootstrap alone would exclude zero.
    differences = np.zeros((1, 5, 10))
    differences[0, :4, 0] = -1
    assert bootstrap_bounds(differences)[1] < 0
    low, high = mean_difference(differences)["ci95"]
    assert low < -0.15 and high > 0


@pytest.mark.parametrize("most", [1, 2])
def test_bounds_of_few_trials_stay_within_what_is_possible(most):
    solved = np.ones((1, 2, 2))
    found = paired_difference(0 * solved, solved) if most == 1 else mean_difference(-most * solved)
    assert found["mean"] == found["ci95"][0] == -most and found["ci95"][1] < 0
    assert all(type(bound) is float for bound in found["ci95"])


def test_rank_correlation_needs_three_pairs_that_vary():
    assert rank_correlation([0.1, 0.2, 0.3], [1.0, 5.0, 6.0]) == 1.0
    assert rank_correlation([0.1, 0.2, 0.3], [3.0, 1.0, 2.0]) == -0.5  # 1 - 6 * (4 + 1 + 1) / (3 * 8)
    assert rank_correlation([0.1, 0.2, 0.3], [1.0, 1.0, 1.0]) is None
    assert rank_correlation([0.1, 0.2], [1.0, 2.0]) is None
