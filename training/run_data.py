"""The datasets of a run as windows for training and validation, and their statistics and descriptions."""

import dataclasses
import hashlib
import itertools
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import distributed
from torch.utils.data import DataLoader, Subset

from datasets_scripts.columns import find_image_key, image_key
from datasets_scripts.storage.dataset_rows import DatasetRows
from datasets_scripts.storage.provenance import (
    EPISODE_FACTS_PATH,
    PROVENANCE_PATH,
    read_provenance,
    scripted_in,
)
from modeling_foresight import ForesightConfig
from training.config import DatasetSource, RunConfig
from training.windows import (
    ConcatWindows,
    ForesightWindows,
    WindowConfig,
    WindowSampler,
    collate_windows,
    split_episodes,
    warn_of_differences,
)

__all__ = [
    "RunData",
    "dataset_identity",
    "evaluation_loader",
    "open_datasets",
    "training_loader",
    "window_config",
]


def open_datasets(config: RunConfig) -> list[DatasetRows]:
    """The datasets of a run, in the config's order; the only place where training opens them.

    Raises:
        ValueError: If no dataset is named, or one is missing or damaged.
    """
    if not config.data.datasets:
        raise ValueError("no dataset: give --dataset DIR_OR_REPO, or data.datasets in the config")
    return [DatasetRows(source.path) for source in config.data.datasets]


def dataset_identity(rows: DatasetRows) -> dict:
    """Name, size, tasks and metadata digest of a dataset: the same for every copy of it."""
    digest = hashlib.sha256()
    for place in ("meta/info.json", PROVENANCE_PATH, EPISODE_FACTS_PATH):
        if (rows.root / place).exists():
            digest.update((rows.root / place).read_bytes())
    return {
        "name": Path(rows.name).name,
        "episodes": rows.n_episodes,
        "frames": len(rows),
        "tasks": rows.tasks,
        "digest": digest.hexdigest()[:16],
    }


def window_config(model: ForesightConfig, config: RunConfig) -> WindowConfig:
    """Windows of a run: what the model takes and is supervised with, made as `config.data` says."""
    names = ("p_moving", "occluded_weight", "random_shift", "action_key")
    names += ("skip_flagged", "missing_targets", "frame_cache")
    return WindowConfig.for_model(
        model,
        views=list(model.views),
        goal_image=model.goal_image,
        state_key=config.data.state_key if model.state_dim else None,
        action_codec=model.action_codec,
        binary_action_indices=list(model.binary_action_indices),
        seed=config.seed,
        **{name: getattr(config.data, name) for name in names},
    )


class RunData:
    """Windows of all datasets of a run, split by episode.

    Args:
        config (`RunConfig`): Datasets and how their windows are made.
        model (`ForesightConfig`): Lengths, views and objectives.
        datasets (`Sequence[DatasetRows]`, *optional*): The datasets, if they are already open.

    Attributes:
        train (`ConcatWindows`): Augmented windows of the training episodes.
        val (`ConcatWindows`, *optional*): Windows of the validation episodes, held out or those of
            `data.validation`; `None` if there are none.
        instructions (`list[str]`): All instructions.
        fps (`float`): Control steps per second.

    Raises:
        ValueError: If no dataset is named, one does not fit the model, or none has anything to train on.
    """

    def __init__(
        self, config: RunConfig, model: ForesightConfig, datasets: Sequence[DatasetRows] | None = None
    ):
        datasets = open_datasets(config) if datasets is None else datasets
        base = window_config(model, config)
        train, val = [], []
        for source, rows in zip(config.data.datasets, datasets, strict=True):
            own = _apply_source(base, source)
            # Split before flagged episodes are removed: a flag must not move other episodes across the split.
            chosen, held_out = split_episodes(rows.n_episodes, config.data.val_fraction, config.seed)
            train.append(ForesightWindows(rows, dataclasses.replace(own, episodes=chosen)))
            if held_out:
                val.append(ForesightWindows(rows, own.for_evaluation(held_out)))
        self.train = ConcatWindows(train)
        warn_of_differences(train)
        if config.data.validation:
            own = _apply_source(base, config.data.datasets[0])
            val.append(_open_validation(config.data.validation, own.for_evaluation(), train))
        self.val = ConcatWindows(val) if val else None
        self.instructions = sorted({task for windows in train for task in windows.rows.tasks})
        # Datasets of a mixture may differ; control follows the first.
        self.fps = train[0].rows.fps / train[0].config.frame_stride

    def unaugmented_train(self) -> ConcatWindows:
        """The training windows without augmentation."""
        plain = (w.config.for_evaluation(w.config.episodes) for w in self.train.datasets)
        return ConcatWindows(
            [ForesightWindows(w.rows, own) for w, own in zip(self.train.datasets, plain, strict=True)]
        )

    def describe_window(self, index: int) -> str:
        """Dataset, episode and newest frame of a training window, for messages."""
        windows, index = self.train.locate(index)
        episode, first_row = windows.locate(index)
        newest = first_row + (windows.config.history_length - 1) * windows.config.frame_stride
        frame = newest - int(windows.rows.episode_starts[episode])
        return f"dataset {windows.rows.name}, episode {episode}, frame {frame}"

    def statistics(self, key: str) -> dict[str, np.ndarray] | None:
        """`mean`, `std`, `min` and `max` of `action` or `state` over the episodes trained on.

        In a mixture every dataset counts by its number of windows. `None` for `local_delta` actions, which
        are never normalized.
        """
        if key == "action" and self.train.config.action_codec == "local_delta":
            return None
        column = getattr(self.train.config, f"{key}_key")
        found = [windows for windows in self.train.datasets if column in windows.statistics]
        weight = np.array([len(windows) for windows in found], dtype=np.float64)[:, None]
        weight /= weight.sum()
        each = {
            name: np.stack([windows.statistics[column][name] for windows in found])
            for name in ("mean", "std", "min", "max")
        }
        mean = (weight * each["mean"]).sum(0)
        variance = (weight * (each["std"] ** 2 + (each["mean"] - mean) ** 2)).sum(0)
        return {"mean": mean, "std": np.sqrt(variance), "min": each["min"].min(0), "max": each["max"].max(0)}

    @property
    def image_keys(self) -> dict[str, str | None]:
        """Image column of every view in the first dataset that has the view; `None` if none has."""
        keys = dict.fromkeys(self.train.config.views)
        for windows in reversed(self.train.datasets):
            for view, camera in windows.cameras.items():
                key = find_image_key(windows.rows.features, camera)
                # LeRobot hands no other columns to a policy; robots name their cameras like this.
                keys[view] = key if key.startswith("observation.") else image_key(key)
        return keys

    def describe(self) -> list[dict]:
        """Name, episodes, windows and label sources of every dataset, for the card."""
        val = self.val.datasets if self.val else []
        apart = [windows for windows in val if windows.config.episodes is None]
        pairs = itertools.zip_longest(self.train.datasets, [] if apart else val)
        return [_describe_dataset(*pair) for pair in (*pairs, *((None, windows) for windows in apart))]


