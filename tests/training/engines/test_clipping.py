# ruff: noqa: F401, F811  (fixtures of another file)
"""Clipping of gradients: to a norm, or not at all."""

import pytest
import torch
from accelerate import Accelerator

from tests.training.test_train import config_file, dataset, fresh_accelerate, log_lines, run, weights
from training.engines.clipping import clip_gradients


@pytest.mark.parametrize(("largest", "after"), [(0.0, 5.0), (2.5, 2.5), (9.0, 5.0)])
def test_gradients_are_clipped_to_a_norm_and_with_0_not_at_all(largest, after):
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clip_gradients(Accelerator(cpu=True), layer.parameters(), largest).item() == 5.0
    assert layer.weight.grad.norm().item() == pytest.approx(after, rel=1e-5)


def test_a_run_without_clipping_trains_as_one_whose_norm_is_never_reached(config_file, dataset, tmp_path):
    flags = ["--model.objectives", "[action]", "--data.val_fraction", "0", "--train.steps", "2"]
    flags += ["--train.warmup_steps", "0"]
    for name, largest in (("off", "0"), ("far", "1e9")):
        assert run(config_file, dataset, tmp_path / name, *flags, "--train.max_grad_norm", largest) == 0
    off, far = weights(tmp_path / "off"), weights(tmp_path / "far")
    assert all(torch.equal(off[name], value) for name, value in far.items())
    assert all(line["grad_norm"] > 0 for line in log_lines(tmp_path / "off"))
