# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""LeRobot's items as windows of `training.windows`: the samples that `training/train.py` trains on.

Item `i` of LeRobot is the window whose newest frame is `i`; near the start of an episode it is the first
window. `training.windows` makes the whole window: targets, masks, and which points are followed.

`lerobot-train` makes dataset and data loader itself and gives a policy only the dataset's metadata. So the
policy attaches its windows to that object, and `LeRobotDataset` gets torch's `__getitems__`, which a data
loader asks for a batch and LeRobot does not define. `dataset[i]` and datasets without windows are unchanged.

Batches that were not read this way, such as those of `--dataset.eval_split`, whose dataset has other
metadata, are read again by their frame numbers in the training process.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.constants import HF_LEROBOT_HUB_CACHE, OBS_PREFIX
from torch import Tensor
from torch.utils.data import default_collate

from datasets_scripts.columns import IMAGE_PREFIX, is_label_key
from datasets_scripts.storage.dataset_rows import BrokenEpisodeError, DatasetRows
from modeling_foresight import ForesightConfig
from training.windows import ForesightWindows, WindowConfig
from training.windows.columns import WindowColumns, column_statistics, idle_objectives, require_targets

__all__ = ["WindowReader", "to_uint8"]

SAMPLE = f"{OBS_PREFIX}foresight."  # LeRobot's preprocessor passes on what begins with `observation.`
WINDOWS = "foresight_windows"  # attribute of a dataset's metadata
RANGE_MARGIN = 0.25  # beyond [0, 1], which an interpolation may overshoot
# Transforms of LeRobot and torchvision that leave every point where it is in the picture.
_NAMES = """
    CoarseDropout ColorJitter GammaCorrection GaussianBlur GaussianNoise GaussianPatchBrightness Grayscale
    Identity JPEG JPEGCompression MotionBlur PlanckianJitter RandomAdjustSharpness RandomAutocontrast
    RandomChannelPermutation RandomEqualize RandomErasing RandomGrayscale RandomInvert
    RandomPhotometricDistort RandomPosterize RandomShadow RandomSolarize SharpnessJitter
"""
PHOTOMETRIC = frozenset(_NAMES.split())


