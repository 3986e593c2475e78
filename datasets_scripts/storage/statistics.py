"""Statistics of rows from those of their parts."""

from collections.abc import Mapping

import numpy as np

__all__ = ["pool_statistics"]


def pool_statistics(parts: Mapping[str, np.ndarray], weight: np.ndarray) -> dict[str, np.ndarray]:
    """`mean`, `std`, `min` and `max` of all rows, each `(size,)`, in float64.

    Args:
        parts (`Mapping`): The same of each of P parts, `(P, size)`.
        weight (`np.ndarray`): `(P,)`, of which only ratios count, such as rows of each part.
    """
    share = (np.asarray(weight, np.float64) / np.sum(weight))[:, None]
    mean = (share * parts["mean"]).sum(0)
    variance = (share * (parts["std"] ** 2 + (parts["mean"] - mean) ** 2)).sum(0)
    return {
        "mean": mean,
        "std": np.sqrt(variance),
        "min": parts["min"].min(0),
        "max": parts["max"].max(0),
    }
