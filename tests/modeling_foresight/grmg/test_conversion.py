"""Conversion of GR-MG checkpoints, judged by a plain re-statement of GR-MG (`reference.py`)."""

import collections
import dataclasses
import hashlib
import json
import pickle
import re
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection, ViTMAEConfig, ViTMAEForPreTraining

from modeling_foresight import ForesightConfig, ForesightForActionPrediction, ForesightProcessor
from modeling_foresight.attention_mask import Kind
from modeling_foresight.encoders import sincos_2d
from modeling_foresight.grmg.configuration import Checkpoint, count_heads
from modeling_foresight.grmg.conversion import tensors_in_file
from modeling_foresight.grmg.convert import main
from modeling_foresight.grmg.names import IGNORED, NEW_IN_3D, POSITIONS, table_rows
from modeling_foresight.grmg.reading import read_tensors
from tests.modeling_foresight.grmg.reference import FULL, PRETRAINING, GrmgReference, Sizes
from tests.tiny import tiny_config, tiny_tokenizer

BATCH = 2
SMALL = Sizes()
# Other numbers everywhere, and no towers: what is given are features.
OTHER = Sizes(
    width=64,
    layers=3,
    heads=8,
    frames=4,
    chunk=3,
    latents=5,
    resampler_depth=1,
    resampler_heads=2,
    resampler_head_dim=20,
    action_width=24,
    action_encoder_width=16,
    latent=10,
    image=24,
    patch=4,
    vision_width=30,
    text_feature=22,
    vision_tower=False,
    text_tower=False,
)
PRETRAINED = dataclasses.replace(SMALL, **PRETRAINING, frames=6)


def write_json(folder, sizes: Sizes, **changes):
    vision = {"num_heads": sizes.vision_heads, "embed_dim": sizes.vision_width, "img_size": [sizes.image]}
    settings = sizes.grmg_json()
    settings |= {"vision_stand_in": vision, "text_stand_in": {"heads": sizes.text_heads}}
    for path, value in changes.items():
        section, key = path.split("__")
        settings[section] = settings.get(section, {}) | {key: value}
    (folder / "grmg.json").write_text(json.dumps(settings))
    return str(folder / "grmg.json")


def weights_of(model, prefix="model."):
    return {prefix + name: value.clone() for name, value in model.state_dict().items()}


def convert(folder, tensors, sizes=SMALL, *options, **changes) -> int:
    """Writes `tensors` and a json into `folder` and converts them into `folder / "ours"`."""
    save_file(tensors, folder / "grmg.safetensors")
    config = write_json(folder, sizes, **changes)
    output = ["--config", config, "--output", str(folder / "ours")]
    return main([str(folder / "grmg.safetensors"), *output, *options])


@dataclasses.dataclass
class Pair:
    sizes: Sizes
    reference: GrmgReference
    model: ForesightForActionPrediction
    folder: object


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """GR-MG and what became of it, converted once from each of the kinds of file."""
    made = {}
    for name, sizes in {"small": SMALL, "other": OTHER, "pretrained": PRETRAINED}.items():
        folder = tmp_path_factory.mktemp(name)
        reference = GrmgReference(sizes).randomize(seed=len(made))
        if name == "small":
            assert convert(folder, weights_of(reference)) == 0
        else:  # a Lightning payload, and a plain dict of weights
            payload = {"state_dict": weights_of(reference), "epoch": 3}
            payload = payload if name == "other" else weights_of(reference, prefix="")
            torch.save(payload, folder / "grmg.ckpt")
            output = ["--output", str(folder / "ours")]
            assert main([str(folder / "grmg.ckpt"), "--config", write_json(folder, sizes), *output]) == 0
        model = ForesightForActionPrediction.from_pretrained(folder / "ours").eval()
        made[name] = Pair(sizes, reference, model, folder)
    return made


def draw_inputs(sizes: Sizes, padding: bool):
    """Inputs of both: features of two views and the goal, text features, states, actions, masks, noise."""
    draw = torch.Generator().manual_seed(7)

    def normal(*shape):
        return torch.randn(*shape, generator=draw)

    views, patches, frames = 1 + sizes.wrist, 9, sizes.frames
    mask = torch.ones(BATCH, frames)
    if padding:
        mask[0, 2:] = 0
    # Padded steps are zeros, as in GR-MG's data.
    inputs = {
        "vision": (
            normal(BATCH, frames, views, sizes.vision_width) * mask[..., None, None],
            normal(BATCH, frames, views, patches, sizes.vision_width) * mask[..., None, None, None],
        ),
        "goal": (normal(BATCH, sizes.vision_width), normal(BATCH, patches, sizes.vision_width)),
        "text": 3 * normal(BATCH, sizes.text_feature),
        "mask": mask,
        "noise": normal(BATCH, frames, sizes.latent),
    }
    if sizes.state:
        inputs["arm_state"] = normal(BATCH, frames, sizes.state_dim - 1) * mask[..., None]
        inputs["gripper_state"] = (normal(BATCH, frames) > 0).float() * mask
    if sizes.action:
        inputs["arm_action"] = (
            normal(BATCH, frames, sizes.chunk, sizes.action_dim - 1) * mask[..., None, None]
        )
        inputs["gripper_action"] = (normal(BATCH, frames, sizes.chunk) > 0).float() * mask[..., None]
    return inputs


