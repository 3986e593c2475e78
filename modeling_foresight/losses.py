# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""Targets and losses, one function per equation (3D Foresight, Sec. III-C; GR-MG).

Everything here runs in float32 whatever the model's dtype. A mean without valid elements is an exact zero
that still depends on the prediction, so that distributed training never sees an unused parameter.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .encoders import take_entries

MIN_VALID_SHARE = 0.25


def masked_mean(error: Tensor, mask: Tensor) -> Tensor:
    """Mean of `error` where `mask` is true, or weighted by a float mask; 0 if it is empty.

    Args:
        error (`torch.Tensor`): Any shape, float. Where `mask` is 0 it may be NaN, but its gradient is then
            NaN too: give [`masked_target`] to whatever computes the error.
        mask (`torch.Tensor`): Broadcastable to `error`.
    """
    mask = mask.to(error.dtype).expand_as(error)
    error = torch.where(mask > 0, error, torch.zeros_like(error))
    return (error * mask).sum() / mask.sum().clamp(min=torch.finfo(error.dtype).tiny)


def masked_target(target: Tensor, mask: Tensor) -> Tensor:
    """`target` in float32 with 0 where `mask` is 0.

    Targets may be NaN where nothing is known. Masking the error alone would not do: backward multiplies the
    masked 0 by the derivative of the error, and 0 * NaN is NaN.
    """
    target = target.float()
    return torch.where(mask.expand_as(target) > 0, target, torch.zeros_like(target))


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """`(..., C, H, W)` -> `(..., N, patch_size**2 * C)`, row-major; inside a patch (row, column, channel).

    Raises:
        ValueError: If `patch_size` does not divide the image; the message gives both sizes.
    """
    height, width = images.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"Images of {height}x{width} pixels cannot be cut into patches of {patch_size} pixels."
        )
    return rearrange(images, "... c (h p) (w q) -> ... (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches: Tensor, patch_size: int, channels: int) -> Tensor:
    """Inverse of [`patchify`] for square images: `(..., N, patch_size**2 * C)` -> `(..., C, H, W)`."""
    side = round(patches.shape[-2] ** 0.5)
    return rearrange(
        patches,
        "... (h w) (p q c) -> ... c (h p) (w q)",
        h=side,
        w=side,
        p=patch_size,
        q=patch_size,
        c=channels,
    )


def rgb_target(pixel_values: Tensor, patch_size: int) -> Tensor:
    """RGB patches with zero mean and unit deviation each (GR-MG's form of MAE's target).

    `(x - mean) / (sqrt(unbiased var) + 1e-6)` over the `patch_size**2 * 3` values of a patch.

    Args:
        pixel_values (`torch.Tensor`): `(..., 3, H, W)` normalised network input.
        patch_size (`int`): Side of a patch in pixels.

    Returns:
        `torch.Tensor`: float32 `(..., N, patch_size**2 * 3)`.
    """
    patches = patchify(pixel_values.float(), patch_size)
    centred = patches - patches.mean(-1, keepdim=True)
    # Several times as fast as `std` on a CPU.
    variance = centred.square().sum(-1, keepdim=True) / (centred.shape[-1] - 1)
    return centred / (variance.sqrt() + 1e-6)


def depth_statistics(depth: Tensor, patch_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Patches of a depth map with each patch's mean and deviation over its valid pixels.

    Args:
        depth (`torch.Tensor`): `(..., H, W)` metres; 0 or non-finite where invalid.
        patch_size (`int`): Side of a patch in pixels.

    Returns:
        Patches `(..., N, patch_size**2)` in metres, their valid pixels (bool, same shape), mean
        `(..., N, 1)` and `sqrt(unbiased var + 1e-6)` `(..., N, 1)` in metres: a floor of 1 mm, so that flat
        patches do not blow up noise.
    """
    patches = patchify(depth.float()[..., None, :, :], patch_size)
    valid = torch.isfinite(patches) & (patches > 0)
    patches = torch.where(valid, patches, torch.zeros_like(patches))
    count = valid.sum(-1, keepdim=True)
    mean = patches.sum(-1, keepdim=True) / count.clamp(min=1)
    squares = torch.where(valid, (patches - mean) ** 2, torch.zeros_like(patches))
    var = squares.sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    return patches, valid, mean, (var + 1e-6).sqrt()


def depth_target(depth: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Depth patches with zero mean and unit deviation each, and where they may be compared.

    Args:
        depth (`torch.Tensor`): `(..., H, W)` metres; 0 or non-finite where invalid.
        patch_size (`int`): Side of a patch in pixels.

    Returns:
        Target float32 `(..., N, patch_size**2)` and its boolean mask: invalid pixels, and all pixels of
        patches with less than a quarter of valid ones, are out.
    """
    patches, valid, mean, deviation = depth_statistics(depth, patch_size)
    enough = valid.float().mean(-1, keepdim=True) >= MIN_VALID_SHARE
    return (patches - mean) / deviation, valid & enough


def depth_loss(prediction: Tensor, depth: Tensor, mask: Tensor, patch_size: int) -> Tensor:
    """Eq. (1): squared error of normalised current depth, summed over views.

    Args:
        prediction (`torch.Tensor`): `(B, T, V, N, patch_size**2)` normalised per patch.
        depth (`torch.Tensor`): `(B, T, V, H, W)` metres; 0 = invalid.
        mask (`torch.Tensor`): Boolean `(B, T, V)`: real frames of present views.
        patch_size (`int`): Side of a patch in pixels.
    """
    square, count = _depth_error(prediction, depth, mask, patch_size)
    return _mean_per_view(square, count)


def _depth_error(prediction: Tensor, depth: Tensor, mask: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Sum of squared errors `(B, T, V)` over the valid pixels of a frame's present views, and their number.

    Sums of whole frames keep the large arrays few: memory, not arithmetic, is what these losses take.
    """
    target, valid = depth_target(depth, patch_size)
    valid = valid & mask[..., None, None]
    error = torch.where(valid, prediction.float() - target, 0.0)
    return error.square().sum((-2, -1)), valid.sum((-2, -1))


def _mean_per_view(square: Tensor, count: Tensor) -> Tensor:
    """`(B, T, V)` sums and numbers of elements -> mean over the elements of each view, summed over views."""
    return (square.sum((0, 1)) / count.sum((0, 1)).clamp(min=1)).sum()


def future_loss(
    rgb: Tensor,
    depth_prediction: Tensor | None,
    pixel_values: Tensor,
    depth: Tensor | None,
    mask: Tensor,
    patch_size: int,
) -> Tensor:
    """Eq. (2): squared error of normalised future RGB-D, the mean over its four channels, summed over views.

    Args:
        rgb (`torch.Tensor`): `(B, T', V, N, patch_size**2 * 3)` prediction for S frames ahead.
        depth_prediction (`torch.Tensor`, *optional*): `(B, T', V, N, patch_size**2)` prediction for S frames
            ahead; `None` where RGB alone is predicted.
        pixel_values (`torch.Tensor`): `(B, T', V, 3, H, W)` the future frames, normalised network input.
        depth (`torch.Tensor`, *optional*): `(B, T', V, H, W)` their depth in metres; 0 = invalid. Without it
            only RGB counts.
        mask (`torch.Tensor`): Boolean `(B, T', V)`: both frames real, view present.
        patch_size (`int`): Side of a patch in pixels.
    """
    error = rgb.float() - rgb_target(pixel_values, patch_size)
    square = torch.where(mask, error.square().sum((-2, -1)), 0.0)
    count = mask * error[0, 0, 0].numel()
    if depth_prediction is not None and depth is None:
        square = square + 0 * depth_prediction.float().sum()
    elif depth_prediction is not None:
        squares, counts = _depth_error(depth_prediction, depth, mask, patch_size)
        square, count = square + squares, count + counts
    return _mean_per_view(square, count)


def flow_loss(prediction: Tensor, track: Tensor, weight: Tensor) -> Tensor:
    """Eq. (3): weighted mean squared error of trajectories over frames, steps, points and the 3 coordinates.

    Args:
        prediction (`torch.Tensor`): `(B, T, L, P, 3)`: x, y as fractions of the image, z in metres; with two
            coordinates z is left out.
        track (`torch.Tensor`): Truth `(B, T, L, P, 3)` in the same units.
        weight (`torch.Tensor`): `(B, T, L, P)`; 0 where not supervised.
    """
    weight = weight.float()[..., None]
    track = masked_target(track[..., : prediction.shape[-1]], weight)
    return masked_mean((prediction.float() - track) ** 2, weight)


def action_losses(
    prediction: Tensor, actions: Tensor, mask: Tensor, binary: list[int], kind: str
) -> tuple[Tensor, Tensor]:
    """Eq. (4): SmoothL1 (beta 1) on regressed entries and binary cross-entropy on binary ones.

    Args:
        prediction (`torch.Tensor`): `(B, T, K, A)`; logits at the binary entries.
        actions (`torch.Tensor`): `(B, T, K, A)` normalised; 0 or 1 at the binary entries.
        mask (`torch.Tensor`): Boolean `(B, T, K)`: frame real and action present.
        binary (`list[int]`): The binary entries.
        kind (`str`): `"smooth_l1"`, or `"l1"` for the regressed entries.

    Returns:
        The two losses; 0 for a kind of entry that does not exist.
    """
    mask = mask[..., None]
    prediction, actions = prediction.float(), masked_target(actions, mask)
    continuous = [i for i in range(prediction.shape[-1]) if i not in binary]
    regress = F.smooth_l1_loss if kind == "smooth_l1" else F.l1_loss
    arm = gripper = prediction.sum() * 0
    if continuous:
        error = regress(
            take_entries(prediction, continuous), take_entries(actions, continuous), reduction="none"
        )
        arm = masked_mean(error, mask)
    if binary:
        error = F.binary_cross_entropy_with_logits(
            take_entries(prediction, binary), take_entries(actions, binary), reduction="none"
        )
        gripper = masked_mean(error, mask)
    return arm, gripper


def kl_loss(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL divergence of the style from N(0, 1): sum over dimensions, mean over all frames, padded too (GR-MG).

    Args:
        mean, log_var (`torch.Tensor`): `(M, latent)` of all M frames.
    """
    mean, log_var = mean.float(), log_var.float()
    return (0.5 * (mean**2 + log_var.exp() - 1 - log_var)).sum(-1).mean()


def progress_loss(prediction: Tensor, progress: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of progress over real frames; all `(B, T)`."""
    return masked_mean((prediction.float() - masked_target(progress, mask)) ** 2, mask)


__all__ = [
    "action_losses",
    "depth_loss",
    "depth_statistics",
    "depth_target",
    "flow_loss",
    "future_loss",
    "kl_loss",
    "masked_mean",
    "masked_target",
    "patchify",
    "progress_loss",
    "rgb_target",
    "unpatchify",
]
