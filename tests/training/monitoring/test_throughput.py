"""Counted operations and speed."""

import pytest
import torch

from training.monitoring.throughput import FlopMeter


def test_operations_of_forward_and_backward_are_counted_and_told_per_second():
    meter, layer = FlopMeter(torch.device("cpu")), torch.nn.Linear(8, 4)
    assert meter.speed(1.0) == {}
    with meter.counting():
        layer(torch.ones(16, 8, requires_grad=True)).sum().backward()
    each = 2 * 16 * 8 * 4
    assert meter.speed(0.5) == {"tflops": pytest.approx(3 * each / 0.5 / 1e12)}
    meter.peak = 1e-6
    assert meter.speed(0.5)["mfu"] == pytest.approx(3 * each / 0.5 / 1e6)


def test_the_peak_is_that_of_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    assert FlopMeter(torch.device("cuda")).peak == 756
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    assert FlopMeter(torch.device("cuda")).peak is None
