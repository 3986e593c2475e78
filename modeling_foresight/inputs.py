# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""The schema of a batch, raw and prepared, and the one check of it.

Dimension letters: B samples, T frames of the window (oldest first, padding at the end), F frames after it,
V views, K actions per chunk, L flow steps, P flow points, A action size, N patches and C features of the
vision tower. `h, w` may differ between views; H = W = `config.image_size`. Every key but images and text is
optional: a target that is missing only turns off its own loss.
"""

import reprlib
from collections.abc import Iterable, Mapping
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from .configuration_foresight import ForesightConfig


class RawBatch(TypedDict, total=False):
    """Data of a loader or a robot: `training.windows` and [`ForesightProcessor.__call__`] fill it.

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
        depth: view -> float32 `(B, T + F, h, w)` meters along the optical axis; 0 = invalid.
        track_start, track, track_weight, progress: As in [`ForesightBatch`].
        text_features: As in [`ForesightInputs`], for a model without a text tower; `task` is not read then.
        embodiment: B names of robots, of a policy with `embodiments`: `state` and `actions` then have the
            robot's entries at the places of the model's. By default the one that the processor is for.
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
    text_features: Tensor
    embodiment: list[str]


class ForesightInputs(TypedDict, total=False):
    """Inputs of the transformer: `ForesightProcessor` fills all except the three features.

    Attributes:
        pixel_values: float32 `(B, T, V, 3, H, W)`, resized, normalized by `image_mean` and `image_std`.
        input_ids, attention_mask: int64 `(B, length)`, the instruction; each row has the end-of-text id.
        state: float32 `(B, T, state_dim)`, normalized; binary entries 0 or 1. `relative`: entries 0 to 5 are
            the pose seen from the window's first frame, meters and radians. Missing: masked everywhere.
        frame_mask: bool `(B, T)`, true for real frames; all by default.
        view_mask: bool `(B, V)`, or `(B, T, V)` if it differs between frames; all present by default.
        state_mask: bool `(B,)`.
        goal_pixel_values: float32 `(B, 3, H, W)`, a goal for the first view, normalized as `pixel_values`.
        goal_mask: bool `(B,)`.
        goal_draw: float32 `(B,)`, uniform: training hides goals whose number is below `goal_dropout`, and
            draws the numbers if they are missing; evaluation ignores them.
        track_start: float32 `(B, T, P, 2)`, x and y of the flow points at step 0 as fractions of the first
            view, pixel centers; the grid by default. `training/windows/flow_targets.py` makes it.
        embodiment: int64 `(B,)`, the robot of each sample: its place among the sorted names of
            `config.embodiments`. Needed with actions of a policy that has some, for their losses.
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
    goal_draw: Tensor
    track_start: Tensor
    embodiment: Tensor
    text_features: Tensor
    vision_features: tuple[Tensor, Tensor]
    goal_features: tuple[Tensor, Tensor]


class ForesightBatch(ForesightInputs, total=False):
    """Inputs and targets of the policy. `ForesightProcessor.prepare_batch` fills all but the last two.

    Attributes:
        actions: float32 `(B, T, K, A)`, normalized (`local_delta`: unchanged); binary entries 0 or 1; masked
            steps 0.
        action_mask: bool `(B, T, K)`; all present by default.
        depth: float32 `(B, T, V, H, W)` meters, resized by nearest neighbor; 0 = invalid.
        lookahead_pixel_values: float32 `(B, F, V, 3, H, W)`, the F frames after the window, as
            `pixel_values`.
        lookahead_depth: float32 `(B, F, V, H, W)` meters.
        lookahead_mask: bool `(B, F)`, true for real frames; all by default.
        track: float32 `(B, T, L, P, 3)`, x and y as fractions of the first view and z in meters at steps 0 to
            L - 1. `training/windows/flow_targets.py` makes it.
        track_weight: float32 `(B, T, L, P)`, 0 where not supervised; 1 by default.
        progress: float32 `(B, T)` in [0, 1], the completed share of the instruction.
        style_noise: float `(B, T, latent)` standard normal, to fix the CVAE's sample. Training draws it; in
            evaluation the style is zero unless this is given.
        supervision_order: float32 `(B, T, V)`, uniform: with `supervised_share` below 1, the images of each
            view with the largest numbers are decoded. `targets.draw_supervision` makes it. Training draws it
            if it is missing; evaluation ignores it.
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
    supervision_order: Tensor


