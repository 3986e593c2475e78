"""Confidence intervals of success rates and of their differences.

Outcomes are arrays `(S, T, E)` of successes (0, 1): training seeds, tasks, starts; or `(S, T, E, N)`, where
every start was tried N times, with policies of other numbers of demonstrations for instance. All variants
meet the same tasks, starts and seeds, so a difference is taken between the same trials before it is averaged.

Two intervals are made, and the outer bounds of both count. A bootstrap over seeds and starts knows what
trials have in common, but it collapses where few of them differ: 50 pairs that agree would leave no doubt. An
interval that takes trials as independent does not collapse.
"""

import functools

import numpy as np

from training.evaluation.metric_loader import load_metric

__all__ = ["Z_95", "mean_difference", "paired_difference", "rank_correlation", "success_rate"]

DRAWS = 10_000
Z_95 = 1.959964


def success_rate(outcomes: np.ndarray) -> dict:
    """Share of solved trials, with the outer bounds of the bootstrap's and Wilson's 95 % intervals.

    Returns:
        `dict`: `success_rate`, `ci95` (lower and upper bound), `successes`, `episodes`.
    """
    outcomes = np.asarray(outcomes)
    wilson = success_metric().compute(predictions=outcomes.astype(int).ravel().tolist())
    return {
        "success_rate": float(outcomes.mean()),
        "ci95": outer_bounds(bootstrap_bounds(outcomes), wilson["interval"]),
        "successes": int(outcomes.sum()),
        "episodes": outcomes.size,
    }


def mean_difference(differences: np.ndarray, most: float = 2.0) -> dict:
    """Mean of differences between paired outcomes, with the outer bounds of two 95 % intervals.

    They are the bootstrap's and that of Agresti and Min (2005, "Simple improved confidence intervals for
    comparing matched proportions"), which adds half a trial to each of the four kinds of pairs.

    Args:
        differences (`np.ndarray`): -1, 0 or 1 each, in the form of outcomes; or differences of two such
            numbers.
        most (`float`): The largest difference that is possible; bounds do not go beyond it.

    Returns:
        `dict`: `mean`, `ci95`, `trials`.
    """
    differences = np.asarray(differences, np.float64)
    n, total = differences.size + 2, differences.sum()
    middle = total / n
    reach = Z_95 * np.sqrt(np.square(differences).sum() + 1 - total**2 / n) / n
    paired = [float(np.clip(bound, -most, most)) for bound in (middle - reach, middle + reach)]
    return {
        "mean": float(differences.mean()),
        "ci95": outer_bounds(bootstrap_bounds(differences), paired),
        "trials": differences.size,
    }


def paired_difference(first: np.ndarray, second: np.ndarray) -> dict:
    """Success of the first minus that of the second on the same trials, with its interval.

    Returns:
        `dict`: As [`mean_difference`], and how many trials only the first (`won`) or the second (`lost`)
        solved.
    """
    differences = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    counts = {"won": int((differences > 0).sum()), "lost": int((differences < 0).sum())}
    return mean_difference(differences, most=1.0) | counts


def bootstrap_bounds(outcomes: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean over tasks, by a bootstrap over training seeds and starts.

    Every draw takes training seeds with replacement, and starts within each task with replacement; the tasks
    are fixed, and a start brings all its N trials. Both sources of chance count: two policies that differ in
    their seed alone can differ more than two halves of the starts. With one seed only the starts are drawn,
    and with few seeds the interval is too narrow rather than too wide.

    Args:
        outcomes (`np.ndarray`): `(S, T, E)` or `(S, T, E, N)`.
        confidence (`float`): Coverage.
    """
    outcomes = np.asarray(outcomes, np.float64)
    outcomes = outcomes.mean(-1) if outcomes.ndim == 4 else outcomes
    seeds, tasks, starts = outcomes.shape
    generator = np.random.default_rng(0)
    of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS) / seeds  # (draws, S)
    means = np.zeros(DRAWS)
    for task in range(tasks):
        of_starts = generator.multinomial(starts, np.full(starts, 1 / starts), DRAWS) / starts  # (draws, E)
        means += np.einsum("ds,de,se->d", of_seeds, of_starts, outcomes[:, task], optimize=True) / tasks
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


@functools.cache
def success_metric():
    """The metric `success_rate`, loaded once."""
    return load_metric("success_rate")


def outer_bounds(*intervals: tuple[float, float]) -> list[float]:
    """Lowest lower and highest upper bound, rounded for JSON."""
    lows, highs = zip(*intervals, strict=True)
    return [round(min(lows), 4), round(max(highs), 4)]


def rank_correlation(first: list[float], second: list[float]) -> float | None:
    """Spearman's rank correlation; `None` if one side does not vary, or for fewer than three pairs."""
    if len(first) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    from scipy.stats import spearmanr  # training itself does not need it

    return round(float(spearmanr(first, second).statistic), 4)
