"""Training as a user runs it: from a dataset on disk to a model that acts; stopping, resuming, processes."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from filelock import FileLock
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from datasets_scripts.storage.hub.download import HubError
from datasets_scripts.storage.provenance import read_provenance, write_provenance
from modeling_foresight.transformer import ForesightBlock
from tests.ranks import run_ranks
from tests.synthetic import make_dataset
from training.checkpoints import latest_checkpoint
from training.config_reading import load_config
from training.evaluation.metric_loader import load_metric
from training.loop import run_steps, train
from training.models.starting_model import build_model, starting_config
from training.run_data import RunData
from training.run_state import Run
from training.train import main
from training.windows import collate_windows, split_episodes

REPO = Path(__file__).parents[2]
STEPS, BATCH = 6, 4
DROPOUT = ["--model.resid_pdrop", "0.2"]
TINY = {
    "model": {
        "views": ["front", "side"],
        "image_size": 32,
        "patch_size": 8,
        "history_length": 3,
        "future_targets": "lookahead",
        "chunk_size": 4,
        "flow_grid": [2, 3],
        "num_flow_queries": 2,
        "num_latents": 2,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "resampler_depth": 1,
        "resampler_heads": 2,
        "resampler_head_dim": 8,
        "decoder_depth": 1,
        "decoder_heads": 2,
        "action_hidden_size": 16,
        "action_encoder_depth": 1,
        "action_decoder_depth": 1,
        "progress_decoder_depth": 1,
        "action_num_heads": 2,
        "latent_dim": 4,
        "freeze_text": False,
        "freeze_vision": False,
        "text_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "projection_dim": 16,
            "max_position_embeddings": 32,
        },
        "vision_config": {
            "model_type": "vit",
            "image_size": 32,
            "patch_size": 8,
            "hidden_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 24,
        },
    },
    "data": {"val_fraction": 0.25},
    "train": {
        "checkpoint_every": 3,
        "steps": STEPS,
        "batch_size": BATCH,
        "warmup_steps": 2,
        "log_every": 1,
        "val_every": 2,
    },
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("train") / "dataset"
    return make_dataset(root, episodes=4, frames=10, cameras=("front", "side"), size=(32, 40)).root


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """A finished run with dropout, and the config file that it was made from; read only."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    assert run(folder / "tiny.yaml", dataset, folder / "run", *DROPOUT) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder / "run"


def spoil_step(monkeypatch, number: int) -> None:
    """In the step of this number, from 1 on, a window has a progress that is not a number."""
    prepare, seen = Run.prepare_batch, []

    def spoil(self, raw, step):
        batch = prepare(self, raw, step)
        seen.append(step)
        if len(seen) == number:
            batch["progress"][1] = float("nan")
        return batch

    monkeypatch.setattr(Run, "prepare_batch", spoil)


@pytest.fixture(autouse=True)
def fresh_accelerate(tmp_path, monkeypatch):
    monkeypatch.setenv("FORESIGHT_CACHE", str(tmp_path / "cache"))
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def run(config_file, dataset, output, *overrides, resume=False) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    flags = ["--dataset", str(dataset), "--output", str(output), *overrides]
    return train(load_config(config_file, flags), resume)


def command(config_file, dataset, output, *flags) -> list[str]:
    script = [str(REPO / "training" / "train.py"), "--config", str(config_file)]
    return [*script, "--dataset", str(dataset), "--output", str(output), *flags]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def log_lines(output) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(output) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "model.safetensors")


def test_a_run_writes_a_model_that_loads_and_acts(finished):
    output = finished
    model = AutoModel.from_pretrained(output / "model")
    processor = AutoProcessor.from_pretrained(output / "model")
    image = torch.zeros(32, 40, 3, dtype=torch.uint8)
    batch = processor(
        images={"front": image, "side": image}, text="open the drawer", state=[0.0] * model.config.state_dim
    )
    actions = processor.decode_actions(model.eval().predict_action(**batch))
    assert actions.shape == (1, 4, model.config.action_dim)
    assert torch.isfinite(actions).all()
    assert model.config.fps == 20

    lines = [line for line in log_lines(output) if "step_s" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert {"loss", "action", "depth", "future", "flow", "kl", "progress", "data_s", "lr"} <= set(lines[0])
    assert {"flow_x_px", "flow_y_px", "flow_z_m", "stay_put_x_px", "stay_put_y_px"} <= set(lines[0])
    validated = [line for line in log_lines(output) if "val_depth" in line]
    assert [line["step"] for line in validated] == [2, 4] and validated[0]["val_progress"] > 0
    summary = json.loads((output / "summary.json").read_text())
    assert len(summary["datasets"][0]["validation_episodes"]) == 1
    assert summary["validation"]["losses"]["depth"] > 0
    assert load_config(output / "config.yaml", []).model["history_length"] == 3


def test_resuming_gives_the_weights_of_an_uninterrupted_run(config_file, dataset, tmp_path, finished):
    # Dropout and the CVAE's noise are on: their randomness must continue too.
    whole, broken = finished, tmp_path / "broken"
    shutil.copytree(whole, broken)
    newest = broken / "checkpoints" / f"step-{STEPS:07d}"
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-1] ^= 1  # a byte that the disk lost: the checkpoint before this one is taken
    (newest / "model.safetensors").write_bytes(content)
    shutil.rmtree(broken / "model")
    (broken / "summary.json").unlink()
    with pytest.warns(UserWarning, match=f"{newest.name} is left out: its model.safetensors is damaged"):
        assert run(config_file, dataset, broken, *DROPOUT, resume=True) == 0

    expected, resumed = weights(whole), weights(broken)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    told, again = (
        [
            {k: v for k, v in line.items() if k != "seconds" and not k.endswith("_s")}
            for line in log_lines(run)
        ]
        for run in (whole, broken)
    )
    assert told == again


