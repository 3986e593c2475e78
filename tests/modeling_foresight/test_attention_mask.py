"""Who looks at whom: the table of 3D Foresight and GR-MG's flat mask, each against its own slow rewrite."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from modeling_foresight import ForesightConfig, attention_mask
from modeling_foresight.attention_mask import (
    Kind,
    TokenLayout,
    allowed_pairs,
    build_attention_mask,
    build_layout,
    valid_columns,
)
from tests.tiny import tiny_config

FRAMES = 4
QUERIES = (Kind.FLOW, Kind.ACTION, Kind.FUTURE, Kind.PROGRESS)

# The table as the paper draws it: A past and now, C past and own group so far, B past, S own frame, G always.
# One entry per column: goal LANG STATE main wrist FLOW ACT FUT PROG.
FORESIGHT_TABLE = {
    "goal": "C--------",
    "LANG": "GABBB----",
    "STATE": "GAABB----",
    "main": "GAACB----",
    "wrist": "GAAAC----",
    "FLOW": "GA-AA----",
    "ACT": "GAAAAS---",
    "FUT": "GA-AA----",
    "PROG": "GAAAA----",
}
COLUMNS = list(FORESIGHT_TABLE)


def table_name(kind: int, group: int) -> str:
    names = {
        Kind.GOAL: "goal",
        Kind.LANGUAGE: "LANG",
        Kind.STATE: "STATE",
        Kind.IMAGE: ("main", "wrist")[group],
        Kind.FLOW: "FLOW",
        Kind.ACTION: "ACT",
        Kind.FUTURE: "FUT",
        Kind.PROGRESS: "PROG",
    }
    return names[Kind(kind)]


def tokens_of(layout: TokenLayout) -> list[tuple[int, int, int, int]]:
    return list(
        zip(
            layout.kind.tolist(),
            layout.frame.tolist(),
            layout.group.tolist(),
            layout.rank.tolist(),
            strict=True,
        )
    )


def mask_by_table(layout: TokenLayout, table: dict[str, str]) -> torch.Tensor:
    def may_attend(row, column) -> bool:
        (row_kind, row_frame, row_group, row_rank), (kind, frame, group, rank) = row, column
        letter = table[table_name(row_kind, row_group)][COLUMNS.index(table_name(kind, group))]
        return {
            "A": frame <= row_frame,
            "B": frame < row_frame,
            "C": frame < row_frame or (frame == row_frame and rank <= row_rank),
            "S": frame == row_frame,
            "G": True,
            "-": False,
        }[letter]

    tokens = tokens_of(layout)
    return torch.tensor([[may_attend(row, column) for column in tokens] for row in tokens])


def gr_mg_mask(config: ForesightConfig, frames: int) -> torch.Tensor:
    """GR-MG's own way: number the sequence from left to right, look left, never at a query."""
    sequence = []
    if config.goal_image:
        sequence += ["input"] * (config.num_latents + 1)
    for _ in range(frames):
        sequence += ["input"] * (2 + 2 * (config.num_latents + 1))  # language, state, two images
        sequence += ["query"] * (1 + 2 * (config.num_latents + 1) + 1)  # action, two futures, progress
    mask = torch.zeros(len(sequence), len(sequence), dtype=torch.bool)
    for i in range(len(sequence)):
        for j in range(i + 1):
            mask[i, j] = sequence[j] == "input"
    return mask


@pytest.mark.parametrize("goal_image", [True, False])
def test_every_entry_follows_the_table_of_3d_foresight(goal_image):
    config = tiny_config(goal_image=goal_image)
    layout = build_layout(config, FRAMES)
    assert torch.equal(allowed_pairs(config, layout), mask_by_table(layout, FORESIGHT_TABLE))


@pytest.mark.parametrize("goal_image", [True, False])
def test_the_gr_mg_switch_is_the_flat_triangle_without_query_columns(goal_image):
    config = tiny_config(
        goal_image=goal_image, objectives=["action", "future", "progress"], future_sees_state=True
    )
    layout = build_layout(config, FRAMES)
    assert torch.equal(allowed_pairs(config, layout), gr_mg_mask(config, FRAMES))


def test_without_vision_sees_state_neither_language_nor_images_look_at_the_state():
    config = tiny_config(vision_sees_state=False)
    layout = build_layout(config, FRAMES)
    blind = {
        row: cells[:2] + "-" + cells[3:] if row in ("LANG", "main", "wrist") else cells
        for row, cells in FORESIGHT_TABLE.items()
    }
    assert torch.equal(allowed_pairs(config, layout), mask_by_table(layout, blind))