def run_reference(pair: Pair, inputs, noise=True):
    given = {key: inputs[key] for key in ("arm_state", "arm_action", "gripper_action") if key in inputs}
    if "gripper_state" in inputs:
        is_open = inputs["gripper_state"]
        given["gripper_state"] = torch.stack([1 - is_open, is_open], dim=-1)
    cls, patches = inputs["vision"]
    vision = [(cls[:, :, v], patches[:, :, v]) for v in range(cls.shape[2])]
    return pair.reference(
        vision,
        inputs["goal"],
        inputs["text"],
        frame_mask=inputs["mask"],
        noise=inputs["noise"] if noise else None,
        **given,
    )


@torch.no_grad()
def run_ours(pair: Pair, inputs, noise=True, **replaced):
    given = {
        "vision_features": inputs["vision"],
        "goal_features": inputs["goal"],
        "text_features": inputs["text"],
        "frame_mask": inputs["mask"].bool(),
    }
    if "arm_state" in inputs:
        given["state"] = torch.cat([inputs["arm_state"], inputs["gripper_state"][..., None]], dim=-1)
    if "arm_action" in inputs:
        given["actions"] = torch.cat([inputs["arm_action"], inputs["gripper_action"][..., None]], dim=-1)
        given["style_noise"] = inputs["noise"] if noise else None
    return pair.model(**(given | replaced), output_hidden_states=True)


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("name", ["small", "other", "pretrained"])
def test_the_converted_model_computes_what_gr_mg_computes(pairs, name, padding, noise):
    pair = pairs[name]
    inputs = draw_inputs(pair.sizes, padding)
    theirs, ours = run_reference(pair, inputs, noise), run_ours(pair, inputs, noise)
    if pair.sizes.action:
        assert_equal(ours.actions[..., :-1], theirs["arm"])
        assert_equal(ours.actions[..., -1:], theirs["gripper"])
        assert_equal(ours.style_mean, theirs["mean"])
        assert_equal(ours.style_log_var, theirs["log_var"])
        assert_equal(ours.progress, theirs["progress"])
        assert_equal(ours.future_rgb[:, :, 1], theirs["future_wrist"])
    assert_equal(ours.future_rgb[:, :, 0], theirs["future_main"])
    assert ours.embeddings.shape == theirs["embeddings"].shape
    assert len(ours.hidden_states) == pair.sizes.layers + 1 == len(theirs["hidden_states"])
    assert_equal(ours.embeddings, theirs["embeddings"])
    for mine, expected in zip(ours.hidden_states, theirs["hidden_states"], strict=True):
        assert_equal(mine, expected)


@torch.no_grad()
def test_images_and_words_go_through_the_converted_towers(pairs):
    pair = pairs["small"]
    sizes, draw = pair.sizes, torch.Generator().manual_seed(3)
    inputs = draw_inputs(sizes, padding=False)
    pixels = torch.randn(BATCH, sizes.frames, 2, 3, sizes.image, sizes.image, generator=draw)
    goal = torch.randn(BATCH, 3, sizes.image, sizes.image, generator=draw)
    words = torch.randint(1, sizes.text_vocab - 2, (BATCH, 7), generator=draw)
    words[0, 4] = words[1, 6] = sizes.text_vocab - 1  # the end of the text; what follows is padding
    inputs["vision"] = pair.reference.encode_images(pixels)
    inputs["goal"] = pair.reference.encode_images(goal)
    inputs["text"] = pair.reference.text_encoder.encode_text(words)
    replaced = {"vision_features": None, "goal_features": None, "text_features": None}
    replaced |= {"pixel_values": pixels, "goal_pixel_values": goal, "input_ids": words}
    ours, theirs = run_ours(pair, inputs, **replaced), run_reference(pair, inputs)
    assert_equal(ours.actions[..., :-1], theirs["arm"])
    assert_equal(ours.future_rgb[:, :, 1], theirs["future_wrist"])
    assert_equal(ours.progress, theirs["progress"])
    assert_equal(ours.hidden_states[-1], theirs["hidden_states"][-1])


def test_the_sequence_has_gr_mgs_order(pairs):
    sizes, image = SMALL, SMALL.latents + 1
    frame = [Kind.LANGUAGE, Kind.STATE, *[Kind.IMAGE] * 2 * image, Kind.ACTION, *[Kind.FUTURE] * 2 * image]
    frame += [Kind.PROGRESS]
    layout = pairs["small"].model.model.layout(sizes.frames)
    assert layout.kind.tolist() == [Kind.GOAL] * image + frame * sizes.frames


def test_the_config_says_what_shapes_and_json_say(pairs):
    config = pairs["other"].model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 3, 8)
    assert (config.resampler_heads, config.resampler_head_dim, config.num_latents) == (2, 20, 5)
    assert (config.history_length, config.chunk_size, config.latent_dim) == (4, 3, 10)
    assert (config.image_size, config.patch_size, config.action_hidden_size) == (24, 4, 24)
    assert config.action_encoder_hidden_size == 16
    assert config.towers == [] and config.goal_image and config.future_shift == 2
    assert (config.state_representation, config.action_codec) == ("relative", "local_delta")
    assert config.objectives == ["action", "future_rgb", "progress"]
    weights = ("gripper", "future", "kl", "progress")
    assert [getattr(config, f"{name}_loss_weight") for name in weights] == [0.02, 0.3, 0.7, 0.9]
    video = pairs["pretrained"].model.config
    assert (video.views, video.state_dim, video.objectives) == (["main"], 0, ["future_rgb"])


# Of the published policy: number of tensors, values, and SHA-256 of the sorted lines "name shape".
PUBLISHED = {
    "calvin": (838, 285_748_169, "8342cf4279a9aaa15d66dd6fa7e073beadd580175e46629f1390b214c5a89e2c"),
    "video": (681, None, "6a9fbf4a1c96ec35246e46011d93db699e31fa2a84dddd0870414b24ba361318"),
}


