# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""Decoders of current depth, future RGB-D, 3D flow, actions and progress (3D Foresight, Sec. III-B; GR-MG).

All are plain pre-norm ViT blocks with bidirectional attention, exact GELU and no dropout, which run for each
frame alone: context tokens from the transformer, then mask tokens that are read out.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_foresight import ForesightConfig
from .encoders import embed_all, sincos_2d, take_entries
from .transformer import start_normal


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 under autocast and in a bfloat16 model alike.

    For outputs in physical units: in bfloat16 a depth of 4 m would come in steps of 3 cm, and a coordinate
    near 1 in steps of 1/256 of the image.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_features)` -> float32 `(..., out_features)`."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), self.bias.float())


def vit_blocks(config: ForesightConfig, width: int, heads: int, depth: int) -> nn.Sequential:
    """`depth` of timm's pre-norm blocks with biases everywhere."""
    from timm.models.vision_transformer import Block  # here, because timm takes long to import

    norm_layer = partial(nn.LayerNorm, eps=config.layer_norm_eps)
    return nn.Sequential(
        *(Block(width, heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=norm_layer) for _ in range(depth))
    )


class PatchDecoder(nn.Module):
    """Tokens of one image or query -> all patches of one image: the image decoder and the depth decoder.

    One instance serves all views, as in GR-MG; the depth decoder (1 channel) current and future depth.
    """

    def __init__(self, config: ForesightConfig, channels: int):
        super().__init__()
        width, side = config.hidden_size, config.image_size // config.patch_size
        self.side, self.width = side, width
        self.embed = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("positions", sincos_2d(side, side, width)[None], persistent=False)
        self.blocks = vit_blocks(config, width, config.decoder_heads, config.decoder_depth)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.predict = nn.Linear(width, config.patch_size**2 * channels)

    def forward(self, context: Tensor) -> Tensor:
        """Decodes `(..., tokens, D)` to `(..., N, patch_size**2 * channels)`, patches row-major.

        Inside a patch the order is (row, column, channel); values are normalized per patch.
        """
        return self.predict(self._decode(context))

    def _decode(self, context: Tensor) -> Tensor:
        """Hidden states of the patches `(..., N, D)`."""
        lead = context.shape[:-2]
        context = self.embed(context.flatten(0, -3))
        queries = (self.mask_token + self.positions.to(context.dtype)).expand(len(context), -1, -1)
        x = self.blocks(torch.cat([context, queries.to(context.dtype)], dim=1))
        return self.norm(x[:, -(self.side**2) :]).unflatten(0, lead)


class MetricDepthDecoder(PatchDecoder):
    """The depth decoder with two more numbers per patch, which make meters of it: not the paper's."""

    def __init__(self, config: ForesightConfig):
        super().__init__(config, channels=1)
        # Small, so that two outputs that are far off at first do not disturb what all patches share.
        self.predict_scale = start_normal(Float32Linear(self.width, 2), 1e-4)

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """As [`PatchDecoder`], and the float32 [`depth_scale_target`] `(..., N, 2)`, at first 1 m and 3 %."""
        x = self._decode(context)
        mean, log_deviation = self.predict_scale(x).chunk(2, dim=-1)
        return self.predict(x), torch.cat([mean, log_deviation + math.log(0.03)], dim=-1)


class FlowDecoder(nn.Module):
    """FLOW query of one frame + start coordinates of P points -> their trajectories over L steps."""

    start_features = 2

    def __init__(self, config: ForesightConfig):
        super().__init__()
        width = config.hidden_size
        self.length, self.dim = config.flow_length, config.flow_dim
        self.xy_residual = config.flow_xy_residual
        self.embed = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.embed_start = nn.Linear(self.start_features, width)
        self.blocks = vit_blocks(config, width, config.decoder_heads, config.decoder_depth)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self._add_outputs(config, width)

    def _add_outputs(self, config: ForesightConfig, width: int) -> None:
        # Small, so that training starts from "points stay put".
        self.predict = start_normal(Float32Linear(width, config.flow_length * config.flow_dim), 1e-4)

    def forward(self, context: Tensor, start: Tensor) -> Tensor:
        """Hidden states `(B, T, l, D)` and x, y at step 0 `(B, T, P, 2)` -> float32 `(B, T, L, P, 3)`.

        x and y are fractions of the image, z is in meters; `(B, T, L, P, 2)` with `flow_2d`.
        """
        lead, points = start.shape[:2], start.shape[2]
        context = self.embed(context.flatten(0, 1))
        place = self._describe_places(2 * start - 1).flatten(0, 1)  # (B * T, P, features)
        queries = self.mask_token + self.embed_start(place.to(context.dtype))
        x = self.blocks(torch.cat([context, queries.to(context.dtype)], dim=1))
        return self._predict(self.norm(x[:, -points:]).unflatten(0, lead), start.float())

    def _describe_places(self, xy: Tensor) -> Tensor:
        """Coordinates in [-1, 1] `(..., 2)` -> `(..., start_features)`."""
        return xy

    def _predict(self, x: Tensor, start: Tensor) -> Tensor:
        """Hidden states of points `(B, T, P, D)` -> trajectories."""
        flow = self.predict(x).unflatten(-1, (self.length, self.dim)).transpose(2, 3)  # (B, T, L, P, 3)
        if self.xy_residual:
            flow = torch.cat([flow[..., :2] + start[:, :, None], flow[..., 2:]], dim=-1)
        return flow


class DisplacementFlowDecoder(FlowDecoder):
    """The same with two outputs, depth at the start and displacement since: step 0 *is* the start.

    Start points enter with their sines and cosines in four octaves as well (Mildenhall et al. 2020): depth
    changes within a few pixels, which linear coordinates alone hardly tell apart.
    """

    start_features = 2 + 2 * 2 * 4

    def _add_outputs(self, config: ForesightConfig, width: int) -> None:
        _, self.scale = config.flow_scales
        self.predict = start_normal(Float32Linear(width, (self.length - 1) * self.dim), 1e-4)
        if self.dim == 3:
            self.predict_start = Float32Linear(width, 1)

    def _describe_places(self, xy: Tensor) -> Tensor:
        waves = torch.cat([torch.pi * 2**octave * xy.float() for octave in range(4)], dim=-1)
        return torch.cat([xy, waves.sin(), waves.cos()], dim=-1)

    def _predict(self, x: Tensor, start: Tensor) -> Tensor:
        if self.dim == 3:
            start = torch.cat([start, self.predict_start(x)], dim=-1)  # (B, T, P, 3)
        moved = self.scale * self.predict(x).unflatten(-1, (self.length - 1, self.dim)).transpose(2, 3)
        start = start[:, :, None]  # (B, T, 1, P, 3)
        return torch.cat([start, start + moved], dim=2)


class ActionEncoder(nn.Module):
    """CVAE encoder: the true action chunk -> mean and log-variance of the style (GR-MG; ACT, Zhao 2023)."""

    def __init__(self, config: ForesightConfig):
        super().__init__()
        width = config.action_encoder_hidden_size or config.action_hidden_size
        self.continuous, self.binary = config.continuous_action_indices, list(config.binary_action_indices)
        if self.continuous:
            self.embed_continuous = nn.Linear(len(self.continuous), width)
        if self.binary:
            # Rows 2i and 2i + 1 stand for entry i closed and open.
            self.embed_binary = nn.Embedding(2 * len(self.binary), width)
        self.join = nn.Linear((bool(self.continuous) + bool(self.binary)) * width, width)
        self.cls_token = nn.Embedding(1, width)
        self.positions = nn.Embedding(config.chunk_size + 1, width)
        self.blocks = vit_blocks(config, width, config.action_num_heads, config.action_encoder_depth)
        self.predict = nn.Linear(width, 2 * config.latent_dim)

    def forward(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Normalized actions `(M, K, A)`, masked steps 0 -> mean, log-variance: float32 `(M, latent)`."""
        parts = []
        if self.continuous:
            parts.append(self.embed_continuous(take_entries(actions, self.continuous)))
        if self.binary:
            row = (take_entries(actions, self.binary) > 0.5).long()
            row = row + 2 * torch.arange(len(self.binary), device=row.device)
            parts.append(self.embed_binary(row).sum(-2))
        steps = self.join(torch.cat(parts, dim=-1))  # (M, K, width)
        cls = embed_all(self.cls_token, steps.device).expand(len(steps), 1, -1)
        x = torch.cat([cls.to(steps.dtype), steps], dim=1) + embed_all(self.positions, steps.device)
        mean, log_var = self.predict(self.blocks(x)[:, 0]).float().chunk(2, dim=-1)
        return mean, log_var


class ActionOutputs(nn.Module):
    """Linear outputs of an action: one layer for regressed entries, one for binary ones."""

    def _add_outputs(self, config: ForesightConfig, width: int) -> None:
        continuous, binary = config.continuous_action_indices, list(config.binary_action_indices)
        if continuous:
            self.predict_continuous = Float32Linear(width, len(continuous))
        if binary:
            self.predict_binary = Float32Linear(width, len(binary))
        self.outputs = [name for name in ("predict_continuous", "predict_binary") if hasattr(self, name)]
        order = [*continuous, *binary]  # entry of the action at each output
        self.entry_order = sorted(range(len(order)), key=order.__getitem__)

    def _predict(self, x: Tensor) -> Tensor:
        """`(..., width)` -> float32 `(..., A)`."""
        parts = [getattr(self, name)(x) for name in self.outputs]
        return take_entries(torch.cat(parts, dim=-1), self.entry_order)


class ActionDecoder(ActionOutputs):
    """ACTION query of one frame + style -> K actions; no final LayerNorm, linear outputs (GR-MG)."""

    def __init__(self, config: ForesightConfig):
        super().__init__()
        width = config.action_hidden_size
        self.chunk_size = config.chunk_size
        self.embed_style = nn.Linear(config.latent_dim, width)
        self.embed_query = nn.Linear(config.hidden_size, width)
        self.mask_token = nn.Embedding(1, width)
        self.positions = nn.Embedding(config.chunk_size, width)
        self.blocks = vit_blocks(config, width, config.action_num_heads, config.action_decoder_depth)
        self._add_outputs(config, width)

    def forward(self, query: Tensor, style: Tensor) -> Tensor:
        """Hidden states `(M, D)` and style `(M, latent)`, zeros outside training -> float32 `(M, K, A)`.

        Values are normalized, and logits at the binary entries.
        """
        context = torch.stack([self.embed_style(style.to(query.dtype)), self.embed_query(query)], dim=1)
        mask, positions = (embed_all(table, query.device) for table in (self.mask_token, self.positions))
        steps = (mask + positions).expand(query.shape[0], -1, -1)
        x = self.blocks(torch.cat([context, steps.to(context.dtype)], dim=1))[:, -self.chunk_size :]
        return self._predict(x)


class LinearActionDecoder(ActionOutputs):
    """ACTION query of one frame -> one action, through linear maps without activations (GR-1)."""

    def __init__(self, config: ForesightConfig):
        super().__init__()
        width, half = config.hidden_size, config.hidden_size // 2
        self.shared = nn.Sequential(nn.Linear(width, half), nn.Linear(half, half))
        self._add_outputs(config, half)

    def forward(self, query: Tensor, style: Tensor | None = None) -> Tensor:
        """`(M, D)` -> float32 `(M, 1, A)`: normalized values, and logits at the binary entries.

        `style` is not used; the CVAE's decoder takes it.
        """
        return self._predict(self.shared(query))[:, None]


class ProgressDecoder(nn.Module):
    """PROGRESS query of one frame -> completed share of the instruction in [0, 1] (GR-MG)."""

    def __init__(self, config: ForesightConfig):
        super().__init__()
        width = config.action_hidden_size
        self.embed_query = nn.Linear(config.hidden_size, width)
        self.mask_token = nn.Embedding(1, width)
        self.blocks = vit_blocks(config, width, config.action_num_heads, config.progress_decoder_depth)
        self.predict = Float32Linear(width, 1)

    def forward(self, query: Tensor) -> Tensor:
        """`(M, D)` -> float32 `(M,)`."""
        query = self.embed_query(query)
        mask = embed_all(self.mask_token, query.device).expand(len(query), -1).to(query.dtype)
        return self.predict(self.blocks(torch.stack([query, mask], dim=1))[:, 1]).squeeze(-1).sigmoid()
