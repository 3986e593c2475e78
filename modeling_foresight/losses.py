# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""Losses, one function per equation (3D Foresight, Sec. III-C; GR-MG).

Every loss is a sum and the number of elements in it, so that parts of a batch (of other processes, or of
gradient accumulation) share one mean. Losses are float32 for every model dtype. A sum without valid elements
is an exact zero that still depends on the prediction: distributed training needs all parameters.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .encoders import take_entries
from .targets import Target, masked_target


class LossSum(NamedTuple):
    """A loss before its mean is taken.

    Attributes:
        total: float32 `()`, or `(V,)` for a loss that is a mean per view, summed over views.
        count: float32, the same shape: the number of elements in the sum, or the sum of their weights.
    """

    total: Tensor
    count: Tensor

    def mean(self, count: Tensor | None = None) -> Tensor:
        """`total` over its own count, or over another one (see `ForesightForActionPrediction.forward`)."""
        count = self.count if count is None else count.to(self.total)
        # Nothing is divided by a tiny number: a gradient that is scaled (GradScaler) would overflow.
        return (self.total / torch.where(count > 0, count, 1)).sum()


def masked_sum(error: Tensor, mask: Tensor) -> Tensor:
    """Sum of `error` where `mask` is true, or weighted by a float mask.

    `error` may be NaN where `mask` is 0, but its gradient is then NaN too: compute it from [`masked_target`].
    """
    mask = mask.to(error.dtype)
    return (torch.where(mask > 0, error, torch.zeros_like(error)) * mask).sum()


def depth_loss(prediction: Tensor, target: Target) -> LossSum:
    """Eq. (1): squared error of normalized depth `(B, T, V, N, patch_size**2)`, a mean per view."""
    values, valid = target
    error = torch.where(valid, prediction.float() - values, 0.0)
    # Sums of whole frames keep the large arrays few: these losses are limited by memory, not arithmetic.
    return LossSum(error.square().sum((-2, -1)).sum((0, 1)), count_per_view(valid))


def count_per_view(weight: Tensor, elements: int = 1) -> Tensor:
    """Number of elements of each view, float32 `(V,)`; an entry of `(B, T, V, ...)` counts `elements`."""
    return (weight.flatten(3).sum(-1).sum((0, 1)) * elements).float()


def future_loss(rgb: Tensor, depth: Tensor | None, targets: dict[str, Target]) -> LossSum:
    """Eq. (2): squared error of normalized future RGB-D over its four channels, a mean per view.

    Predicted `rgb` is `(B, T', V, N, patch_size**2 * 3)`, `depth` `(B, T', V, N, patch_size**2)` or `None`.
    Where [`future_targets`] has no depth only RGB counts.
    """
    values, mask = targets["future_rgb"]
    error = rgb.float() - values
    square = torch.where(mask[..., 0, 0], error.square().sum((-2, -1)), 0.0)
    total, count = square.sum((0, 1)), count_per_view(mask, error.shape[-2] * error.shape[-1])
    if depth is None:
        return LossSum(total, count)
    if "future_depth" not in targets:
        return LossSum(total + 0 * depth.float().sum(), count)
    more = depth_loss(depth, targets["future_depth"])
    return LossSum(total + more.total, count + more.count)


def scale_loss(prediction: Tensor, target: Target | None) -> LossSum:
    """Absolute error of [`depth_scale_target`] `(B, T, V, N, 2)`: a share, like AbsRel. Not the paper's."""
    if target is None:
        nothing = 0 * prediction.sum()
        return LossSum(nothing, nothing.detach())
    error = (prediction - masked_target(target.values, target.weight)).abs()
    return LossSum(masked_sum(error, target.weight), count_scales(target.weight))


def count_scales(known: Tensor) -> Tensor:
    """The count of [`scale_loss`]: two numbers for each patch with depth."""
    return 2 * known.sum().float()


def flow_loss(prediction: Tensor, target: Target) -> LossSum:
    """Eq. (3): weighted squared error of trajectories `(B, T, L, P, 3)`, or `(B, T, L, P, 2)` without z."""
    weight = target.weight[..., None]
    error = (prediction.float() - masked_target(target.values, weight)) ** 2
    return LossSum(masked_sum(error, weight), target.weight.sum() * prediction.shape[-1])


