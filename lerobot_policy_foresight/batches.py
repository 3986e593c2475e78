# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""LeRobot's batches -> the raw batches of `ForesightProcessor` (its module has both tables).

LeRobot fills a window that starts before its episode with copies of the first frame and says so in
`*_is_pad`. Ours are padded at the end, so each sample is moved forward until it begins with a real frame;
frames after the newest one, which targets ask for, then serve as history too.

Where the dataset is read our way (`fast_reading.py`) all this happens as it is read, in the processes that
read, and batches have the samples already, under names that begin with `SAMPLE`.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from lerobot.utils.constants import ACTION, OBS_PREFIX, OBS_STATE
from torch import Tensor

from datasets_scripts.columns import (
    DEPTH_FLOOR_M,
    IMAGE_PREFIX,
    check_depth_range,
    clean_depth,
    depth_limit_m,
    find_depth_key,
    points_key,
    points_visible_key,
)
from datasets_scripts.storage.provenance import moving_flags, read_provenance
from modeling_foresight import ForesightConfig as ModelConfig

from .configuration_foresight import MILLIMETRES_PER, ForesightConfig
from .flow import read_flow

__all__ = ["BatchReader", "Window", "to_uint8"]

SAMPLE = f"{OBS_PREFIX}foresight."  # LeRobot's preprocessor passes on what begins with `observation.`


@dataclass
class Window:
    """Which of the M frames that LeRobot gives are the frames of a batch's windows.

    Attributes:
        index (`torch.Tensor`): int64 `(B, M)`, frame of the batch that stands at each place.
        real (`torch.Tensor`): bool `(B, M)`, false past the end.
        skipped (`torch.Tensor`): int64 `(B,)`, copies at the start that were left out.
    """

    index: Tensor
    real: Tensor
    skipped: Tensor

    @classmethod
    def of(cls, is_pad: Tensor, history_length: int) -> "Window":
        """From LeRobot's marks `(B, M)`; the newest frame of the history is never one of them."""
        skipped = is_pad[:, :history_length].long().cumprod(1).sum(1)
        place = torch.arange(is_pad.shape[1], device=is_pad.device) + skipped[:, None]
        index = place.clamp(max=is_pad.shape[1] - 1)
        return cls(index, (place < is_pad.shape[1]) & ~is_pad.gather(1, index), skipped)

    def take(self, values: Tensor, frames: int) -> Tensor:
        """The first `frames` places of `(B, M, ...)`."""
        if not self.skipped.any():  # most windows: nothing moves, nothing is copied
            return values[:, :frames]
        index = self.index[:, :frames]
        return values[torch.arange(len(index), device=index.device)[:, None], index]


