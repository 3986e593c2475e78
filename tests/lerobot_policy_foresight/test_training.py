"""Runs of both trainers as a user has them: what is exported, resumed, run by two processes."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from lerobot.configs import PreTrainedConfig
from lerobot.scripts import lerobot_train as script
from safetensors.torch import load_file, save_model
from transformers import AutoModel

from lerobot_policy_foresight.lerobot_files import write_lerobot_files
from modeling_foresight import ForesightForActionPrediction, ForesightProcessor, export_with_code
from tests.lerobot_policy_foresight.miniature import (
    assert_same_actions,
    lerobot_train,
    policy_options,
    run_options,
    small_model,
)
from tests.ranks import run_ranks
from tests.synthetic import make_dataset
from tests.training.test_train import TINY
from training.config_reading import load_config
from training.loop import train
from training.models.model_folder import load_checkpoint


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """A dataset with all labels."""
    root = tmp_path_factory.mktemp("data") / "dataset"
    cameras = {"front": (32, 40), "side": (32, 40)}
    return make_dataset(root, episodes=4, frames=[9, 11, 8, 10], cameras=cameras, use_videos=False)


def run_trainer(tmp_path, facts, *overrides):
    """`training/train.py` for two steps; the folder of its model."""
    # Weights with which the action depends on what is seen.
    model = {**TINY["model"], "initializer_range": 0.3, "embedding_initializer_range": 0.02}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**TINY, "model": model}))
    options = ["--dataset", str(facts.root), "--output", str(tmp_path / "run"), "--data.val_fraction", "0"]
    options += ["--train.steps", "2", "--seed", "1", "--train.batch_size", "2", "--train.val_every", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORESIGHT_CACHE", str(tmp_path / "cache"))
        AcceleratorState._reset_state(reset_partial_state=True)
        assert train(load_config(tmp_path / "run.yaml", [*options, *overrides]), False) == 0
        AcceleratorState._reset_state(reset_partial_state=True)
    return tmp_path / "run" / "model"


def weights(checkpoint) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "pretrained_model" / "model.safetensors")


def test_a_resumed_run_gives_the_weights_of_an_uninterrupted_one(facts, tmp_path):
    # Without flow: which tracked points are asked for is drawn where the dataset is read, ahead of the step.
    model = small_model(binary_action_indices=[2], objectives=["action", "depth", "future", "progress"])
    options = [*run_options(facts.root, tmp_path / "run"), "--steps=4", "--save_freq=2"]
    lerobot_train(*policy_options(model), *options, "--policy.scheduler_warmup_steps=0")
    whole, again = (tmp_path / run / "checkpoints" for run in ("run", "again"))
    shutil.copytree(whole / "000002", again / "000002")
    config = again / "000002" / "pretrained_model" / "train_config.json"
    lerobot_train(f"--config_path={config}", "--resume=true", f"--output_dir={tmp_path / 'again'}")
    steps = (whole / "000002", whole / "000004", again / "000004")
    before, expected, given = (weights(step) for step in steps)
    assert expected.keys() == given.keys()
    assert all(torch.equal(expected[name], given[name]) for name in expected)
    assert any(not torch.equal(expected[name], before[name]) for name in expected)


def test_lerobots_sample_weighting_and_held_out_episodes_work(facts, tmp_path, capfd):
    options = run_options(facts.root, tmp_path / "run")
    options += ["--sample_weighting.type=uniform", "--dataset.eval_split=0.5", "--eval_steps=2"]
    lerobot_train(*policy_options(small_model()), *options)
    assert "step 2: eval_loss=" in capfd.readouterr().err
    assert weights(tmp_path / "run" / "checkpoints" / "last")


def test_nan_stops_a_run_unless_its_episode_is_left_out(facts, tmp_path, capfd):
    root = shutil.copytree(facts.root, tmp_path / "data")
    path = next((root / "data").rglob("*.parquet"))
    table = pq.read_table(path)
    actions = np.stack(table["action"].to_numpy())
    actions[facts.starts[1] + 5, 1] = np.nan
    column = pa.FixedSizeListArray.from_arrays(pa.array(actions.ravel()), actions.shape[1])
    pq.write_table(table.set_column(table.column_names.index("action"), "action", column), path)
    stats = json.loads((root / "meta" / "stats.json").read_text())
    stats["action"] |= {name: [float("nan")] * actions.shape[1] for name in ("mean", "std", "min", "max")}
    (root / "meta" / "stats.json").write_text(json.dumps(stats))  # as LeRobot's recorder leaves it
    fresh = policy_options(small_model())
    with pytest.raises(ValueError, match="'action' is not finite in episode 1, frame 5.*--dataset.episodes"):
        lerobot_train(*fresh, *run_options(root, tmp_path / "broken"))
    options = [*run_options(root, tmp_path / "run"), "--dataset.episodes=[0, 2, 3]"]
    with pytest.warns(UserWarning, match="those of its 37 finite frames are used"):
        lerobot_train(*fresh, *options, "--dataset.eval_split=0.3", "--eval_steps=2")
    assert "step 2: eval_loss=nan" not in capfd.readouterr().err
    assert all(
        value.isfinite().all() for value in weights(tmp_path / "run" / "checkpoints" / "last").values()
    )


@pytest.mark.slow  # test_train.py and test_environments.py show it for training and acting
def test_bfloat16_is_float32_where_it_has_no_kernels(facts, tmp_path, monkeypatch, capfd):
    def trained(name, dtype, has_kernels):
        monkeypatch.setattr(
            "lerobot_policy_foresight.modeling_foresight.has_bfloat16", lambda device: has_kernels
        )
        options = [*run_options(facts.root, tmp_path / name), "--policy.scheduler_warmup_steps=0"]
        lerobot_train(*policy_options(small_model()), *options, f"--policy.dtype={dtype}")
        return weights(tmp_path / name / "checkpoints" / "last")

    logging.Logger.warning_once.cache_clear()  # another test may have been told
    expected = trained("float32", "float32", has_kernels=False)
    assert "computing in float32" not in capfd.readouterr().err
    without = trained("without", "bfloat16", has_kernels=False)
    assert "computing in float32" in capfd.readouterr().err
    assert all(torch.equal(expected[name], without[name]) for name in expected)
    rounded = trained("with", "bfloat16", has_kernels=True)
    assert any(not torch.equal(expected[name], rounded[name]) for name in expected)


def run_process(rank: int, folder, options: list[str]) -> None:
    """`lerobot-train` in one of two processes, as `accelerate launch` starts it; saves its weights."""
    made, make_policy = [], script.make_policy
    script.make_policy = lambda *args, **kwargs: made.append(make_policy(*args, **kwargs)) or made[0]
    lerobot_train(*options)
    save_model(made[0], f"{folder}/rank{rank}.safetensors")


def check_processes(folder, output: str) -> None:
    """Both processes trained the policy that one of them wrote."""
    assert "effective batch size: 4" in output
    assert output.count("Checkpoint policy after step 2") == 1
    saved = weights(folder / "run" / "checkpoints" / "last")
    ranks = [load_file(folder / f"rank{rank}.safetensors") for rank in (0, 1)]
    for name, tensor in saved.items():
        assert all(torch.equal(rank[f"model.{name}"], tensor) for rank in ranks), name


def test_two_processes_train_one_policy_and_write_it_once(facts, tmp_path, capfd):
    options = [*run_options(facts.root, tmp_path / "run"), "--policy.scheduler_warmup_steps=0"]
    run_ranks(run_process, tmp_path, [*policy_options(small_model()), *options])
    check_processes(tmp_path, capfd.readouterr().err)


# `lerobot-train` of every process, which then leaves its weights.
PROCESS = """
import os, sys
from tests.lerobot_policy_foresight.test_training import run_process
folder, *options = sys.argv[1:]
run_process(int(os.environ["RANK"]), folder, options)
"""


@pytest.mark.slow  # imports everything three times
def test_accelerates_launcher_trains_one_policy_and_writes_it_once(facts, tmp_path):
    (tmp_path / "process.py").write_text(PROCESS)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    launch += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    options = [*run_options(facts.root, tmp_path / "run"), "--policy.scheduler_warmup_steps=0"]
    result = subprocess.run(
        [*launch, str(tmp_path / "process.py"), str(tmp_path), *policy_options(small_model()), *options],
        env={
            **os.environ,
            **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"},
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    check_processes(tmp_path, result.stderr)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, facts):
    return run_trainer(tmp_path_factory.mktemp("trainer"), facts)


def test_what_the_trainer_exports_is_a_policy_of_lerobot_that_acts_the_same(exported, facts):
    config = PreTrainedConfig.from_pretrained(exported)
    assert config.cameras == {"front": "observation.images.front", "side": "observation.images.side"}
    assert_same_actions(exported, facts)
    load_checkpoint(exported)  # as evaluate.py does


def test_a_policy_with_its_code_is_one_of_lerobot_too(exported, facts, tmp_path):
    model = ForesightForActionPrediction.from_pretrained(exported)
    export_with_code(model, ForesightProcessor.from_pretrained(exported), tmp_path / "drawer")
    write_lerobot_files(tmp_path / "drawer")
    assert "auto_map" in (tmp_path / "drawer" / "config.json").read_text()
    assert (tmp_path / "drawer" / "modeling_foresight.py").is_file()
    assert_same_actions(tmp_path / "drawer", facts)


def test_cameras_of_an_exported_model_can_be_renamed(exported, tmp_path):
    model = ForesightForActionPrediction.from_pretrained(exported)
    model.save_pretrained(tmp_path)
    ForesightProcessor.from_pretrained(exported).save_pretrained(tmp_path)
    write_lerobot_files(tmp_path, {"front": "observation.image", "side": None})
    assert PreTrainedConfig.from_pretrained(tmp_path).cameras == {"front": "observation.image"}


def test_a_model_without_actions_is_exported_anyway(facts, tmp_path, capsys):
    folder = run_trainer(tmp_path, facts, "--model.objectives", "[depth, flow]")
    assert f"{folder} is not a policy for LeRobot's commands" in capsys.readouterr().out
    assert not (folder / "policy_preprocessor.json").exists()
    assert AutoModel.from_pretrained(folder).config.objectives == ["depth", "flow"]


def test_a_view_without_a_camera_is_left_out_of_the_policy(facts, tmp_path):
    source = yaml.safe_dump([{"path": str(facts.root), "cameras": {"side": None}}], default_flow_style=True)
    folder = run_trainer(tmp_path, facts, "--data.datasets", source.replace("\n", ""))
    assert PreTrainedConfig.from_pretrained(folder).cameras == {"front": "observation.images.front"}