@pytest.mark.parametrize(
    ("kind", "preset", "switches"), [("calvin", "grmg", {}), ("video", "grmg_pretrain", PRETRAINING)]
)
def test_every_published_tensor_goes_through_the_table(kind, preset, switches):
    with torch.device("meta"):
        theirs = GrmgReference(dataclasses.replace(FULL, **switches)).state_dict()
        ours = tensors_in_file(ForesightForActionPrediction(ForesightConfig.from_preset(preset)))
    lines = sorted(f"{name} {list(value.shape)}" for name, value in theirs.items())
    count, values, digest = PUBLISHED[kind]
    assert len(lines) == count and hashlib.sha256("\n".join(lines).encode()).hexdigest() == digest
    assert values in (None, sum(value.numel() for value in theirs.values()))

    rows = sum(table_rows(ForesightConfig.from_preset(preset)).values(), [])
    unmapped = [name for name in theirs if IGNORED.fullmatch(name)] + [POSITIONS]
    assert collections.Counter([row.theirs for row in rows] + unmapped) == collections.Counter(list(theirs))
    assert collections.Counter(n for row in rows for n in row.ours) == collections.Counter(list(ours))
    for row in rows:
        for name, value in row.to_ours(theirs[row.theirs]).items():
            assert value.shape == ours[name].shape, name
        assert row.to_theirs(ours).shape == theirs[row.theirs].shape


@pytest.mark.parametrize("name", ["small", "other", "pretrained"])
def test_back_in_gr_mgs_names_nothing_has_changed(pairs, name, tmp_path):
    pair = pairs[name]
    base = pair.folder / ("grmg.safetensors" if name == "small" else "grmg.ckpt")
    output = ["--output", str(tmp_path / "back"), "--base", str(base)]
    assert main([str(pair.folder / "ours"), "--to-grmg", *output]) == 0
    back, original = load_file(tmp_path / "back" / "model.safetensors"), pair.reference.state_dict()
    assert set(back) == set(original)
    assert all(torch.equal(back[key], value) for key, value in original.items())

    # The json that comes with it is enough to convert it once more.
    again = ["--config", str(tmp_path / "back" / "config.json"), "--output", str(tmp_path / "again")]
    assert main([str(tmp_path / "back" / "model.safetensors"), *again]) == 0
    once, twice = (
        load_file(folder / "model.safetensors") for folder in (pair.folder / "ours", tmp_path / "again")
    )
    assert set(once) == set(twice) and all(torch.equal(once[key], twice[key]) for key in once)
    configs = [
        json.loads((folder / "config.json").read_text())
        for folder in (pair.folder / "ours", tmp_path / "again")
    ]
    assert configs[0] == configs[1]


def test_without_a_base_only_clips_image_side_is_missing(pairs, tmp_path, capsys):
    pair = pairs["small"]
    assert main([str(pair.folder / "ours"), "--to-grmg", "--output", str(tmp_path / "back")]) == 0
    back, original = load_file(tmp_path / "back" / "model.safetensors"), pair.reference.state_dict()
    assert set(original) - set(back) == {key for key in original if IGNORED.fullmatch(key)}
    assert "--base" in capsys.readouterr().out
    torch.testing.assert_close(back.pop(POSITIONS), original[POSITIONS], atol=1e-6, rtol=0)
    assert all(torch.equal(value, original[key]) for key, value in back.items())


def test_a_policy_of_ours_survives_the_way_to_gr_mg_and_back(tmp_path):
    fields = {"views": ("main", "wrist"), "patch_size": 8, "state_dim": 7, "binary_state_indices": (6,)}
    fields |= {"binary_action_indices": (6,), "objectives": ("action", "future_rgb", "progress")}
    fields |= {"goal_image": True, "future_sees_state": True, "decoder_heads": 8, "action_num_heads": 4}
    fields |= {"state_representation": "relative", "action_codec": "local_delta"}
    model = ForesightForActionPrediction(tiny_config(**fields, hidden_act="relu"))
    model.save_pretrained(tmp_path / "ours")
    assert main([str(tmp_path / "ours"), "--to-grmg", "--output", str(tmp_path / "grmg")]) == 0
    config = ["--config", str(tmp_path / "grmg" / "config.json"), "--output", str(tmp_path / "again")]
    assert main([str(tmp_path / "grmg" / "model.safetensors"), *config]) == 0
    again = ForesightForActionPrediction.from_pretrained(tmp_path / "again")
    assert (again.config.decoder_heads, again.config.action_num_heads) == (8, 4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_json_given_on_the_way_back_must_fit_and_is_kept(pairs, tmp_path, capsys):
    folder = str(pairs["other"].folder / "ours")
    config = write_json(tmp_path, OTHER, trainer__learning_rate=0.5)
    options = ["--to-grmg", "--config", config, "--output"]
    assert main([folder, *options, str(tmp_path / "back")]) == 0
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["trainer"]["learning_rate"] == 0.5
    write_json(tmp_path, OTHER, policy__seq_len=3)
    assert_refused(main([folder, *options, str(tmp_path / "ours")]), "policy.seq_len=3", capsys, tmp_path)


def test_options_that_would_do_nothing_are_refused(capsys):
    for options in (["--to-grmg", "--preset", "grmg"], ["--base", "x"]):
        with pytest.raises(SystemExit):
            main(["file", "--output", "ours", *options])
        assert "--to-grmg" in capsys.readouterr().err.splitlines()[-1]


def test_foresight_3d_starts_from_video_pretraining_and_lists_what_is_fresh(pairs, tmp_path, capsys):
    source = pairs["pretrained"]
    tensors = source.reference.state_dict()
    assert convert(tmp_path, tensors, PRETRAINED, "--preset", "foresight_3d") == 0
    printed = capsys.readouterr().out
    fresh = {line.removeprefix("fresh: ") for line in printed.splitlines() if line.startswith("fresh: ")}
    assert fresh == {
        "state embeddings",
        "wrist embeddings",
        "wrist future query",
        "action encoder",
        "action decoder",
        "progress",
        "depth_decoder",
        "flow_decoder",
        "flow_query",
        "embed_flow_points",
    }
    model = ForesightForActionPrediction.from_pretrained(tmp_path / "ours")
    assert model.config.objectives == list(ForesightConfig.from_preset("foresight_3d").objectives)
    copied = source.model.state_dict()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in copied.items())
    assert model.config.chunk_size == PRETRAINED.chunk and model.config.latent_dim == PRETRAINED.latent