class BatchReader:
    """Makes raw batches for training from what LeRobot's preprocessor gives.

    Args:
        config (`ForesightConfig`): The policy's.
        model (`modeling_foresight.ForesightConfig`): The model's.
        dataset_meta (`LeRobotDatasetMetadata`, *optional*): Tells where depth is and where episodes end;
            without it there are no such targets.

    Warns:
        UserWarning: Once, about objectives for which the dataset has no columns.
    """

    def __init__(self, config: ForesightConfig, model: ModelConfig, dataset_meta=None):
        self.config, self.model = config, model
        self._steps = len(config.observation_delta_indices)
        self._depth: dict[str, tuple[str, float]] = {}  # view -> column, far limit in metres
        self._checked: set[str] = set()  # depth columns whose unit was looked at
        self._episodes: tuple[Tensor, Tensor] | None = None
        self._flow_camera: str | None = None
        if dataset_meta is None:
            return
        features = dataset_meta.features
        if model.has_depth_decoder:
            for view, key in config.cameras.items():
                depth_key = find_depth_key(features, key.removeprefix(IMAGE_PREFIX))
                if depth_key:
                    self._depth[view] = depth_key, depth_limit_m(features[depth_key])
        self._episodes = tuple(
            torch.as_tensor(np.asarray(dataset_meta.episodes[f"dataset_{end}_index"]))
            for end in ("from", "to")
        )
        idle = []
        if model.has_depth_decoder and not self._depth:
            idle.append("depth (no camera of the policy has a depth column)")
        if model.has("flow"):
            camera = config.cameras.get(model.views[0], "").removeprefix(IMAGE_PREFIX)
            if not {points_key(camera), points_visible_key(camera)} <= set(features):
                idle.append(f"flow (the first view's camera {camera!r} has no points columns)")
            else:
                self._flow_camera = camera
                self._provenance = read_provenance(dataset_meta.root)
        if idle:
            renamed = not set(config.cameras.values()) <= set(features)
            hint = " Labels are found by --policy.cameras, not under --rename_map." if renamed else ""
            warnings.warn(
                f"Objectives without targets are not trained: {'; '.join(idle)}. The others are.{hint}",
                stacklevel=4,
            )

    @property
    def columns(self) -> list[str]:
        """Columns of the dataset that training reads."""
        return [*self.config.input_features, *self.config.output_features, *self._label_columns]

    def has_windows(self, delta_indices: dict[str, list[int]]) -> bool:
        """Whether a dataset with these steps gives the windows that the policy trains on."""
        wanted = self.config.observation_delta_indices
        return all(list(delta_indices.get(key, ())) == wanted for key in self.config.cameras.values())

    @property
    def _label_columns(self) -> list[str]:
        camera = self._flow_camera
        points = [points_key(camera), points_visible_key(camera)] if camera is not None else []
        return [key for key, _ in self._depth.values()] + points

    def read_item(self, item: dict) -> dict:
        """An item of the dataset with its sample in place of the columns that it is made of.

        Args:
            item (`dict`): As `LeRobotDataset` gives it, before any preprocessing. RGB may be uint8.
        """
        batch = {key: value[None] if isinstance(value, Tensor) else [value] for key, value in item.items()}
        state = batch.get(OBS_STATE) if self.model.state_dim else None
        raw = self.read(batch, state, batch.get(ACTION))
        spent = {*self.columns, *(f"{key}_is_pad" for key in self.columns)}
        item = {key: value for key, value in item.items() if key not in spent}
        for name, value in raw.items():
            if isinstance(value, dict):
                item |= {f"{SAMPLE}{name}.{view}": tensor[0] for view, tensor in value.items()}
            elif isinstance(value, Tensor):
                item[f"{SAMPLE}{name}"] = value[0]
        return item

    def read(self, batch: dict, state: Tensor | None, actions: Tensor | None) -> dict:
        """A raw batch of windows.

        Args:
            batch (`dict`): Images float `(B, M, 3, h, w)` in [0, 1], depth `(B, M, 1, h, w)`, `*_is_pad`,
                `task`, `index`, `episode_index`.
            state (`torch.Tensor`, *optional*): `(B, M, state_dim)` in the dataset's units.
            actions (`torch.Tensor`, *optional*): `(B, T + K - 1, A)` in the dataset's units.

        Raises:
            ValueError: If a camera is absent, there is no time axis, or depth cannot be in its unit.
        """
        if samples := {key: value for key, value in batch.items() if key.startswith(SAMPLE)}:
            return _collect(samples) | {"task": read_tasks(batch, len(next(iter(samples.values()))))}
        model, config = self.model, self.config
        steps, frames = self._steps, model.history_length
        if steps == 1:  # LeRobot drops the axis of time of videos then
            seen = [key for key in (*config.cameras.values(), *self._label_columns) if key in batch]
            batch = batch | {key: batch[key][:, None] for key in seen if batch[key].ndim == 4}
        state, actions = (  # nor has it an axis for columns of one number
            values[..., None] if values is not None and values.ndim == 2 else values
            for values in (state, actions)
        )
        for view, key in config.cameras.items():
            if key not in batch:
                raise ValueError(
                    f"The batch lacks {key!r}, the camera of view {view!r}: name it with "
                    f"""--policy.cameras='{{"{view}": "KEY"}}', or do without: '{{"{view}": null}}'."""
                )
            if batch[key].ndim != 5 or batch[key].shape[1] != steps:
                raise ValueError(
                    f"{key} has shape {tuple(batch[key].shape)}; expected (batch, {steps}, 3, height, "
                    "width): load the dataset with the policy's observation_delta_indices."
                )
        first = next(iter(config.cameras.values()))
        size = batch[first].shape[:2]
        # One for all observations; `--rename_map` leaves them under the dataset's names.
        marks = [batch[key] for key in batch if key.startswith(OBS_PREFIX) and key.endswith("_is_pad")]
        is_pad = marks[0] if marks else torch.zeros(size, dtype=torch.bool, device=batch[first].device)
        window = Window.of(is_pad, frames)

        later = model.future_shift if model.has("future") and model.future_targets == "lookahead" else 0
        raw = {
            "task": read_tasks(batch, size[0]),
            "images": {
                view: to_uint8(window.take(batch[key], frames + later))
                for view, key in config.cameras.items()
            },
            "frame_mask": window.real[:, : frames + later],
        }
        if state is not None:
            raw["state"] = window.take(state, frames)
        if actions is not None and model.has("action"):
            raw |= self._read_actions(actions, batch.get(f"{ACTION}_is_pad"), window.skipped)
        depth = {
            view: self._metres(key, window.take(batch[key], frames + later)[:, :, 0], limit)
            for view, (key, limit) in self._depth.items()
            if key in batch
        }
        if depth:
            raw["depth"] = depth
        if self._flow_camera is not None:
            raw |= self._read_flow(batch, window)
        if model.has("progress") and self._episodes is not None:
            raw["progress"] = self._read_progress(batch, window.skipped)
        return raw

    def _read_actions(self, actions: Tensor, is_pad: Tensor | None, skipped: Tensor) -> dict:
        """Chunks `(B, T, K, A)` at every frame and which of their steps exist."""
        frames, chunk = self.model.history_length, self.model.chunk_size
        if is_pad is None:
            is_pad = torch.zeros(actions.shape[:2], dtype=torch.bool, device=actions.device)
        starts = torch.arange(frames, device=actions.device)[:, None]
        step = starts + torch.arange(chunk, device=actions.device) + skipped[:, None, None]  # (B, T, K)
        index = step.clamp(max=actions.shape[1] - 1)
        row = torch.arange(len(actions), device=actions.device)[:, None, None]
        return {
            "actions": actions[row, index],
            "action_mask": (step < actions.shape[1]) & ~is_pad[row, index],
        }

    def _read_flow(self, batch: dict, window: Window) -> dict:
        """Tracks of the first view."""
        rows, camera = self.model.history_length + self.model.flow_length - 1, self._flow_camera
        visible = window.take(batch[points_visible_key(camera)], rows)
        moving = [
            moving_flags(self._provenance, int(episode), camera, visible.shape[-1])
            for episode in batch["episode_index"].flatten()
        ]
        points = window.take(batch[points_key(camera)], rows)
        return read_flow(self.model, points, visible, window.real[:, :rows], moving)

    def _read_progress(self, batch: dict, skipped: Tensor) -> Tensor:
        """Completed share of the episode at every frame, `(B, T)`."""
        frames = self.model.history_length
        first, stop = (ends[batch["episode_index"].cpu().flatten()][:, None] for ends in self._episodes)
        newest = batch["index"].cpu().flatten()[:, None] + skipped.cpu()[:, None]
        share = (newest + torch.arange(1 - frames, 1) - first) / (stop - 1 - first).clamp(min=1)
        return share.clamp(0, 1).float()

    def _metres(self, key: str, depth: Tensor, limit_m: float) -> Tensor:
        """Depth `(B, frames, h, w)` in the declared unit -> metres, 0 where invalid."""
        metres = depth.float() * (MILLIMETRES_PER[self.config.depth_unit] / 1000)
        if key not in self._checked:
            values = metres.cpu().numpy()
            try:
                check_depth_range(values, key, limit_m)
                if not (values > DEPTH_FLOOR_M).any():
                    raise ValueError(f"depth column '{key}' has no value above {DEPTH_FLOOR_M} m")
            except ValueError as error:
                raise ValueError(
                    f"{error} (as read with policy.depth_unit={self.config.depth_unit!r}, which must be the "
                    "unit that LeRobot delivers, --dataset.depth_output_unit)"
                ) from None
            self._checked.add(key)
        return clean_depth(metres, limit_m)


def _collect(samples: dict[str, Tensor]) -> dict:
    """The raw batch that [`BatchReader.read_item`] has spread over names."""
    raw: dict = {}
    for key, value in samples.items():
        name, _, view = key.removeprefix(SAMPLE).partition(".")
        if view:
            raw.setdefault(name, {})[view] = value
        else:
            raw[name] = value
    return raw


def read_tasks(batch: dict, samples: int) -> list[str]:
    """The instruction of every sample.

    Raises:
        ValueError: If there is none.
    """
    tasks = batch.get("task")
    tasks = [tasks] * samples if isinstance(tasks, str) else list(tasks or [])
    if len(tasks) != samples:
        raise ValueError(f"The batch has {len(tasks)} instructions (`task`) for {samples} samples.")
    return tasks


def to_uint8(images: Tensor) -> Tensor:
    """RGB in [0, 1], as LeRobot hands it over, back to the 0..255 that cameras give."""
    return images if images.dtype == torch.uint8 else (images * 255).round().clamp(0, 255).to(torch.uint8)
