# ruff: noqa: F401, F811  (fixtures of another file)
"""Engines that Accelerate would ignore."""

import pytest
from accelerate.state import AcceleratorState

from tests.training.test_train import config_file, dataset, run


def test_an_engine_that_accelerate_ignores_is_refused(config_file, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ValueError, match="FSDP was asked for, but Accelerate trains with NO on 1 x cpu"):
        run(config_file, dataset, tmp_path / "run")
    assert not (tmp_path / "run").exists()
