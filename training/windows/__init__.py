"""Datasets -> windows of T frames with targets and masks, for both trainers."""

from training.windows.dataset import ForesightWindows
from training.windows.mixture import (
    ConcatWindows,
    collate_windows,
    control_rate,
    find_embodiments,
    warn_of_differences,
    warn_of_no_future,
)
from training.windows.sampler import WindowSampler
from training.windows.settings import WindowConfig, split_episodes

__all__ = [
    "ConcatWindows",
    "ForesightWindows",
    "WindowConfig",
    "WindowSampler",
    "collate_windows",
    "control_rate",
    "split_episodes",
    "find_embodiments",
    "warn_of_differences",
    "warn_of_no_future",
]