@pytest.mark.parametrize("contents", ["thesis.txt", "config.json"])
def test_an_export_does_not_replace_a_folder_with_contents(config_file, dataset, tmp_path, contents):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / contents).write_text("precious")
    with pytest.raises(ValueError, match="--export is .*mine, which has contents that would be lost"):
        run(config_file, dataset, tmp_path / "run", "--export", str(tmp_path / "mine"))
    assert (tmp_path / "mine" / contents).read_text() == "precious"
    assert not (tmp_path / "run" / "config.yaml").exists(), "the same --output is free for a corrected run"
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="--export is .*file, which is a file"):
        run(config_file, dataset, tmp_path / "run", "--export", str(tmp_path / "file"))


def test_datasets_may_move_between_sessions(config_file, dataset, tmp_path):
    flags = ["--train.steps", "2", "--train.warmup_steps", "0", "--data.val_fraction", "0"]
    for name in ("here", "there"):
        for folder in ("data", "held_out"):
            shutil.copytree(dataset, tmp_path / name / folder)
    info = tmp_path / "here" / "held_out" / "meta" / "info.json"
    other = json.loads(info.read_text()) | {"robot_type": "another"}  # not the training data
    for name in ("here", "there"):
        (tmp_path / name / "held_out" / "meta" / "info.json").write_text(json.dumps(other))
    for name, resume in (("here", False), ("there", True)):
        place = tmp_path / name
        (tmp_path / "run" / "summary.json").unlink(missing_ok=True)
        validation = ["--data.validation", str(place / "held_out")]
        assert run(config_file, place / "data", tmp_path / "run", *flags, *validation, resume=resume) == 0


def test_a_run_that_was_killed_after_its_export_resumes(config_file, dataset, tmp_path):
    flags = ["--train.steps", "2", "--train.warmup_steps", "0"]
    assert run(config_file, dataset, tmp_path, *flags) == 0
    (tmp_path / "summary.json").unlink()
    assert run(config_file, dataset, tmp_path, *flags, resume=True) == 0
    assert (tmp_path / "summary.json").exists()
    (tmp_path / "summary.json").unlink()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="--export is .*notes, which has contents"):
        run(config_file, dataset, tmp_path, *flags, "--export", str(tmp_path / "notes"), resume=True)


@pytest.mark.parametrize("place", ["run/checkpoints", "run/checkpoints/best", "run/pictures"])
def test_an_export_into_what_the_run_fills_is_refused_before_training(config_file, dataset, tmp_path, place):
    with pytest.raises(ValueError, match=rf"--export is .*{place}, but .* has this run's own files"):
        run(config_file, dataset, tmp_path / "run", "--export", str(tmp_path / place))


def test_a_dataset_is_no_place_for_a_run(config_file, dataset, tmp_path):
    before = sorted(path.name for path in dataset.iterdir())
    with pytest.raises(ValueError, match="--output is .*, which holds a dataset"):
        run(config_file, dataset, dataset)
    assert sorted(path.name for path in dataset.iterdir()) == before


def test_another_runs_model_is_not_replaced(config_file, dataset, tmp_path, finished):
    model = shutil.copytree(finished / "model", tmp_path / "model")
    before = contents(model)
    output, flags = tmp_path / "run", ["--train.steps", "2", "--train.warmup_steps", "0"]
    stopped = [*flags, "--train.max_hours", "0"]
    assert run(config_file, dataset, output, *stopped) == 0
    with pytest.raises(ValueError, match="--export is .*model, which has contents that would be lost"):
        run(config_file, dataset, output, *flags, "--export", str(model), resume=True)
    assert contents(model) == before


