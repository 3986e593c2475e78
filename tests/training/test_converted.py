"""What the converters write can be trained on: CALVIN's form from poses, LIBERO's commands as recorded."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from transformers import AutoProcessor

from datasets_scripts.conversion.calvin import CalvinArchive
from datasets_scripts.conversion.job import convert
from datasets_scripts.conversion.libero import LiberoArchive
from datasets_scripts.simulation.libero import choose_form
from modeling_foresight import ForesightConfig
from tests.datasets_scripts.conversion import test_calvin, test_libero
from tests.synthetic import make_dataset
from tests.training.test_train import TINY
from training.config_reading import load_config
from training.loop import train
from training.run_data import RunData

COMMON = {
    "views": ["main", "wrist"],
    "state_representation": "relative",
    "goal_image": True,
    "action_dim": 7,
    "binary_action_indices": [6],
    "binary_state_indices": [6],
    "state_dim": 7,
}
WITH_DEPTH = {"objectives": ["action", "depth", "future", "progress"], "action_codec": "local_delta"}
WITHOUT_DEPTH = {"objectives": ["action", "future_rgb", "progress"], "action_codec": "recorded"}
LENGTHS = {"history_length": 2, "chunk_size": 2, "future_shift": 1}


def calvin(folder):
    return CalvinArchive(test_calvin.make_archive(folder))


def libero(folder):
    for number in range(2):
        test_libero.write_file(folder / f"{number}_demo.hdf5", (6, 5), "close it")
    return LiberoArchive(folder)


@pytest.mark.parametrize(
    ("archive", "form", "open_and_closed"),
    [(calvin, WITH_DEPTH, {-1.0, 1.0}), (libero, WITHOUT_DEPTH, {0.0, 1.0})],
)
def test_two_steps_of_training(archive, form, open_and_closed, tmp_path, monkeypatch):
    monkeypatch.setenv("FORESIGHT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "archive").mkdir()
    convert(archive(tmp_path / "archive"), tmp_path / "dataset")
    options = {**TINY["train"], "steps": 2, "checkpoint_every": 0}
    model = {**TINY["model"], **COMMON, **LENGTHS, **form}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "model": model, "train": options}))
    AcceleratorState._reset_state(reset_partial_state=True)
    output = tmp_path / "run"
    config = load_config(path, ["--dataset", str(tmp_path / "dataset"), "--output", str(output)])
    assert train(config, False) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    logged = next(line for line in lines if "step_s" in line)
    assert {"action", "gripper", "future"} <= set(logged) and ("depth" in logged) == (form is WITH_DEPTH)

    processor = AutoProcessor.from_pretrained(output / "model")
    likely = torch.tensor([[[0.1] * 6 + [2.0], [0.1] * 6 + [-2.0]]])  # the last one is a logit
    state = torch.zeros(1, 7)
    assert set(processor.decode_actions(likely, state)[0, :, 6].tolist()) == open_and_closed


@pytest.mark.parametrize(
    ("name", "archive", "codec"),
    [("calvin_d_d", calvin, "local_delta"), ("libero_suite", libero, "recorded")],
)
def test_the_named_run_reads_the_dataset(name, archive, codec, tmp_path):
    (tmp_path / "archive").mkdir()
    convert(archive(tmp_path / "archive"), tmp_path / "dataset")
    options = [
        "--dataset",
        str(tmp_path / "dataset"),
        "--model.history_length",
        "4",
        "--data.frame_cache",
        "off",
    ]
    # The annotation would bring tracks, and LIBERO's depth.
    run = load_config(f"training/configs/{name}.yaml", [*options, "--data.missing_targets", "true"])
    model = ForesightConfig(**run.model)
    assert model.objectives == ["action", "depth", "future", "flow", "progress"] and model.goal_image
    assert (model.action_codec, model.state_representation) == (codec, "relative")
    assert list(model.binary_action_indices) == list(model.binary_state_indices) == [6]
    windows = RunData(run, model).train
    assert (windows.action_dim, windows.state_dim) == (7, 7) == (model.action_dim, model.state_dim)
    assert set(windows[0]["images"]) == {"main", "wrist"}


def test_the_documented_command_trains_on_the_columns_of_lerobot_libero(tmp_path):
    page = Path("docs/libero_on_the_hub.md").read_text()
    command = re.search(r"launch training/train.py (.*?)\n```", page, re.DOTALL)[1].replace("\\\n", "")
    flags = shlex.split(command)
    dataset = make_dataset(
        tmp_path / "dataset",
        episodes=2,
        frames=14,
        cameras=("image", "image2"),
        size=(32, 32),
        state_dim=8,
        action_dim=7,
        use_videos=False,
        fps=10,
    )
    flags[flags.index("--dataset") + 1] = str(dataset.root)
    config = load_config(flags[flags.index("--config") + 1], [*flags[2:], "--data.frame_cache", "off"])
    model = ForesightConfig(**config.model, state_dim=8)
    windows = RunData(config, model).train
    assert (windows.state_dim, windows.action_dim, config.train.epochs) == (8, 7, 50)
    assert set(windows[0]["images"]) == {"image", "image2"} and "goal_image" not in windows[0]
    assert choose_form(model.views, model.state_dim) == "lerobot"


def test_abc_d_is_trained_as_d_d_for_three_times_as_long():
    one, three = (load_config(f"training/configs/calvin_{name}.yaml", []) for name in ("d_d", "abc_d"))
    assert three.train.steps / one.train.steps == pytest.approx(
        three.train.warmup_steps / one.train.warmup_steps, rel=0.01
    )
    assert three.train.steps == pytest.approx(3 * one.train.steps, rel=0.01)
    for name in ("steps", "warmup_steps", "val_every", "checkpoint_every"):
        setattr(one.train, name, getattr(three.train, name))
    assert one == three
