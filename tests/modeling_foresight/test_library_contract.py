"""What transformers promises of a model: outputs on request, padded text, attention backends, arguments."""

import copy

import pytest
import torch
from transformers import AutoModel, ResNetConfig, TimmWrapperConfig

from modeling_foresight import ForesightForActionPrediction, ForesightModel
from modeling_foresight.lora import lora_config
from tests.tiny import BATCH, BATCH_NORM_TOWER, tiny_batch, tiny_config, tiny_inputs


@pytest.fixture(scope="module")
def config():
    return tiny_config(goal_image=True)


def build(config, cls=ForesightForActionPrediction, **attention):
    torch.manual_seed(0)
    return cls._from_config(copy.deepcopy(config), **attention).eval()


@pytest.fixture(scope="module")
def model(config):
    return build(config)


@pytest.fixture(scope="module")
def inputs(config):
    return tiny_inputs(config)


def equal(ours, theirs) -> bool:
    """Whether two outputs hold the same numbers: tensors, or the losses by name."""
    if isinstance(ours, dict):
        return all(torch.equal(ours[name], theirs[name]) for name in ours)
    return torch.equal(ours, theirs)


# --- Outputs on request -------------------------------------------------------------------------------------


@torch.no_grad()
def test_hidden_states_run_from_the_embeddings_to_the_last_block(model, inputs):
    trunk = model.model
    output = trunk(**inputs, output_hidden_states=True)
    tokens = len(trunk.layout(5))
    assert output.embeddings.shape == (BATCH, tokens, 48)
    assert [h.shape for h in output.hidden_states] == [(BATCH, tokens, 48)] * 3
    first, *_, last = output.hidden_states
    torch.testing.assert_close(first, trunk.embed_norm(output.embeddings))
    torch.testing.assert_close(output.last_hidden_state, trunk.norm(last))
    assert not torch.allclose(last, output.last_hidden_state)
    whole = model(**inputs, output_hidden_states=True)
    assert torch.equal(whole.embeddings, output.embeddings)
    assert all(torch.equal(a, b) for a, b in zip(whole.hidden_states, output.hidden_states, strict=True))


@torch.no_grad()
def test_asking_for_hidden_states_changes_nothing_else(model, inputs):
    plain, asked = model(**inputs), model(**inputs, output_hidden_states=True)
    assert set(asked) - set(plain) == {"embeddings", "hidden_states"}
    assert all(equal(plain[name], asked[name]) for name in plain)


@pytest.mark.parametrize("cls", [ForesightModel, ForesightForActionPrediction])
@torch.no_grad()
def test_attentions_are_distributions_over_all_tokens(config, inputs, cls):
    attentions = build(config, cls, attn_implementation="eager")(**inputs, output_attentions=True).attentions
    tokens = len(build(config, ForesightModel).layout(5))
    assert [a.shape for a in attentions] == [(BATCH, 4, tokens, tokens)] * 2
    for weights in attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(BATCH, 4, tokens))


@torch.no_grad()
def test_tuples_hold_the_same_outputs_in_the_same_order(model, inputs):
    output, values = model(**inputs), model(**inputs, return_dict=False)
    assert all(equal(a, b) for a, b in zip(output.values(), values, strict=True))


@torch.no_grad()
def test_evaluation_is_deterministic(model, inputs):
    first, second = model(**inputs), model(**inputs)
    assert all(equal(first[name], second[name]) for name in first)


# --- Text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [1, 6])
@torch.no_grad()
def test_padding_after_the_text_changes_nothing(model, inputs, padding):
    ids = torch.nn.functional.pad(inputs["input_ids"], (0, padding), value=2)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, padding))
    padded = inputs | {"input_ids": ids, "attention_mask": mask}
    before, after = model.predict_action(**inputs), model.predict_action(**padded)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pad_id", [1, 2], ids=["as the end of text", "its own"])
@torch.no_grad()
def test_text_padded_on_the_left_is_the_same_text(model, inputs, pad_id):
    lengths = inputs["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) == BATCH
    left = {
        name: torch.full_like(inputs[name], fill)
        for name, fill in (("input_ids", pad_id), ("attention_mask", 0))
    }
    for row, length in enumerate(lengths):
        for name in left:
            left[name][row, -length:] = inputs[name][row, :length]
    before, after = model.predict_action(**inputs), model.predict_action(**inputs | left)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-6)


# --- Attention backends -------------------------------------------------------------------------------------


