"""The config: what it refuses, what it saves, and that it stands alone."""

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoConfig, CLIPTextConfig, TimmWrapperConfig, ViTConfig

from modeling_foresight import ForesightConfig
from tests.tiny import tiny_config


def test_defaults_are_the_papers():
    config = ForesightConfig()
    assert (config.history_length, config.future_shift, config.chunk_size, config.flow_length) == (
        10,
        3,
        5,
        6,
    )
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (384, 12, 12)
    assert (config.num_flow_points, config.num_latents, config.num_flow_queries) == (196, 9, 10)
    assert (config.embd_pdrop, config.attention_dropout, config.resid_pdrop) == (0.1, 0.1, 0.1)
    assert (config.hidden_act, config.within_frame) == ("relu", "causal")
    assert (config.vision_sees_state, config.future_sees_state, config.action_sees_flow) == (
        True,
        False,
        True,
    )
    assert config.vision_config.model_type == "vit" and config.vision_config.layer_norm_eps == 1e-6
    assert config.text_config.projection_dim == 512 and config.text_config.hidden_act == "quick_gelu"
    assert config.continuous_action_indices == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "objectives",
            ["action", "optical_flow"],
            r"objectives has \['optical_flow'\]; choose from .*'flow'",
        ),
        ("objectives", [], "objectives has no entry"),
        ("objectives", ["action", "action"], "objectives=.* must name each objective once"),
        ("future_targets", "ahead", "future_targets='ahead' is unknown; choose one of"),
        ("within_frame", "none", "within_frame='none'"),
        ("action_loss", "l2", r"action_loss='l2' is unknown.*'smooth_l1', 'l1'"),
        ("views", ["main", "main"], r"views=\['main', 'main'\] must name at least one camera, each once"),
        ("views", [], "views=.. must name"),
        ("patch_size", 7, "image_size=40 is not divisible by patch_size=7"),
        ("num_attention_heads", 5, "hidden_size=48 is not divisible by num_attention_heads=5"),
        ("decoder_heads", 10, "hidden_size=48 is not divisible by decoder_heads=10"),
        ("action_num_heads", 7, "action_hidden_size=24 is not divisible by action_num_heads=7"),
        ("history_length", 3, "history_length=3 leaves no target 3 frames ahead"),
        ("history_length", 0, "history_length=0 must be at least 1"),
        ("chunk_size", -1, "chunk_size=-1 must be at least 1"),
        ("depth_form", "meters", "depth_form='meters' is unknown; choose one of"),
        ("flow_form", "motion", "flow_form='motion' is unknown; choose one of"),
        ("flow_scales", [0.3], r"flow_scales=\[0.3\] must be two positive numbers"),
        ("flow_scales", [float("nan"), 1.0], "flow_scales=.*nan.* must be two positive numbers"),
        ("flow_scales", [float("inf"), 1.0], "flow_scales=.*inf.* must be two positive numbers"),
        ("flow_grid", [4], r"flow_grid=\[4\] must be two positive numbers"),
        ("binary_action_indices", [7], r"binary_action_indices=\[7\] exceeds action_dim=7"),
        ("binary_action_indices", [2, 2], r"binary_action_indices=\[2, 2\] must name each entry once"),
        ("binary_state_indices", [4, 4], r"binary_state_indices=\[4, 4\] must name each entry once"),
        ("binary_state_indices", [-1], r"binary_state_indices=\[-1\] exceeds state_dim=11"),
        ("image_size", 48, "vision_config.image_size=40, but image_size=48"),
        ("fps", 0, "fps=0 must be above 0"),
        ("fps", float("nan"), "fps=nan must be at least 0"),
        ("image_mean", [0.5, float("nan"), 0.5], "image_mean=.*nan.* must be three finite numbers, one per"),
        ("image_mean", [0.5, 0.5], "image_mean=.* must be three finite numbers"),
        ("image_std", [0.2, 0.0, 0.2], "image_std=.* must be three finite numbers above 0"),
        ("layer_norm_eps", float("nan"), "layer_norm_eps=nan must be at least 0"),
        ("flow_loss_weight", float("inf"), "flow_loss_weight=inf must be at least 0"),
        ("supervised_share", 0, "supervised_share=0 must be above 0 and at most 1"),
        ("embd_pdrop", 1.5, "embd_pdrop=1.5 must be at least 0 and at most 1"),
        ("state_dim", -1, "state_dim=-1 must be at least 0"),
        ("num_hidden_layers", 0, "num_hidden_layers=0 must be at least 1"),
        ("action_dim", 10**9, "action_dim=1000000000 is more than any model has"),
        ("image_size", 10**6, "image_size=1000000 must be at most 8192 pixels"),
        ("views", [str(view) for view in range(2000)], "views names 2000 cameras; expected at most 1000"),
    ],
)
def test_contradictions_are_refused_with_the_fields_and_their_values(field, value, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        tiny_config(**{field: value})


SIZES = [name for name in ForesightConfig.__annotations__ if name.endswith(("_depth", "_layers", "_heads"))]


@pytest.mark.parametrize("name", [name for name in SIZES if name != "auxiliary_heads"])
def test_no_part_may_have_no_layer_or_head_because_it_would_ignore_its_inputs(name):
    with pytest.raises(StrictDataclassClassValidationError, match=f"{name}=0 must be at least 1"):
        tiny_config(**{name: 0})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_sizes": 32}, "no field 'hidden_sizes': did you mean 'hidden_size'"),
        ({"flow_weight": 3}, "no field 'flow_weight': did you mean 'flow_loss_weight'"),
        (
            {"text_config": {"num_hidden_layer": 1}},
            "text_config has no field 'num_hidden_layer'",
        ),
        ({"vision_config": {"hidden_sizes": 8}}, "vision_config has no field 'hidden_sizes'"),
        ({"text_config": {"model_type": "t5"}}, "text_config.model_type='t5' is not that of CLIP's text"),
        ({"text_config": {"model_type": "clip", "text_config": {}}}, "text_config.model_type='clip' is not"),
    ],
)
def test_what_would_be_a_default_without_a_word_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)
    kept = ForesightConfig.from_dict(tiny_config(embodiment="arm", n_action_steps=2).to_dict())
    assert (kept.embodiment, kept.n_action_steps) == ("arm", 2), "LeRobot's options stay"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_labels": 10**9}, "num_labels=1000000000 is more than any model has"),
        ({"text_config": {"vocab_size": 10**9}}, "text_config.vocab_size=1000000000 is more"),
        (
            {"vision_config": {"model_type": "resnet", "depths": [1, 10**9]}},
            "vision_config.depths.1=1000000000",
        ),
    ],
)
def test_numbers_that_no_model_has_are_refused_before_a_tower_is_described(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


def timm(architecture="test_vit", **model_args) -> dict:
    return {"model_type": "timm_wrapper", "architecture": architecture, "model_args": model_args}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_config": timm(checkpoint_path="weights.pth")}, r"model_args has \['checkpoint_path'\]"),
        ({"vision_config": timm(pretrained=True)}, r"model_args has \['pretrained'\]"),
        ({"vision_config": timm(pretrained_cfg={"file": "weights.pth"})}, "model_args has .'pretrained_cfg'"),
        ({"vision_config": timm(pretrained_cfg_overlay={"hf_hub_id": "a/b"})}, "'pretrained_cfg_overlay'"),
        ({"vision_config": timm(cache_dir="/")}, r"model_args has \['cache_dir'\]"),
        ({"vision_config": timm("hf-hub:timm/resnet18.a1_in1k")}, "architecture='hf-hub:.*names a source"),
        ({"vision_config": timm("hf_hub:timm/resnet18")}, "architecture='hf_hub:.*names a source"),
        ({"vision_config": timm("local-dir:/tmp")}, "architecture='local-dir:.*names a source"),
        ({"vision_config": timm("timm/resnet18")}, "architecture='timm/resnet18' names a source"),
        (
            {"vision_config": {"model_type": "timm_backbone", "backbone": "resnet18"}},
            "vision_config.backbone=",
        ),
        (
            {"vision_config": {"model_type": "vit", "auto_map": {"AutoModel": "a--b.C"}}},
            "vision_config.auto_map=",
        ),
        (
            {"attn_implementation": "kernels-community/flash-attn2"},
            "attn_implementation='kernels-.* names a kernel",
        ),
        (
            {"transformers_weights": "../other.safetensors"},
            "transformers_weights='../other.safetensors' names",
        ),
        ({"vision_config": {"model_type": ["vit"]}}, "vision_config.model_type=.'vit'. is unknown"),
        ({"vision_config": {"model_type": "nothing"}}, "vision_config.model_type='nothing' is unknown"),
        ({"dtype": "os"}, "dtype='os' is unknown"),
        ({"vision_config": {"dtype": "nope"}}, "vision_config.dtype='nope' is unknown"),
    ],
)
def test_nothing_in_a_config_names_code_or_weights_elsewhere(fields, message):
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match=message):
        tiny_config(**fields)