def test_a_model_that_another_run_wrote_meanwhile_is_not_replaced(
    config_file, dataset, tmp_path, finished, monkeypatch
):
    model, output = tmp_path / "model", tmp_path / "run"
    flags = ["--train.steps", "2", "--train.warmup_steps", "0"]

    def finish_another(*arguments):
        shutil.copytree(finished / "model", model)
        return run_steps(*arguments)

    monkeypatch.setattr("training.loop.run_steps", finish_another)
    with pytest.raises(ValueError, match="--export is .*model, which has contents that would be lost"):
        run(config_file, dataset, output, *flags, "--export", str(model))
    assert contents(model) == contents(finished / "model")
    monkeypatch.undo()
    assert run(config_file, dataset, output, *flags, "--export", str(output / "model"), resume=True) == 0


def test_a_single_step_of_warm_up_is_told(config_file, dataset, tmp_path, capsys):
    run(config_file, dataset, tmp_path, "--train.steps", "1", "--train.warmup_steps", "2")
    assert "warning: all steps are warm-up" in capsys.readouterr().out


def test_a_finished_run_is_left_alone_and_another_one_refused(config_file, dataset, tmp_path, finished):
    output = finished
    before = (output / "model" / "model.safetensors").stat().st_mtime_ns
    assert run(config_file, dataset, output, *DROPOUT, resume=True) == 0
    assert (output / "model" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="already holds a run.*--resume"):
        run(config_file, dataset, output, *DROPOUT)
    with pytest.raises(ValueError, match="other settings \\(seed: 0 there, 5 here\\)"):
        run(config_file, dataset, output, *DROPOUT, "--seed", "5", resume=True)
    other = tmp_path / "other" / dataset.name  # other data under the same name
    shutil.copytree(dataset, other)
    info = json.loads((other / "meta" / "info.json").read_text())
    (other / "meta" / "info.json").write_text(json.dumps(info | {"robot_type": "another"}))
    with pytest.raises(ValueError, match="trained on other data"):
        run(config_file, other, output, *DROPOUT, resume=True)