def test_action_sees_flow_can_be_switched_off():
    config = tiny_config(action_sees_flow=False)
    layout = build_layout(config, FRAMES)
    table = FORESIGHT_TABLE | {"ACT": "GAAAA----"}
    assert torch.equal(allowed_pairs(config, layout), mask_by_table(layout, table))


def test_within_frame_full_lets_tokens_of_one_image_see_each_other_and_changes_nothing_else():
    causal, full = tiny_config(goal_image=True), tiny_config(goal_image=True, within_frame="full")
    layout = build_layout(full, FRAMES)
    before, after = allowed_pairs(causal, layout), allowed_pairs(full, layout)
    for i, row in enumerate(tokens_of(layout)):
        for j, column in enumerate(tokens_of(layout)):
            same_image = row[:3] == column[:3] and row[0] in (Kind.GOAL, Kind.IMAGE)
            assert after[i, j] == (True if same_image else before[i, j])


def test_the_mask_follows_the_records_and_not_the_order_of_the_sequence():
    config = tiny_config(goal_image=True)
    layout = build_layout(config, FRAMES)
    shuffled = torch.randperm(len(layout), generator=torch.Generator().manual_seed(0))
    other = TokenLayout.from_records([tokens_of(layout)[i] for i in shuffled])
    expected = allowed_pairs(config, layout)[shuffled][:, shuffled]
    assert torch.equal(allowed_pairs(config, other), expected)
    # ... and positions still come frame by frame, rank by rank.
    found = other.positions(Kind.FUTURE, 1)
    assert [tokens_of(other)[i] for i in found] == sorted(tokens_of(other)[i] for i in found)


def test_a_query_sees_no_query_not_even_itself_but_for_action_and_flow():
    config = tiny_config()
    layout = build_layout(config, FRAMES)
    query = layout.kind >= Kind.FLOW
    among_queries = allowed_pairs(config, layout)[query][:, query]
    kinds, frames = layout.kind[query], layout.frame[query]
    action_to_flow = (kinds[:, None] == Kind.ACTION) & (kinds[None] == Kind.FLOW)
    assert torch.equal(among_queries, action_to_flow & (frames[:, None] == frames[None]))


@pytest.mark.parametrize("goal_image", [True, False])
@pytest.mark.parametrize("missing", ["nothing", "goal", "views", "state", "frames", "everything"])
@pytest.mark.parametrize("flags", [{}, {"vision_sees_state": False}, {"within_frame": "full"}])
def test_no_row_is_ever_empty(goal_image, missing, flags):
    config = tiny_config(goal_image=goal_image, **flags)
    layout = build_layout(config, FRAMES)

    def present(*shape: int, absent: str) -> torch.Tensor:
        return torch.full(shape, missing not in (absent, "everything"))

    frame_mask = torch.ones(1, FRAMES, dtype=torch.bool)
    if missing in ("frames", "everything"):
        frame_mask[:, 1:] = False
    valid = valid_columns(
        layout,
        frame_mask,
        present(1, 2, absent="views"),
        present(1, absent="state"),
        present(1, absent="goal"),
    )
    mask = build_attention_mask(config, torch.zeros(1, len(layout), 48), allowed_pairs(config, layout), valid)
    assert mask.any(-1).all()


def test_columns_of_what_is_missing_are_seen_by_nobody_else():
    config = tiny_config(goal_image=True)
    layout = build_layout(config, FRAMES)
    frame_mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    view_mask = torch.tensor([[True, True], [True, False]])
    state_mask, goal_mask = torch.tensor([True, False]), torch.tensor([False, True])
    valid = valid_columns(layout, frame_mask, view_mask, state_mask, goal_mask)
    mask = build_attention_mask(config, torch.zeros(2, len(layout), 48), allowed_pairs(config, layout), valid)
    for i, (kind, frame, group, _) in enumerate(tokens_of(layout)):
        exists = [
            frame < 2 and kind != Kind.GOAL,
            not (kind == Kind.IMAGE and group == 1) and kind != Kind.STATE,
        ]
        for sample in range(2):
            seen_by = mask[sample, 0, :, i].nonzero().flatten().tolist()
            if kind >= Kind.FLOW:
                continue
            assert (set(seen_by) - {i} != set()) == exists[sample], (sample, Kind(kind), frame)


