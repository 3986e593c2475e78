"""Finetuning of the goal generator: what it computes, resumption, export, what is refused."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from goal_images.generator import GoalGenerator
from goal_images.source import GoalRequest
from tests.synthetic import make_dataset
from tests.tiny_pipeline import SIDE, save_tiny_pipeline, tiny_pipeline
from training.goal_generator.finetuning import GoalTraining, encode_prompts, measure_loss
from training.goal_generator.train import main

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("goal_extra")]

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs") / "demos"
    sizes = {"size": (32, 32), "depth": False, "tracks": False, "use_videos": False}
    return make_dataset(root, episodes=2, frames=9, **sizes)


@pytest.fixture(scope="module")
def base(goal_extra, tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("pipeline") / "base")


@pytest.fixture
def run(demos, base, tmp_path, capsys):
    def run(output, *options, **changed):
        settings = {"base": base, "dataset": demos.root, "output": tmp_path / output, "image_size": SIDE}
        settings |= {"batch_size": 4, "steps": 4, "least_ahead": 2, "most_ahead": 3, "num_workers": 0}
        settings |= {"learning_rate": 1e-3, "warmup_steps": 1, "frame_cache": "off", "log_every": 1}
        settings |= {"checkpoint_every": 2, **changed}
        AcceleratorState._reset_state(reset_partial_state=True)
        code = main([*(f"--{name}={value}" for name, value in settings.items()), *options])
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, out=printed.out, err=printed.err, folder=tmp_path / output)

    return run


def read_log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(folder / "pipeline" / UNET)


def test_a_run_exports_a_generator_with_the_averaged_weights_and_logs_its_loss(run, base):
    done = run("run")
    assert done.code == 0, done.err
    log = read_log(done.folder)
    assert [line["step"] for line in log] == [1, 2, 3, 4] and all(line["loss"] > 0 for line in log)
    trained, before = weights(done.folder), load_file(base / UNET)
    assert trained.keys() == before.keys()
    assert any(not torch.equal(trained[name], before[name]) for name in trained)
    last = load_file(done.folder / "checkpoints" / "step-0000004" / "model.safetensors")
    assert any(not torch.equal(trained[name], last[name]) for name in trained), "the average is exported"
    for part in ("vae", "text_encoder"):
        name = next((base / part).glob("*.safetensors")).name
        assert (base / part / name).read_bytes() == (done.folder / "pipeline" / part / name).read_bytes()
    sampling = json.loads((done.folder / "pipeline" / "goal_images.json").read_text())
    assert sampling == {"image_size": SIDE, "steps": 50, "guidance": 7.5, "image_guidance": 2.5}
    picture = torch.zeros(20, 20, 3, dtype=torch.uint8).numpy()
    generator = GoalGenerator(done.folder / "pipeline", device="cpu")
    assert generator.draw([GoalRequest(picture, picture, "close it", progress=0.5)]).shape == (
        1,
        SIDE,
        SIDE,
        3,
    )
    again = run("run", "--resume")
    assert again.code == 0 and "holds this finished run" in again.out


def test_an_interrupted_run_resumes_to_the_same_weights_and_average(run, monkeypatch):
    whole = run("whole", gradient_accumulation_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr("training.goal_generator.finetuning.export", lambda *_: pytest.fail("not at its end"))
        patch.setattr("training.engines.stopping.StopRequest.is_agreed", lambda stop: True)
        patch.setattr("training.engines.stopping.StopRequest.exit_code", 130)
        stopped = run("cut", gradient_accumulation_steps=2)
    assert stopped.code == 130 and "continue with: " in stopped.out
    resumed = run("cut", "--resume", gradient_accumulation_steps=2)
    assert resumed.code == 0, resumed.err
    ours, theirs = weights(resumed.folder), weights(whole.folder)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    losses = [[line["loss"] for line in read_log(one.folder)] for one in (resumed, whole)]
    assert losses[0] == losses[1]


def test_another_run_in_the_folder_and_bad_values_are_refused(run, tmp_path):
    assert run("run", steps=1).code == 0
    for options, changed, message in (
        ((), {"steps": 1}, "already holds a run: continue it with --resume"),
        (("--resume",), {"steps": 2}, "other settings (steps: 1 there, 2 here)"),
        ((), {"dropout": 0.5}, "--dropout is 0.5"),
        ((), {"least_ahead": 5}, "--most_ahead is 3, less than --least_ahead 5"),
        ((), {"base": tmp_path}, "has no model_index.json"),
        ((), {"image_size": SIDE + 1}, "--image_size is 33; the autoencoder of"),
        ((), {"dataset": tmp_path / "none"}, "neither a folder nor a Hub id"),
    ):
        done = run("run" if message.startswith(("already", "other")) else "new", *options, **changed)
        assert done.code == 1 and message in done.err and "Traceback" not in done.err
    broken = run("broken", learning_rate=1e38, warmup_steps=0)
    assert broken.code == 1 and "is not finite at step" in broken.err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"batch_size": 7, "gradient_accumulation_steps": 2},
            "--batch_size 7 cannot be cut into --gradient_",
        ),
        ({"batch_size": 1, "gradient_accumulation_steps": 2}, "--gradient_accumulation_steps 2 equal parts"),
        ({"ema_decay": 1.0}, "--ema_decay is 1.0; it must be from 0 to below 1"),
        ({"warmup_steps": -1}, "--warmup_steps is -1; it must be a finite number, at least 0"),
        ({"learning_rate": -1.0}, "--learning_rate is -1.0"),
        ({"learning_rate": float("nan")}, "--learning_rate is nan"),
        ({"num_workers": -1}, "--num_workers is -1"),
        ({"seed": -1}, "--seed is -1"),
        ({"steps": 0}, "--steps is 0; it must be a finite number, at least 1"),
    ],
)
def test_values_that_no_run_can_have_are_refused_before_anything_is_opened(changed, message):
    with pytest.raises(ValueError, match=message):
        GoalTraining(base="owner/base", dataset="owner/demos", output="run", **changed)


def test_a_run_that_ended_before_its_first_checkpoint_begins_again_with_corrected_settings(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("training.goal_generator.finetuning.measure_loss", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("run", batch_size=2)
    assert (done := run("run", batch_size=4)).code == 1 and "continue it with --resume" in done.err
    corrected = run("run", "--resume", batch_size=4, steps=1)
    assert corrected.code == 0, corrected.err
    assert json.loads((corrected.folder / "config.json").read_text())["settings"]["batch_size"] == 4


def test_a_run_is_not_resumed_from_another_base_of_the_same_name(run, base, tmp_path):
    copy = shutil.copytree(base, tmp_path / "copy" / base.name)
    assert run("run", steps=1).code == 0
    assert "holds this finished run" in run("run", "--resume", steps=1, base=copy).out
    save_tiny_pipeline(copy, seed=1)
    other = run("run", "--resume", steps=1, base=copy)
    assert other.code == 1 and "holds a run with other settings (another base)" in other.err


def loss_of(dropout, seed=0, prompts=("open the drawer", "close it"), shade=0.3):
    """The loss of a fixed batch of two, and what the U-Net was given."""
    pipeline, given = tiny_pipeline(), []

    class Watched(torch.nn.Module):
        def forward(self, latents, times, text, return_dict):
            given.append((latents, text))
            return (torch.zeros_like(latents[:, :4]),)

    from diffusers import DDPMScheduler

    AcceleratorState._reset_state(reset_partial_state=True)
    options = GoalTraining(base="", dataset="", output="", dropout=dropout)
    noise = DDPMScheduler.from_config(pipeline.scheduler.config)
    run = SimpleNamespace(options=options, accelerator=Accelerator(cpu=True), pipeline=pipeline)
    run.unet, run.noise = Watched(), noise
    draw = torch.Generator().manual_seed(1)
    picture, goal = torch.rand(2, 2, 3, SIDE, SIDE, generator=draw) * shade
    torch.manual_seed(seed)
    loss = measure_loss(run, {"picture": picture, "goal": goal, "prompt": list(prompts)})
    return loss, *given[0], pipeline, picture


def test_the_u_net_sees_noise_beside_the_unscaled_picture_and_the_error_is_that_of_the_noise():
    loss, latents, text, pipeline, picture = loss_of(dropout=0)
    with torch.no_grad():
        expected = pipeline.vae.encode(picture).latent_dist.mode()
        features = encode_prompts(pipeline, ["open the drawer", "close it"], torch.device("cpu"))
    torch.testing.assert_close(latents[:, 4:], expected)
    torch.testing.assert_close(text, features)
    assert 0.8 < loss < 1.2, "a U-Net that finds no noise misses the variance of all of it"


def test_conditions_are_hidden_from_a_third_each_when_everything_is_dropped():
    with torch.no_grad():
        empty = encode_prompts(tiny_pipeline(), [""], torch.device("cpu"))[0]
    kinds = set()
    for seed in range(12):
        _, latents, text, _, _ = loss_of(1 / 3, seed)
        for row in range(2):
            kinds.add((torch.equal(text[row], empty), not latents[row, 4:].any().item()))
    assert kinds == {(True, False), (True, True), (False, True)}
