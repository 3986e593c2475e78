"""`benchmarks/training_loop.py`: it times the loop that trains."""

import importlib
import json
from pathlib import Path

import pytest

from tests.synthetic import make_dataset


@pytest.mark.parametrize(
    ("flag", "value"),
    [("train.gradient_accumulation_steps", "2"), ("train.ema_decay", "0.9")],
)
def test_what_the_bare_loop_lacks_is_refused(monkeypatch, capsys, flag, value):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    script = importlib.import_module("training_loop")
    assert script.main([f"--{flag}", value]) == 1
    assert f"error: the bare loop has no {flag}: leave it out" in capsys.readouterr().err


@pytest.mark.slow  # a benchmark, which people run
def test_the_loop_is_compared_with_a_bare_one_and_with_the_computation(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    script = importlib.import_module("training_loop")
    dataset = make_dataset(tmp_path / "ds", episodes=2, frames=30, use_videos=False).root
    options = ["--dataset", dataset, "--interval", "1", "--rounds", "2", "--threads", "1"]
    options += ["--output", tmp_path / "loop.csv", "--data.num_workers", "0"]
    options += ["--data.val_fraction", "0", "--train.batch_size", "2"]
    options += ["--model.image_size", "32", "--model.vision_config.model_args.img_size", "32"]
    assert script.main([*map(str, options)]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(figures) == {"benchmark", "loop / bare", "bare / computation", "loop / computation"}
    assert len((tmp_path / "loop.csv").read_text().splitlines()) == 4
