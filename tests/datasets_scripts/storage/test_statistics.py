"""Statistics of parts give those of all rows."""

import numpy as np
import pytest

from datasets_scripts.storage.statistics import pool_statistics

NAMES = ("mean", "std", "min", "max")


def summary(rows):
    return {name: getattr(rows, name)(0) for name in NAMES}


def test_parts_of_different_length_give_the_statistics_of_all_rows():
    rows = np.random.default_rng(0).normal(5, [1, 3], (10, 2))
    parts = [rows[:1], rows[1:4], rows[4:]]
    each = {name: np.stack([summary(part)[name] for part in parts]) for name in NAMES}
    for weight in (np.array([1, 3, 6]), np.array([0.1, 0.3, 0.6])):
        pooled = pool_statistics(each, weight)
        assert pooled.keys() == set(NAMES)
        for name, value in summary(rows).items():
            assert pooled[name] == pytest.approx(value), name