def test_a_timm_tower_takes_the_arguments_of_its_architecture():
    config = tiny_config(vision_config=timm("test_vit.r160_in1k", img_size=40, depth=1, drop_path_rate=0.1))
    assert config.vision_config.model_args["depth"] == 1


def test_a_wrong_type_is_refused_with_the_name_of_the_field():
    with pytest.raises(StrictDataclassFieldValidationError, match="chunk_size"):
        tiny_config(chunk_size="five")


def test_checks_of_a_head_that_is_off_do_not_apply():
    assert tiny_config(objectives=["action"], history_length=1, decoder_heads=10).history_length == 1
    assert tiny_config(history_length=2, future_targets="lookahead").future_shift == 3


@pytest.mark.parametrize(
    "vision_config",
    [
        ViTConfig(image_size=40, patch_size=10),
        TimmWrapperConfig(architecture="test_resnet", model_args={"features_only": True}),
    ],
    ids=["vit", "timm"],
)
def test_saving_and_loading_gives_an_equal_config(tmp_path, vision_config):
    config = tiny_config(vision_config=vision_config, objectives=("action", "flow"), fps=20)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is ForesightConfig and type(loaded.text_config) is CLIPTextConfig
    assert type(loaded.vision_config) is type(vision_config)
    assert loaded.to_json_string() == config.to_json_string()
    assert loaded.objectives == config.objectives == ["action", "flow"]
    assert loaded.flow_grid == config.flow_grid == [2, 8]
    assert loaded.vision_config.to_dict() == config.vision_config.to_dict()


def test_towers_may_be_given_as_dictionaries():
    config = tiny_config(
        text_config={"hidden_size": 20, "num_attention_heads": 2, "projection_dim": 6},
        vision_config={"model_type": "timm_wrapper", "architecture": "test_resnet"},
    )
    assert config.text_config.projection_dim == 6
    assert isinstance(config.vision_config, TimmWrapperConfig)
