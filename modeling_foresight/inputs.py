# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""The schema of a batch, raw and prepared, and the one check of it.

Dimension letters: B samples, T frames of the window (oldest first, padding at the end), F frames after it,
V views, K actions per chunk, L flow steps, P flow points, A action size, N patches and C features of the
vision tower. `h, w` may differ between views; H = W = `config.image_size`. Every key but images and text is
optional: a target that is missing only turns off its own loss.
"""

from collections.abc import Mapping
from typing import TypedDict

import torch
from torch import Tensor

from .configuration_foresight import ForesightConfig


class RawBatch(TypedDict, total=False):
    """What a data loader or a robot has: `training/windows.py` and [`ForesightProcessor.__call__`] fill it.

    Attributes:
        images: view -> uint8 `(B, T + F, 3, h, w)`, RGB as recorded; the last F frames are targets only.
        task: B instructions.
        frame_mask: bool `(B, T + F)`, true for real frames.
        view_mask: bool `(B, V)`, or `(B, T, V)` if it changes: which cameras exist. Views that `images` lacks
            are masked in any case.
        state: float32 `(B, T, state_dim)` in the dataset's units.
        state_mask: bool `(B,)`, false where there is no state.
        goal_image: uint8 `(B, 3, h, w)`, a goal for the first view.
        goal_mask: bool `(B,)`, false where there is no goal.
        actions: float32 `(B, T, K, A)`. `recorded`: the dataset's units; `local_delta`: `action_codec.py`'s,
            gripper 0 or 1.
        action_mask: bool `(B, T, K)`, false past the episode's end.
        depth: view -> float32 `(B, T + F, h, w)` metres along the optical axis; 0 = invalid.
        track_start, track, track_weight, progress: As in [`ForesightBatch`].
    """

    images: dict[str, Tensor]
    task: list[str]
    frame_mask: Tensor
    view_mask: Tensor
    state: Tensor
    state_mask: Tensor
    goal_image: Tensor
    goal_mask: Tensor
    actions: Tensor
    action_mask: Tensor
    depth: dict[str, Tensor]
    track_start: Tensor
    track: Tensor
    track_weight: Tensor
    progress: Tensor


class ForesightInputs(TypedDict, total=False):
    """What the transformer reads: `ForesightProcessor` fills all but the three features.

    Attributes:
        pixel_values: float32 `(B, T, V, 3, H, W)`, resized, normalised by `image_mean` and `image_std`.
        input_ids, attention_mask: int64 `(B, length)`, the instruction; each row has the end-of-text id.
        state: float32 `(B, T, state_dim)`, normalised; binary entries 0 or 1. `relative`: entries 0 to 5 are
            the pose seen from the window's first frame, metres and radians. Missing: masked everywhere.
        frame_mask: bool `(B, T)`, true for real frames; all by default.
        view_mask: bool `(B, V)`, or `(B, T, V)` if it differs between frames; all present by default.
        state_mask: bool `(B,)`.
        goal_pixel_values: float32 `(B, 3, H, W)`, a goal for the first view, normalised as `pixel_values`.
        goal_mask: bool `(B,)`.
        track_start: float32 `(B, T, P, 2)`, x and y of the flow points at step 0 as fractions of the first
            view, pixel centres; the grid by default. `targets.build_flow_targets` makes it.
        text_features: float `(B, text width)`, the text tower's projected feature of any length, in place of
            `input_ids`.
        vision_features: float CLS `(B, T, V, C)` and patch features `(B, T, V, N, C)` of the vision tower, in
            place of `pixel_values`.
        goal_features: float `(B, C)` and `(B, N, C)`, in place of `goal_pixel_values`.
    """

    pixel_values: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    state: Tensor
    frame_mask: Tensor
    view_mask: Tensor
    state_mask: Tensor
    goal_pixel_values: Tensor
    goal_mask: Tensor
    track_start: Tensor
    text_features: Tensor
    vision_features: tuple[Tensor, Tensor]
    goal_features: tuple[Tensor, Tensor]


class ForesightBatch(ForesightInputs, total=False):
    """Inputs and targets of the policy. `ForesightProcessor.prepare_batch` fills all but `style_noise`.

    Attributes:
        actions: float32 `(B, T, K, A)`, normalised (`local_delta`: unchanged); binary entries 0 or 1; masked
            steps 0.
        action_mask: bool `(B, T, K)`; all present by default.
        depth: float32 `(B, T, V, H, W)` metres, resized by nearest neighbor; 0 = invalid.
        lookahead_pixel_values: float32 `(B, F, V, 3, H, W)`, the F frames after the window, as
            `pixel_values`.
        lookahead_depth: float32 `(B, F, V, H, W)` metres.
        lookahead_mask: bool `(B, F)`, true for real frames; all by default.
        track: float32 `(B, T, L, P, 3)`, x and y as fractions of the first view and z in metres at steps 0 to
            L - 1. `targets.build_flow_targets` makes it.
        track_weight: float32 `(B, T, L, P)`, 0 where not supervised; 1 by default.
        progress: float32 `(B, T)` in [0, 1], the completed share of the instruction.
        style_noise: float `(B, T, latent)` standard normal, to fix the CVAE's sample. Training draws it; in
            evaluation the style is zero unless this is given.
    """

    actions: Tensor
    action_mask: Tensor
    depth: Tensor
    lookahead_pixel_values: Tensor
    lookahead_depth: Tensor
    lookahead_mask: Tensor
    track: Tensor
    track_weight: Tensor
    progress: Tensor
    style_noise: Tensor


# Axes by letter (see `_sizes`) or size. Targets of heads that are off are not looked at.
INPUT_SHAPES = {
    "state": ("B", "T", "state"),
    "frame_mask": ("B", "T"),
    "state_mask": ("B",),
    "goal_pixel_values": ("B", 3, "H", "H"),
    "goal_mask": ("B",),
    "text_features": ("B", "text"),
    "track_start": ("B", "T", "P", 2),
}
TARGET_SHAPES = {
    "action": {
        "actions": ("B", "T", "K", "A"),
        "action_mask": ("B", "T", "K"),
        "style_noise": ("B", "T", "latent"),
    },
    "depth": {"depth": ("B", "T", "V", "H", "H")},
    "future": {
        "depth": ("B", "T", "V", "H", "H"),
        "lookahead_pixel_values": ("B", "F", "V", 3, "H", "H"),
        "lookahead_depth": ("B", "F", "V", "H", "H"),
        "lookahead_mask": ("B", "F"),
    },
    "flow": {"track": ("B", "T", "L", "P", 3), "track_weight": ("B", "T", "L", "P")},
    "progress": {"progress": ("B", "T")},
}


def batch_size(batch: Mapping) -> tuple[int, int]:
    """B and T of a batch."""
    images = batch.get("pixel_values")
    images = batch["vision_features"][0] if images is None else images
    return images.shape[0], images.shape[1]


def real_frames(batch: Mapping) -> Tensor:
    """Boolean `(B, T)`, true for frames that are not padding."""
    if (mask := batch.get("frame_mask")) is not None:
        return mask.bool()
    images = batch.get("pixel_values")
    images = batch["vision_features"][0] if images is None else images
    return torch.ones(images.shape[:2], dtype=torch.bool, device=images.device)


def present_views(config: ForesightConfig, batch: Mapping) -> Tensor:
    """Boolean `(B, T, V)`, true for images of real frames and existing cameras."""
    real, views = real_frames(batch), batch.get("view_mask")
    if views is None:
        return real[..., None].expand(-1, -1, len(config.views))
    return real[..., None] & (views if views.ndim == 3 else views[:, None]).bool()


def check_shapes(**expected: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Refuses a tensor of another shape than `name=(tensor, shape)` says, where it would be broadcast.

    Raises:
        ValueError: The message names the tensor, its shape and the expected one.
    """
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}.")


