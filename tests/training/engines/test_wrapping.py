# ruff: noqa: F401, F811  (fixtures of another file)
"""A model that Accelerate compiles (`accelerate launch --dynamo_backend`): trained, resumed, exported."""

import pytest
import torch
from accelerate import Accelerator
from torch._dynamo.utils import counters
from transformers import AutoModel

from tests.training.test_train import config_file, dataset, fresh_accelerate, run, weights
from training.engines.wrapping import plain_model, whole_state

FLAGS = ["--model.objectives", "[action]", "--train.steps", "2", "--train.warmup_steps", "0"]
FLAGS += ["--train.ema_decay", "0.5", "--train.checkpoint_every", "1"]


@pytest.fixture
def compiling(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_a_compiled_model_is_trained_exported_and_resumed_as_any(
    config_file, dataset, tmp_path, monkeypatch, compiling
):
    assert run(config_file, dataset, tmp_path / "compiled", *FLAGS) == 0
    assert counters["frames"]["ok"] > 0
    compiled = weights(tmp_path / "compiled")
    AutoModel.from_pretrained(tmp_path / "compiled" / "model")

    assert run(config_file, dataset, tmp_path / "cut", *FLAGS, "--train.max_hours", "0") == 0
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    assert run(config_file, dataset, tmp_path / "cut", *FLAGS, resume=True) == 0
    cut = weights(tmp_path / "cut")
    assert cut.keys() == compiled.keys()
    for name, value in compiled.items():
        torch.testing.assert_close(cut[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("regional", ["false", "true"])
def test_names_are_those_of_the_model_and_the_compiled_one_keeps_what_is_in_it(
    monkeypatch, compiling, regional
):
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", regional)
    accelerator = Accelerator(cpu=True)
    plain = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]))
    prepared = torch.nn.DataParallel(plain)  # as DDP
    prepared = accelerator.prepare_model(prepared)
    before = [type(module) for module in prepared.modules()]
    assert plain_model(accelerator, prepared) is plain
    assert whole_state(accelerator, prepared).keys() == plain.state_dict().keys()
    assert [type(module) for module in prepared.modules()] == before
