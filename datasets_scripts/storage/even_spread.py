"""Pick some of many rows, episodes or windows, evenly spread."""

import numpy as np

__all__ = ["spread_evenly"]


def spread_evenly(n: int, most: int) -> list[int]:
    """At most `most` of the numbers from 0 to `n - 1`, ascending; the first and the last if there are two."""
    return np.unique(np.linspace(0, n - 1, min(most, n)).round().astype(int)).tolist()
