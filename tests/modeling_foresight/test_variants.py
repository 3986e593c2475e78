"""The method, its baselines and its ablations: tokens, parameters, masks and one training step of each."""

import runpy
import sys

import pytest
import torch

from modeling_foresight import ForesightConfig, ForesightForActionPrediction
from modeling_foresight.__main__ import describe_variant
from modeling_foresight.attention_mask import allowed_pairs, build_layout
from modeling_foresight.configuration_foresight import PRESETS
from tests.modeling_foresight.test_attention_mask import FORESIGHT_TABLE, gr_mg_mask, mask_by_table
from tests.tiny import tiny_batch, tiny_config

GRMG_TRAINED = 48_596_936  # the published policy without its frozen towers

# Tokens of a window of 10 frames, of one frame, and trained parameters beyond GR-MG's that the parts sum to.
DEPTH_DECODER = 3_796_480
FLOW = 10 * 384 + (2 * 196 + 1) * 384  # query vectors, and the map of the start points
FLOW_DECODER = 384 * 385 + 384 + 3 * 384 + 2 * 1_774_464 + 768  # embed, mask, start, two blocks, norm
DISPLACEMENT = 385 * (5 * 3 + 1) + 384 * 16  # two outputs, and waves of the start points
SIZES = {
    "gr1": (430, 43, None),
    "grmg": (450, 44, 0),
    "foresight_2d": (550, 54, FLOW + FLOW_DECODER + 385 * 6 * 2),
    "foresight_3d": (550, 54, FLOW + FLOW_DECODER + 385 * 6 * 3 + DEPTH_DECODER),
    "foresight_3d_displacement": (550, 54, FLOW + FLOW_DECODER + DISPLACEMENT + DEPTH_DECODER),
    "foresight_3d_metric": (550, 54, FLOW + FLOW_DECODER + 385 * 6 * 3 + DEPTH_DECODER + 385 * 2),
    "no_depth": (550, 54, FLOW + FLOW_DECODER + 385 * 6 * 3 + DEPTH_DECODER),
    "no_future": (350, 34, FLOW + FLOW_DECODER + 385 * 6 * 3 + DEPTH_DECODER - 3_993_600 - 20 * 384),
    "no_flow": (450, 44, DEPTH_DECODER),
    "grmg_pretrain": (220, 21, None),
    "foresight_3d_pretrain": (320, 31, None),
}
SCALES = {"depth_scale", "future_depth_scale"}
# Parts that exist in each variant, of all that a variant may lack.
PARTS = {
    "model.embed_goal": set(PRESETS) - {"gr1"},
    "model.embed_state": set(PRESETS) - {"grmg_pretrain", "foresight_3d_pretrain"},
    "model.embed_views.1": set(PRESETS) - {"grmg_pretrain", "foresight_3d_pretrain"},
    "model.flow_query": set(PRESETS) - {"gr1", "grmg", "no_flow", "grmg_pretrain"},
    "model.embed_flow_points": set(PRESETS) - {"gr1", "grmg", "no_flow", "grmg_pretrain"},
    "model.action_query": set(PRESETS) - {"grmg_pretrain", "foresight_3d_pretrain"},
    "model.future_queries": set(PRESETS) - {"no_future"},
    "model.progress_query": set(PRESETS) - {"gr1", "grmg_pretrain", "foresight_3d_pretrain"},
    "action_encoder": set(PRESETS) - {"gr1", "grmg_pretrain", "foresight_3d_pretrain"},
    "action_decoder.blocks": set(PRESETS) - {"gr1", "grmg_pretrain", "foresight_3d_pretrain"},
    "action_decoder.shared": {"gr1"},
    "progress_decoder": set(PRESETS) - {"gr1", "grmg_pretrain", "foresight_3d_pretrain"},
    "image_decoder": set(PRESETS) - {"no_future"},
    "depth_decoder": set(PRESETS) - {"gr1", "grmg", "foresight_2d", "grmg_pretrain"},
    "depth_decoder.predict_scale": {"foresight_3d_metric"},
    "flow_decoder": set(PRESETS) - {"gr1", "grmg", "no_flow", "grmg_pretrain"},
}


