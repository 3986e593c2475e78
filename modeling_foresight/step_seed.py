# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""Seeds of training as a function of (seed, step, process), so that a resumed run gives the same result."""


def step_seed(seed: int, step: int, process: int) -> int:
    """One seed per (seed, step, process); the generator's own mixing makes neighbors unrelated."""
    return ((seed * 1_000_003 + step) * 4099 + process) % 2**63
