"""Benchmarks of a run's start and of the workers' memory, in miniature: they follow what they measure."""

import importlib
import json
import sys
from pathlib import Path

import pytest

SIZES = {
    "worker_memory": "--files 3 --windows 20 --warmup 20 --workers 1",
    "startup": "--frames 40 --episodes 2 --video-files 1 --rounds 1",
}


@pytest.mark.slow  # benchmarks, which people run
@pytest.mark.parametrize("name", SIZES)
def test_a_benchmark_ends_with_its_figures(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    monkeypatch.setattr(sys, "argv", [name, *SIZES[name].split()])
    assert importlib.import_module(name).main() == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["benchmark"] == name