@pytest.mark.parametrize(
    ("name", "preset"),
    [("other", "foresight_3d"), ("other", "no_flow"), ("pretrained", "foresight_3d_pretrain")],
)
def test_from_the_same_inputs_only_the_third_dimension_is_fresh(pairs, name, preset, tmp_path, capsys):
    pair = pairs[name]
    assert convert(tmp_path, pair.reference.state_dict(), pair.sizes, "--preset", preset) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fresh: ")]
    model = ForesightForActionPrediction.from_pretrained(tmp_path / "ours")
    copied, names = pair.model.state_dict(), set(model.state_dict())
    assert all(name.startswith(NEW_IN_3D) for name in names - set(copied)) and set(copied) <= names
    assert bool(lines) and model.config.history_length == pair.sizes.frames


def test_towers_come_from_folders_with_their_tokenizer(pairs, tmp_path):
    tiny = tiny_config()
    tiny.text_config.projection_dim = OTHER.text_feature
    text = CLIPTextModelWithProjection(tiny.text_config)
    text.save_pretrained(tmp_path / "clip")
    tiny_tokenizer().save_pretrained(tmp_path / "clip")
    sizes = {"hidden_size": 30, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 44}
    mae = ViTMAEForPreTraining(ViTMAEConfig(**sizes, image_size=24, patch_size=8, decoder_hidden_size=16))
    mae.save_pretrained(tmp_path / "mae")
    options = ["--text-tower", str(tmp_path / "clip"), "--vision-tower", str(tmp_path / "mae")]
    assert convert(tmp_path, pairs["other"].reference.state_dict(), OTHER, *options) == 0

    model = ForesightForActionPrediction.from_pretrained(tmp_path / "ours").eval()
    assert sorted(model.config.towers) == ["text", "vision"]
    towers = model.model
    expected = text.text_model.final_layer_norm.weight
    assert torch.equal(towers.text_encoder.tower.text_model.final_layer_norm.weight, expected)
    weights = (
        load_file(tmp_path / "ours" / "model.safetensors"),
        load_file(tmp_path / "mae" / "model.safetensors"),
    )
    name = "encoder.layer.0.attention.attention.query.weight"
    assert torch.equal(weights[0][f"model.vision_encoder.tower.{name}"], weights[1][f"vit.{name}"])
    assert towers.vision_encoder.tower.layernorm.eps == 1e-6  # GR-MG's, where ViTMAE's config says 1e-12
    processor = ForesightProcessor.from_pretrained(tmp_path / "ours")
    frame = torch.zeros(OTHER.frames, 30, 30, 3, dtype=torch.uint8).numpy()
    state = torch.zeros(OTHER.frames, 7)
    batch = processor({"main": frame, "wrist": frame}, "open the drawer", state=state, goal_image=frame[0])
    with torch.no_grad():
        assert model(**batch).actions.shape == (1, OTHER.frames, OTHER.chunk, 7)


def test_towers_come_from_files_in_their_original_names(pairs, tmp_path):
    tensors = weights_of(pairs["small"].reference)
    parts = {"mae": "model.model_mae.", "clip": "model.text_encoder."}
    towers = {
        name: {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
        for name, prefix in parts.items()
    }
    torch.save({"model": towers["mae"]}, tmp_path / "mae.pth")  # as MAE publishes it
    save_file(towers["clip"], tmp_path / "clip.safetensors")
    options = [
        "--vision-tower",
        str(tmp_path / "mae.pth"),
        "--text-tower",
        str(tmp_path / "clip.safetensors"),
    ]
    assert convert(tmp_path, tensors, SMALL, *options) == 0
    first, second = (load_file(f / "ours" / "model.safetensors") for f in (tmp_path, pairs["small"].folder))
    assert set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in second)


