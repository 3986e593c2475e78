"""Evenly spread picks."""

import pytest

from datasets_scripts.storage.even_spread import spread_evenly


@pytest.mark.parametrize(
    ("n", "most", "picks"),
    [
        (0, 4, []),
        (1, 4, [0]),
        (3, 8, [0, 1, 2]),
        (10, 1, [0]),
        (10, 2, [0, 9]),
        (11, 3, [0, 5, 10]),
        (10, 4, [0, 3, 6, 9]),
        (6, 4, [0, 2, 3, 5]),
    ],
)
def test_picks_are_distinct_and_reach_both_ends(n, most, picks):
    assert spread_evenly(n, most) == picks
