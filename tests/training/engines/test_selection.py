# ruff: noqa: F401, F811  (fixtures of another file)
"""Engines that Accelerate would ignore."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState

from tests.training.test_train import config_file, dataset, run
from training.config import TrainConfig
from training.engines.selection import check_engine, configure_engine


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


@pytest.mark.parametrize(("kind", "shards"), CANNOT)
def test_what_a_training_cannot_do_with_is_refused_by_name(kind, shards):
    accelerator = SimpleNamespace(distributed_type=DistributedType[kind], is_fsdp2=False)
    with pytest.raises(ValueError, match=CANNOT[kind, shards]):
        check_engine(accelerator, shards)


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
