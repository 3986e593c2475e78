# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""The causal transformer's block: GPT-2's, pre-norm, with attention through the library's interface."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_foresight import ForesightConfig


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Attention written out: `(B, heads, S, head_dim)` -> `(B, S, heads, head_dim)` and the weights."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def start_normal(linear: nn.Linear, std: float) -> nn.Linear:
    """Marks a linear layer for initial weights of N(0, `std`) and zero bias; returns it."""
    linear.init_std = std
    return linear


def gpt_linear(config: ForesightConfig, inputs: int, outputs: int, residual: bool = False) -> nn.Linear:
    """A linear layer with GPT-2's initial weights, which are smaller before the residual stream."""
    shrink = (2 * config.num_hidden_layers) ** 0.5 if residual else 1.0
    return start_normal(nn.Linear(inputs, outputs), config.initializer_range / shrink)


class ForesightAttention(nn.Module):
    """Multi-head self-attention of the transformer, through the library's attention interface."""

    def __init__(self, config: ForesightConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        # The mask is complete; without this flag sdpa would assume a causal one where there is none.
        self.is_causal = False
        self.q_proj = gpt_linear(config, config.hidden_size, config.hidden_size)
        self.k_proj = gpt_linear(config, config.hidden_size, config.hidden_size)
        self.v_proj = gpt_linear(config, config.hidden_size, config.hidden_size)
        self.o_proj = gpt_linear(config, config.hidden_size, config.hidden_size, residual=True)

    def forward(
        self, hidden_states: Tensor, attention_mask=None, last_rows: int | None = None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """`(B, S, D)` -> `(B, S, D)` and, with eager attention, the weights `(B, heads, S, S)`.

        With `last_rows` only that many tokens at the end are queries; the mask then has as many rows.
        """
        queries = hidden_states if last_rows is None else hidden_states[:, -last_rows:]
        inputs = ((self.q_proj, queries), (self.k_proj, hidden_states), (self.v_proj, hidden_states))
        query, key, value = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for project, x in inputs
        )
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(attended.flatten(2)), weights


class ForesightBlock(GradientCheckpointingLayer):
    """Pre-norm GPT-2 block: attention, then feed-forward, each with a residual connection and dropout."""

    def __init__(self, config: ForesightConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = ForesightAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.up_proj = gpt_linear(config, config.hidden_size, config.intermediate_size)
        self.down_proj = gpt_linear(config, config.intermediate_size, config.hidden_size, residual=True)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self, hidden_states: Tensor, attention_mask=None, last_rows: int | None = None, **kwargs
    ) -> Tensor:
        """`(B, S, D)` -> `(B, S, D)`, or only the last `last_rows` tokens."""
        attended, _ = self.self_attn(self.norm1(hidden_states), attention_mask, last_rows, **kwargs)
        if last_rows is not None:
            hidden_states = hidden_states[:, -last_rows:]
        hidden_states = hidden_states + self.dropout(attended)
        expanded = self.activation(self.up_proj(self.norm2(hidden_states)))
        return hidden_states + self.dropout(self.down_proj(expanded))
