# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""Targets of every head for a model batch ([`ForesightBatch`]), with weights: one function per target.

The losses, the open-loop errors and the pictures use them.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from .configuration_foresight import ForesightConfig
from .inputs import blank_masked, present_views, real_frames

MIN_VALID_SHARE = 0.25


class Target(NamedTuple):
    """What a head should predict, and how much each element counts.

    Attributes:
        values: float32, in the form of the head's prediction; arbitrary where `weight` is 0.
        weight: Boolean or float, broadcastable to `values`.
    """

    values: Tensor
    weight: Tensor


def masked_target(target: Tensor, mask: Tensor) -> Tensor:
    """`target` in float32 with 0 where `mask` is 0.

    Unknown targets may be NaN. Masking the error alone is not enough: backward multiplies the masked 0 by the
    derivative of the error, and 0 * NaN is NaN.
    """
    target = target.float()
    return torch.where(mask.expand_as(target) > 0, target, torch.zeros_like(target))


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """`(..., C, H, W)` -> `(..., N, patch_size**2 * C)`, row-major; inside a patch (row, column, channel)."""
    height, width = images.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"Images of {height}x{width} pixels cannot be cut into patches of {patch_size} pixels."
        )
    return rearrange(images, "... c (h p) (w q) -> ... (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches: Tensor, patch_size: int, channels: int) -> Tensor:
    """Inverse of [`patchify`] for square images: `(..., N, patch_size**2 * C)` -> `(..., C, H, W)`."""
    side = round(patches.shape[-2] ** 0.5)
    sizes = {"h": side, "w": side, "p": patch_size, "q": patch_size, "c": channels}
    return rearrange(patches, "... (h w) (p q c) -> ... c (h p) (w q)", **sizes)


def rgb_target(pixel_values: Tensor, patch_size: int) -> Tensor:
    """RGB patches with zero mean and unit deviation each (GR-MG's form of MAE's target).

    Normalized pixels `(..., 3, H, W)` -> float32 `(..., N, patch_size**2 * 3)`:
    `(x - mean) / (sqrt(unbiased var) + 1e-6)` over the values of a patch.
    """
    patches = patchify(pixel_values.float(), patch_size)
    centered = patches - patches.mean(-1, keepdim=True)
    # Several times as fast as `std` on a CPU.
    variance = centered.square().sum(-1, keepdim=True) / (centered.shape[-1] - 1)
    return centered / (variance.sqrt() + 1e-6)


def depth_statistics(depth: Tensor, patch_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Patches of a depth map with each patch's mean and deviation over its valid pixels.

    Args:
        depth (`torch.Tensor`): `(..., H, W)` meters; 0 or non-finite where invalid.
        patch_size (`int`): Side of a patch in pixels.

    Returns:
        Patches `(..., N, patch_size**2)` in meters, their valid pixels (bool, same shape), mean
        `(..., N, 1)` and `sqrt(unbiased var + 1e-6)` `(..., N, 1)` in meters: a floor of 1 mm, so that flat
        patches do not blow up noise.
    """
    patches, valid = _depth_patches(depth, patch_size)
    patches = torch.where(valid, patches, torch.zeros_like(patches))
    return patches, valid, *_mean_and_deviation(patches, valid)


def _mean_and_deviation(patches: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Those of the valid pixels of each patch, `(..., N, 1)`; the deviation is at least 1e-3."""
    count = valid.sum(-1, keepdim=True)
    mean = patches.sum(-1, keepdim=True) / count.clamp(min=1)
    squares = torch.where(valid, (patches - mean) ** 2, torch.zeros_like(patches))
    var = squares.sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    return mean, (var + 1e-6).sqrt()


def _depth_patches(depth: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Depth `(..., H, W)` -> patches `(..., N, patch_size**2)` in meters, and where they are known."""
    patches = patchify(depth.float()[..., None, :, :], patch_size)
    return patches, torch.isfinite(patches) & (patches > 0)


def _in_good_patches(valid: Tensor) -> Tensor:
    """Valid pixels `(..., N, patch_size**2)` except those of patches with less than a quarter of them."""
    return valid & (valid.float().mean(-1, keepdim=True) >= MIN_VALID_SHARE)


def depth_target(depth: Tensor, patch_size: int) -> Target:
    """Depth patches `(..., N, patch_size**2)` with zero mean and unit deviation each.

    Takes what [`depth_statistics`] takes. The boolean weight leaves out invalid pixels, and all pixels of
    patches with less than a quarter of valid ones.
    """
    patches, valid, mean, deviation = depth_statistics(depth, patch_size)
    return Target((patches - mean) / deviation, _in_good_patches(valid))


def depth_weight(depth: Tensor, patch_size: int) -> Tensor:
    """The weight of [`depth_target`] alone, for counting."""
    return _in_good_patches(_depth_patches(depth, patch_size)[1])


def draw_supervision(config: ForesightConfig, batch: Mapping) -> dict[str, Tensor]:
    """The random `supervision_order` of a training batch, by PyTorch's own generator.

    Args:
        config (`ForesightConfig`): Its `supervised_share` counts; at 1, nothing is drawn.
        batch (`Mapping`): A [`ForesightBatch`].
    """
    if config.supervised_share == 1:
        return {}
    views = present_views(config, batch)
    return {"supervision_order": torch.rand(views.shape).to(views.device)}


def draw_training(config: ForesightConfig, batch: Mapping, seeds: Sequence[int]) -> dict[str, Tensor]:
    """The random numbers of a training batch, each sample's from its own seed.

    They do not depend on how samples are divided among processes and micro-batches. Dropout does. A trainer
    that counts targets over processes or parts adds them to the batch before `count_targets` and `forward`,
    so that both know which images are left out.

    Args:
        config (`ForesightConfig`): Which numbers the model needs.
        batch (`Mapping`): A [`ForesightBatch`] of B samples.
        seeds (`Sequence[int]`): One per sample.

    Returns:
        `dict[str, torch.Tensor]`: `supervision_order`, `style_noise` and `goal_draw` of [`ForesightBatch`],
        float32, as far as the model uses them.
    """
    views = present_views(config, batch)  # (B, T, V)
    frames, draws = views.shape[1], {}
    if config.supervised_share < 1:
        draws["supervision_order"] = torch.rand, views.shape[1:]
    if config.has("action") and config.has_style and batch.get("actions") is not None:
        draws["style_noise"] = torch.randn, (frames, config.latent_dim)
    if config.goal_image and config.goal_dropout:
        draws["goal_draw"] = torch.rand, ()
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return {
        name: torch.stack([draw(shape, generator=generator) for generator in generators]).to(views.device)
        for name, (draw, shape) in draws.items()
    }


def take_supervised(config: ForesightConfig, batch: Mapping, images: Tensor) -> Tensor:
    """The images that a batch supervises, as frames of one window; all if it has no `supervision_order`.

    Whole images, because the decoders' attention joins the patches of one; equally many of each view, because
    losses are means per view; masked ones too, so that shapes do not depend on the data.

    Args:
        config (`ForesightConfig`): Its `supervised_share` counts.
        batch (`Mapping`): A [`ForesightBatch`].
        images (`torch.Tensor`): `(B, T', V, ...)` of anything that belongs to the first T' frames' images.

    Returns:
        `torch.Tensor`: `(1, M, V, ...)`, M at least 1.
    """
    order = batch.get("supervision_order")
    if order is None:
        return images
    order = order[:, : images.shape[1]].flatten(0, 1)  # (B * T', V)
    chosen = order.topk(max(round(config.supervised_share * len(order)), 1), dim=0).indices  # (M, V)
    return images.flatten(0, 1)[chosen, torch.arange(images.shape[2], device=chosen.device)][None]


def depth_targets(config: ForesightConfig, batch: Mapping) -> Target | None:
    """Current depth `(B, T, V, N, patch_size**2)`, normalized per patch; `None` if the batch has no depth.

    This and [`future_targets`] hold the images of [`take_supervised`] alone.
    """
    if batch.get("depth") is None:
        return None
    values, valid = depth_target(take_supervised(config, batch, batch["depth"]), config.patch_size)
    present = take_supervised(config, batch, present_views(config, batch))
    return Target(values, valid & present[..., None, None])


def depth_scale_targets(config: ForesightConfig, batch: Mapping) -> Target | None:
    """Scale of current depth `(B, T, V, N, 2)` with weight `(B, T, V, N, 1)`; `None` without depth."""
    if batch.get("depth") is None:
        return None
    values, known = depth_scale_target(take_supervised(config, batch, batch["depth"]), config.patch_size)
    present = take_supervised(config, batch, present_views(config, batch))
    return Target(values, known & present[..., None, None])


def depth_scale_target(depth: Tensor, patch_size: int) -> Target:
    """Mean of log depth (meters) and log of its deviation, `(..., N, 2)`; weight `(..., N, 1)`.

    Takes what [`depth_statistics`] takes. The deviation is at least 1e-3, 1 mm at 1 m. Patches with less
    than a quarter of valid pixels have no weight.
    """
    patches, valid = _depth_patches(depth, patch_size)
    mean, deviation = _mean_and_deviation(torch.where(valid, patches, torch.ones_like(patches)).log(), valid)
    return Target(torch.cat([mean, deviation.log()], -1), _in_good_patches(valid).any(-1, keepdim=True))


def depth_in_meters(patches: Tensor, scale: Tensor, patch_size: int) -> Tensor:
    """Predicted `(..., N, patch_size**2)` and [`depth_scale_target`] -> float32 `(..., H, W)` meters.

    In log space, where depth stays positive and near and far edges weigh alike: on held-out MetaWorld
    episodes AbsRel was 0.060 and 0.195 (two cameras), with mean and deviation in meters 0.069 and 0.208.
    """
    mean, log_deviation = scale[..., :1], scale[..., 1:]
    return unpatchify((mean + log_deviation.exp() * patches.float()).exp(), patch_size, 1).squeeze(-3)


def newest_trained_future(config: ForesightConfig) -> int:
    """The newest frame of a whole window whose future is trained, 0 for the oldest.

    With `future_targets="window"` targets lie inside the window: the predictions of the last `future_shift`
    frames are never trained.
    """
    untrained = config.future_shift if config.future_targets == "window" else 0
    return config.history_length - 1 - untrained


def frames_ahead(config: ForesightConfig, now: Tensor, later: Tensor | None) -> Tensor:
    """Frames `future_shift` after those of a window `(B, T, ...)`, as far as there are any.

    `later` are the frames after the window, `(B, F, ...)`. Gives `(B, T', ...)` with T' at most T.
    """
    shift, frames = config.future_shift, now.shape[1]
    if later is None:
        return now[:, shift:]
    return torch.cat([now[:, shift:], later[:, max(shift - frames, 0) : shift]], dim=1)


def future_mask(config: ForesightConfig, batch: Mapping) -> Tensor:
    """Boolean `(B, T', V)`: the frame and the one `future_shift` after it are real, the camera exists."""
    now, later = present_views(config, batch), None
    if (pixels := batch.get("lookahead_pixel_values")) is not None:
        # A camera that exists in the window exists after it.
        later = now.any(1, keepdim=True).expand(-1, pixels.shape[1], -1)
        if batch.get("lookahead_mask") is not None:
            later = later & batch["lookahead_mask"].bool()[..., None]
    ahead = frames_ahead(config, now, later)
    return ahead & now[:, : ahead.shape[1]]


def future_depth(config: ForesightConfig, batch: Mapping) -> Tensor | None:
    """Depth `future_shift` frames ahead `(B, T', V, H, W)` in meters; `None` if the batch has no depth."""
    now, later, pixels = (batch.get(k) for k in ("depth", "lookahead_depth", "lookahead_pixel_values"))
    if now is None:
        return None
    if pixels is None:
        later = None
    elif later is None:
        later = now.new_zeros(len(now), pixels.shape[1], *now.shape[2:])
    return frames_ahead(config, now, later)


def num_future_targets(config: ForesightConfig, batch: Mapping) -> int:
    """T', the number of a batch's frames that have a target `future_shift` frames ahead."""
    return 0 if batch.get("pixel_values") is None else future_mask(config, batch).shape[1]


def future_targets(config: ForesightConfig, batch: Mapping) -> dict[str, Target]:
    """RGB and depth `future_shift` frames ahead, normalized per patch.

    Returns:
        `dict`: `future_rgb` `(B, T', V, N, patch_size**2 * 3)`, and `future_depth` `(B, T', V, N,
        patch_size**2)` if it is predicted and the batch has depth. Empty without future frames.
    """
    if not num_future_targets(config, batch):
        return {}
    shown = take_supervised(config, batch, future_mask(config, batch))
    patch, depth, mask = config.patch_size, future_depth(config, batch), shown[..., None, None]
    pixels = frames_ahead(config, batch["pixel_values"], batch.get("lookahead_pixel_values"))
    pixels = blank_masked(take_supervised(config, batch, pixels), shown)
    targets = {"future_rgb": Target(rgb_target(pixels, patch), mask)}
    if depth is not None and "future" in config.objectives:
        values, valid = depth_target(take_supervised(config, batch, depth), patch)
        targets["future_depth"] = Target(values, valid & mask)
    return targets


def future_scale_targets(config: ForesightConfig, batch: Mapping) -> Target | None:
    """Scale of future depth `(B, T', V, N, 2)` with weight `(B, T', V, N, 1)`; `None` without depth."""
    depth = future_depth(config, batch)
    if depth is None:
        return None
    values, known = depth_scale_target(take_supervised(config, batch, depth), config.patch_size)
    mask = take_supervised(config, batch, future_mask(config, batch))
    return Target(values, known & mask[..., None, None])


def flow_targets(config: ForesightConfig, batch: Mapping) -> Target | None:
    """Trajectories `(B, T, L, P, 3)`, or `(B, T, L, P, 2)` for `flow_2d`, with weights `(B, T, L, P)`."""
    if batch.get("track") is None:
        return None
    track, weight = batch["track"].float()[..., : config.flow_dim], batch.get("track_weight")
    weight = torch.ones_like(track[..., 0]) if weight is None else weight.float()
    return Target(track, weight * real_frames(batch)[:, :, None, None])


def action_weight(config: ForesightConfig, batch: Mapping) -> Tensor:
    """Boolean `(B, T, K)`: the frame is real and the action exists."""
    mask = real_frames(batch)[:, :, None].expand(-1, -1, config.chunk_size)
    return mask if batch.get("action_mask") is None else mask & batch["action_mask"].bool()


def action_entries(config: ForesightConfig, batch: Mapping) -> Tensor | None:
    """Boolean `(B, A)`: entries of the action that each sample's robot has; `None` without embodiments."""
    if not config.embodiments:
        return None
    robots = batch["embodiment"]
    return _copy_once(tuple(map(tuple, config.robot_entries("action"))), robots.device)[robots]


@functools.lru_cache(maxsize=16)
def _copy_once(values: tuple, device: torch.device) -> Tensor:
    """A boolean table on its device: a copy at every step would wait for the GPU."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)


def progress_targets(config: ForesightConfig, batch: Mapping) -> Target | None:
    """The completed share of the instruction at every frame; `(B, T)` both."""
    if batch.get("progress") is None:
        return None
    return Target(batch["progress"].float(), real_frames(batch))
