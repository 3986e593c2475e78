"""GR-MG's goal generator as a pipeline, and back; what is refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import T5Config, T5EncoderModel

from goal_images.convert_grmg import main
from goal_images.generator import GoalGenerator, write_prompt
from goal_images.source import GoalRequest
from modeling_foresight import build_small_tokenizer
from tests.tiny_pipeline import WIDTH, save_tiny_pipeline, tiny_pipeline

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("goal_extra")]


def save_t5(folder, width=WIDTH):
    tokenizer = build_small_tokenizer(["open the drawer"], 300, 16)
    sizes = {"d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": len(tokenizer)}
    T5EncoderModel(T5Config(d_model=width, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def parts(goal_extra, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    return SimpleNamespace(base=save_tiny_pipeline(folder / "base"), t5=save_t5(folder / "t5"))


@pytest.fixture
def convert(parts, tmp_path, capsys):
    def convert(payload, *options, base=parts.base, t5=parts.t5):
        torch.save(payload, tmp_path / "goal_gen.ckpt")
        flags = ("--base", str(base), "--text-encoder", str(t5), "--output", str(tmp_path / "pipeline"))
        code = main([str(tmp_path / "goal_gen.ckpt"), *flags, *options])
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, err=printed.err, folder=tmp_path / "pipeline")

    return convert


def checkpoint(**changes):
    """What GR-MG saves: weights, their average, and Lightning's extras."""
    unet = tiny_pipeline(seed=5).unet.state_dict()
    other = {name: value + 1 for name, value in unet.items()}
    state = {"unet_ema": unet | changes, "unet": other}
    return {
        "epoch": 49,
        "global_step": 102900,
        "state_dict": state,
        "hyper_parameters": {"configs": {"seed": 1}},
    }


def test_the_average_becomes_the_u_net_and_its_file_has_grmgs_names_again(convert):
    payload = checkpoint()
    done = convert(payload)
    assert done.code == 0, done.err
    back = load_file(done.folder / "unet" / "diffusion_pytorch_model.safetensors")
    theirs = payload["state_dict"]["unet_ema"]
    assert back.keys() == theirs.keys() and all(torch.equal(back[name], theirs[name]) for name in theirs)
    sampling = json.loads((done.folder / "goal_images.json").read_text())
    assert sampling == {"image_size": 256, "steps": 50, "guidance": 7.5, "image_guidance": 2.5}
    assert "exists already" in convert(payload).err, "nothing is overwritten"


def test_prompts_have_77_tokens_and_their_padding_is_hidden_from_t5_as_in_grmg(convert, parts):
    folder = convert(checkpoint()).folder
    (folder / "goal_images.json").write_text('{"image_size": 32, "steps": 2}')
    generator = GoalGenerator(folder, device="cpu")
    pipeline, seen = generator.pipeline, []
    forward = pipeline.text_encoder.forward

    def watched(*given, **named):
        seen.append(forward(*given, **named)[0])
        return (seen[-1],)

    pipeline.text_encoder.forward = watched
    picture = np.zeros((20, 20, 3), np.uint8)
    generator.draw([GoalRequest(picture, picture, "open the drawer", progress=0.5)])
    tokens = pipeline.tokenizer(
        write_prompt("open the drawer", 0.5),
        padding="max_length",
        max_length=77,
        truncation=True,
        return_tensors="pt",
    )
    assert not tokens.attention_mask.all()
    with torch.no_grad():
        expected = T5EncoderModel.from_pretrained(parts.t5)(**tokens)[0]
    assert seen[0].shape == (1, 77, WIDTH)
    torch.testing.assert_close(seen[0], expected)


def test_weights_that_do_not_fit_and_other_files_are_named(convert, tmp_path):
    name = "conv_in.bias"
    bias = checkpoint()["state_dict"]["unet_ema"][name]
    missing = checkpoint()
    del missing["state_dict"]["unet_ema"][name]
    for payload, message in (
        (missing, f"1 missing, such as ['{name}']"),
        (checkpoint(**{"conv_new.bias": bias}), "1 unknown, such as ['conv_new.bias']"),
        (checkpoint(**{name: bias[:3]}), f"1 of another shape, such as ['{name}']"),
        (checkpoint(**{name: bias / 0}), "not finite"),
        ({"state_dict": {"model.a": bias}}, "has no unet_ema, so it is not GR-MG's goal_gen.ckpt"),
        (bias, "it holds Tensor"),
        ({**checkpoint(), "extra": SimpleNamespace()}, "add --allow-pickle"),
    ):
        done = convert(payload)
        assert done.code == 1 and message in done.err and "Traceback" not in done.err
        assert not done.folder.exists()
    assert convert({**checkpoint(), "extra": SimpleNamespace()}, "--allow-pickle").code == 0


def test_parts_that_do_not_fit_are_named(convert, parts, tmp_path):
    assert "model_index.json" in convert(checkpoint(), base=parts.t5).err
    assert "cannot be loaded" in convert(checkpoint(), t5=tmp_path / "none").err
    wide = save_t5(tmp_path / "wide", 2 * WIDTH)
    assert f"gives {2 * WIDTH} features, the U-Net reads {WIDTH}" in convert(checkpoint(), t5=wide).err
