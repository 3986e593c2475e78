"""The data of one run: windows for training and validation, and what the model must know of its datasets."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
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
    collate_windows,
    split_episodes,
)

__all__ = ["RunData", "dataset_facts", "evaluation_loader", "window_config"]


def dataset_facts(path: str) -> dict:
    """What tells one dataset from another wherever it lies: name, size, tasks, digest of its metadata."""
    rows = DatasetRows(path)
    files = (rows.root / "meta" / "info.json", rows.root / PROVENANCE_PATH)
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files if file.exists())).hexdigest()
    return {
        "name": Path(path).name,
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
        config (`RunConfig`): Datasets and their treatment.
        model (`ForesightConfig`): Lengths, views and objectives.

    Attributes:
        train (`ConcatWindows`): Augmented windows of the training episodes.
        train_plain (`ConcatWindows`): The same windows without augmentation.
        val (`ConcatWindows`, *optional*): Windows of the validation episodes; `None` if `val_fraction` is 0.
        instructions (`list[str]`): All instructions.
        fps (`float`): Control steps per second.

    Raises:
        ValueError: If no dataset is named or one does not serve the model; names it.
    """

    def __init__(self, config: RunConfig, model: ForesightConfig):
        if not config.data.datasets:
            raise ValueError("no dataset: give --dataset DIR_OR_REPO, or data.datasets in the config")
        base = window_config(model, config)
        train, plain, val = [], [], []
        for source in config.data.datasets:
            own = dataclasses.replace(
                base,
                cameras=source.cameras,
                frame_stride=source.frame_stride,
                strided_commands=source.strided_commands,
            )
            rows = DatasetRows(source.path)
            # Flagged episodes are left out of both sides later, so that no other one changes sides for them.
            chosen, held_out = split_episodes(rows.n_episodes, config.data.val_fraction, config.seed)
            train.append(ForesightWindows(source.path, dataclasses.replace(own, episodes=chosen)))
            plain.append(ForesightWindows(source.path, own.for_evaluation(chosen)))
            if held_out:
                val.append(ForesightWindows(source.path, own.for_evaluation(held_out)))
        self.train, self.train_plain = ConcatWindows(train), ConcatWindows(plain)
        self.val = ConcatWindows(val) if val else None
        self.instructions = sorted({task for windows in train for task in windows.rows.tasks})
        # Datasets of a mixture may differ; control follows the first.
        self.fps = train[0].rows.fps / train[0].config.frame_stride

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


def evaluation_loader(windows: ConcatWindows, batch_size: int, count: int | None = None) -> DataLoader:
    """Windows in order, without augmentation; `count` of them, evenly spread, or all."""
    chosen = range(len(windows))
    if count is not None and count < len(windows):
        chosen = [i * len(windows) // count for i in range(count)]
    return DataLoader(Subset(windows, chosen), batch_size=batch_size, collate_fn=collate_windows)
