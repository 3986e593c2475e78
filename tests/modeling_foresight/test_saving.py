"""Weights on disk: shards, types, devices, policies without auxiliary heads, and files that do not fit."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, PreTrainedModel, TimmWrapperConfig
from transformers.utils import logging

from modeling_foresight import ForesightForActionPrediction, ForesightModel, export_with_code
from modeling_foresight.checkpoint_sizes import read_shapes
from tests.tiny import tiny_config, tiny_inputs, tiny_processor, tiny_targets


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ForesightForActionPrediction(tiny_config(goal_image=True)).eval()


@pytest.fixture(scope="module")
def inputs(model):
    return tiny_inputs(model.config)


@pytest.fixture(scope="module")
def action(model, inputs):
    return model.predict_action(**inputs)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved-whole")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy of the checkpoint that a test may damage."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    return tmp_path


def count(model) -> int:
    return sum(p.numel() for p in model.parameters())


def test_a_model_in_shards_loads_as_the_same_model(model, inputs, action, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = ForesightForActionPrediction.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.predict_action(**inputs), action, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16", "auto"])
def test_weights_load_in_the_type_asked_for(checkpoint, inputs, action, dtype):
    loaded = AutoModel.from_pretrained(checkpoint, dtype=dtype)
    expected = {"float16": torch.float16, "auto": torch.float32}.get(dtype, dtype)
    assert {p.dtype for p in loaded.parameters()} == {expected}
    assert loaded.depth_decoder.positions.dtype == torch.float32  # sin-cos tables lose too much below
    given = loaded.predict_action(**inputs)
    assert given.dtype == torch.float32
    torch.testing.assert_close(given, action, rtol=0, atol=0.05)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map_places_the_whole_model(checkpoint, inputs, action, device_map):
    loaded = AutoModel.from_pretrained(checkpoint, device_map=device_map)
    on_device = {k: v.to(loaded.device) for k, v in inputs.items()}
    torch.testing.assert_close(loaded.predict_action(**on_device).cpu(), action, rtol=0, atol=1e-4)
    assert not any(p.requires_grad for p in loaded.model.text_encoder.parameters())


# --- Without auxiliary heads --------------------------------------------------------------------------------


def test_a_policy_without_auxiliary_heads_acts_the_same(checkpoint, model, inputs, action, tmp_path):
    actor = AutoModel.from_pretrained(checkpoint, auxiliary_heads=False)
    torch.testing.assert_close(actor.predict_action(**inputs), action, rtol=0, atol=1e-6)
    with torch.no_grad():
        whole, alone = model(**inputs), actor(**inputs)
    torch.testing.assert_close(alone.actions, whole.actions, rtol=0, atol=1e-5)
    assert [name for name in alone if name in ("depth", "future_rgb", "flow", "progress")] == []
    gone = {n.split(".")[0] for n, _ in model.named_children()} - {n for n, _ in actor.named_children()}
    assert gone == {"depth_decoder", "image_decoder", "flow_decoder", "action_encoder", "progress_decoder"}
    assert count(actor) < count(model) - sum(count(getattr(model, name)) for name in gone)

    actor.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert again.config.auxiliary_heads is False and count(again) == count(actor)
    torch.testing.assert_close(again.predict_action(**inputs), action, rtol=0, atol=1e-6)


def test_with_a_timm_tower_too_auxiliary_heads_may_be_left_out(tmp_path):
    # transformers then renames what the model has no place for, so that it has to be known by both names.
    sizes = {"img_size": 40, "patch_size": 10, "embed_dim": 40, "depth": 1, "num_heads": 2}
    timm = {"architecture": "vit_tiny_patch16_224", "do_pooling": False, "model_args": sizes}
    whole = ForesightForActionPrediction(tiny_config(vision_config=TimmWrapperConfig(**timm))).eval()
    whole.save_pretrained(tmp_path)
    actor = AutoModel.from_pretrained(tmp_path, auxiliary_heads=False)
    inputs = tiny_inputs(whole.config)
    torch.testing.assert_close(actor.predict_action(**inputs), whole.predict_action(**inputs))
    ForesightModel.from_pretrained(tmp_path)  # the trunk alone


def test_loading_without_auxiliary_heads_reports_nothing(checkpoint, tmp_path, caplog):
    logging.enable_propagation()
    try:
        actor = AutoModel.from_pretrained(checkpoint, auxiliary_heads=False)
        assert caplog.text == ""
        actor.save_pretrained(tmp_path)
        AutoModel.from_pretrained(tmp_path, auxiliary_heads=True, strict=False)
        assert "MISSING" in caplog.text  # so that would have been seen
    finally:
        logging.disable_propagation()


def test_a_policy_without_auxiliary_heads_still_needs_all_of_its_own_weights(broken):
    weights = load_file(broken / "model.safetensors")
    del weights["action_decoder.embed_query.weight"]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights of this .*action_decoder\.embed_query\.weight"):
        AutoModel.from_pretrained(broken, auxiliary_heads=False)


def test_a_policy_saved_without_auxiliary_heads_cannot_grow_them_back(checkpoint, tmp_path):
    AutoModel.from_pretrained(checkpoint, auxiliary_heads=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks weights of this .*: action_encoder\..* and \d+ more"):
        AutoModel.from_pretrained(tmp_path, auxiliary_heads=True)


def test_a_policy_without_auxiliary_heads_refuses_to_train(checkpoint, inputs, model):
    actor = AutoModel.from_pretrained(checkpoint, auxiliary_heads=False)
    with pytest.raises(ValueError, match="auxiliary_heads=False acts but does not train: load it whole"):
        actor(**inputs, actions=tiny_targets(model.config)["actions"])


# --- Files that do not fit ----------------------------------------------------------------------------------


def test_a_truncated_file_is_refused_by_name(broken):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"The weights of .*{broken.name} cannot be read .*truncated"):
        AutoModel.from_pretrained(broken)


def test_a_missing_shard_is_refused_by_name(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        AutoModel.from_pretrained(tmp_path)


def test_weights_of_another_size_are_refused(broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_flow_queries": 4}))
    with pytest.raises(ValueError, match=r"sizes .*: model.flow_query.weight \(3, 48\) where \(4, 48\)"):
        AutoModel.from_pretrained(broken, strict=False)
    loaded = AutoModel.from_pretrained(broken, ignore_mismatched_sizes=True)
    assert loaded.model.flow_query.weight.shape == (4, 48)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(broken, value):
    weights = load_file(broken / "model.safetensors")
    weights["action_decoder.embed_query.weight"][0, 0] = value
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights are not finite in action_decoder.embed_query.weight:"):
        AutoModel.from_pretrained(broken)


def test_running_statistics_that_are_not_finite_are_refused_by_name(tmp_path):
    tower = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8], "depths": [1]}
    model = ForesightForActionPrediction(tiny_config(vision_config=tower | {"layer_type": "basic"}))
    name, statistics = next(entry for entry in model.named_buffers() if entry[0].endswith("running_var"))
    statistics[1] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"the weights are not finite in {name}:"):
        AutoModel.from_pretrained(tmp_path)


TOO_LARGE = {
    "width": ({"hidden_size": 40_000}, "hidden_size=40000"),
    "views": ({"views": [f"camera{view}" for view in range(1000)], "hidden_size": 96}, r"len\(views\)=1000"),
    "actions": ({"action_dim": 10**6}, "action_dim=1000000"),
    "states": ({"state_dim": 10**6}, "state_dim=1000000"),
    "layers": ({"num_hidden_layers": 10**6}, "num_hidden_layers=1000000"),
    "queries": ({"num_flow_queries": 10**6}, "num_flow_queries=1000000"),
    "decoders": ({"decoder_depth": 10**6}, "decoder_depth=1000000"),
    "history": ({"history_length": 10**6}, "history_length=1000000"),
    "pixels": ({"image_size": 8000, "vision_config": {"image_size": 8000}}, "image_size=8000"),
    "tower": ({"vision_config": {"model_type": "resnet", "depths": [10**6]}}, "vision_config.depths=1000000"),
    "vocabulary": ({"text_config": {"vocab_size": 10**6, "hidden_size": 4096}}, "vocab_size=1000000"),
    "all at once": ({"intermediate_size": 10**6, "flow_grid": [10**6, 10**6]}, "flow_grid=1000000"),
}


@pytest.mark.parametrize(("fields", "named"), TOO_LARGE.values(), ids=TOO_LARGE)
def test_a_config_that_is_larger_than_the_weights_is_refused_before_memory_is_allocated(
    broken, fields, named, monkeypatch
):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | fields))
    # Whatever loads the weights would allocate.
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    with pytest.raises(ValueError, match=rf"describes a model of .* in \d+ tensors.*{named}"):
        ForesightForActionPrediction.from_pretrained(broken, ignore_mismatched_sizes=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "nonsense"}, "hidden_act='nonsense' is unknown; choose from"),
        ({"vision_config": {"hidden_act": "nonsense"}}, "vision_config.hidden_act='nonsense' is unknown"),
        ({"text_config": {"num_attention_heads": 0}}, "No model can be made .* modulo by zero"),
        ({"vision_config": {"model_type": ["vit"]}}, r"vision_config.model_type=\['vit'\] is unknown"),
        ({"vision_config": {"model_type": "resnet", "depths": []}}, "no tower that can be built: IndexError"),
    ],
)
def test_a_config_of_which_no_model_can_be_made_is_named(broken, fields, message):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match=message):
        ForesightForActionPrediction.from_pretrained(broken)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            '{"weight_map": {"a": "../b.safetensors"}}',
            "names files outside of its folder, '../b.safetensors'",
        ),
        ('{"weight_map": {"a": 5}}', "index.json is damaged"),
        ("[]", "index.json is damaged"),
        ("[" * 10**5, "index.json is damaged"),
    ],
)
def test_an_index_of_shards_stays_in_its_folder(tmp_path, index, message):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=message):
        read_shapes(str(tmp_path), {})


def test_sizes_are_compared_with_all_shards_and_with_overrides(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    with pytest.raises(ValueError, match="num_hidden_layers=100000"):
        AutoModel.from_pretrained(tmp_path, num_hidden_layers=10**5)


def test_a_config_without_weights_may_describe_any_model():
    with torch.device("meta"):
        large = AutoModel.from_config(tiny_config(hidden_size=1920))
    assert large.model.embed_norm.weight.shape == (1920,)


def test_a_checkpoint_of_another_kind_is_refused(model, tmp_path):
    model.model.text_encoder.tower.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="config.json of a 'foresight' model, got that of a 'clip_text_model'"
    ):
        ForesightForActionPrediction.from_pretrained(tmp_path)


def test_weights_without_a_config_are_refused(broken):
    (broken / "config.json").unlink()
    with pytest.raises(ValueError, match=r"Expected the config\.json of a 'foresight' model.*missing"):
        ForesightForActionPrediction.from_pretrained(broken)


def test_overrides_at_loading_must_fit_together(checkpoint):
    with pytest.raises(
        StrictDataclassClassValidationError, match="hidden_size=48 is not divisible by decoder_h"
    ):
        AutoModel.from_pretrained(checkpoint, decoder_heads=5)


def test_a_checkpoint_saved_from_an_export_does_not_name_code_that_it_lacks(model, tmp_path):
    export_with_code(model, tiny_processor(model.config), tmp_path / "exported")
    AutoModel.from_pretrained(tmp_path / "exported").save_pretrained(tmp_path / "plain")
    assert "auto_map" in json.loads((tmp_path / "exported/config.json").read_text())
    assert "auto_map" not in json.loads((tmp_path / "plain/config.json").read_text())


def test_a_device_map_that_leaves_parts_on_disk_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    parts = dict.fromkeys((name for name, _ in model.named_children()), "cpu") | {"image_decoder": "disk"}
    with pytest.raises(ValueError, match="left on disk, where its fixed tables would be lost"):
        AutoModel.from_pretrained(tmp_path / "model", device_map=parts, offload_folder=tmp_path / "disk")