class ScriptedTower(torch.nn.Module):
    def __init__(self, tensors):
        super().__init__()
        for name, value in tensors.items():
            self.register_buffer(name.replace(".", "_"), value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.filterwarnings("ignore:.*TorchScript archive")
def test_a_torchscript_archive_as_openai_publishes_clip_needs_the_opt_in(tmp_path):
    values = {"ln_final_weight": torch.arange(3.0).half()}
    torch.jit.script(ScriptedTower(values)).save(str(tmp_path / "ViT.pt"))
    with pytest.raises(ValueError, match="TorchScript.*--allow-pickle"):
        read_tensors(tmp_path / "ViT.pt")
    tensors, _ = read_tensors(tmp_path / "ViT.pt", allow_pickle=True)
    assert torch.equal(tensors["ln_final_weight"], torch.arange(3.0))


def test_a_tokenizer_of_another_tower_is_refused(pairs, tmp_path, capsys):
    tiny_tokenizer().save_pretrained(tmp_path / "words")
    code = convert(
        tmp_path, pairs["small"].reference.state_dict(), SMALL, "--tokenizer", str(tmp_path / "words")
    )
    assert_refused(code, "ends texts with 1", capsys, tmp_path)
    code = convert(tmp_path, pairs["small"].reference.state_dict(), SMALL, "--tokenizer", str(tmp_path))
    assert_refused(code, "no tokenizer", capsys, tmp_path)


def test_towers_of_another_width_are_refused(pairs, tmp_path, capsys):
    CLIPTextModelWithProjection(tiny_config().text_config).save_pretrained(tmp_path / "clip")
    tensors = {**pairs["small"].reference.state_dict()}
    assert convert(tmp_path, tensors, SMALL, "--text-tower", str(tmp_path / "clip")) == 1
    assert "takes 20" in capsys.readouterr().err and not (tmp_path / "ours").exists()


def test_the_processor_has_calvins_forms_and_no_tokenizer(pairs):
    processor = ForesightProcessor.from_pretrained(pairs["other"].folder / "ours")
    assert (processor.state_representation, processor.action_codec) == ("relative", "local_delta")
    assert (processor.image_size, processor.views) == (24, ["main", "wrist"])
    assert processor.action_stats is None and processor.state_stats is None
    with pytest.raises(ValueError, match="set processor.tokenizer"):
        processor.tokenize(["open the drawer"])
    with pytest.raises(Exception, match="UNK"):  # whoever goes around the processor
        processor.tokenizer(["open the drawer"])


def test_half_precision_and_old_buffers_are_read(pairs, tmp_path):
    pair = pairs["small"]
    tensors = {
        name: value.half() if name.startswith("model.text_encoder.") else value
        for name, value in weights_of(pair.reference).items()
    }
    tensors["model.transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    tensors["model.transformer.h.1.attn.masked_bias"] = torch.tensor(-1e4)
    assert convert(tmp_path, tensors) == 0
    model = ForesightForActionPrediction.from_pretrained(tmp_path / "ours")
    found = model.model.text_encoder.tower.text_projection.weight
    assert found.dtype == torch.float32
    assert torch.equal(found, pair.reference.text_encoder.text_projection.half().float().T)


@pytest.mark.parametrize("declared", [None, {}, True, {"kind": "conv"}])
def test_a_tower_of_another_structure_leaves_a_model_that_wants_features(pairs, declared, tmp_path, capsys):
    tensors = {k: v for k, v in pairs["small"].reference.state_dict().items() if "model_mae." not in k}
    save_file({**tensors, "model_mae.conv.weight": torch.zeros(40, 3, 8, 8)}, tmp_path / "grmg.safetensors")
    settings = SMALL.grmg_json() | {"text_stand_in": {"heads": SMALL.text_heads}, "vision_stand_in": declared}
    (tmp_path / "grmg.json").write_text(json.dumps(settings))
    options = ["--config", str(tmp_path / "grmg.json"), "--output", str(tmp_path / "ours")]
    assert main([str(tmp_path / "grmg.safetensors"), *options]) == 0
    assert "the file's vision tower is another network" in capsys.readouterr().out
    assert ForesightConfig.from_pretrained(tmp_path / "ours").towers == ["text"]


def test_a_tower_with_gaps_is_refused_rather_than_left_out(pairs, tmp_path, capsys):
    tensors = dict(pairs["small"].reference.state_dict())
    del tensors["model_mae.blocks.1.norm1.bias"]
    save_file(tensors, tmp_path / "grmg.safetensors")
    (tmp_path / "grmg.json").write_text(json.dumps(SMALL.grmg_json()))
    options = ["--config", str(tmp_path / "grmg.json"), "--output", str(tmp_path / "ours")]
    code = main([str(tmp_path / "grmg.safetensors"), *options])
    assert_refused(code, "lacks tensors of GR-MG: model_mae.blocks.1.norm1.bias", capsys, tmp_path)


def test_heads_that_nothing_tells_leave_the_tower_out(pairs, tmp_path, capsys):
    tensors = pairs["small"].reference.state_dict()
    assert convert(tmp_path, dict(tensors), SMALL, vision_stand_in__num_heads=None) == 0
    assert '"vision_stand_in": {"heads"' in capsys.readouterr().out
    assert ForesightConfig.from_pretrained(tmp_path / "ours").towers == ["text"]


def test_heads_of_the_published_towers_need_no_json():
    with torch.device("meta"):
        checkpoint = Checkpoint(GrmgReference(FULL).state_dict(), {})
    assert (count_heads(checkpoint, "vision"), count_heads(checkpoint, "text")) == (12, 8)


@pytest.mark.parametrize("width", [64, 768])
def test_heads_of_reduced_towers_are_not_guessed_from_their_width(width, tmp_path, capsys):
    reduced = dataclasses.replace(
        SMALL, vision_width=width, vision_heads=4, vision_depth=1, resampler_depth=1
    )
    tensors = weights_of(GrmgReference(reduced).randomize())
    assert convert(tmp_path, tensors, reduced, vision_stand_in__num_heads=None) == 0
    assert "does not say its heads" in capsys.readouterr().out
    assert ForesightConfig.from_pretrained(tmp_path / "ours").towers == ["text"]


def test_other_kinds_of_towers_are_refused_in_one_sentence_before_the_checkpoint_is_read(tmp_path, capsys):
    command = ["absent.pt", "--config", write_json(tmp_path, OTHER), "--output", str(tmp_path / "ours")]
    torch.save({}, tmp_path / "clip.pt")
    CLIPTextModelWithProjection(tiny_config().text_config).save_pretrained(tmp_path / "clip")
    for option, source, message in (
        ("--text-tower", "clip.pt", "clip.pt has no tensors by name"),
        ("--vision-tower", "clip/model.safetensors", "model.safetensors: the file's vision tower is another"),
        ("--vision-tower", "clip", "a MAE or ViT checkpoint belongs there"),
        ("--vision-tower", "absent", "absent is neither a file nor a folder with a model's config.json"),
    ):
        assert_refused(main([*command, option, str(tmp_path / source)]), message, capsys, tmp_path)


def test_without_an_activation_in_the_json_relu_is_taken_and_said(pairs, tmp_path, capsys):
    assert (
        convert(tmp_path, pairs["other"].reference.state_dict(), OTHER, policy__activation_function=None) == 0
    )
    assert "relu is taken" in capsys.readouterr().out
    assert ForesightConfig.from_pretrained(tmp_path / "ours").hidden_act == "relu"


def with_value(name, value):
    return lambda tensors: tensors.update({name: torch.full_like(tensors[name], value)})


class Hyperparameters:
    """What a training script may have pickled beside its weights."""


@pytest.mark.parametrize("opt_in", [False, True])
def test_pickled_objects_need_an_explicit_opt_in(pairs, opt_in, tmp_path, capsys):
    tensors = weights_of(pairs["other"].reference)
    torch.save({"state_dict": tensors, "hyper_parameters": Hyperparameters()}, tmp_path / "grmg.ckpt")
    output = ["--config", write_json(tmp_path, OTHER), "--output", str(tmp_path / "ours")]
    code = main([str(tmp_path / "grmg.ckpt"), *output, *["--allow-pickle"] * opt_in])
    assert code == (0 if opt_in else 1) and (tmp_path / "ours").exists() == opt_in
    if not opt_in:
        message = capsys.readouterr().err
        assert "--allow-pickle" in message and "Hyperparameters" in message


def test_pickled_objects_of_a_missing_module_name_it(tmp_path, capsys, monkeypatch):
    module = types.ModuleType("absent_trainer")
    module.Options = type("Options", (), {"__module__": "absent_trainer"})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "absent_trainer", module)
        torch.save({"hyper_parameters": module.Options()}, tmp_path / "grmg.ckpt")
    code = main([str(tmp_path / "grmg.ckpt"), "--allow-pickle", "--output", str(tmp_path / "ours")])
    assert_refused(
        code, "cannot be imported here: install it. (No module named 'absent_trainer')", capsys, tmp_path
    )


def test_the_json_inside_a_lightning_checkpoint_is_enough(pairs, tmp_path):
    hyper = {"configs": OTHER.grmg_json()}
    payload = {"state_dict": weights_of(pairs["other"].reference), "hyper_parameters": hyper}
    torch.save(payload, tmp_path / "grmg.ckpt")
    assert main([str(tmp_path / "grmg.ckpt"), "--output", str(tmp_path / "ours")]) == 0


def damaged_files(folder, pair):
    """Name -> (checkpoint, a piece of the message)."""
    tensors = weights_of(pair.reference)
    save_file(tensors, folder / "whole.safetensors")
    torch.save(tensors, folder / "whole.pt")
    for suffix in (".safetensors", ".pt"):
        whole = (folder / f"whole{suffix}").read_bytes()
        (folder / f"cut{suffix}").write_bytes(whole[: len(whole) // 2])
    torch.save(tensors, folder / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": {"unet": {"a": tensors}, "unet_ema": {}}}, folder / "goal_gen.ckpt")
    save_file({"encoder.weight": torch.zeros(2, 3)}, folder / "random.safetensors")
    torch.save([1, 2], folder / "list.pt")
    data = bytearray((folder / "whole.pt").read_bytes())
    data[data.index(tensors["model.transformer.ln_f.weight"].numpy().tobytes()) + 3] ^= 0x40
    (folder / "flipped.pt").write_bytes(data)
    (folder / "plain.pkl").write_bytes(pickle.dumps({"state_dict": {"a": 1}}))
    with zipfile.ZipFile(folder / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    (folder / "words.ckpt").write_text("these are words")
    (folder / "empty.ckpt").write_bytes(b"")
    gr1 = {"model_clip.ln_final.weight": torch.zeros(3), "transformer.wte.weight": torch.zeros(1, 4)}
    save_file(gr1, folder / "gr1.safetensors")
    return {
        "cut.safetensors": "cut short",
        "cut.pt": "cut short",
        "flipped.pt": "is damaged",
        "old.pt": "torch.save since 2020: load its weights and write them",
        "plain.pkl": "neither a safetensors file nor one of torch.save",
        "other.zip": "of another program",
        "goal_gen.ckpt": "goal-image generator",
        "random.safetensors": "not a GR-MG policy",
        "list.pt": "list",
        "words.ckpt": "neither a safetensors file nor one of torch.save",
        "empty.ckpt": "neither a safetensors file nor one of torch.save",
        "gr1.safetensors": "GR-1",
        "absent.pt": "absent.pt",
    }


def assert_refused(code, message, capsys, folder):
    error = capsys.readouterr().err.strip()
    assert code == 1 and message in error and error.startswith("error: ") and "\n" not in error, error
    assert not (folder / "ours").exists() and not list(folder.glob(".ours*"))


def test_files_of_another_kind_or_damaged_are_refused_in_one_line(pairs, tmp_path, capsys):
    config = write_json(tmp_path, OTHER)
    for name, message in damaged_files(tmp_path, pairs["other"]).items():
        code = main([str(tmp_path / name), "--config", config, "--output", str(tmp_path / "ours")])
        assert_refused(code, message, capsys, tmp_path)


def test_our_own_checkpoints_are_recognized(pairs, tmp_path, capsys):
    ours = pairs["other"].folder / "ours"
    for path, message in {ours: "--to-grmg", ours / "model.safetensors": "of this project already"}.items():
        code = main([str(path), "--config", write_json(tmp_path, OTHER), "--output", str(tmp_path / "ours")])
        assert_refused(code, message, capsys, tmp_path)


def without(name):
    return lambda tensors: tensors.pop(name)


def with_tensor(name, *shape):
    return lambda tensors: tensors.update({name: torch.zeros(*shape)})


def moved(tensors):
    tensors[POSITIONS] = tensors[POSITIONS].flip(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("embed_state.bias"), "lacks tensors of GR-MG: embed_state.bias"),
        (without("transformer.h.1.ln_2.weight"), "transformer.h.1.ln_2.weight"),
        (without("embed_goal_patch.weight"), "embed_goal_patch.weight"),
        (without(POSITIONS), POSITIONS),
        (with_tensor("embed_sound.weight", 2, 3), "GR-MG lacks: embed_sound.weight"),
        (with_tensor("embed_lang.weight", 64, 21), "policy.lang_feat_dim=22"),
        (with_tensor("embed_hand_img.weight", 64, 29), "embed_hand_img.weight"),
        (with_tensor("decoder_pred.weight", 49, 64), "decoder_pred.weight"),
        (with_value("embed_img.weight", float("nan")), "embed_img.weight: not every value is finite"),
        (lambda t: t.update({"embed_img.bias": t["embed_img.bias"].int()}), "embed_img.bias: torch.int32"),
        (moved, "differs from its equation"),
    ],
)
def test_gaps_leftovers_and_wrong_shapes_are_named(pairs, change, message, tmp_path, capsys):
    tensors = dict(pairs["other"].reference.state_dict())
    change(tensors)
    (tmp_path / "plain.json").write_text(json.dumps(OTHER.grmg_json()))
    save_file(tensors, tmp_path / "grmg.safetensors")
    options = ["--config", str(tmp_path / "plain.json"), "--output", str(tmp_path / "ours")]
    assert_refused(main([str(tmp_path / "grmg.safetensors"), *options]), message, capsys, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy__n_layer": 12}, "policy.n_layer=12"),
        ({"policy__seq_len": 10}, "policy.seq_len=10"),
        ({"policy__n_head": 7}, "num_attention_heads"),
        ({"policy__n_head": None}, "has no policy.n_head"),
        ({"policy__n_head": 0}, "num_attention_heads"),
        ({"policy__resampler_params": None}, "has no policy.resampler_params.heads"),
        ({"policy__activation_function": "swoosh"}, "policy.activation_function='swoosh'"),
        ({"policy__activation_function": ["relu"]}, "policy.activation_function=['relu']"),
        ({"trainer__fwd_pred_hand": False}, "is not supported"),
        ({"trainer__kl_loss_ratio": -1}, "trainer.kl_loss_ratio=-1"),
        ({"policy__n_head": "eight"}, "policy.n_head='eight', which is not a number"),
        ({"policy__resampler_params": {"heads": 3, "dim_head": 20}}, "to_q"),
        ({"trainer__act_pred": False}, "trainer.act_pred=False"),
        ({"trainer__progress_pred": False}, "trainer.progress_pred=False"),
        ({"input__use_state": False}, "input.use_state=False"),
        ({"policy__act_encoder_dim": 32}, "act_encoder_dim=32"),
        ({"policy__progress_decoder_dim": 32}, "progress_decoder_dim=32"),
        ({"policy__use_resampler": False}, "resampler"),
    ],
)
def test_a_json_that_contradicts_the_weights_is_refused(pairs, changes, message, tmp_path, capsys):
    code = convert(tmp_path, pairs["other"].reference.state_dict(), OTHER, **changes)
    assert_refused(code, message, capsys, tmp_path)


def test_a_preset_that_does_not_fit_the_file_is_refused(pairs, tmp_path, capsys):
    tensors = pairs["other"].reference.state_dict()
    code = convert(tmp_path, tensors, OTHER, "--preset", "grmg_pretrain")
    assert_refused(code, "has no place for", capsys, tmp_path)


@pytest.mark.parametrize("preset", [[], ["--preset", "foresight_3d"]])
@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("action encoder", "only one of the action encoder and the action decoder"),
        ("action decoder", "only one of the action encoder and the action decoder"),
        ("wrist embeddings", "only one of the wrist camera's input and its future query"),
        ("wrist future query", "only one of the wrist camera's input and its future query"),
    ],
)
def test_half_of_a_pair_of_parts_is_refused_with_and_without_a_preset(
    pairs, part, message, preset, tmp_path, capsys
):
    tensors = dict(pairs["other"].reference.state_dict())
    for row in Checkpoint(tensors, {}).rows(part):
        del tensors[row.theirs]
    assert_refused(convert(tmp_path, tensors, OTHER, *preset), message, capsys, tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", '{"trainer": {}}'])
def test_a_json_that_is_not_gr_mgs_is_refused(pairs, text, tmp_path, capsys):
    (tmp_path / "bad.json").write_text(text)
    save_file(pairs["other"].reference.state_dict(), tmp_path / "grmg.safetensors")
    options = ["--config", str(tmp_path / "bad.json"), "--output", str(tmp_path / "ours")]
    assert_refused(main([str(tmp_path / "grmg.safetensors"), *options]), "json", capsys, tmp_path)


def test_heads_are_never_guessed_without_a_json(pairs, tmp_path, capsys):
    save_file(pairs["other"].reference.state_dict(), tmp_path / "grmg.safetensors")
    code = main([str(tmp_path / "grmg.safetensors"), "--output", str(tmp_path / "ours")])
    assert_refused(code, "--config", capsys, tmp_path)


def test_a_folder_with_something_in_it_is_not_changed(pairs, tmp_path, capsys):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "precious").write_text("work")
    assert convert(tmp_path, pairs["other"].reference.state_dict(), OTHER) == 1
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["precious"]