def _sizes(config: ForesightConfig, batch: int, frames: int, later: int = 0) -> dict[str, int]:
    return {
        "B": batch,
        "T": frames,
        "F": later,
        "V": len(config.views),
        "H": config.image_size,
        "K": config.chunk_size,
        "A": config.action_dim,
        "L": config.flow_length,
        "P": config.num_flow_points,
        "state": config.state_dim,
        "latent": config.latent_dim,
        "text": config.text_config.projection_dim,
    }


def _check_table(batch: Mapping, table: Mapping[str, tuple], sizes: Mapping[str, int]) -> None:
    for name, axes in table.items():
        check_shapes(**{name: (batch.get(name), tuple(sizes.get(axis, axis) for axis in axes))})


def check_targets(config: ForesightConfig, batch: Mapping) -> None:
    """Checks the targets of heads that exist, in a batch whose images were checked.

    Args:
        config (`ForesightConfig`): Sizes and objectives.
        batch (`Mapping`): A [`ForesightBatch`].

    Raises:
        ValueError: If a shape does not fit, or there is nothing to train with a target; the message names it.
    """
    if batch.get("style_noise") is not None and (batch.get("actions") is None or not config.has_style):
        raise ValueError(
            "style_noise fixes the sample of the action CVAE: give actions, to a model with one."
        )
    if batch.get("actions") is not None and not config.auxiliary_heads:
        raise ValueError("A policy with auxiliary_heads=False acts but does not train: load it whole.")
    later = batch.get("lookahead_pixel_values")
    sizes = _sizes(config, *batch_size(batch), config.future_shift if later is None else later.shape[1])
    for objective, table in TARGET_SHAPES.items():
        if config.has(objective):
            _check_table(batch, table, sizes)


