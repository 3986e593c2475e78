"""A run in CALVIN's form, from a dataset of poses without depth to commands for the simulator."""

import json

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from transformers import AutoModel, AutoProcessor

from modeling_foresight import ForesightConfig, ForesightForActionPrediction
from modeling_foresight.action_codec import to_simulator_action
from modeling_foresight.configuration_foresight import PRESETS
from tests.synthetic import make_dataset
from tests.tiny import tiny_processor
from tests.training.test_train import TINY
from training.config_reading import load_config
from training.loop import train
from training.run_data import RunData, window_config
from training.windows import collate_windows

EPISODES, FRAMES, STATE = 4, 11, 8
MODEL = {
    "objectives": ["action", "future_rgb", "flow_2d", "progress"],
    "action_codec": "local_delta",
    "state_representation": "relative",
    "goal_image": True,
    "action_dim": 7,
    "binary_action_indices": [6],
    "binary_state_indices": [6],
    "state_dim": STATE,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(
        tmp_path_factory.mktemp("calvin_form") / "dataset",
        EPISODES,
        FRAMES,
        cameras=("front", "side"),
        size=(32, 40),
        use_videos=False,
        depth=False,
        state_dim=STATE,
        poses=True,
    )


@pytest.fixture
def run(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("FORESIGHT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.yaml"
    train_options = {**TINY["train"], "steps": 2, "checkpoint_every": 0}
    path.write_text(yaml.safe_dump({**TINY, "model": {**TINY["model"], **MODEL}, "train": train_options}))
    AcceleratorState._reset_state(reset_partial_state=True)
    yield load_config(path, ["--dataset", str(dataset.root), "--output", str(tmp_path / "run")])
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_run_without_depth_ends_in_a_policy_that_commands_the_simulator(run, dataset, tmp_path):
    assert train(run, False) == 0
    model = AutoModel.from_pretrained(tmp_path / "run" / "model").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "run" / "model")
    assert (processor.action_codec, processor.state_representation) == ("local_delta", "relative")
    assert processor.action_stats is None and len(processor.state_stats["mean"]) == STATE
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = next(line for line in lines if "step_s" in line)
    assert {"action", "gripper", "kl", "future", "flow", "progress", "flow_x_px"} <= set(logged)
    assert not {"depth", "flow_z_m"} & set(logged)
    assert all(np.isfinite(value) for value in logged.values() if isinstance(value, float))
    validation = json.loads((tmp_path / "run" / "summary.json").read_text())["validation"]
    assert set(validation) - {"windows", "losses"} == {"actions", "future_rgb", "flow", "progress"}

    frames = range(3, 3 + model.config.history_length)
    images = {view: np.stack([dataset.image(0, t, view) for t in frames]) for view in ("front", "side")}
    states = np.stack([dataset.state(0, t) for t in frames])
    batch = processor(images, dataset.task(0), states)
    assert (batch["state"][0, 0, :6] == 0).all() and batch["state"][0, 1, :6].abs().max() > 0
    actions = model.predict_action(**batch)
    commands = processor.decode_actions(actions, states[None, -1])
    assert commands.shape == (1, model.config.chunk_size, 7) and commands.isfinite().all()
    assert set(commands[..., 6].unique().tolist()) <= {-1.0, 1.0}
    actions[..., 6].sigmoid_()  # the processor reads the logit of a binary entry
    assert torch.equal(commands, to_simulator_action(actions.float(), torch.from_numpy(states[None, -1])))


def test_every_parameter_learns_from_such_windows(run):
    fields = dict(run.model)
    fields["text_config"] = {**fields["text_config"], "vocab_size": 300, "eos_token_id": 1}
    config = ForesightConfig(**fields)
    windows = RunData(run, config).train
    raw = collate_windows([windows[i] for i in (0, 5, len(windows) - 1)])
    assert raw["depth"] == {} and raw["goal_mask"].all() and not raw["action_mask"].all()
    processor = tiny_processor(config)
    model = ForesightForActionPrediction(config)
    model(**processor.prepare_batch(raw)).loss.backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle


def test_a_policy_that_only_acts_asks_for_actions_only(run):
    config = ForesightConfig(**run.model, auxiliary_heads=False)
    assert window_config(config, run).objectives == ["action"]


@pytest.mark.parametrize("preset", ["gr1", "foresight_2d", "grmg_pretrain"])
def test_a_preset_trains_under_its_own_name(preset, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("FORESIGHT_CACHE", str(tmp_path / "cache"))
    path, output = tmp_path / "tiny.yaml", tmp_path / "run"
    sizes = {k: v for k, v in TINY["model"].items() if k not in ("objectives", "views", "chunk_size")}
    views = "[front]" if preset == "grmg_pretrain" else "[front, side]"
    options = {**TINY["train"], "steps": 1, "checkpoint_every": 0}
    path.write_text(yaml.safe_dump({**TINY, "model": sizes, "train": options}))
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = ["--dataset", str(dataset.root), "--output", str(output), "--model.preset", preset]
    arguments += ["--model.views", views]  # given beside the preset, they beat its own
    assert train(load_config(path, arguments), False) == 0
    saved = json.loads((output / "model" / "config.json").read_text())
    assert saved["objectives"] == list(PRESETS[preset]["objectives"])
    assert load_config(output / "config.yaml", []) == load_config(path, arguments)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_an_unknown_preset_is_refused_with_the_closest_one(tmp_path):
    with pytest.raises(ValueError, match="model.preset='foresight3d' is unknown; did you mean foresight_3d"):
        load_config(None, ["--model.preset", "foresight3d"])