def test_a_failed_conversion_writes_nothing(pairs, tmp_path, capsys, monkeypatch):
    def full_disk(self, folder):
        raise OSError("no space left on device")

    monkeypatch.setattr(ForesightProcessor, "save_pretrained", full_disk)
    code = convert(tmp_path, pairs["other"].reference.state_dict(), OTHER)
    assert_refused(code, "no space left", capsys, tmp_path)


def test_a_folder_that_reads_back_other_values_is_not_kept(pairs, tmp_path, capsys, monkeypatch):
    save = ForesightProcessor.save_pretrained

    def damage_weights(self, folder):
        save(self, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.embed_norm.weight"][3] += 1
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(ForesightProcessor, "save_pretrained", damage_weights)
    code = convert(tmp_path, pairs["other"].reference.state_dict(), OTHER)
    assert_refused(code, "gave other values of model.embed_norm.weight", capsys, tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objectives": ("action", "depth", "future_rgb")}, "depth_decoder"),
        ({"within_frame": "full"}, "within_frame='full'"),
        ({"binary_action_indices": (2,)}, "binary_action_indices=[2]"),
    ],
)
def test_models_that_gr_mg_cannot_express_do_not_go_back(fields, message, tmp_path, capsys):
    usual = {"objectives": ("action", "future_rgb"), "goal_image": True, "future_sees_state": True}
    usual |= {"state_dim": 7, "binary_state_indices": (6,), "binary_action_indices": (6,)}
    config = tiny_config(**(usual | fields), decoder_heads=8)
    ForesightForActionPrediction(config).save_pretrained(tmp_path / "model")
    code = main([str(tmp_path / "model"), "--to-grmg", "--output", str(tmp_path / "ours")])
    assert_refused(code, message, capsys, tmp_path)