def displacement_loss(prediction: Tensor, target: Target, scales: Sequence[float]) -> LossSum:
    """Squared errors of the depth at the start and of the displacement since: one mean over all of them.

    Not the paper's: of the squared error of [`flow_loss`] nearly all is depth at the start.

    Args:
        prediction (`torch.Tensor`): Trajectories `(B, T, L, P, 3)`, or `(B, T, L, P, 2)` without z.
        target (`Target`): Of the same form. Without a known start a point has no displacement.
        scales (`Sequence[float]`): What each error is measured in: meters, and fractions and meters.
    """
    starts, later = _displacement_weights(target)
    error = prediction.float() - masked_target(target.values, target.weight[..., None])
    start = error[:, :, 0, :, 2:] / scales[0]  # (B, T, P, 1), or no entry without z
    moved = (error[:, :, 1:] - error[:, :, :1]) / scales[1]  # (B, T, L - 1, P, 3)
    total = masked_sum(start**2, starts) + masked_sum(moved**2, later)
    return LossSum(total, count_displacements(target))


def count_displacements(target: Target) -> Tensor:
    """The count of [`displacement_loss`]: x and y of the start are given."""
    starts, later = _displacement_weights(target)
    dim = target.values.shape[-1]
    return starts.sum() * (dim - 2) + later.sum() * dim


def _displacement_weights(target: Target) -> tuple[Tensor, Tensor]:
    """Weights `(B, T, P, 1)` of the start and `(B, T, L - 1, P, 1)` of each later step."""
    weight = target.weight[..., None]
    return weight[:, :, 0], weight[:, :, 1:] * (weight[:, :, :1] > 0)


def action_losses(
    prediction: Tensor,
    actions: Tensor,
    mask: Tensor,
    binary: list[int],
    kind: str,
    entries: Tensor | None = None,
) -> tuple[LossSum, LossSum]:
    """Eq. (4): SmoothL1 (beta 1) on regressed entries and binary cross-entropy on binary ones.

    Args:
        prediction (`torch.Tensor`): `(B, T, K, A)`; logits at the binary entries.
        actions (`torch.Tensor`): `(B, T, K, A)` normalized; 0 or 1 at the binary entries.
        mask (`torch.Tensor`): Boolean `(B, T, K)`: frame real and action present.
        binary (`list[int]`): The binary entries.
        kind (`str`): `"smooth_l1"`, or `"l1"` for the regressed entries.
        entries (`torch.Tensor`, *optional*): Boolean `(B, A)`: entries that the robot has; all by default.

    Returns:
        The two losses; 0 for a kind of entry that does not exist.
    """
    continuous = [i for i in range(prediction.shape[-1]) if i not in binary]
    arm_count, gripper_count = count_actions(mask, continuous, binary, entries)
    mask = mask[..., None]  # (B, T, K, 1)
    if entries is not None:
        mask = mask & entries[:, None, None]  # (B, T, K, A)
    prediction, actions = prediction.float(), masked_target(actions, mask)
    regress = F.smooth_l1_loss if kind == "smooth_l1" else F.l1_loss

    def loss_sum(error_of, chosen: list[int]) -> Tensor:
        if not chosen:
            return prediction.sum() * 0
        pair = take_entries(prediction, chosen), take_entries(actions, chosen)
        counted = mask if mask.shape[-1] == 1 else take_entries(mask, chosen)
        return masked_sum(error_of(*pair, reduction="none"), counted)

    arm, gripper = loss_sum(regress, continuous), loss_sum(F.binary_cross_entropy_with_logits, binary)
    return LossSum(arm, arm_count), LossSum(gripper, gripper_count)


def count_actions(
    mask: Tensor, continuous: list[int], binary: list[int], entries: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Numbers of regressed and of binary entries of the actions that exist; see [`action_losses`]."""
    if entries is None:
        steps = mask.sum()
        return (steps * len(continuous)).float(), (steps * len(binary)).float()
    steps = mask.sum((1, 2))[:, None]  # (B, 1)
    each = (steps * take_entries(entries, kind) if kind else 0 * steps for kind in (continuous, binary))
    return tuple(count.sum().float() for count in each)


def kl_loss(mean: Tensor, log_var: Tensor) -> LossSum:
    """KL divergence of the style from N(0, 1): sum over dimensions, mean over all frames, padded too (GR-MG).

    `mean` and `log_var` are `(M, latent)` for all M frames.
    """
    mean, log_var = mean.float(), log_var.float()
    total = (0.5 * (mean**2 + log_var.exp() - 1 - log_var)).sum()
    return LossSum(total, total.new_tensor(len(mean)))


def progress_loss(prediction: Tensor, target: Target) -> LossSum:
    """Squared error of progress over real frames; all `(B, T)`."""
    values, mask = target
    error = (prediction.float() - masked_target(values, mask)) ** 2
    return LossSum(masked_sum(error, mask), mask.sum().float())
