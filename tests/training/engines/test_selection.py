# ruff: noqa: F401, F811  (fixtures of another file)
"""Engines that Accelerate would ignore."""

import datetime
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DynamoBackend
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from tests.ranks import CONFIGS
from tests.training.test_train import config_file, dataset, fresh_accelerate, run
from training.config import TrainConfig
from training.config_reading import load_config
from training.engines.selection import check_engine, configure_engine
from training.goal_generator.finetuning import GoalTraining, finetune
from training.run_state import build_accelerator


def test_an_engine_that_accelerate_ignores_is_refused(config_file, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ValueError, match="FSDP was asked for, but Accelerate trains with NO on 1 x cpu"):
        run(config_file, dataset, tmp_path / "run")
    assert not (tmp_path / "run").exists()


CANNOT = {
    ("FSDP", True): "version 1",
    ("FSDP", False): "without FSDP",
    ("DEEPSPEED", False): "DeepSpeed .ddp",
}


def accelerator_of(kind, backend="NO"):
    return SimpleNamespace(
        distributed_type=DistributedType[kind],
        is_fsdp2=False,
        gradient_accumulation_steps=1,
        parallelism_config=None,
        state=SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=DynamoBackend[backend])),
    )


@pytest.mark.parametrize(("kind", "shards"), CANNOT)
def test_what_a_training_cannot_do_with_is_refused_by_name(kind, shards):
    with pytest.raises(ValueError, match=CANNOT[kind, shards]):
        check_engine(accelerator_of(kind), TrainConfig(), shards)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_compiling_is_refused_with_weights_in_shards(kind):
    with pytest.raises(ValueError, match="leave out --dynamo_backend"):
        check_engine(accelerator_of(kind, "INDUCTOR"), TrainConfig())


LAUNCHER = {
    ("MIXED_PRECISION", "bf16"): "told --mixed_precision bf16, and the run's mixed_precision is no",
    ("MIXED_PRECISION", "fp8"): "told --mixed_precision fp8",
    ("GRADIENT_ACCUMULATION_STEPS", "4"): "told --gradient_accumulation_steps 4, and the run's are 1",
    ("USE_PARALLELISM_CONFIG", "true"): "told a parallelism_config",
}


@pytest.mark.parametrize(("name", "value"), LAUNCHER)
def test_what_the_launcher_was_told_and_the_run_says_otherwise_is_refused(
    config_file, dataset, tmp_path, monkeypatch, name, value
):
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(ValueError, match=LAUNCHER[name, value]):
        run(config_file, dataset, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("launcher", "own"), [("bf16", "bf16"), ("no", "bf16"), ("no", "no")])
def test_a_launcher_that_agrees_or_says_nothing_leaves_precision_to_the_run(monkeypatch, launcher, own):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    monkeypatch.setattr("training.run_state.has_bfloat16", lambda device: True)
    flags = ["--train.mixed_precision", own, "--train.gradient_accumulation_steps", "2"]
    accelerator = build_accelerator(load_config(None, flags))
    assert (accelerator.mixed_precision, accelerator.gradient_accumulation_steps) == (own, 2)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_every_config_starts_the_second_of_two_machines_by_the_launcher_of_torch(name):
    command = ["--config_file", str(CONFIGS / f"{name}.yaml"), "--num_machines", "2", "--machine_rank", "1"]
    command += ["--num_processes", "16", "--main_process_ip", "10.0.0.1", "--main_process_port", "29500"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args([*command, "train.py"]))
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ""
        own_command, _ = prepare_deepspeed_cmd_env(arguments)
        assert own_command is None, "DeepSpeed's launcher would need a host file"
    else:
        prepare_multi_gpu_env(arguments)
    assert (arguments.nnodes, arguments.node_rank, arguments.nproc_per_node) == ("2", 1, "8")


def finetune_goal_generator(output):
    return finetune(GoalTraining(base="base", dataset="dataset", output=str(output)))


@pytest.mark.parametrize(
    "train", [lambda output: build_accelerator(load_config(None, [])), finetune_goal_generator]
)
def test_processes_wait_for_a_download_of_hours(tmp_path, monkeypatch, train):
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**place, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)

    def start(timeout=None, **_):
        assert timeout >= datetime.timedelta(hours=12)
        raise RuntimeError("it starts")

    monkeypatch.setattr(torch.distributed, "init_process_group", start)
    with pytest.raises(RuntimeError, match="it starts"):
        train(tmp_path)


def test_deepspeed_takes_its_batch_and_clipping_from_the_run_and_nothing_else():
    theirs = {"zero_optimization": {"stage": 3}, "gradient_clipping": "auto"}
    plugin = SimpleNamespace(deepspeed_config=theirs)
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED,
        state=SimpleNamespace(deepspeed_plugin=plugin),
        num_processes=2,
        device=torch.device("cpu"),
    )
    options = TrainConfig(batch_size=12, gradient_accumulation_steps=3, max_grad_norm=0.5)
    configure_engine(accelerator, torch.nn.Linear(1, 1), options)
    sizes = {name: theirs[name] for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")}
    assert sizes == {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}
    assert theirs["gradient_clipping"] == 0.5
    theirs["gradient_clipping"] = 1.0
    with pytest.raises(ValueError, match=r"DeepSpeed's gradient_clipping is 1.0, and the run's is 0.5"):
        configure_engine(accelerator, torch.nn.Linear(1, 1), options)
