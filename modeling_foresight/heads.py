# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""One class per objective: the queries that it adds, how it decodes them, and its losses.

The classes hold no weights: learned queries are modules of [`ForesightModel`] (the trunk), decoders are
modules of [`ForesightForActionPrediction`] (the policy), under the names in `queries` and `decoders`. A new
objective is a class here and an entry of `HEADS`; the config names it and its loss weight, and a new kind of
query gets a row in the attention mask.
"""

import abc
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from .configuration_foresight import ForesightConfig
from .decoders import (
    ActionDecoder,
    ActionEncoder,
    DisplacementFlowDecoder,
    FlowDecoder,
    LinearActionDecoder,
    MetricDepthDecoder,
    PatchDecoder,
    ProgressDecoder,
)
from .encoders import embed_all, flow_grid_points
from .inputs import batch_size, present_views, real_frames
from .losses import (
    LossSum,
    action_losses,
    count_actions,
    count_displacements,
    count_per_view,
    count_scales,
    depth_loss,
    displacement_loss,
    flow_loss,
    future_loss,
    kl_loss,
    progress_loss,
    scale_loss,
)
from .targets import (
    action_entries,
    action_weight,
    depth_in_meters,
    depth_scale_targets,
    depth_targets,
    depth_weight,
    flow_targets,
    future_depth,
    future_mask,
    future_scale_targets,
    future_targets,
    masked_target,
    num_future_targets,
    progress_targets,
    take_supervised,
)
from .tokens import Kind

__all__ = ["AUXILIARY_DECODERS", "AUXILIARY_QUERIES", "DECODERS", "HEADS", "Head", "heads_of", "query_heads"]

# Gives the hidden states `(B, T, tokens, D)` of a kind of token, of one view.
Read = Callable[..., Tensor]


class Head(abc.ABC):
    """What every objective has.

    Attributes:
        objective: Its name in the config (`config.has`), or the name of the whole form of a family.
        losses: Names of its losses; the config has a `<name>_loss_weight` for each.
        query: The kind of its query tokens, if it adds any.
        queries, decoders: Names of its modules in the trunk and in the policy.
        control_parts: Those of them that a policy with `auxiliary_heads=False` keeps.
    """

    objective: str
    losses: tuple[str, ...]
    query: Kind | None = None
    queries: tuple[str, ...] = ()
    decoders: tuple[str, ...] = ()
    control_parts: tuple[str, ...] = ()

    def query_tokens(self, config: ForesightConfig) -> list[int]:
        """Number of query tokens per frame, for each group: one group, or one per view."""
        return [1] if self.query is not None and config.has(self.objective) else []

    def add_queries(self, trunk: nn.Module) -> None:
        """Makes the learned queries, on a trunk whose config has them."""
        for name in self.queries:
            setattr(trunk, name, nn.Embedding(1, trunk.config.hidden_size))

    def embed_queries(
        self, trunk: nn.Module, size: tuple[int, int], batch: Mapping, device: torch.device
    ) -> list[Tensor]:
        """Query tokens of `size` = (B, frames): one `(B, frames * tokens, D)` per group."""
        return [_repeat(getattr(trunk, name), size, device) for name in self.queries]

    @abc.abstractmethod
    def add_decoders(self, policy: nn.Module) -> None:
        """Makes the decoders, on a policy whose config has the objective."""

    @abc.abstractmethod
    def decode(self, policy: nn.Module, read: Read, batch: Mapping) -> dict[str, Tensor]:
        """Fields of [`ForesightOutput`] from the final hidden states."""

    @abc.abstractmethod
    def loss(self, config: ForesightConfig, predicted: Mapping, batch: Mapping) -> dict[str, LossSum]:
        """The losses by name; empty if the batch has no target for them."""

    @abc.abstractmethod
    def count(self, config: ForesightConfig, batch: Mapping) -> dict[str, Tensor]:
        """The counts of [`loss`] without a prediction; empty if the batch has no target."""

    def zero_loss(self, policy: nn.Module, predicted: Mapping) -> Tensor:
        """Zero that depends on every parameter of the head, for a batch without its target (DDP)."""
        return sum(0 * output.float().sum() for output in predicted.values())


class DepthHead(Head):
    """Current depth of every view, decoded from the image tokens: it adds no query."""

    objective, losses, decoders = "depth", ("depth", "depth_scale"), ("depth_decoder",)

    def add_decoders(self, policy):
        _add_depth_decoder(policy)

    def decode(self, policy, read, batch):
        views = range(len(policy.config.views))
        images = torch.stack([read(Kind.IMAGE, view) for view in views], dim=2)  # (B, T, V, r + 1, D)
        return _decode_depth(policy, take_supervised(policy.config, batch, images), "depth")

    def loss(self, config, predicted, batch):
        target = depth_targets(config, batch)
        if target is None:
            return {}
        losses = {"depth": depth_loss(predicted["depth"], target)}
        if config.depth_form == "metric":
            losses["depth_scale"] = scale_loss(predicted["depth_scale"], depth_scale_targets(config, batch))
        return losses

    def count(self, config, batch):
        if batch.get("depth") is None:
            return {}
        valid = depth_weight(take_supervised(config, batch, batch["depth"]), config.patch_size)
        valid = valid & take_supervised(config, batch, present_views(config, batch))[..., None, None]
        counts = {"depth": count_per_view(valid)}
        if config.depth_form == "metric":
            counts["depth_scale"] = count_scales(valid.any(-1))
        return counts


class FlowHead(Head):
    """3D (or 2D) flow of points of the first view. The action query reads its query."""

    objective, losses, query = "flow", ("flow",), Kind.FLOW
    queries, decoders = ("flow_query", "embed_flow_points"), ("flow_decoder",)

    def query_tokens(self, config):
        return [config.num_flow_queries] if config.has_flow_query else []

    def add_queries(self, trunk):
        config = trunk.config
        trunk.flow_query = nn.Embedding(config.num_flow_queries, config.hidden_size)
        trunk.embed_flow_points = nn.Linear(2 * config.num_flow_points, config.hidden_size)

    def embed_queries(self, trunk, size, batch, device):
        start = _start_points(trunk.config, size, batch, device)
        points = trunk.embed_flow_points((2 * start - 1).flatten(2).to(trunk.dtype))  # (B, T, D)
        return [(embed_all(trunk.flow_query, device) + points[:, :, None]).flatten(1, 2)]

    def add_decoders(self, policy):
        apart = policy.config.flow_form == "displacement"
        policy.flow_decoder = (DisplacementFlowDecoder if apart else FlowDecoder)(policy.config)

    def decode(self, policy, read, batch):
        context = read(Kind.FLOW)
        start = _start_points(policy.config, context.shape[:2], batch, context.device)
        return {"flow": policy.flow_decoder(context, start)}

    def loss(self, config, predicted, batch):
        target = flow_targets(config, batch)
        if target is None:
            return {}
        if config.flow_form == "displacement":
            return {"flow": displacement_loss(predicted["flow"], target, config.flow_scales)}
        return {"flow": flow_loss(predicted["flow"], target)}

    def count(self, config, batch):
        target = flow_targets(config, batch)
        if target is None:
            return {}
        if config.flow_form == "displacement":
            return {"flow": count_displacements(target)}
        return {"flow": target.weight.sum() * config.flow_dim}


class ActionHead(Head):
    """Action chunks: through a CVAE (GR-MG, ACT) or linear maps (GR-1)."""

    objective, losses, query = "action", ("action", "gripper", "kl"), Kind.ACTION
    queries, decoders = ("action_query",), ("action_encoder", "action_decoder")
    control_parts = ("action_query", "action_decoder")

    def add_decoders(self, policy):
        config = policy.config
        if config.has_style:
            policy.action_encoder = ActionEncoder(config)
        linear = config.action_head == "linear"
        policy.action_decoder = LinearActionDecoder(config) if linear else ActionDecoder(config)

    def decode(self, policy, read, batch):
        query = read(Kind.ACTION)  # (B, T, 1, D)
        size, predicted = query.shape[:2], {}
        style = torch.zeros(size.numel(), policy.config.latent_dim, device=query.device)
        if batch.get("actions") is not None and policy.config.has_style:
            actions, noise = self._encoder_actions(policy.config, batch), batch.get("style_noise")
            mean, log_var = policy.action_encoder(actions.flatten(0, 1).to(policy.dtype))  # (B * T, latent)
            if policy.training and noise is None:
                noise = torch.randn_like(mean)
            if noise is not None:
                style = mean + (0.5 * log_var).exp() * noise.reshape_as(mean)
            predicted["style_mean"] = mean.unflatten(0, size)
            predicted["style_log_var"] = log_var.unflatten(0, size)
        chunks = policy.action_decoder(query.flatten(0, 2), style)  # (B * T, K, A)
        return {"actions": chunks.unflatten(0, size), **predicted}

    def _encoder_actions(self, config: ForesightConfig, batch: Mapping) -> Tensor:
        """What the CVAE encodes: all frames, padded ones too (GR-MG). What is missing and NaN are zero."""
        actions, mask = batch["actions"], batch.get("action_mask")
        actions = actions if mask is None else masked_target(actions, mask[..., None])
        if (entries := action_entries(config, batch)) is not None:
            actions = masked_target(actions, entries[:, None, None])
        return masked_target(actions, real_frames(batch)[:, :, None, None] | actions.isfinite())

    def loss(self, config, predicted, batch):
        if batch.get("actions") is None:
            return {}
        arm, gripper = action_losses(
            predicted["actions"],
            batch["actions"],
            action_weight(config, batch),
            list(config.binary_action_indices),
            config.action_loss,
            action_entries(config, batch),
        )
        losses = {"action": arm, "gripper": gripper}
        if "style_mean" in predicted:
            style = (predicted[name].flatten(0, 1) for name in ("style_mean", "style_log_var"))
            losses["kl"] = kl_loss(*style)
        return losses

    def count(self, config, batch):
        if batch.get("actions") is None:
            return {}
        kinds = config.continuous_action_indices, list(config.binary_action_indices)
        arm, gripper = count_actions(action_weight(config, batch), *kinds, action_entries(config, batch))
        counts = {"action": arm, "gripper": gripper}
        if config.has_style:
            size, frames = batch_size(batch)
            counts["kl"] = arm.new_tensor(size * frames)
        return counts

    def zero_loss(self, policy, predicted):
        total = super().zero_loss(policy, predicted)
        if policy.training and policy.config.has_style:
            nothing = torch.zeros_like(predicted["actions"][:1, 0], dtype=policy.dtype)  # (1, K, A)
            total = total + sum(0 * output.sum() for output in policy.action_encoder(nothing))
        return total


class FutureHead(Head):
    """RGB-D (or RGB) `future_shift` frames ahead. Depth comes from the decoder of current depth."""

    objective, losses, query = "future", ("future", "future_depth_scale"), Kind.FUTURE
    queries, decoders = ("future_queries",), ("image_decoder", "depth_decoder")

    def query_tokens(self, config):
        return [config.num_latents + 1] * len(config.views) if config.has("future") else []

    def add_queries(self, trunk):
        config = trunk.config
        trunk.future_queries = nn.ModuleList(
            nn.Embedding(config.num_latents + 1, config.hidden_size) for _ in config.views
        )

    def embed_queries(self, trunk, size, batch, device):
        return [_repeat(query, size, device) for query in trunk.future_queries]

    def add_decoders(self, policy):
        policy.image_decoder = PatchDecoder(policy.config, channels=3)
        if policy.config.has_depth_decoder and not hasattr(policy, "depth_decoder"):
            _add_depth_decoder(policy)

    def decode(self, policy, read, batch):
        config, known = policy.config, num_future_targets(policy.config, batch)
        # In training only the frames that have a target are decoded.
        frames = slice(known if policy.training and known else None)
        views = range(len(config.views))
        future = torch.stack([read(Kind.FUTURE, view)[:, frames] for view in views], dim=2)
        future = take_supervised(config, batch, future)
        predicted = {"future_rgb": policy.image_decoder(future)}
        if "future" in config.objectives:
            predicted |= _decode_depth(policy, future, "future_depth")
        return predicted

    def loss(self, config, predicted, batch):
        targets = future_targets(config, batch)
        if not targets:
            return {}
        known = targets["future_rgb"].values.shape[1]  # with a supervision order, all that are predicted
        depth = predicted["future_depth"][:, :known] if "future_depth" in predicted else None
        losses = {"future": future_loss(predicted["future_rgb"][:, :known], depth, targets)}
        if "future_depth_scale" in predicted:
            scale = predicted["future_depth_scale"][:, :known]
            losses["future_depth_scale"] = scale_loss(scale, future_scale_targets(config, batch))
        return losses

    def count(self, config, batch):
        if not num_future_targets(config, batch):
            return {}
        mask = take_supervised(config, batch, future_mask(config, batch))[..., None, None]
        counts = {"future": count_per_view(mask, 3 * config.image_size**2)}
        depth = future_depth(config, batch)
        if depth is not None and "future" in config.objectives:
            valid = depth_weight(take_supervised(config, batch, depth), config.patch_size) & mask
            counts["future"] = counts["future"] + count_per_view(valid)
            if config.depth_form == "metric":
                counts["future_depth_scale"] = count_scales(valid.any(-1))
        return counts


class ProgressHead(Head):
    """The completed share of the instruction."""

    objective, losses, query = "progress", ("progress",), Kind.PROGRESS
    queries, decoders = ("progress_query",), ("progress_decoder",)

    def add_decoders(self, policy):
        policy.progress_decoder = ProgressDecoder(policy.config)

    def decode(self, policy, read, batch):
        query = read(Kind.PROGRESS)  # (B, T, 1, D)
        return {"progress": policy.progress_decoder(query.flatten(0, 2)).unflatten(0, query.shape[:2])}

    def loss(self, config, predicted, batch):
        target = progress_targets(config, batch)
        return {} if target is None else {"progress": progress_loss(predicted["progress"], target)}

    def count(self, config, batch):
        if batch.get("progress") is None:
            return {}
        return {"progress": real_frames(batch).sum().float()}


# In the order of their queries in a frame.
HEADS: tuple[Head, ...] = (DepthHead(), FlowHead(), ActionHead(), FutureHead(), ProgressHead())
DECODERS = tuple(dict.fromkeys(name for head in HEADS for name in head.decoders))
# What a policy with `auxiliary_heads=False` leaves out, except what the action reads.
AUXILIARY_QUERIES = tuple(name for head in HEADS for name in head.queries if name not in head.control_parts)
AUXILIARY_DECODERS = tuple(name for name in DECODERS if not any(name in head.control_parts for head in HEADS))


def heads_of(config: ForesightConfig) -> list[Head]:
    """The heads that a config asks for."""
    return [head for head in HEADS if config.has(head.objective)]


def query_heads(config: ForesightConfig, kinds: Iterable[Kind]) -> list[Head]:
    """Heads with query tokens of these kinds, in the order of the sequence."""
    return [head for head in HEADS if head.query in kinds and head.query_tokens(config)]


def query_groups(config: ForesightConfig, kinds: Iterable[Kind]) -> list[tuple[Kind, int, int]]:
    """Kind, group and number of tokens of each group of queries in a frame, in the order of the sequence."""
    return [
        (head.query, group, tokens)
        for head in query_heads(config, kinds)
        for group, tokens in enumerate(head.query_tokens(config))
    ]


def _add_depth_decoder(policy: nn.Module) -> None:
    metric = policy.config.depth_form == "metric"
    policy.depth_decoder = (
        MetricDepthDecoder(policy.config) if metric else PatchDecoder(policy.config, channels=1)
    )


def _decode_depth(policy: nn.Module, context: Tensor, name: str) -> dict[str, Tensor]:
    """Depth as `name` in [`ForesightOutput`], and what belongs to it with `depth_form="metric"`."""
    if policy.config.depth_form == "normalized":
        return {name: policy.depth_decoder(context)}
    patches, scale = policy.depth_decoder(context)
    predicted = {name: patches, f"{name}_scale": scale}
    if not policy.training:  # no loss needs it
        predicted[f"predicted_{name}"] = depth_in_meters(patches, scale, policy.config.patch_size)
    return predicted


def _repeat(query: nn.Embedding, size: tuple[int, int], device: torch.device) -> Tensor:
    return embed_all(query, device).expand(*size, -1, -1).flatten(1, 2)


def _start_points(config: ForesightConfig, size: tuple[int, int], batch: Mapping, device) -> Tensor:
    """Where flow points start, `(B, T, P, 2)`: those of the batch, or the grid."""
    if batch.get("track_start") is not None:
        return batch["track_start"]
    return flow_grid_points(*config.flow_grid, device=device).expand(*size, -1, -1)