def tiny_preset(name: str, **overrides) -> ForesightConfig:
    """A preset at the size of the tests."""
    robot = {"action_dim": 7, "binary_action_indices": (6,), "state_dim": 7, "binary_state_indices": (6,)}
    return tiny_config(**(robot | PRESETS[name] | overrides))


@pytest.mark.parametrize("name", PRESETS)
def test_tokens_and_parameters_of_the_paper_size(name):
    row = describe_variant(name)
    tokens, per_frame, beyond_grmg = SIZES[name]
    assert (row["tokens"], row["per frame"]) == (tokens, per_frame)
    if beyond_grmg is not None:
        assert row["trained"] - GRMG_TRAINED == beyond_grmg


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_off_has_no_parameters(name):
    names = [parameter for parameter, _ in ForesightForActionPrediction(tiny_preset(name)).named_parameters()]
    for part, variants in PARTS.items():
        assert any(n.startswith(part) for n in names) == (name in variants), part


@pytest.mark.parametrize("name", PRESETS)
def test_the_mask_is_the_specified_one(name):
    config = tiny_preset(name)
    layout = build_layout(config, config.history_length)
    mask = allowed_pairs(config, layout)
    if name in ("gr1", "grmg"):
        expected = gr_mg_mask(config, config.history_length)
        if name == "gr1":  # it has no progress token at the end of a frame
            frame = 2 + 2 * 10 + 1 + 2 * 10 + 1
            keep = [i for i in range(len(expected)) if i % frame != frame - 1]
            expected = expected[keep][:, keep]
        assert torch.equal(mask, expected)
    else:
        table = FORESIGHT_TABLE
        if name == "grmg_pretrain":
            table = table | {"FUT": "GAAAA----"}  # there is no state to see
        assert torch.equal(mask, mask_by_table(layout, table))


@pytest.mark.parametrize("name", PRESETS)
def test_one_training_step_gives_every_parameter_a_gradient(name):
    config = tiny_preset(name)
    torch.manual_seed(0)
    model = ForesightForActionPrediction(config).train()
    output = model(**tiny_batch(config))
    output.loss.backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name
    wanted = {
        "gr1": {"action", "gripper", "future"},
        "grmg": {"action", "gripper", "kl", "future", "progress"},
        "foresight_2d": {"action", "gripper", "kl", "future", "flow", "progress"},
        "foresight_3d": {"action", "gripper", "kl", "depth", "future", "flow", "progress"},
        "foresight_3d_displacement": {"action", "gripper", "kl", "depth", "future", "flow", "progress"},
        "foresight_3d_metric": {"action", "gripper", "kl", "depth", "future", "flow", "progress", *SCALES},
        "no_depth": {"action", "gripper", "kl", "future", "flow", "progress"},
        "no_future": {"action", "gripper", "kl", "depth", "flow", "progress"},
        "no_flow": {"action", "gripper", "kl", "depth", "future", "progress"},
        "grmg_pretrain": {"future"},
        "foresight_3d_pretrain": {"depth", "future", "flow"},
    }
    assert set(output.losses) == wanted[name]


@pytest.mark.parametrize("name", PRESETS)
def test_a_variant_is_saved_and_loaded_as_it_is(name, tmp_path):
    config = tiny_preset(name)
    model = ForesightForActionPrediction(config).eval()
    model.save_pretrained(tmp_path)
    loaded = ForesightForActionPrediction.from_pretrained(tmp_path)
    batch = tiny_batch(config, batch=1)
    with torch.no_grad():
        ours, theirs = model(**batch), loaded(**batch)
    assert torch.equal(ours.loss, theirs.loss)


