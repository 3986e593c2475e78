"""`lerobot-train` and `training/train.py` are one training.

Both loops run as they are, from the same weights, with the same recipe and seed and all randomness on. Only
the order of windows, which each draws in its own way, is made equal.
"""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from lerobot.datasets.lerobot_dataset import LeRobotDatasetMetadata
from safetensors.torch import load_file

from lerobot_policy_foresight.lerobot_files import write_lerobot_files
from modeling_foresight import ForesightForActionPrediction
from tests.lerobot_policy_foresight.miniature import lerobot_train, run_options
from tests.synthetic import make_dataset
from tests.tiny import tiny_config, tiny_processor
from training.config_reading import load_config
from training.loop import train
from training.models.starting_model import starting_config
from training.run_data import RunData
from training.windows import WindowSampler

STEPS, BATCH, SEED, LR, WARMUP = 8, 4, 3, 1e-3, 2
LOSSES = ("depth", "future", "flow", "kl", "action", "gripper", "progress")
TOLERANCE = 1e-5  # relative, per step; what was seen is the rounding of float32, 3e-7


@pytest.fixture
def start(tmp_path):
    """A dataset that leaves no choice of points to follow, and a model with all kinds of draws."""
    facts = make_dataset(
        tmp_path / "data", use_videos=False, frames=[9, 11], state_dim=5, n_points=2, n_padding=1
    )
    stats = LeRobotDatasetMetadata("local/synthetic", root=facts.root).stats
    config = tiny_config(
        history_length=3,
        future_shift=2,
        future_targets="lookahead",
        supervised_share=0.5,
        action_dim=4,
        binary_action_indices=[2],
        state_dim=5,
        binary_state_indices=[],
        embd_pdrop=0.1,
        resid_pdrop=0.1,
        attention_dropout=0.1,
        fps=facts.fps,
    )
    torch.manual_seed(0)
    ForesightForActionPrediction(config).save_pretrained(tmp_path / "start")
    stats = {"action_stats": stats["action"], "state_stats": stats["observation.state"]}
    tiny_processor(config, **stats).save_pretrained(tmp_path / "start")
    write_lerobot_files(tmp_path / "start")
    return facts.root, tmp_path / "start"


def trainers_run(root, start, output) -> tuple[list[dict], list[int]]:
    """Losses of every step of `training/train.py`; the newest frames of its windows in its order."""
    options = {
        "dataset": root,
        "output": output,
        "init_from": start,
        "seed": SEED,
        "data.val_fraction": 0,
        "data.random_shift": 0,
        "data.frame_cache": "off",
        "train.steps": STEPS,
        "train.batch_size": BATCH,
        "train.learning_rate": LR,
        "train.warmup_steps": WARMUP,
        "train.log_every": 1,
    }
    config = load_config(None, [f"--{name}={value}" for name, value in options.items()])
    assert train(config, resume=False) == 0
    AcceleratorState._reset_state(True)
    windows = RunData(config, starting_config(config)).train
    order = WindowSampler(windows.sizes, BATCH, seed=SEED, steps=STEPS)
    newest = [int(windows[i]["index"]) for step in range(STEPS) for i, _ in order.batch_indices(step)]
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()], newest


def lerobots_run(root, start, output, order, monkeypatch) -> list[dict]:
    """Losses of every step of `lerobot-train` on items of this order."""
    from lerobot.scripts import lerobot_train as script

    losses, update = [], script.update_policy

    def noted_update(*args, **kwargs):
        metrics, parts = update(*args, **kwargs)
        values = {name: getattr(metrics, name).val for name in ("loss", "grad_norm", "lr")}
        losses.append(values | parts)
        return metrics, parts

    monkeypatch.setattr(script, "update_policy", noted_update)
    monkeypatch.setattr(script, "EpisodeAwareSampler", lambda *args, **kwargs: order)
    lerobot_train(
        f"--policy.path={start}",
        *run_options(root, output),
        f"--batch_size={BATCH}",
        f"--steps={STEPS}",
        f"--seed={SEED}",
        f"--policy.optimizer_lr={LR}",
        f"--policy.scheduler_warmup_steps={WARMUP}",
    )
    return losses


def test_every_step_has_the_same_losses_and_both_end_with_the_same_weights(start, tmp_path, monkeypatch):
    root, folder = start
    theirs, order = trainers_run(root, folder, tmp_path / "trainer")
    ours = lerobots_run(root, folder, tmp_path / "lerobot", order, monkeypatch)
    names = {name.removesuffix("_loss") for name in ours[0]}
    assert names == {"loss", "grad_norm", "lr", *LOSSES} and len(ours) == len(theirs) == STEPS
    for one, other in zip(ours, theirs, strict=True):
        for name, value in one.items():
            assert value == pytest.approx(other[name.removesuffix("_loss")], rel=TOLERANCE), (
                other["step"],
                name,
            )
    assert ours[-1]["loss"] < 0.5 * ours[0]["loss"]  # and it was a training
    trained = tmp_path / "lerobot" / "checkpoints" / "last" / "pretrained_model"
    weights = [load_file(place / "model.safetensors") for place in (trained, tmp_path / "trainer" / "model")]
    # Adam makes full steps of the rounding errors where a gradient is zero, as for the bias of keys.
    torch.testing.assert_close(*weights, rtol=TOLERANCE, atol=0.1 * LR)
