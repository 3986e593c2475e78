"""The datasets of a run as windows for training and validation, and their statistics and descriptions."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from datasets_scripts.columns import find_image_key, image_key
from datasets_scripts.storage.provenance import PROVENANCE_PATH, read_provenance
from datasets_scripts.storage.rows import DatasetRows
from modeling_foresight import ForesightConfig
from training.config import RunConfig
from training.windows import (
    ConcatWindows,
    ForesightWindows,
    WindowConfig,
    WindowSampler,
    collate_windows,
    split_episodes,
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
    files = (rows.root / "meta" / "info.json", rows.root / PROVENANCE_PATH)
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files if file.exists())).hexdigest()
    return {
        "name": Path(rows.name).name,
        "episodes": rows.n_episodes,
        "frames": len(rows),
        "tasks": rows.tasks,
        "digest": digest[:16],
    }


def window_config(model: ForesightConfig, config: RunConfig) -> WindowConfig:
    """Windows that hold what a model takes and is supervised with."""
    data = config.data
    return WindowConfig(
        views=list(model.views),
        history_length=model.history_length,
        future_shift=model.future_shift,
        lookahead=model.future_targets == "lookahead" and model.has("future"),
        chunk_size=model.chunk_size,
        flow_length=model.flow_length,
        flow_grid=tuple(model.flow_grid),
        objectives=[objective for objective in model.objectives if model.has(objective)],
        goal_image=model.goal_image,
        p_moving=data.p_moving,
        occluded_weight=data.occluded_weight,
        random_shift=data.random_shift,
        state_key=data.state_key if model.state_dim else None,
        action_key=data.action_key,
        action_codec=model.action_codec,
        binary_action_indices=list(model.binary_action_indices),
        skip_flagged=data.skip_flagged,
        missing_targets=data.missing_targets,
        frame_cache=data.frame_cache,
        image_size=model.image_size,
        seed=config.seed,
    )


class RunData:
    """Windows of all datasets of a run, split by episode.

    Args:
        config (`RunConfig`): Datasets and how their windows are made.
        model (`ForesightConfig`): Lengths, views and objectives.
        datasets (`Sequence[DatasetRows]`, *optional*): The datasets, if they are already open.

    Attributes:
        train (`ConcatWindows`): Augmented windows of the training episodes.
        val (`ConcatWindows`, *optional*): Windows of the validation episodes; `None` if `val_fraction` is 0.
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
            own = dataclasses.replace(
                base,
                cameras=source.cameras,
                frame_stride=source.frame_stride,
                strided_commands=source.strided_commands,
            )
            # Split before flagged episodes are removed: a flag must not move other episodes across the split.
            chosen, held_out = split_episodes(rows.n_episodes, config.data.val_fraction, config.seed)
            train.append(ForesightWindows(rows, dataclasses.replace(own, episodes=chosen)))
            if held_out:
                val.append(ForesightWindows(rows, own.for_evaluation(held_out)))
        self.train = ConcatWindows(train)
        self.val = ConcatWindows(val) if val else None
        self.instructions = sorted({task for windows in train for task in windows.rows.tasks})
        # Datasets of a mixture may differ; control follows the first.
        self.fps = train[0].rows.fps / train[0].config.frame_stride

    def unaugmented_train(self) -> ConcatWindows:
        """The training windows without augmentation."""
        return ConcatWindows(
            [
                ForesightWindows(windows.rows, windows.config.for_evaluation(windows.config.episodes))
                for windows in self.train.datasets
            ]
        )

    def describe_window(self, index: int) -> str:
        """Dataset, episode and newest frame of a training window, for messages."""
        for windows in self.train.datasets:
            if index < len(windows):
                break
            index -= len(windows)
        episode, first_row = windows.locate(index)
        newest = first_row + (windows.config.history_length - 1) * windows.config.frame_stride
        frame = newest - int(windows.rows.episode_starts[episode])
        return f"dataset {windows.rows.name}, episode {episode}, frame {frame}"

    def statistics(self, key: str) -> dict[str, np.ndarray] | None:
        """`mean`, `std`, `min` and `max` of `action` or `state` over the episodes trained on.

        In a mixture every dataset counts by its number of windows. `None` for `local_delta` actions, which
        are never normalised.
        """
        if key == "action" and self.train.config.action_codec == "local_delta":
            return None
        column = {"action": "action_key", "state": "state_key"}[key]
        found = [
            (len(windows), windows.statistics[getattr(windows.config, column)])
            for windows in self.train.datasets
            if getattr(windows.config, column) in windows.statistics
        ]
        weight = np.array([n for n, _ in found], dtype=np.float64)[:, None] / sum(n for n, _ in found)
        mean, std = (np.stack([stats[k] for _, stats in found]) for k in ("mean", "std"))
        joint = (weight * mean).sum(0)
        variance = (weight * (std**2 + (mean - joint) ** 2)).sum(0)
        return {
            "mean": joint,
            "std": np.sqrt(variance),
            "min": np.min([stats["min"] for _, stats in found], axis=0),
            "max": np.max([stats["max"] for _, stats in found], axis=0),
        }

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
        described = []
        for windows, plain_val in zip(
            self.train.datasets, self.val.datasets if self.val else self.train.datasets, strict=True
        ):
            described.append(
                {
                    "name": Path(windows.rows.name).name
                    if Path(windows.rows.name).exists()
                    else windows.rows.name,
                    "train_episodes": len(windows.episodes),
                    "train_windows": len(windows),
                    "validation_episodes": [int(e) for e in plain_val.episodes] if self.val else [],
                    "flagged_episodes": sorted({*windows.flagged, *plain_val.flagged}),
                    "fps": windows.rows.fps,
                    "tasks": windows.rows.tasks,
                    "labels": read_provenance(windows.rows.root).get("cameras", {}),
                }
            )
        return described


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
        # Forking a process that decodes video and computes with threads is not safe.
        multiprocessing_context="spawn" if workers else None,
        pin_memory=device.type == "cuda",
    )


def evaluation_loader(
    windows: ConcatWindows, batch_size: int, count: int | None = None, rank: int = 0, world_size: int = 1
) -> DataLoader:
    """Windows in order, all or `count` evenly spread; with `world_size`, this rank's share of them."""
    chosen = range(len(windows))
    if count is not None and count < len(windows):
        chosen = [i * len(windows) // count for i in range(count)]
    share = chosen[rank::world_size]
    return DataLoader(Subset(windows, share), batch_size=batch_size, collate_fn=collate_windows)