def test_two_runs_cannot_share_a_folder(config_file, dataset, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    with FileLock(output / ".lock"), pytest.raises(ValueError, match="another process is training"):
        run(config_file, dataset, output)


def test_a_half_written_log_line_does_not_hinder_resuming(config_file, dataset, tmp_path, finished):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    (output / "summary.json").unlink()
    with (output / "metrics.jsonl").open("a") as log:
        log.write('{"step": 7, "los')
    assert run(config_file, dataset, output, *DROPOUT, resume=True) == 0
    assert [line["step"] for line in log_lines(output) if "step_s" in line] == list(range(1, STEPS + 1))


def test_settings_metrics_and_pictures_reach_a_tracker(config_file, dataset, tmp_path):
    class Recorder(GeneralTracker):
        name, requires_logging_directory, tracker = "recorder", False, None

        def __init__(self):
            super().__init__()
            self.settings, self.logged, self.pictures = {}, [], []

        def store_init_configuration(self, values):
            self.settings = values

        def log(self, values, step, **kwargs):
            self.logged.append((step, values))

        def log_images(self, values, step, **kwargs):
            self.pictures.append((step, values["predictions"]))

    recorder = Recorder()
    flags = ["--dataset", str(dataset), "--output", str(tmp_path / "run"), "--train.picture_every", "3"]
    config = load_config(config_file, flags)
    config.train.tracker = recorder
    AcceleratorState._reset_state(reset_partial_state=True)
    # A tracker object cannot be written to YAML; its name is what a user gives.
    with patch("training.checkpoints.save_config"):
        assert train(config, resume=False) == 0
    assert recorder.settings["train/steps"] == str(STEPS)
    assert all(isinstance(value, str) for value in recorder.settings.values())
    assert recorder.logged[0][0] == 1 and recorder.logged[0][1]["depth"] > 0
    ((step, pictures),) = recorder.pictures
    assert step == 3 and str(pictures.dtype) == "uint8" and pictures.ndim == 4 and pictures.shape[-1] == 3
    assert [path.name for path in (tmp_path / "run" / "pictures").iterdir()] == ["step-0000003.png"]


def test_a_run_at_its_time_limit_saves_and_ends_well_with_the_command_to_go_on(
    config_file, dataset, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["training/train.py", "--dataset", "some where"])
    assert run(config_file, dataset, tmp_path / "run", "--train.max_hours", "0") == 0
    printed = capsys.readouterr().out
    assert "stopped after step 1, at the limit of 0 hours; continue with: " in printed
    assert "training/train.py --dataset 'some where' --resume" in printed
    assert not (tmp_path / "run" / "model").exists()
    assert run(config_file, dataset, tmp_path / "run", "--train.max_hours", "1", resume=True) == 0
    assert (tmp_path / "run" / "model").exists()


def test_a_run_whose_time_is_over_at_its_last_step_is_measured_by_the_next_session(
    config_file, dataset, tmp_path, capsys
):
    flags = ["--train.steps", "1", "--train.warmup_steps", "0", "--train.max_hours", "0"]
    assert run(config_file, dataset, tmp_path / "run", *flags) == 0
    assert "stopped after step 1, at the limit of 0 hours; continue with: " in capsys.readouterr().out
    assert latest_checkpoint(tmp_path / "run" / "checkpoints")[1] == 1
    assert not (tmp_path / "run" / "model").exists()
    assert run(config_file, dataset, tmp_path / "run", *flags, resume=True) == 0
    assert (tmp_path / "run" / "summary.json").exists(), "it has nothing else to do"


def test_a_full_disk_is_named_and_leaves_the_last_whole_checkpoint(
    config_file, dataset, tmp_path, monkeypatch
):
    output = tmp_path / "run"
    save_state = Accelerator.save_state

    def fill_the_disk(self, folder):
        if "0000006" in folder:
            Path(folder, "model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_state(self, folder)

    monkeypatch.setattr(Accelerator, "save_state", fill_the_disk)
    with pytest.raises(OSError, match="step 6.*No space left.*--resume"):
        run(config_file, dataset, output)
    monkeypatch.undo()
    monkeypatch.setenv("FORESIGHT_CACHE", str(tmp_path / "cache"))
    assert latest_checkpoint(output / "checkpoints")[1] == 3
    assert run(config_file, dataset, output, resume=True) == 0


def test_gradient_accumulation_gives_the_update_of_the_whole_batch(config_file, dataset, tmp_path):
    # Means are over valid elements of a batch: equal for objectives whose windows are all full.
    objective = ["--model.objectives", "[depth]", "--train.steps", "2", "--data.val_fraction", "0"]
    run(config_file, dataset, tmp_path / "whole", *objective)
    run(config_file, dataset, tmp_path / "parts", *objective, "--train.gradient_accumulation_steps", "2")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    # Adam's first steps have the size of the learning rate whatever the gradient: compare where it is clear.
    assert max((whole[name] - parts[name]).abs().max() for name in whole) < 2e-3
    first, second = (log_lines(tmp_path / name)[0]["depth"] for name in ("whole", "parts"))
    assert abs(first - second) < 1e-3 * first


@pytest.mark.parametrize(("has_kernels", "taken"), [(True, "bf16"), (False, "no")])
def test_bfloat16_is_for_where_it_has_kernels_and_keeps_float32_weights(
    config_file, dataset, tmp_path, monkeypatch, capsys, has_kernels, taken
):
    monkeypatch.setattr("training.run_state.has_bfloat16", lambda device: has_kernels)
    forward, autocast = ForesightBlock.forward, []

    def note(self, *args, **kwargs):
        if self.training:
            autocast.append(torch.is_autocast_enabled("cpu"))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(ForesightBlock, "forward", note)
    run(config_file, dataset, tmp_path / "run", "--train.mixed_precision", "bf16", "--train.steps", "2")
    assert len(autocast) == 2 and set(autocast) == {has_kernels}  # in every step, one block each
    assert ("computing in float32" in capsys.readouterr().out) != has_kernels
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["mixed_precision"] == taken
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {torch.float32}
    assert all(
        torch.isfinite(torch.tensor(line["loss"])) for line in log_lines(tmp_path / "run") if "loss" in line
    )


def test_training_starts_from_a_trained_model_and_keeps_its_processor(dataset, tmp_path, finished):
    base = str(finished / "model")
    flags = ["--dataset", str(dataset), "--output", str(tmp_path / "second"), "--init_from", base]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert (
        train(load_config(None, [*flags, "--train.steps", "1", "--train.learning_rate", "0.0"]), False) == 0
    )
    first, second = weights(finished), weights(tmp_path / "second")
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ValueError, match="standardize_tokens is for models that start fresh"):
        train(
            load_config(
                None, [*flags, "--output", str(tmp_path / "third"), "--train.standardize_tokens", "true"]
            ),
            False,
        )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.num_attention_heads", "1"], "model.num_attention_heads is 1, but .* was trained with 2"),
        (["--model.decoder_heads", "1"], "model.decoder_heads is 1, but .*: leave it out"),
        (["--model.hidden_size", "64"], "model.hidden_size is 64, but .*: leave it out"),
        (["--model.image_mean", "[0.5, 0.5, 0.5]"], "model.image_mean is .*, but .* was trained with"),
        (["--model.vision_config", "{hidden_act: relu}"], "model.vision_config.hidden_act is relu, but"),
        (["--init_from", "runs/a1/modle"], "init_from runs/a1/modle is not a folder; .*Hub id"),
        (["--init_from", "{run}"], "init_from .* has no config.json .*give the folder that train.py exports"),
    ],
)
def test_a_start_that_cannot_be_is_refused_before_data_are_read(
    tmp_path, finished, monkeypatch, flags, message
):
    monkeypatch.setattr("training.loop.open_datasets", lambda *_: pytest.fail("data were read"))
    flags = [flag.replace("{run}", str(finished)) for flag in flags]
    base = ["--init_from", str(finished / "model"), "--dataset", "me/data", "--output", str(tmp_path / "run")]
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match=message):
        train(load_config(None, [*base, *flags]), False)


