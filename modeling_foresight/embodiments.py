# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""Statistics of states and actions, of one robot or of several that share a policy.

Robots differ in the entries of their states and actions. In the model each entry has a place
(`ForesightConfig.embodiments`), and a place that a robot lacks is an entry that is always zero.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .configuration_foresight import LARGEST_SIZE

STATISTICS = ("mean", "std", "min", "max")


class EntryTable(NamedTuple):
    """Statistics of the entries of an action or a state: one number, or float32 tensor, for each.

    Attributes:
        mean, divisor: What normalizes; the divisor of an entry that never moves is 1.
        low, high: Smallest and largest value.
        still: Whether the entry never moves.
    """

    mean: Any
    divisor: Any
    low: Any
    high: Any
    still: Any


ABSENT = EntryTable(0.0, 1.0, 0.0, 0.0, True)
# Without statistics numbers pass unchanged, as binary entries of 0 and 1 do.
UNCHANGED_ENTRY = EntryTable(0.0, 1.0, 0.0, 1.0, False)


def make_table(stats: Mapping) -> EntryTable:
    """Numbers for every entry; the noise of an entry that never moves must not be scaled up."""
    mean, std, low, high = (tuple(stats[key]) for key in STATISTICS)
    still = find_still_entries(stats)
    return EntryTable(mean, tuple(1.0 if s else x for s, x in zip(still, std, strict=True)), low, high, still)


def place_entries(values: Tensor, places: Sequence[int], size: int) -> Tensor:
    """A robot's own entries `(..., n)` at their places of the model's `(..., size)`; the others are zero."""
    placed = values.new_zeros(*values.shape[:-1], size)
    placed[..., places] = values
    return placed


def place_tables(embodiments: Mapping, statistics: Mapping, sizes: Mapping[str, int]) -> dict[str, dict]:
    """Tables of `action` and `state` of all robots, in the order of their names.

    Raises:
        ValueError: If statistics do not fit the places or sizes; names the robot.
    """
    tables = {}
    for name in sorted(embodiments):
        tables[name] = {}
        for kind, size in sizes.items():
            if type(size) is not int or not 0 <= size <= LARGEST_SIZE:
                raise ValueError(f"{kind}_dim={size!r} must be a whole number from 0 to {LARGEST_SIZE}.")
            stats, places = statistics.get(name, {}).get(kind), embodiments[name][kind]
            check_statistics(f"{name}'s {kind}", stats)
            if max(places, default=-1) >= size or (stats and len(stats["mean"]) != len(places)):
                raise ValueError(
                    f"The statistics of {name}'s {kind} do not fit its places {places} of {size}: export the "
                    "model again."
                )
            tables[name][kind] = place_table(stats, places, size)
    return tables


def place_table(stats: Mapping | None, places: Sequence[int], size: int) -> EntryTable:
    """The table of one robot's entries at their `places` in a model of `size` entries."""
    own = [(x,) * len(places) for x in UNCHANGED_ENTRY] if stats is None else make_table(stats)
    columns = []
    for values, absent in zip(own, ABSENT, strict=True):
        entries = dict(zip(places, values, strict=True))
        columns.append(tuple(entries.get(place, absent) for place in range(size)))
    return EntryTable(*columns)


def keep_statistics(config, given: dict, robot: str | None = None) -> dict[str, dict[str, list[float]]]:
    """The statistics of `action` and `state` that a processor keeps, as plain numbers.

    Raises:
        ValueError: If one has another size than the config's; names it.
    """
    found = {}
    for name, stats in given.items():
        if stats is None or (name == "action" and config.action_codec == "local_delta"):
            continue
        kept = {key: np.asarray(stats[key], dtype=np.float64).ravel().tolist() for key in STATISTICS}
        size, expected = len(kept["mean"]), getattr(config, f"{name}_dim")
        if robot:
            expected = len(config.embodiments[robot][name])
        if size != expected:
            raise ValueError(
                f"The dataset's {name} has {size} entries, but the config says {name}_dim={expected}: "
                f"set {name}_dim={size}."
                if robot is None
                else f"The {name} of {robot} has {size} entries, but embodiments.{robot}.{name} {expected}."
            )
        found[name] = kept
    return found


def as_plain_numbers(stats: Mapping | None) -> dict[str, Any] | None:
    """Statistics given as arrays or tensors as flat lists, which JSON takes; others as they are."""
    if not isinstance(stats, Mapping):
        return stats
    return {
        key: np.asarray(x, dtype=np.float64).ravel().tolist() if isinstance(x, np.ndarray | Tensor) else x
        for key, x in stats.items()
    }


def check_statistics(name: str, stats: Mapping | None) -> None:
    """Refuses statistics, of a dataset or of a processor_config.json, that would turn values into NaN."""
    if stats is None:
        return
    try:
        values = np.array([stats[key] for key in STATISTICS], dtype=np.float64)
    except (KeyError, TypeError, ValueError):
        values = np.empty(0)
    if values.ndim != 2 or any(isinstance(entry, bool | str) for key in STATISTICS for entry in stats[key]):
        raise ValueError(f"{name}_stats must hold one number per entry for each of {list(STATISTICS)}.")
    # What is finite as float64 only becomes infinite as soon as it meets a tensor.
    if not (np.abs(values) <= np.finfo(np.float32).max).all():
        raise ValueError(
            f"The statistics of {name} are not finite: the dataset holds NaN or infinite values. Repair "
            "those frames or leave their episodes out, then recompute them."
        )
    _, std, low, high = values
    if (std < 0).any() or (low > high).any():
        raise ValueError(f"{name}_stats has a negative std, or a min above its max: recompute them.")


def find_still_entries(stats: Mapping) -> tuple[bool, ...]:
    """Entries of an action or a state that never moved: their range is what float32 rounds away.

    Units are the user's, so no fixed length or angle says what moves: 5e-5 may be noise or the meters of one
    step at a high rate. Rounding leaves some units in the last place of the entry itself, and about one of
    a larger entry where it was computed from that one, such as a difference of poses. The median entry stands
    for these: beside one entry in ticks of an encoder, small motions in meters are not rounding errors.

    Args:
        stats (`dict`): `min`, `max` and `std` of every entry, in the dataset's units.
    """
    low, high, std = (np.asarray(stats[key], dtype=np.float64) for key in ("min", "max", "std"))
    size = np.maximum(abs(low), abs(high))
    typical = np.sort(size)[(len(size) - 1) // 2] if len(size) else 0
    noise = np.finfo(np.float32).eps * np.maximum(8 * size, typical)
    return tuple(((high - low <= noise) | (std <= 0)).tolist())