def fused(model) -> set[bool]:
    return {module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")}


@pytest.mark.parametrize("tower", ["vit", "timm"])
def test_every_part_follows_the_attention_implementation(tower):
    timm = TimmWrapperConfig(architecture="test_vit", do_pooling=False, model_args={"img_size": 48})
    config = tiny_config(**({"vision_config": timm, "image_size": 48} if tower == "timm" else {}))
    model = build(config)
    assert fused(model) == {True}
    model.set_attn_implementation("eager")
    assert fused(model) == {False} == fused(build(config, attn_implementation="eager"))
    assert model.model.text_encoder.tower.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    assert fused(model) == {True} == fused(build(config, attn_implementation="sdpa"))
    assert model.model.text_encoder.tower.config._attn_implementation == "sdpa"


def test_a_tower_without_attention_leaves_the_choice_to_the_rest(tmp_path):
    tower = ResNetConfig(embedding_size=8, hidden_sizes=[8, 20], depths=[1, 1], layer_type="basic")
    config = tiny_config(vision_config=tower)
    model, inputs = build(config), tiny_inputs(config)
    model.save_pretrained(tmp_path)
    expected = model.predict_action(**inputs)
    for chosen in ("sdpa", "eager"):
        loaded = AutoModel.from_pretrained(tmp_path, attn_implementation=chosen).eval()
        model.set_attn_implementation(chosen)
        for policy in (model, loaded):
            vision, text = policy.model.vision_encoder.tower, policy.model.text_encoder.tower
            assert (policy.config._attn_implementation, text.config._attn_implementation) == (chosen, chosen)
            assert vision.config._attn_implementation == "eager"
            torch.testing.assert_close(policy.predict_action(**inputs), expected)


def test_flex_attention_says_that_it_cannot_drop_out():
    model = build(tiny_config(), attn_implementation="flex_attention").train()
    # A whole step would first compile the kernels of mask and towers, which takes half a minute.
    with pytest.raises(ValueError, match=r"flex_attention.*does not support.*dropout"):
        model.model.layers[0](torch.randn(2, 7, 48))


# --- Arguments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            "pixel_value",
            "ForesightForActionPrediction takes no argument 'pixel_value': did you mean 'pixel_values'",
        ),
        ("action_masks", "did you mean 'action_mask'"),
        ("goal_feature", "did you mean 'goal_features'"),
        ("labels", "no argument 'labels': it takes pixel_values, input_ids, "),
    ],
)
def test_an_argument_that_nobody_knows_is_refused(model, inputs, wrong, message):
    with pytest.raises(TypeError, match=message):
        model(**inputs, **{wrong: torch.zeros(1)})


def test_the_trunk_refuses_unknown_arguments_too(model, inputs):
    with pytest.raises(
        TypeError, match="ForesightModel takes no argument 'view_masks': did you mean 'view_mask'"
    ):
        model.model(**inputs, view_masks=torch.ones(BATCH, 2))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("input_ids", (BATCH + 1, 9), r"input_ids has shape \(4, 9\); expected \(3, 9\)"),
        ("input_ids", (9,), r"input_ids has shape \(9,\); expected \(3, length\)"),
        ("attention_mask", (BATCH, 8), r"attention_mask has shape \(3, 8\); expected \(3, 9\)"),
    ],
)
def test_text_of_a_wrong_shape_is_refused(model, inputs, name, shape, message):
    with pytest.raises(ValueError, match=message):
        model(**inputs | {name: torch.ones(shape, dtype=torch.int64)})


@torch.no_grad()
def test_arguments_of_the_library_pass(model, inputs):
    model(**inputs, return_dict=True, output_hidden_states=False, num_items_in_batch=torch.tensor(3))


# --- Other libraries ----------------------------------------------------------------------------------------


def test_a_model_without_a_text_tower_takes_an_adapter_and_checkpointing():
    """peft asks for the input embeddings, and takes `NotImplementedError` for "there are none"."""
    peft = pytest.importorskip("peft")
    model = build(tiny_config(towers=["vision"]))
    with pytest.raises(NotImplementedError, match="no text tower"):
        model.get_input_embeddings()
    model.gradient_checkpointing_enable()
    peft.get_peft_model(model, lora_config(model, r=2))


def batch_norm_config():
    return tiny_config(vision_config=BATCH_NORM_TOWER, freeze_vision=False)


@pytest.mark.parametrize("trains_before", [False, True])
@pytest.mark.parametrize("own", [["embed_state"], ["bn1"]], ids=["no norm learns", "one norm learns"])
def test_no_tensor_of_the_base_changes_while_an_adapter_trains(trains_before, own):
    """Running statistics are not parameters: freezing does not hold them, and no adapter brings them back."""
    peft = pytest.importorskip("peft")
    config = batch_norm_config()
    model = build(config).train(trains_before)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert any("running_mean" in name for name in before)
    adapted = peft.get_peft_model(model, lora_config(model, r=2, modules_to_save=own))
    if not trains_before:
        adapted.train()
    adapted(**tiny_batch(config)).loss.backward()
    after = {
        name.replace("base_layer.", "").replace("original_module.", ""): value
        for name, value in model.state_dict().items()
        if "lora_" not in name and "modules_to_save" not in name
    }
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    saved = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    assert any("bn1.running_mean" in name for name in saved) == (own == ["bn1"])


def test_statistics_of_norms_that_are_not_batch_norm_stay_too():
    peft = pytest.importorskip("peft")
    arguments = {"norm_layer": "evonormb0", "layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}
    tower = {"architecture": "resnetv2_50", "model_args": {**BATCH_NORM_TOWER["model_args"], **arguments}}
    config = tiny_config(vision_config={**BATCH_NORM_TOWER, **tower}, freeze_vision=False)
    model = build(config).train()
    before = {name: value.clone() for name, value in model.named_buffers() if name.endswith("running_var")}
    assert before
    peft.get_peft_model(model, lora_config(model, r=2))(**tiny_batch(config))
    assert all(torch.equal(value, before[n]) for n, value in model.named_buffers() if n in before)


def test_statistics_follow_the_images_where_their_layers_learn():
    config = batch_norm_config()
    model = build(config).train()
    before = {n: b.clone() for n, b in model.named_buffers() if n.endswith("running_mean")}
    model(**tiny_batch(config))
    assert all(not torch.equal(b, before[n]) for n, b in model.named_buffers() if n in before)