class WindowReader:
    """Windows of a LeRobot dataset by LeRobot's frame numbers. Files are opened for the first window.

    Args:
        dataset_meta (`LeRobotDatasetMetadata`): The dataset's.
        cameras (`dict[str, str]`): View -> image column. A column that the dataset lacks means that LeRobot
            renames columns (`--rename_map`): then windows have all cameras of the dataset.
        model (`modeling_foresight.ForesightConfig`): Lengths and objectives.
        frame_cache (`str`): See `WindowConfig`.

    Raises:
        ValueError: If no objective has a target in the dataset; names the columns.
    """

    def __init__(self, dataset_meta, cameras: dict[str, str], model: ForesightConfig, frame_cache: str):
        features = dataset_meta.features
        self._meta, self._cameras = dataset_meta, cameras
        self._windows: ForesightWindows | None = None
        self.is_renamed = not set(cameras.values()) <= set(features)
        if self.is_renamed:
            pictures = [key for key in features if features[key]["dtype"] in ("image", "video")]
            views = [key for key in pictures if not is_label_key(key, features[key])]
            names = dict(zip(views, views, strict=True))
        else:
            views = list(model.views)
            names = {
                view: cameras[view].removeprefix(IMAGE_PREFIX) if view in cameras else None for view in views
            }
        self._config = WindowConfig.for_model(
            model,
            views=views,
            cameras=names,
            state_key="observation.state" if model.state_dim else None,
            missing_targets=True,
            frame_cache=frame_cache,
        )
        columns = WindowColumns.find(features, self._config)
        require_targets([(str(self.root), columns, self._config)])
        if idle := idle_objectives(columns, self._config):
            hint = " Labels are found by --policy.cameras, not under --rename_map." if self.is_renamed else ""
            reasons = "; ".join(f"{name} ({why})" for name, why in idle.items())
            warnings.warn(
                f"Objectives without targets are not trained: {reasons}. The others are.{hint}", stacklevel=4
            )

    @property
    def root(self) -> Path:
        """The dataset's folder."""
        return self._meta.root

    def attach(self) -> None:
        """Makes data loaders read the dataset of this metadata as windows."""
        setattr(self._meta, WINDOWS, self)

    def _open(self, episodes: Sequence[int] | None) -> None:
        if self._windows is not None:
            return
        config, rows = dataclasses.replace(self._config, episodes=episodes), None
        try:
            rows = DatasetRows(self.root)
            self._windows = ForesightWindows(rows, config, with_statistics=False)
        except ValueError as error:
            if rows is not None and not isinstance(error, BrokenEpisodeError):
                raise  # all files are here
            # Of `--dataset.episodes` LeRobot downloads some files of a commit only; we need the rows of all.
            if episodes is not None and HF_LEROBOT_HUB_CACHE in self.root.parents:
                with contextlib.suppress(ValueError, RuntimeError):
                    rows = DatasetRows(f"{self._meta.repo_id}@{self.root.name}", stream=True)
                    self._windows = ForesightWindows(rows, config, with_statistics=False)
                    return
            raise ValueError(
                f"{error}. lerobot-train needs the whole dataset on this machine (`hf download "
                f"{self._meta.repo_id} --repo-type dataset --local-dir DIR`, then --dataset.root=DIR)"
            ) from error

    def read_items(self, dataset: LeRobotDataset, indices: Sequence[int]) -> list[dict]:
        """Items of a dataset: LeRobot's frame numbers and task, and a window under `observation.foresight.`.

        `indices` count the frames of the dataset's chosen episodes; its image transforms apply.
        """
        if self._windows is None:
            self._open(dataset.episodes)
            opened = self._windows
            # Refuses NaN before the first step; the statistics themselves come from LeRobot.
            column_statistics(opened.rows, opened.columns, opened.config, opened.episodes)
        if self._windows.config.wants_depth or self._windows.config.wants_flow:
            check_image_transforms(dataset.image_transforms)
        places = dataset.absolute_to_relative_idx
        frames = range(len(dataset)) if places is None else list(places)
        return [self._read_item(int(frames[int(i)]), dataset.image_transforms) for i in indices]

    def _read_item(self, frame: int, image_transforms: Callable | None = None) -> dict[str, Any]:
        windows = self._windows
        rows, history = windows.rows, windows.config.history_length
        episode = rows.episode_of(frame)
        span = rows.rows_of(episode)
        first, last = span[0], span[-1]
        # The last frame of an episode is never the newest of a window (`slicing.window_starts`).
        start = max(first, min(frame, last - 1) - history + 1)
        sample = windows.read(episode, start, np.random.default_rng(int(torch.randint(2**62, ()))))
        item = {
            "index": torch.tensor(frame),
            "episode_index": torch.tensor(episode),
            "frame_index": torch.tensor(frame - first),
            "timestamp": torch.tensor((frame - first) / rows.fps, dtype=torch.float32),
            "task_index": torch.tensor(int(rows.column("task_index").read(range(frame, frame + 1))[0])),
            "task": sample["task"],
        }
        for view, pictures in sample.pop("images").items():
            if image_transforms is not None:  # some of LeRobot's change float pictures only
                pictures = (image_transforms(pictures / 255) * 255).round().clamp(0, 255).to(torch.uint8)
            item[view if self.is_renamed else f"{SAMPLE}images.{view}"] = pictures
        for view, depth in sample.pop("depth").items():
            item[f"{SAMPLE}depth.{view}"] = depth
        values = {name: value for name, value in sample.items() if name not in item}
        return item | {f"{SAMPLE}{name}": value for name, value in values.items()}

    def read_batch(self, batch: dict) -> dict:
        """A raw batch of `ForesightProcessor` from a batch of LeRobot, after the preprocessor."""
        if f"{SAMPLE}frame_mask" not in batch:
            if self.is_renamed:
                raise ValueError(
                    "These frames were not read as windows and their cameras are renamed: name the cameras "
                    """with --policy.cameras='{"VIEW": "KEY"}' instead of --rename_map."""
                )
            self._open(None)
            frames = batch["index"].flatten().tolist()
            batch = default_collate([self._read_item(frame) for frame in frames])
        raw: dict = {"task": batch["task"]}
        for key, value in batch.items():
            if key.startswith(SAMPLE):
                name, _, view = key.removeprefix(SAMPLE).partition(".")
                raw |= {name: raw.get(name, {}) | {view: value}} if view else {name: value}
        if self.is_renamed:
            del raw["view_mask"]  # of the dataset's cameras
            if absent := [key for key in self._cameras.values() if key not in batch]:
                raise ValueError(
                    f"The dataset lacks {absent}, also under --rename_map: see --policy.cameras."
                )
            raw["images"] = {view: to_uint8(batch[key], key) for view, key in self._cameras.items()}
        return raw


def to_uint8(images: Tensor, key: str) -> Tensor:
    """RGB in [0, 1], as LeRobot passes it, back to the 0..255 of the cameras; `key` is the column."""
    if images.dtype == torch.uint8:
        return images
    low, high = images.aminmax()
    if low < -RANGE_MARGIN or high > 1 + RANGE_MARGIN:
        raise ValueError(
            f"{key} holds values from {low:.3g} to {high:.3g}; LeRobot's images are in [0, 1], neither "
            "0..255 nor standardized."
        )
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def _read_loader_batch(dataset: LeRobotDataset, indices: Sequence[int]) -> list[dict]:
    """Reads all items of a batch at once; torch's data loaders call it as `__getitems__`."""
    reader: WindowReader | None = getattr(dataset.meta, WINDOWS, None)
    return [dataset[i] for i in indices] if reader is None else reader.read_items(dataset, indices)


# Worker processes do this too: unpickling their reader imports this module.
LeRobotDataset.__getitems__ = _read_loader_batch


def check_image_transforms(transform) -> None:
    """Refuse transforms that move the picture: depth and tracks would stay where they are.

    Raises:
        ValueError: If a transform is not known to be photometric; names it and the remedy.
    """
    parts = getattr(transform, "transforms", None)
    if parts is not None:
        for part in parts.values() if isinstance(parts, Mapping) else parts:
            check_image_transforms(part)
    elif transform is not None and type(transform).__name__ not in PHOTOMETRIC:
        raise ValueError(
            f"--dataset.image_transforms: {type(transform).__name__} may move pictures, and their depth and "
            "3D tracks would stay where they are. List those that change colors only in "
            "--dataset.image_transforms.tfs (docs/lerobot.md), or use training/train.py, whose "
            "data.random_shift moves pictures and labels together"
        )
