"""Which episodes of a dataset give windows, and how many each."""

import warnings

import numpy as np

from datasets_scripts.storage.dataset_rows import DatasetRows
from datasets_scripts.storage.provenance import flagged_episodes, read_provenance
from training.windows.columns import WindowColumns
from training.windows.settings import WindowConfig
from training.windows.slicing import window_starts

__all__ = ["EpisodeWindows"]


class EpisodeWindows:
    """Windows of the chosen episodes, counted one episode after the other; flags of cameras in use count.

    Attributes:
        episodes (`numpy.ndarray`): int64, episodes that give windows.
        stops (`numpy.ndarray`): int64, number of windows up to and with each of them.
        flagged (`list[int]`): Episodes left out for their flags.

    Raises:
        ValueError: If no window is left; says why and the remedy.
    """

    def __init__(self, rows: DatasetRows, columns: WindowColumns, config: WindowConfig):
        chosen = _choose_episodes(rows, config)
        self.flagged = _find_flagged(chosen, rows, columns, config) if config.skip_flagged else []
        if len(self.flagged) == len(chosen):
            raise ValueError(
                f"dataset {rows.name}: the {len(chosen)} episodes chosen all have a flag, such as "
                f"{self.flagged[0]}, so that skip_flagged leaves none; see why with "
                "`python datasets_scripts/inspect_dataset.py DIR --report FILE.html`, choose another seed of "
                "the split, or set skip_flagged to false"
            )
        chosen = np.setdiff1d(chosen, self.flagged).astype(np.int64)
        counts = _count_windows(rows, config, chosen)
        self.episodes = chosen[counts >= 1]
        self._starts = rows.episode_starts[self.episodes]
        self.stops = np.cumsum(counts[counts >= 1])

    def __len__(self) -> int:
        return int(self.stops[-1])

    def locate(self, i: int) -> tuple[int, int]:
        """Episode and first row (global frame number) of window `i`.

        Raises:
            IndexError: If there is no such window.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        slot = int(np.searchsorted(self.stops, i, side="right"))
        before = int(self.stops[slot - 1]) if slot else 0
        return int(self.episodes[slot]), int(self._starts[slot]) + i - before


def _count_windows(rows: DatasetRows, config: WindowConfig, chosen: np.ndarray) -> np.ndarray:
    """Windows of each chosen episode; warns about those that are too short for one."""
    frames, stride = config.history_length, config.frame_stride
    firsts, lasts = rows.episode_starts[chosen], rows.episode_stops[chosen] - 1
    bounds = zip(firsts, lasts, strict=True)
    counts = np.array([len(window_starts(first, last, frames, 1, stride)) for first, last in bounds])
    needed = config.frames_needed
    if counts.max() < 1:
        raise ValueError(
            f"dataset {rows.name}: no window of history_length={frames} frames fits (frame_stride {stride}); "
            f"the longest of {len(chosen)} episodes has {(lasts - firsts).max() + 1} frames and {needed} are "
            "needed: take longer episodes, or train with a smaller history_length"
        )
    if short := int((counts < 1).sum()):
        warnings.warn(
            f"dataset {rows.name}: {short} of {len(chosen)} episodes are shorter than {needed} frames and "
            "give no window",
            stacklevel=4,
        )
    return counts


def _choose_episodes(rows: DatasetRows, config: WindowConfig) -> np.ndarray:
    chosen = range(rows.n_episodes) if config.episodes is None else config.episodes
    chosen = np.unique(np.asarray(chosen, dtype=np.int64))
    if not len(chosen) or chosen[0] < 0 or chosen[-1] >= rows.n_episodes:
        raise ValueError(
            f"dataset {rows.name} has episodes 0 to {rows.n_episodes - 1}, but {chosen.tolist()} were chosen"
        )
    return chosen


def _find_flagged(
    chosen: np.ndarray, rows: DatasetRows, columns: WindowColumns, config: WindowConfig
) -> list[int]:
    """Those of the chosen episodes that have a flag of a camera in use."""
    provenance = read_provenance(rows.root)
    if not any("flags" in episode for episode in provenance.get("episodes", {}).values()):
        if config.missing_targets:  # a mixture may hold datasets without labels
            return []
        raise ValueError(
            f"dataset {rows.name} has no flags to skip episodes by; `python "
            "datasets_scripts/inspect_dataset.py DIR --write-flags` writes them, or set skip_flagged to false"
        )
    flagged = flagged_episodes(provenance, list(columns.cameras.values()))
    return [int(episode) for episode in chosen if episode in flagged]