def test_another_rate_than_that_of_the_data_is_refused_with_a_base_too(dataset, tmp_path, finished):
    flags = ["--dataset", str(dataset), "--init_from", str(finished / "model"), "--output", str(tmp_path)]
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="model.fps is 3, but the dataset gives"):
        train(load_config(None, [*flags, "--model.fps", "3"]), False)


def test_actions_and_a_camera_are_added_to_what_was_pretrained_on_video(
    config_file, dataset, tmp_path, capsys
):
    video = ["--model.objectives", "[depth, future, flow]", "--model.views", "[front]", "--train.steps", "1"]
    none = ["--data.state_key", "null", "--model.state_dim", "0", "--model.binary_state_indices", "[]"]
    run(config_file, dataset, tmp_path / "video", *video, *none)
    base = ["--dataset", str(dataset), "--init_from", str(tmp_path / "video" / "model")]
    base += ["--model.objectives", "[action, depth, future, flow, progress]", "--train.steps", "1"]

    def finetune(name: str, *flags: str) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        train(load_config(None, [*base, "--output", str(tmp_path / name), *flags]), False)

    finetune("robot", "--model.views", "[front, side]", "--train.learning_rate", "0.0")
    before, after = weights(tmp_path / "video"), weights(tmp_path / "robot")
    assert all(torch.equal(before[name], after[name]) for name in before)
    model = AutoModel.from_pretrained(tmp_path / "robot" / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "robot" / "model")
    assert (model.config.action_dim, model.config.state_dim) == (4, 3)
    assert len(processor.action_stats["mean"]) == 4 and len(processor.state_stats["mean"]) == 3
    printed = capsys.readouterr().out
    assert "starts fresh: action_decoder, action_encoder, action_query, embed_state, embed_views" in printed
    for flags, message in (
        (["--model.views", "[side, front]"], "views are added and left out at the end"),
        (["--model.num_latents", "3"], "objectives and views can change, sizes cannot"),
        (["--data.statistics", "model"], "has no statistics of them: use data.statistics=dataset"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune("refused", "--data.missing_targets", "true", *flags)


def test_image_tokens_of_a_fresh_model_differ_between_images_from_the_first_step(config_file, dataset):
    flags = ["--dataset", str(dataset), "--data.random_shift", "0", "--data.num_workers", "0"]

    def tokens(*more):
        torch.manual_seed(0)
        config = load_config(config_file, [*flags, *more])
        data = RunData(config, starting_config(config))
        model, processor = build_model(config, data)
        raw = collate_windows([data.train[i] for i in range(len(data.train))])
        batch = processor.prepare_batch(raw, history_length=3)
        with torch.no_grad():
            made = model.model.embed_images(*model.model.encode_images(batch["pixel_values"]))
        return made[batch["frame_mask"]]  # (frames, views, latents + CLS, width)

    plain, made = tokens(), tokens("--train.standardize_tokens", "true")
    for view in range(2):
        for part in (slice(None, -1), slice(-1, None)):
            std, mean = torch.std_mean(made[:, view, part].flatten(0, 1), dim=0)
            torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-3, rtol=0)
            torch.testing.assert_close(std, torch.ones_like(std), atol=1e-2, rtol=0)
        # What is left are differences between images: without it they drown in what all images share.
        assert made[:, view, -1].mean(0).square().mean() < 0.1 * made[:, view, -1].var(0).mean()
        assert plain[:, view, -1].mean(0).square().mean() > plain[:, view, -1].var(0).mean()


def test_windows_of_a_mixture_know_the_binary_entries_of_the_model(config_file, dataset):
    twice = f"--data.datasets=[{{path: '{dataset}'}}, {{path: '{dataset}'}}]"
    for named, expected in (
        ([], []),
        (["--model.action_dim", "4", "--model.binary_action_indices", "[3]"], [3]),
    ):
        config = load_config(config_file, [twice, "--data.num_workers", "0", *named])
        data = RunData(config, starting_config(config))
        assert [windows.config.binary_action_indices for windows in data.train.datasets] == [expected] * 2
        assert build_model(config, data)[0].config.binary_action_indices == expected


def test_sigterm_saves_and_a_resumed_run_finishes(config_file, dataset, tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    flags = ["--train.checkpoint_every", "0"]
    backward, calls = Accelerator.backward, iter(range(1, STEPS))

    def interrupt_the_second(self, loss):
        backward(self, loss)
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Accelerator, "backward", interrupt_the_second)
    assert run(config_file, dataset, output, *flags) == 128 + signal.SIGTERM
    monkeypatch.setattr(Accelerator, "backward", backward)
    assert "continue with: " in capsys.readouterr().out
    assert [checkpoint.name for checkpoint in (output / "checkpoints").iterdir()] == ["step-0000002"]
    assert not (output / "model").exists()
    assert run(config_file, dataset, output, *flags, resume=True) == 0
    steps = [line["step"] for line in log_lines(output) if "step_s" in line]
    assert steps == list(range(1, STEPS + 1))


def test_epochs_are_the_steps_that_pass_over_all_windows_and_resume_exactly(
    config_file, dataset, tmp_path, capsys, finished
):
    # 21 windows in batches of 4: six steps, and a quarter of an epoch is two.
    output, flags = tmp_path / "run", [*DROPOUT, "--train.epochs", "1", "--train.warmup_epochs", "0.25"]
    shutil.copytree(finished, output)
    shutil.rmtree(output / "checkpoints" / f"step-{STEPS:07d}")
    (output / "summary.json").unlink()
    saved = yaml.safe_load((output / "config.yaml").read_text())
    saved["train"] |= {"steps": None, "epochs": 1.0, "warmup_steps": None, "warmup_epochs": 0.25}
    (output / "config.yaml").write_text(yaml.safe_dump(saved))
    with pytest.raises(ValueError, match=r"other settings \(train.epochs: 1.0 there, 2.0 here\)"):
        run(config_file, dataset, output, *flags, "--train.epochs", "2", resume=True)
    assert run(config_file, dataset, output, *flags, resume=True) == 0
    assert "6 steps of 4 windows, 2 of them warm-up: 1.14 epochs" in capsys.readouterr().out
    expected, found = weights(finished), weights(output)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["steps"], summary["epochs"]) == (STEPS, 1.1429)


