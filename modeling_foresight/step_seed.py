# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""Seeds of training steps and samples from their position alone, so that a resumed run repeats them."""

from collections.abc import Iterable


def step_seed(seed: int, step: int, process: int) -> int:
    """One seed per (seed, step, process); the generator's own mixing makes neighbors unrelated."""
    return ((seed * 1_000_003 + step) * 4099 + process) % 2**63


def sample_seeds(seed: int, positions: Iterable[int]) -> list[int]:
    """Seeds of samples by their place in the stream of samples; other numbers than those of [`step_seed`]."""
    return [~step_seed(seed, position, 0) for position in positions]