def _apply_source(base: WindowConfig, source: DatasetSource) -> WindowConfig:
    """Windows of one dataset of the mixture."""
    return dataclasses.replace(base, **{name: x for name, x in vars(source).items() if name != "path"})


def _open_validation(path: str, config: WindowConfig, train: Sequence[ForesightWindows]) -> ForesightWindows:
    """Windows of a dataset for validation alone; it must be like the first one, and none trained on."""
    val, first = ForesightWindows(path, config), train[0]
    if val.rows.root.resolve() in [windows.rows.root.resolve() for windows in train]:
        raise ValueError(f"data.validation is {path}, which is trained on too; give another dataset")
    for what, read in {
        "state size": lambda windows: windows.state_dim,
        "action size": lambda windows: windows.action_dim,
        "pictures": lambda windows: windows.view_sizes,
        "depth": lambda windows: windows.depth_sizes,
        "views": lambda windows: sorted(windows.cameras),
        "tracks": lambda windows: windows.columns.points is not None,
        "frames a second": lambda windows: windows.rows.fps,
    }.items():
        if read(val) != read(first):
            raise ValueError(
                f"data.validation: {val.rows.name} and {first.rows.name} differ in {what}: {read(val)} and "
                f"{read(first)}; convert and annotate both in the same way"
            )
    return val


def _describe_dataset(train: ForesightWindows | None, val: ForesightWindows | None) -> dict:
    """One entry of `RunData.describe`, from the windows of the two parts of a dataset."""
    parts = [windows for windows in (train, val) if windows is not None]
    rows = parts[0].rows
    provenance = read_provenance(rows.root)
    simulator = scripted_in(provenance)
    return {
        "name": Path(rows.name).name if Path(rows.name).exists() else rows.name,
        "train_episodes": len(train.episodes) if train else 0,
        "train_windows": len(train) if train else 0,
        "validation_episodes": val.episodes.tolist() if val else [],
        "flagged_episodes": sorted({episode for windows in parts for episode in windows.flagged}),
        "fps": rows.fps,
        "tasks": rows.tasks,
        "labels": provenance.get("cameras", {}),
        **({"scripted_in": simulator} if simulator else {}),
    }


def training_loader(
    config: RunConfig, data: RunData, sampler: WindowSampler, device: torch.device
) -> DataLoader:
    """Augmented training windows in the sampler's batches, read by `num_workers` processes."""
    workers = config.data.num_workers
    return DataLoader(
        data.train,
        batch_sampler=sampler,
        collate_fn=collate_windows,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=leave_signals_to_parent,
        # Forking a process that decodes video and computes with threads is not safe.
        multiprocessing_context="spawn" if workers else None,
        pin_memory=device.type == "cuda",
    )


def leave_signals_to_parent(worker: int) -> None:
    """Ignores what a terminal sends to all its processes: a run needs its workers to finish the step."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def evaluation_loader(windows: ConcatWindows, batch_size: int, count: int | None = None) -> DataLoader:
    """Windows in order, all or `count` evenly spread; of several processes, each gets its share of them."""
    count = min(count or len(windows), len(windows))
    chosen = [i * len(windows) // count for i in range(count)]
    ranks = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    share = chosen[ranks[0] :: ranks[1]]
    return DataLoader(Subset(windows, share), batch_size=batch_size, collate_fn=collate_windows)
