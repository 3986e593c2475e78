# ruff: noqa: F401, F811  (fixtures of another file)
"""Engines that Accelerate would ignore."""

from types import SimpleNamespace

import pytest
from accelerate import DistributedType
from accelerate.state import AcceleratorState

from tests.training.test_train import config_file, dataset, run
from training.engines.selection import check_engine


def test_an_engine_that_accelerate_ignores_is_refused(config_file, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ValueError, match="FSDP was asked for, but Accelerate trains with NO on 1 x cpu"):
        run(config_file, dataset, tmp_path / "run")
    assert not (tmp_path / "run").exists()


CANNOT = {("DEEPSPEED", True): "DeepSpeed is not", ("FSDP", True): "version 1", ("FSDP", False): "ddp.yaml"}


@pytest.mark.parametrize(("kind", "shards"), CANNOT)
def test_what_a_training_cannot_do_with_is_refused_by_name(kind, shards):
    accelerator = SimpleNamespace(distributed_type=DistributedType[kind], is_fsdp2=False)
    with pytest.raises(ValueError, match=CANNOT[kind, shards]):
        check_engine(accelerator, shards)