def as_tensor(values, name: str) -> Tensor:
    """Numbers of any kind as a tensor; a tensor stays where it is.

    Raises:
        ValueError: If they are not one array of numbers; calls them `name`.
    """
    if isinstance(values, Tensor):
        return values
    try:
        # A copy: PIL's own memory is read-only, and PyTorch takes no negative strides.
        return torch.as_tensor(np.array(values))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is not one array of numbers: {reprlib.repr(values)} ({error}).") from error


def as_texts(text) -> list[str]:
    """One instruction or several as a list.

    Raises:
        ValueError: If one of them is not text; names it.
    """
    texts = list(text) if isinstance(text, Iterable) and not isinstance(text, str) else [text]
    for one in texts:
        if not isinstance(one, str):
            raise ValueError(f"An instruction is {reprlib.repr(one)}; give text.")
    return texts


def blank_masked(values: Tensor, mask: Tensor | None) -> Tensor:
    """Zeros where a boolean `mask` of the first axes of `values` is false: what is masked may be NaN.

    A product or an attention weight of 0 would keep the NaN, in the loss or in a weight's gradient.
    """
    # Large images are copied only if they must be; a GPU or a compiler would wait for the answer.
    is_known = not torch.compiler.is_compiling() and values.device.type == "cpu"
    if mask is None or (is_known and mask.all()):
        return values
    return torch.where(mask.reshape(*mask.shape, *[1] * (values.ndim - mask.ndim)), values, 0)


# Axes by letter (see `_sizes`) or size.
INPUT_SHAPES = {
    "pixel_values": ("B", "T", "V", 3, "H", "H"),
    "vision_features[0]": ("B", "T", "V", "C"),
    "vision_features[1]": ("B", "T", "V", "N", "C"),
    "input_ids": ("B", "length"),
    "attention_mask": ("B", "length"),
    "text_features": ("B", "text"),
    "state": ("B", "T", "state"),
    "frame_mask": ("B", "T"),
    "view_mask": ("B", "V"),
    "state_mask": ("B",),
    "goal_pixel_values": ("B", 3, "H", "H"),
    "goal_features[0]": ("B", "C"),
    "goal_features[1]": ("B", "N", "C"),
    "goal_mask": ("B",),
    "goal_draw": ("B",),
    "track_start": ("B", "T", "P", 2),
    "embodiment": ("B",),
}
# Targets of heads that are off are not checked.
TARGET_SHAPES = {
    "action": {
        "actions": ("B", "T", "K", "A"),
        "action_mask": ("B", "T", "K"),
        "style_noise": ("B", "T", "latent"),
    },
    "depth": {"depth": ("B", "T", "V", "H", "H"), "supervision_order": ("B", "T", "V")},
    "future": {
        "depth": ("B", "T", "V", "H", "H"),
        "lookahead_pixel_values": ("B", "F", "V", 3, "H", "H"),
        "lookahead_depth": ("B", "F", "V", "H", "H"),
        "lookahead_mask": ("B", "F"),
        "supervision_order": ("B", "T", "V"),
    },
    "flow": {"track": ("B", "T", "L", "P", 3), "track_weight": ("B", "T", "L", "P")},
    "progress": {"progress": ("B", "T")},
}


def _images(batch: Mapping) -> Tensor:
    """Pixels `(B, T, ...)`, or the CLS features in their place."""
    pixels = batch.get("pixel_values")
    return batch["vision_features"][0] if pixels is None else pixels


def batch_size(batch: Mapping) -> tuple[int, int]:
    """B and T of a batch."""
    size, frames, *_ = _images(batch).shape
    return size, frames


def real_frames(batch: Mapping) -> Tensor:
    """Boolean `(B, T)`, true for frames that are not padding."""
    if (mask := batch.get("frame_mask")) is not None:
        return mask.bool()
    return torch.ones(batch_size(batch), dtype=torch.bool, device=_images(batch).device)


def present_views(config: ForesightConfig, batch: Mapping) -> Tensor:
    """Boolean `(B, T, V)`, true for images of real frames and existing cameras."""
    real, views = real_frames(batch), batch.get("view_mask")
    if views is None:
        return real[..., None].expand(-1, -1, len(config.views))
    return real[..., None] & (views if views.ndim == 3 else views[:, None]).bool()