def check_inputs(config: ForesightConfig, vision_width: int, batch: Mapping) -> tuple[int, int]:
    """Checks the inputs of the transformer.

    Args:
        config (`ForesightConfig`): Sizes.
        vision_width (`int`): C, width of the vision tower's features.
        batch (`Mapping`): [`ForesightInputs`].

    Returns:
        `tuple[int, int]`: B and T.

    Raises:
        ValueError: If something is missing, given twice or unknown to the config, or a shape does not fit;
            the message names it, its shape and the expected one.
    """
    given = {name for name, value in batch.items() if value is not None}
    for one, other in (("pixel_values", "vision_features"), ("input_ids", "text_features")):
        if (one in given) == (other in given):
            raise ValueError(f"Give one of {one} or {other}.")
    goals = {"goal_pixel_values", "goal_features"} & given
    if len(goals) == 2:
        raise ValueError("Give one of goal_pixel_values or goal_features.")
    if goals and not config.goal_image:
        raise ValueError("A goal was given, but config.goal_image is false: leave it out.")
    if "state" in given and not config.state_dim:
        raise ValueError("state was given, but config.state_dim is 0: leave it out.")
    if "pixel_values" in given:
        size, frames = _check_images(config, batch["pixel_values"])
    else:
        size, frames = _check_features(config, vision_width, batch["vision_features"])
    _check_table(batch, INPUT_SHAPES, _sizes(config, size, frames))
    views, view_mask, ids = len(config.views), batch.get("view_mask"), batch.get("input_ids")
    per_frame = view_mask is not None and view_mask.ndim == 3
    check_shapes(view_mask=(view_mask, (size, frames, views) if per_frame else (size, views)))
    if ids is not None:
        check_shapes(
            input_ids=(ids, (size, ids.shape[-1])),
            attention_mask=(batch.get("attention_mask"), tuple(ids.shape)),
        )
    if "goal_features" in given:
        cls, patches = batch["goal_features"]
        check_shapes(
            **{
                "goal_features[0]": (cls, (size, vision_width)),
                "goal_features[1]": (patches, (size, patches.shape[-2], vision_width)),
            }
        )
    return size, frames


def _check_images(config: ForesightConfig, pixel_values: Tensor) -> tuple[int, int]:
    size = (3, config.image_size, config.image_size)
    if pixel_values.ndim != 6 or tuple(pixel_values.shape[3:]) != size:
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)}; expected (batch, frames, views, "
            f"{', '.join(map(str, size))}). ForesightProcessor builds it from images."
        )
    batch, frames, views = pixel_values.shape[:3]
    if views != len(config.views):
        raise ValueError(f"pixel_values has {views} views; the config names {list(config.views)}.")
    if not 1 <= frames <= config.history_length:
        raise ValueError(f"pixel_values has {frames} frames; the config takes 1 to {config.history_length}.")
    return batch, frames


def _check_features(config: ForesightConfig, width: int, features: tuple[Tensor, Tensor]) -> tuple[int, int]:
    cls, patches = features
    views = len(config.views)
    if cls.ndim != 4 or not 1 <= cls.shape[1] <= config.history_length:
        raise ValueError(
            f"vision_features[0] has shape {tuple(cls.shape)}; expected (batch, 1 to "
            f"{config.history_length} frames, {views} views, {width})."
        )
    lead = (*cls.shape[:2], views)
    check_shapes(
        **{
            "vision_features[0]": (cls, (*lead, width)),
            "vision_features[1]": (patches, (*lead, patches.shape[-2], width)),
        }
    )
    return cls.shape[0], cls.shape[1]


__all__ = [
    "ForesightBatch",
    "ForesightInputs",
    "RawBatch",
    "batch_size",
    "check_inputs",
    "check_shapes",
    "check_targets",
    "present_views",
    "real_frames",
]
