"""The goal generator: its prompt, what it draws, and what is refused."""

import shutil
import sys
import warnings

import numpy as np
import pytest
import torch

from goal_images.generator import (
    GoalGenerator,
    Sampling,
    load_pipeline,
    pipeline_digest,
    read_sampling,
    write_prompt,
)
from goal_images.source import GoalRequest
from tests.tiny_pipeline import save_tiny_pipeline, tiny_pipeline

SIZES = (24, 40)


def test_the_prompt_is_grmgs_with_the_progress_in_tens_of_percent():
    finished = "of the instruction has been finished."
    for progress, percent in ((0.0, 0), (0.299, 20), (0.3, 30), (1.0, 90), (-0.1, 0)):
        assert write_prompt("open the drawer", progress) == f"open the drawer.And {percent}% {finished}"


def test_how_pictures_are_drawn_is_read_from_the_folder_and_is_grmgs_otherwise(tmp_path):
    assert read_sampling("owner/name") == Sampling(256, 50, 7.5, 2.5)
    path = tmp_path / "goal_images.json"
    path.write_text('{"image_size": 64, "steps": 20}')
    assert read_sampling(tmp_path) == Sampling(64, 20)
    for content, message in (
        ('{"sides": 3}', "'sides'"),
        ('{"steps": 0}', "steps of the goal generator is 0"),
        ('{"steps": 10.5}', "steps of the goal generator is 10.5; it must be a whole number, at least 1"),
        ('{"guidance": 0.5}', "guidance of the goal generator is 0.5; it must be a number, at least 1"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_sampling(tmp_path)


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(RuntimeError, match=r"pip install 'lerobot_policy_foresight\[goal\]'"):
        load_pipeline("owner/name")


# ------------------------------------------------------------------ with diffusers


@pytest.fixture(scope="module")
def folder(goal_extra, tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny")


@pytest.fixture(scope="module")
def generator(folder):
    return GoalGenerator(folder, device="cpu")


def ask(seed, instruction="open the drawer", progress=0.3):
    picture = np.random.default_rng(seed).integers(0, 256, (*SIZES, 3), dtype=np.uint8)
    return GoalRequest(picture, picture, instruction, 20, progress)


def test_a_goal_depends_on_picture_instruction_progress_and_seed_and_on_no_other_robot(generator, folder):
    requests = [ask(0), ask(1), ask(0, "close it"), ask(0, progress=0.7)]
    goals = generator.draw(requests)
    assert goals.shape == (4, 32, 32, 3) and goals.dtype == np.uint8 and goals.std() > 1
    for goal, request in zip(goals, requests, strict=True):
        alone = generator.draw([request])[0].astype(int)
        assert np.abs(alone - goal).max() <= 1
    assert all((goals[0] != other).any() for other in goals[1:])
    generator.seed = 1
    assert (generator.draw(requests[:1])[0] != goals[0]).any()
    generator.seed = 0


@pytest.mark.slow
def test_a_folder_of_something_else_and_a_damaged_one_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"has no model_index\.json; give a StableD"):
        load_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match="holds a StableDiffusionPipeline; give a StableD"):
        load_pipeline(tmp_path)
    with pytest.raises(ValueError, match="neither a folder nor a Hub id"):
        load_pipeline("outputs/goal_generator/pipeline")
    with pytest.raises(ValueError, match="goal generator owner/name cannot be loaded"):
        load_pipeline("owner/name")
    with pytest.raises(ValueError, match=r"takes 4 channels; an InstructPix2Pix takes 8"):
        load_pipeline(save_tiny_pipeline(tmp_path / "plain", in_channels=4))
    damaged = save_tiny_pipeline(tmp_path / "damaged")
    weights = damaged / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged cannot be loaded"):
        load_pipeline(damaged)


def test_a_copy_of_a_generator_has_its_digest_and_a_change_of_any_part_another(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    variant = copy / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    for unread in (variant, copy / "README.md", copy / "unet" / "diffusion_pytorch_model.bin"):
        unread.write_text("not read")
    assert pipeline_digest(copy) == pipeline_digest(folder)
    for place in (
        "scheduler/scheduler_config.json",
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ):
        whole = (copy / place).read_bytes()
        (copy / place).write_bytes(whole + b" ")
        assert pipeline_digest(copy) != pipeline_digest(folder)
        (copy / place).write_bytes(whole)


@pytest.mark.slow
def test_weights_that_are_not_safetensors_are_not_read(goal_extra, tmp_path):
    folder = save_tiny_pipeline(tmp_path / "pickled")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(tiny_pipeline().unet.state_dict(), folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        load_pipeline(folder)


@pytest.mark.slow
def test_a_goal_that_is_not_finite_is_an_error(folder):
    generator = GoalGenerator(folder, device="cpu")
    with torch.no_grad():
        generator.pipeline.unet.conv_in.bias.fill_(torch.nan)
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="drew NaN"):
        warnings.simplefilter("ignore")
        generator.draw([ask(0)])