def test_eager_gets_the_same_mask_as_sdpa_in_additive_form():
    config = tiny_config()
    layout = build_layout(config, FRAMES)
    allowed, states = allowed_pairs(config, layout), torch.zeros(2, len(layout), 48)
    valid = valid_columns(layout, torch.tensor([[True] * 4, [True, False, False, False]]))
    config._attn_implementation = "sdpa"
    boolean = build_attention_mask(config, states, allowed, valid)
    config._attn_implementation = "eager"
    additive = build_attention_mask(config, states, allowed, valid)
    assert boolean.dtype == torch.bool and boolean.shape == (2, 1, len(layout), len(layout))
    assert torch.equal(additive == 0, boolean)
    assert (additive[~boolean] == torch.finfo(torch.float32).min).all()


def test_flex_attention_gets_the_same_mask_as_sdpa(monkeypatch):
    # The library would compile a block mask from the function, which takes half a minute on a CPU.
    monkeypatch.setattr(
        attention_mask, "create_bidirectional_mask", lambda and_mask_function, **_: and_mask_function
    )
    config = tiny_config(goal_image=True)
    layout = build_layout(config, FRAMES)
    allowed, states = allowed_pairs(config, layout), torch.zeros(2, len(layout), 48)
    frame_mask = torch.tensor([[True] * 4, [True, False, False, False]])
    valid = valid_columns(layout, frame_mask, goal_mask=torch.tensor([True, False]))
    config._attn_implementation = "sdpa"
    boolean = build_attention_mask(config, states, allowed, valid)
    config._attn_implementation = "flex_attention"
    may_attend = build_attention_mask(config, states, allowed, valid)
    same = create_mask(may_attend, 2, 1, len(layout), len(layout), device="cpu")
    assert torch.equal(same, boolean)


@pytest.mark.parametrize(
    ("switches", "per_frame", "total"),
    [
        ({"objectives": ["action", "future"], "future_sees_state": True}, 43, 430),  # GR-1
        ({"objectives": ["action", "future", "progress"], "goal_image": True}, 44, 450),  # GR-MG
        ({"goal_image": True}, 54, 550),  # 3D Foresight
        ({"goal_image": True, "objectives": ["future"], "state_dim": 0, "views": ["main"]}, 21, 220),
        (
            {
                "goal_image": True,
                "objectives": ["depth", "future", "flow"],
                "state_dim": 0,
                "views": ["main"],
            },
            31,
            320,
        ),
        ({"goal_image": True, "objectives": ["action", "depth", "future", "progress"]}, 44, 450),  # no flow
        ({"goal_image": True, "objectives": ["action", "depth", "flow", "progress"]}, 34, 350),  # no future
        ({"goal_image": True, "objectives": ["action", "future", "flow", "progress"]}, 54, 550),  # no depth
    ],
)
def test_token_counts_of_the_paper_and_its_baselines(switches, per_frame, total):
    switches = {"binary_state_indices": []} | switches if "state_dim" in switches else switches
    layout = build_layout(ForesightConfig(**switches), 10)
    assert len(layout) == total
    assert (layout.frame == 3).sum() == per_frame


def test_the_sequence_runs_goal_then_frames_of_inputs_and_queries():
    config = tiny_config(goal_image=True, num_latents=2, num_flow_queries=2)
    tokens = tokens_of(build_layout(config, 2))
    assert [kind for kind, *_ in tokens[:3]] == [Kind.GOAL] * 3
    frame = [(Kind.LANGUAGE, 0)] + [(Kind.STATE, 0)] + [(Kind.IMAGE, 0)] * 3 + [(Kind.IMAGE, 1)] * 3
    frame += [(Kind.FLOW, 0)] * 2 + [(Kind.ACTION, 0)] + [(Kind.FUTURE, 0)] * 3 + [(Kind.FUTURE, 1)] * 3
    frame += [(Kind.PROGRESS, 0)]
    assert [(kind, group) for kind, _, group, _ in tokens[3:]] == frame * 2
    assert [frame for _, frame, *_ in tokens[3:]] == [0] * len(frame) + [1] * len(frame)


def test_only_the_asked_frames_and_kinds_of_queries_are_laid_out():
    config = tiny_config()
    layout = build_layout(config, FRAMES, query_frames=[FRAMES - 1], queries=(Kind.FLOW, Kind.ACTION))
    queries = layout.kind >= Kind.FLOW
    assert layout.kind[queries].tolist() == [Kind.FLOW] * 3 + [Kind.ACTION]
    assert layout.frame[queries].tolist() == [FRAMES - 1] * 4
    assert len(layout.positions(Kind.PROGRESS)) == 0