def test_a_length_on_the_command_line_replaces_the_other_unit_in_the_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("train: {epochs: 35, warmup_epochs: 5}")
    train = load_config(tmp_path / "mine.yaml", ["--train.steps", "9", "--train.warmup_steps", "3"]).train
    assert (train.steps, train.epochs, train.warmup_steps, train.warmup_epochs) == (9, None, 3, None)
    with pytest.raises(ValueError, match="train.steps is 9 and train.epochs is 2"):
        load_config(None, ["--train.steps", "9", "--train.epochs", "2"])
    train = load_config(None, []).train
    assert (train.steps, train.warmup_steps) == (1000, 100)


def run_twofold(arguments: list[str]) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0"]
    result = subprocess.run(
        [*launch, *arguments], env=environment(), capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr[-3000:]


def run_process(rank: int, config_file, dataset, output, flags: list[str]) -> None:
    assert run(config_file, dataset, output, *flags) == 0


def test_two_processes_share_every_batch_and_learn_as_one(config_file, dataset, tmp_path):
    # Progress has a target in every frame, so that the mean of the halves' means is the mean of the batch.
    flags = ["--model.objectives", "[progress]", "--train.steps", "3", "--train.warmup_steps", "0"]
    for dropout in ("embd_pdrop", "attention_dropout", "resid_pdrop"):  # its draws differ between processes
        flags += [f"--model.{dropout}", "0.0"]
    run_ranks(run_process, config_file, dataset, tmp_path / "two", flags)
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["processes"] == 2

    run(config_file, dataset, tmp_path / "one", *flags)
    one, two = (
        [line["progress"] for line in log_lines(tmp_path / name) if "step_s" in line]
        for name in ("one", "two")
    )
    assert len(two) == 3 and two[0] != two[1]
    assert two == pytest.approx(one, rel=1e-3)
    alone, shared = (
        json.loads((tmp_path / name / "summary.json").read_text())["validation"] for name in ("one", "two")
    )
    assert shared["windows"] == alone["windows"]
    assert shared["progress"]["all"]["model"]["mae"] == pytest.approx(
        alone["progress"]["all"]["model"]["mae"], rel=1e-2
    )


@pytest.mark.slow  # launches processes that import everything again
def test_two_processes_are_one_run_in_bf16_too(config_file, dataset, tmp_path):
    flags = ["--train.mixed_precision", "bf16", "--train.attn_implementation", "eager", "--train.steps", "1"]
    run_twofold(command(config_file, dataset, tmp_path / "two", *flags))
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["processes"] == 2


def test_no_means_no_in_yaml_too():
    assert load_config(None, ["--train.mixed_precision", "no"]).train.mixed_precision == "no"


def test_a_preset_on_the_command_line_beats_the_yaml_and_loses_to_fields_beside_it():
    yaml_file = REPO / "training" / "configs" / "calvin_d_d.yaml"
    pretrain = ["--model.preset", "foresight_3d_pretrain"]
    assert load_config(yaml_file, pretrain).model["views"] == ["main"]
    both = [*pretrain, "--model.views", "[main, wrist]"]
    assert load_config(yaml_file, both).model["views"] == ["main", "wrist"]
    baseline = load_config(yaml_file, ["--model.preset", "gr1"]).model
    assert baseline["binary_action_indices"] == [6] and baseline["chunk_size"] == 1
    assert "action_codec" not in baseline, "the preset of the YAML file is replaced"


@pytest.mark.slow  # the launches of this file run train.py, and CI's quickstart all three as files
@pytest.mark.parametrize("name", ["evaluate", "train", "visualize"])
def test_commands_run_as_modules_and_as_files(name, tmp_path):
    for start in (["-m", f"training.{name}"], [str(REPO / "training" / f"{name}.py")]):
        shown = subprocess.run(
            [sys.executable, *start, "--help"], cwd=REPO, env=environment(), capture_output=True, text=True
        )
        assert shown.returncode == 0 and "--output" in shown.stdout, shown.stderr


def test_metrics_load_where_the_command_hides_the_library_of_its_name(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "training"))  # as Python does for `python training/evaluate.py`
    for name in [name for name in sys.modules if name.startswith("evaluate")]:
        monkeypatch.delitem(sys.modules, name)
    assert load_metric("success_rate").compute(predictions=[1, 1])["success_rate"] == 1.0
    assert Path(sys.modules["evaluate"].__file__).parent != REPO / "training"