def test_the_documented_comparison_runs_and_finds_no_difference(pairs, tmp_path, monkeypatch):
    pair = pairs["small"]
    inputs = draw_inputs(pair.sizes, padding=True)
    theirs = run_reference(pair, inputs)
    (cls, patches), is_open = inputs["vision"], inputs["gripper_state"]
    recorded = {"lang_embeddings": inputs["text"], "attention_mask": inputs["mask"].int()}
    recorded |= {"obs_embeddings": cls[:, :, 0], "hand_obs_embeddings": cls[:, :, 1]}
    recorded |= {"patch_embeddings": patches[:, :, 0], "hand_patch_embeddings": patches[:, :, 1]}
    recorded |= dict(zip(("goal_obs_embeddings", "goal_patch_embeddings"), inputs["goal"], strict=True))
    recorded |= {key: inputs[key] for key in ("arm_state", "arm_action", "gripper_action", "noise")}
    recorded["gripper_state"] = torch.stack([1 - is_open, is_open], dim=-1)
    recorded |= {"arm_action_preds": theirs["arm"], "gripper_action_preds": theirs["gripper"]}
    recorded |= {"obs_preds": theirs["future_main"], "obs_hand_preds": theirs["future_wrist"]}
    recorded |= {"progress_preds": theirs["progress"], "action_mu_preds": theirs["mean"].flatten(0, 1)}
    recorded["action_logvar_preds"] = theirs["log_var"].flatten(0, 1)
    torch.save(recorded, tmp_path / "recorded.pt")
    (tmp_path / "grmg_calvin").symlink_to(pair.folder / "ours")
    monkeypatch.chdir(tmp_path)

    page = (Path(__file__).parents[3] / "docs" / "grmg_checkpoints.md").read_text()
    code, names = re.search(r"```python\n(.+?)```", page, re.DOTALL)[1], {}
    exec(code, names)
    assert len(names["differences"]) == 7 and max(names["differences"].values()) < 1e-5


def test_actions_of_other_sizes_keep_their_form(tmp_path, capsys):
    sizes = dataclasses.replace(OTHER, state_dim=9, action_dim=5, wrist=False)
    assert convert(tmp_path, weights_of(GrmgReference(sizes).randomize()), sizes) == 0
    assert "actions keep their form" in capsys.readouterr().out
    config = ForesightConfig.from_pretrained(tmp_path / "ours")
    assert (config.state_dim, config.binary_state_indices, config.views) == (9, [8], ["main"])
    assert (config.action_dim, config.binary_action_indices, config.action_codec) == (5, [4], "recorded")


def test_the_position_table_of_the_reference_is_ours():
    torch.testing.assert_close(
        GrmgReference(OTHER).randomize().decoder_pos_embed[0], sincos_2d(6, 6, OTHER.width), atol=1e-6, rtol=0
    )
