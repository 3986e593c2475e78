# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""Which token may attend to which (3D Foresight, Fig. 2; GR-MG's causal mask for the input tokens).

A sequence is described by one record per token: its kind, its frame, its group (which view) and its rank
inside the group. The mask follows from these records and a small table, never from the position in the
sequence, so the order of queries and the parts that are left out do not matter.
"""

import torch
from torch import Tensor
from transformers.masking_utils import create_bidirectional_mask

from .configuration_foresight import ForesightConfig
from .heads import query_groups
from .tokens import KINDS, QUERIES, Kind, TokenLayout


def build_layout(
    config: ForesightConfig,
    num_frames: int,
    query_frames: list[int] | None = None,
    queries: tuple[Kind, ...] = QUERIES,
    device=None,
) -> TokenLayout:
    """Lays out the tokens of a window: optional goal, then for each frame its inputs and its queries.

    `[LANG, STATE, 9 latents + CLS of each view, FLOW x l, ACT, FUT of each view x 10, PROG]` per frame,
    latents before their CLS as in GR-MG.

    `query_frames` are the frames that have queries: all by default, only the newest one in control. `queries`
    are the kinds to lay out; those whose head is off are never laid out.
    """
    query_frames = list(range(num_frames)) if query_frames is None else query_frames
    image_tokens = config.num_latents + 1
    records: list[tuple[int, int, int, int]] = []

    def add(kind: Kind, frame: int, count: int, group: int = 0) -> None:
        records.extend((int(kind), frame, group, rank) for rank in range(count))

    if config.goal_image:
        add(Kind.GOAL, -1, image_tokens)
    for frame in range(num_frames):
        add(Kind.LANGUAGE, frame, 1)
        add(Kind.STATE, frame, 1 if config.state_dim else 0)
        for view in range(len(config.views)):
            add(Kind.IMAGE, frame, image_tokens, view)
        if frame in query_frames:
            for kind, group, count in query_groups(config, queries):
                add(kind, frame, count, group)
    return TokenLayout.from_records(records, device)


# Rules for "a row token at frame s attends to column tokens at frame s'".
NEVER, ALWAYS, PAST_AND_NOW, PAST, NOW, OWN_GROUP = range(6)


def attention_rules(config: ForesightConfig) -> dict[tuple[Kind, Kind], int]:
    """The table of the paper's Fig. 2: one rule per (row kind, column kind); absent pairs are `NEVER`.

    IMAGE attends to IMAGE by view (`OWN_GROUP`): to earlier views of its own frame, its own view, and all
    views of the past; see [`allowed_pairs`]. Queries are never columns, except FLOW, which ACTION reads.
    """
    rules = {
        (Kind.GOAL, Kind.GOAL): OWN_GROUP,
        (Kind.LANGUAGE, Kind.LANGUAGE): PAST_AND_NOW,
        (Kind.LANGUAGE, Kind.STATE): PAST,
        (Kind.LANGUAGE, Kind.IMAGE): PAST,
        (Kind.STATE, Kind.LANGUAGE): PAST_AND_NOW,
        (Kind.STATE, Kind.STATE): PAST_AND_NOW,
        (Kind.STATE, Kind.IMAGE): PAST,
        (Kind.IMAGE, Kind.LANGUAGE): PAST_AND_NOW,
        (Kind.IMAGE, Kind.STATE): PAST_AND_NOW,
        (Kind.IMAGE, Kind.IMAGE): OWN_GROUP,
    }
    for query in QUERIES:
        for column in (Kind.LANGUAGE, Kind.STATE, Kind.IMAGE):
            rules[query, column] = PAST_AND_NOW
    for row in KINDS:
        if row != Kind.GOAL:
            rules[row, Kind.GOAL] = ALWAYS
    rules[Kind.FLOW, Kind.STATE] = NEVER
    if not config.future_sees_state:
        rules[Kind.FUTURE, Kind.STATE] = NEVER
    if config.action_sees_flow:
        rules[Kind.ACTION, Kind.FLOW] = NOW
    if not config.vision_sees_state:
        # Language tokens too: otherwise the state would reach flow and future through them one frame later.
        rules[Kind.IMAGE, Kind.STATE] = rules[Kind.LANGUAGE, Kind.STATE] = NEVER
    return rules


def allowed_pairs(config: ForesightConfig, layout: TokenLayout) -> Tensor:
    """Boolean `(S, S)`: whether the row token may attend to the column token, padding aside."""
    table = torch.full((len(Kind), len(Kind)), NEVER, dtype=torch.int64)
    for (row, column), rule in attention_rules(config).items():
        table[row, column] = rule
    rule = table.to(layout.kind.device)[layout.kind[:, None], layout.kind[None, :]]
    frame_q, frame_k = layout.frame[:, None], layout.frame[None, :]
    group_q, group_k = layout.group[:, None], layout.group[None, :]
    past, now = frame_k < frame_q, frame_k == frame_q
    within = now & (group_k == group_q)
    if config.within_frame == "causal":
        within &= layout.rank[None, :] <= layout.rank[:, None]
    return (
        (rule == ALWAYS)
        | ((rule == PAST_AND_NOW) & (past | now))
        | ((rule == PAST) & past)
        | ((rule == NOW) & now)
        | ((rule == OWN_GROUP) & (past | within | (now & (group_k < group_q))))
    )


def valid_columns(
    layout: TokenLayout,
    frame_mask: Tensor,
    view_mask: Tensor | None = None,
    state_mask: Tensor | None = None,
    goal_mask: Tensor | None = None,
) -> Tensor:
    """Which tokens exist for each sample: boolean `(B, S)`. The masks are those of [`ForesightInputs`].

    No token attends to padded frames, missing views, missing states or missing goals. Queries always exist:
    FLOW is read by the action query of its own frame only, and rows of padded frames are ignored.
    """
    # `.value`: torch 2.15 compiles no comparison of a tensor with an enum.
    is_query = layout.kind >= Kind.FLOW.value
    is_goal = layout.kind == Kind.GOAL.value
    valid = frame_mask[:, layout.frame.clamp(min=0)] | is_query | is_goal  # (B, S)
    if view_mask is not None:
        if view_mask.ndim == 2:
            view_mask = view_mask[:, None].expand(-1, frame_mask.shape[1], -1)
        valid &= view_mask[:, layout.frame.clamp(min=0), layout.group] | (layout.kind != Kind.IMAGE.value)
    if state_mask is not None:
        valid &= state_mask[:, None] | (layout.kind != Kind.STATE.value)
    if goal_mask is not None:
        valid &= goal_mask[:, None] | ~is_goal
    return valid


def build_attention_mask(config: ForesightConfig, hidden_states: Tensor, allowed: Tensor, valid: Tensor):
    """Joins the table with the samples' padding, in the form that the attention implementation takes.

    A token without any column (of a missing goal, for example) attends to itself, so that no row of the
    softmax is empty. `allowed` is `(S, S)` of [`allowed_pairs`], `valid` `(B, S)` of [`valid_columns`]. Gives
    a boolean `(B, 1, S, S)` for sdpa, additive floats for eager, a `BlockMask` for flex attention.
    """
    blind = valid.float() @ allowed.float().T == 0  # (B, S)
    if config._attn_implementation == "flex_attention":

        def may_attend(batch, head, query, key):
            return (allowed[query, key] & valid[batch, key]) | ((query == key) & blind[batch, query])

        return create_bidirectional_mask(
            config=config, inputs_embeds=hidden_states, attention_mask=None, and_mask_function=may_attend
        )
    itself = torch.eye(len(allowed), dtype=torch.bool, device=allowed.device)
    mask = ((allowed & valid[:, None, :]) | (itself & blind[:, :, None]))[:, None]  # (B, 1, S, S)
    if config._attn_implementation == "eager":
        dtype = hidden_states.dtype
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return mask