def test_lists_stay_lists_where_text_would_do():
    lora = ["--init_from", "me/base", "--lora.r", "4", "--lora.target_modules", "[q_proj, v_proj]"]
    run = load_config(None, [*lora, "--data.mixture", "[1, 2.5]"])
    assert (run.data.mixture, run.lora.target_modules) == ([1.0, 2.5], ["q_proj", "v_proj"])
    assert load_config(None, ["--data.mixture", "sqrt"]).data.mixture == "sqrt"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.stepz", "3"], "train.stepz is unknown; did you mean steps"),
        (["--model.chunk_sizes", "3"], "model.chunk_sizes is not a field.*chunk_size"),
        (["--train.steps", "many"], "train.steps"),
        (["--model.views", "[front, top]"], "top"),
        (["--model.history_length", "30"], "history_length"),
        (["--model.fps", "7"], "model.fps is 7, but the dataset gives 20"),
        (["--dataset", "nowhere/at-all"], "nowhere/at-all"),
        (["--train.mixed_precision", "fp16"], "fp16"),
        (["--train.gradient_accumulation_steps", "3"], "batch_size=4 cannot be cut"),
    ],
)
def test_bad_settings_are_named_before_training(config_file, dataset, tmp_path, flags, message):
    with pytest.raises((ValueError, OSError, HubError), match=f"(?s){message}"):
        run(config_file, dataset, tmp_path / "run", *flags)
    assert not (tmp_path / "run" / "checkpoints").exists()


ALIASES = "".join(f"b{n + 1}: &b{n + 1} [{', '.join([f'*b{n}'] * 9)}]\n" for n in range(9))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a", "it holds ['a'] instead of settings by name"),
        ("5", "it holds 5 instead of settings"),
        ("seed: 1\n---\nseed: 2", "is not valid YAML: expected a single document"),
        ("seed: 1\ntrain: {steps: 1}\nseed: 2", "is not valid YAML: seed is given twice"),
        ("data: {datasets: [{path: a, path: b}]}", "path is given twice"),
        ("train: {min_learning_rate_ratio: -1}", "min_learning_rate_ratio is -1.0; it must be at least 0"),
        ("model:\n\tviews: [a]", "is not valid YAML"),
        ("model: " + 1500 * "[", "is not valid YAML"),
        ("b0: &b0 [x, x]\n" + ALIASES, "its aliases stand for more than"),
        ("model: &m {text_config: *m}", "its aliases stand for more than"),
        (b"# \xe9", "'utf-8' codec can't decode"),
        ("1: 2", "1 is unknown"),
        ("model: null", "model is None; it must be a group of settings"),
        ("model: {objectives: null}", "model.objectives is None; it must be list[str]"),
        ("model: {views: null}", "model.views is None"),
        ("model: {views: [null]}", "model.views is [None]"),
        ("model: {hidden_size: text}", "model.hidden_size is 'text'; it must be int"),
        ("model: {depth_loss_weight: .nan}", "model.depth_loss_weight is nan"),
        ("model: {preset: []}", "model.preset=[] is unknown"),
        ("data: {datasets: {}}", "data.datasets is {}; it must be list"),
        ("data: {datasets: [5]}", "data.datasets is [5]"),
        ("data: {datasets: [{path: null}]}", "data.datasets.0.path is None; it must be str"),
        ("data: {datasets: [{pth: x}]}", "data.datasets.0.pth is unknown; did you mean path"),
        ("data: {p_moving: null}", "data.p_moving is None; it must be float"),
        ("lora: []", "lora is []; it must be a group of settings"),
        ("train: {steps: true}", "train.steps is True; it must be int"),
        ("train: {steps: 5, epochs: 2}", "train.steps is 5 and train.epochs is 2: give one of them"),
        (
            "train: {epochs: 2, warmup_steps: 1, warmup_epochs: 1}",
            "train.warmup_steps is 1 and train.warmup_",
        ),
        ("train: {epochs: 0}", "train.epochs is 0; it must be above 0"),
        ("train: {epochs: two}", "train.epochs is 'two'; it must be float"),
        ("train: {steps: 5, warmup_epochs: 1}", "train.warmup_epochs belongs to train.epochs"),
        (
            "train: {epochs: 2, warmup_epochs: 3}",
            "train.warmup_epochs is 3; it must be from 0 to train.epochs",
        ),
        ("train: {learning_rate: .inf}", "train.learning_rate is inf"),
        ("train: {betas: [0.9]}", "train.betas is [0.9]; AdamW takes two"),
        ("towers: {tokenizer: null}", "towers.tokenizer is None"),
        ("data: {datasets: [{path: x, embodiment: a/b}]}", "the embodiment 'a/b' of x must be letters"),
        ("seed: -1", "seed is -1; it must be from 0"),
        ("init_from: ''", "init_from is ''; it must be"),
    ],
)
def test_a_config_of_any_content_is_one_line_that_names_file_and_field(
    tmp_path, monkeypatch, capsys, content, message
):
    file = tmp_path / "mine.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(file)])
    assert main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: config {file}: ") and message in line and len(line) < 600