def test_the_losses_of_gr_mg_are_its_own():
    """0.1 times the two cameras' errors of future RGB, and nothing of depth or flow."""
    config = tiny_preset("grmg")
    torch.manual_seed(1)
    model = ForesightForActionPrediction(config).eval()
    batch = tiny_batch(config)
    with torch.no_grad():
        output = model(**batch)
    errors = []
    for view in range(2):
        target = batch["pixel_values"][:, 3:, view].unfold(-2, 8, 8).unfold(-2, 8, 8)  # (B, 2, 3, 5, 5, 8, 8)
        target = target.permute(0, 1, 3, 4, 5, 6, 2).reshape(3, 2, 25, -1)  # row, column, channel in a patch
        deviation = target.var(-1, keepdim=True).sqrt() + 1e-6
        target = (target - target.mean(-1, keepdim=True)) / deviation
        errors.append(((output.future_rgb[:, :2, view] - target) ** 2).mean())
    torch.testing.assert_close(output.losses["future"], errors[0] + errors[1], rtol=1e-4, atol=1e-5)
    parts = {"action": 1, "gripper": 0.01, "kl": 1, "progress": 1, "future": 0.1}
    total = sum(weight * output.losses[name] for name, weight in parts.items())
    torch.testing.assert_close(output.loss, total)


def test_two_dimensional_flow_is_that_of_three_dimensions_without_depth():
    config = tiny_preset("foresight_2d")
    torch.manual_seed(2)
    model, batch = ForesightForActionPrediction(config).eval(), tiny_batch(tiny_preset("foresight_2d"))
    with torch.no_grad():
        output = model(**batch)
        deeper = model(**(batch | {"track": batch["track"] + torch.tensor([0, 0, 5.0])}))
    assert output.flow.shape == (3, 5, 6, 16, 2) and output.depth is None and output.future_depth is None
    assert torch.equal(output.losses["flow"], deeper.losses["flow"])
    expected = ((output.flow - batch["track"][..., :2]) ** 2).mean()
    torch.testing.assert_close(output.losses["flow"], expected)


def test_gr1_predicts_one_action_through_linear_maps():
    config = tiny_preset("gr1")
    torch.manual_seed(3)
    head = ForesightForActionPrediction(config).action_decoder
    with torch.no_grad():
        zero, first, second = (
            head(x)[:, 0] for x in (torch.zeros(1, 48), torch.ones(1, 48), -torch.ones(1, 48))
        )
    assert zero.shape == (1, 7)
    torch.testing.assert_close(first + second, 2 * zero)  # no activation anywhere
    with pytest.raises(
        Exception, match="action_head='linear' predicts one action per frame, but chunk_size=3"
    ):
        tiny_preset("gr1", chunk_size=3)


def test_a_policy_that_only_acts_refuses_to_train():
    config = tiny_preset("foresight_3d", auxiliary_heads=False)
    model = ForesightForActionPrediction(config)
    kept = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert kept == {"model", "action_decoder"}
    whole = tiny_preset("foresight_3d")
    with pytest.raises(ValueError, match="acts but does not train: load it whole"):
        model(**tiny_batch(whole))


def test_the_table_of_variants_is_one_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["-m", "--presets", "grmg", "foresight_3d_pretrain"])
    monkeypatch.delitem(sys.modules, "modeling_foresight.__main__")
    runpy.run_module("modeling_foresight", run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:4] == ["grmg", "450", "44", "48,596,936"]
    assert lines[2].split()[:3] == ["foresight_3d_pretrain", "320", "31"] and "- " in lines[2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objectives": ["action", "future", "future_rgb"]}, "has both 'future' and 'future_rgb'"),
        ({"objectives": ["flow", "flow_2d"]}, "has both 'flow' and 'flow_2d'"),
        (
            {"objectives": ["depth"], "auxiliary_heads": False},
            "leaves nothing of a model without .* 'action'",
        ),
        ({"towers": ["audio"]}, r"towers has \['audio'\]; choose from \['text', 'vision'\]"),
        (
            {"state_representation": "relative", "state_dim": 4},
            "needs a pose in entries 0 to 5 .* state_dim=4",
        ),
        ({"state_representation": "relative", "binary_state_indices": [2]}, "binary_state_indices=.2."),
        ({"action_codec": "local_delta", "action_dim": 4}, "means 7 entries.*action_dim=4.*Use 'recorded'"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        tiny_preset("no_future", **({"objectives": ["action"]} | fields))


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="no preset 'gr2'; choose one of .*'gr1', 'grmg'"):
        ForesightConfig.from_preset("gr2")