def check_shapes(batch: Mapping, shapes: Mapping[str, tuple], sizes: Mapping[str, int]) -> None:
    """Refuses tensors of other shapes, which would be broadcast.

    Args:
        batch (`Mapping`): Tensors by name; those that are missing are not checked.
        shapes (`Mapping`): Axes of each tensor, by letter or size.
        sizes (`Mapping`): Sizes of the letters; one that is missing is read off the first tensor with it.

    Raises:
        ValueError: The message names the tensor, its shape and the expected one.
    """
    sizes = dict(sizes)
    for name, axes in shapes.items():
        if (tensor := batch.get(name)) is None:
            continue
        if tensor.ndim == len(axes):
            for axis, size in zip(axes, tensor.shape, strict=True):
                sizes.setdefault(axis, axis if isinstance(axis, int) else size)
        expected = tuple(sizes.get(axis, axis) for axis in axes)
        if tuple(tensor.shape) != expected:
            wanted, letters = (str(shape).replace("'", "") for shape in (expected, axes))
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected {wanted}, which is {letters} of "
                "ForesightBatch. ForesightProcessor prepares such batches."
            )


def _sizes(config: ForesightConfig) -> dict[str, int]:
    return {
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


def check_inputs(config: ForesightConfig, vision_width: int, batch: Mapping) -> None:
    """Checks the inputs of the transformer.

    Args:
        config (`ForesightConfig`): Sizes.
        vision_width (`int`): C, width of the vision tower's features.
        batch (`Mapping`): [`ForesightInputs`].

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
    for name in ("pixel_values", "goal_pixel_values"):
        if name in given and not batch[name].is_floating_point():
            raise ValueError(
                f"{name} has dtype {batch[name].dtype}; expected normalized pixels. ForesightProcessor makes "
                "them of uint8."
            )
    pairs = {"vision_features", "goal_features"} & given
    tensors = {**batch, **{f"{name}[{i}]": batch[name][i] for name in pairs for i in (0, 1)}}
    shapes, mask, sizes = dict(INPUT_SHAPES), batch.get("view_mask"), {**_sizes(config), "C": vision_width}
    if mask is not None and mask.ndim == 3:
        shapes["view_mask"] = ("B", "T", "V")
    name = "pixel_values" if "pixel_values" in given else "vision_features[0]"
    if tensors[name].ndim == len(shapes[name]) and (views := tensors[name].shape[2]) != len(config.views):
        raise ValueError(f"{name} has {views} views; the config names {list(config.views)}.")
    check_shapes(tensors, {name: shapes[name]}, sizes)
    frames = batch_size(batch)[1]
    if not 1 <= frames <= config.history_length:
        raise ValueError(f"{name} has {frames} frames; the config takes 1 to {config.history_length}.")
    check_shapes(tensors, shapes, sizes)


def check_targets(config: ForesightConfig, batch: Mapping) -> None:
    """Checks the targets of heads that exist, in a batch whose inputs were checked.

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
    if config.embodiments and batch.get("actions") is not None:
        _check_embodiment(config, batch.get("embodiment"))
    sizes = _sizes(config) | dict(zip("BT", batch_size(batch), strict=True))
    if batch.get("lookahead_pixel_values") is None:
        sizes["F"] = config.future_shift
    for objective, shapes in TARGET_SHAPES.items():
        if config.has(objective):
            check_shapes(batch, shapes, sizes)


def _check_embodiment(config: ForesightConfig, robots: Tensor | None) -> None:
    """Checks the numbers of the robots; those on a GPU only for their dtype, because a step would wait."""
    names = sorted(config.embodiments)
    if robots is None:
        raise ValueError(f"Give embodiment with actions, the robot of each sample among {names}.")
    is_whole = not (robots.is_floating_point() or robots.dtype == torch.bool)
    if not is_whole or (robots.device.type == "cpu" and not ((robots >= 0) & (robots < len(names))).all()):
        raise ValueError(
            f"embodiment must hold whole numbers from 0 to {len(names) - 1}, the places of the robots among "
            f"{names}; got {robots.dtype}, {robots.tolist()}."
        )