def test_settings_that_yaml_writes_otherwise_are_taken(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "train: {learning_rate: 1e-3, steps: '5'}\noutput: 2026\nexport: null\n"
    )
    config = load_config(tmp_path / "mine.yaml", ["--data.state_key", "null"])
    assert (config.train.learning_rate, config.train.steps, config.output) == (1e-3, 5, "2026")
    with pytest.raises(ValueError, match=r"--model.views \[a: it is not valid YAML"):
        load_config(None, ["--model.views", "[a"])
    with pytest.raises(ValueError, match="config .*Is a directory"):
        load_config(tmp_path, [])


@pytest.mark.parametrize("start", ["is not installed: pip install wandb", "does not start: no key"])
def test_a_tracker_that_cannot_log_is_named_before_training(
    config_file, dataset, tmp_path, monkeypatch, start
):
    def fail(self, *args, **kwargs):
        raise RuntimeError("no key")

    found = [LoggerType.WANDB] if "start" in start else []
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: found)
    monkeypatch.setattr(Accelerator, "init_trackers", fail)
    with pytest.raises(ValueError, match=f"train.tracker=wandb {start}"):
        run(config_file, dataset, tmp_path / "run", "--train.tracker", "wandb")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_flagged_episodes_are_left_out_of_training_and_validation(
    config_file, dataset, tmp_path, monkeypatch, capsys
):
    root = tmp_path / "flagged"
    shutil.copytree(dataset, root)
    provenance = read_provenance(root)
    chosen, held_out = split_episodes(4, 0.5)
    provenance["episodes"] = dict(provenance["episodes"])
    for episode, facts in provenance["episodes"].items():
        facts["flags"] = ["side/depth-sparse"] * (int(episode) in (chosen[0], held_out[0]))
    write_provenance(root, provenance)
    flags = ["--skip-flagged", "--train.steps", "1", "--data.val_fraction", "0.5"]
    monkeypatch.setattr(sys, "argv", command(config_file, root, tmp_path / "run", *flags))
    assert main() == 0
    assert "flagged: 2 episodes are left out for their flags" in capsys.readouterr().out
    (described,) = json.loads((tmp_path / "run" / "summary.json").read_text())["datasets"]
    assert described["train_episodes"] == 1 and described["validation_episodes"] == held_out[1:]
    assert described["flagged_episodes"] == sorted([chosen[0], held_out[0]])


def test_a_dataset_without_labels_is_refused_with_the_command_that_adds_them(
    config_file, tmp_path, monkeypatch, capsys
):
    plain = make_dataset(
        tmp_path / "plain",
        episodes=2,
        frames=8,
        cameras=("front", "side"),
        size=(32, 32),
        depth=False,
        tracks=False,
    ).root
    monkeypatch.setattr(sys, "argv", command(config_file, plain, tmp_path / "run"))
    capsys.readouterr()  # progress bars of the writer
    assert main() == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "observation.depth.front" in said
    assert "simulate.py" in said and "--model.objectives" in said
    # What the columns allow can be trained.
    assert run(config_file, plain, tmp_path / "less", "--model.objectives", "[action, progress]") == 0
