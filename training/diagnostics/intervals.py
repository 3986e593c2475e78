"""Confidence intervals of success rates and of their differences.

Outcomes are arrays `(S, T, E)`: training seeds, tasks, starts. All variants meet the same tasks, starts and
seeds, so a difference is taken between outcomes of the same task, start and seed before it is averaged.
"""

import numpy as np

__all__ = ["bootstrap_mean", "paired_difference", "rank_correlation"]

DRAWS = 10_000


def bootstrap_mean(outcomes: np.ndarray, confidence: float = 0.95, draws: int = DRAWS) -> dict:
    """Mean over tasks with the percentile interval of a bootstrap over training seeds and starts.

    Every draw takes training seeds with replacement, and starts within each task with replacement; the tasks
    are fixed. Both sources of chance count: two policies that differ in their seed alone can differ more than
    two halves of the starts. With one seed only the starts are drawn, and with few seeds the interval is too
    narrow rather than too wide.

    Args:
        outcomes (`np.ndarray`): `(S, T, E)` successes (0, 1) or differences of them (-1, 0, 1).
        confidence (`float`): Coverage.
        draws (`int`): Bootstrap samples; their seed is fixed.

    Returns:
        `dict`: `mean`, `ci95` (lower and upper bound), `trials`.
    """
    outcomes = np.asarray(outcomes, np.float64)
    seeds, tasks, starts = outcomes.shape
    generator = np.random.default_rng(0)
    of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds  # (draws, S)
    means = np.zeros(draws)
    for task in range(tasks):
        of_starts = generator.multinomial(starts, np.full(starts, 1 / starts), draws) / starts  # (draws, E)
        means += np.einsum("ds,de,se->d", of_seeds, of_starts, outcomes[:, task], optimize=True) / tasks
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return {
        "mean": float(outcomes.mean()),
        "ci95": [round(float(low), 4), round(float(high), 4)],
        "trials": outcomes.size,
    }


def paired_difference(first: np.ndarray, second: np.ndarray) -> dict:
    """Success of the first minus that of the second on the same `(S, T, E)` trials, with its interval.

    Returns:
        `dict`: As [`bootstrap_mean`], and how many trials only the first (`won`) or the second (`lost`)
        solved.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    difference = first - second
    counts = {"won": int((difference > 0).sum()), "lost": int((difference < 0).sum())}
    return bootstrap_mean(difference) | counts


def rank_correlation(first: list[float], second: list[float]) -> float | None:
    """Spearman's rank correlation; `None` if one side does not vary, or for fewer than three pairs."""
    if len(first) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    from scipy.stats import spearmanr  # training itself does not need it

    return round(float(spearmanr(first, second).statistic), 4)
