import csv
import importlib
import json
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a script on a tiny model: rows of its CSV and the JSON object of its last line."""
    monkeypatch.syspath_prepend(FOLDER)

    def run(name: str, *arguments: str):
        script, output = importlib.import_module(name), tmp_path / "a" / f"{name}.csv"
        script.main(["--small", "--device", "cpu", "--output", str(output), *arguments])
        with open(output, newline="") as file:
            return list(csv.DictReader(file)), json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


@pytest.mark.slow  # compiles
def test_control_step_compares_methods_and_names_the_setting_of_each_row(run):
    rows, ratios = run("control_step", "--warmup", "1", "--repeats", "1", "--batches", "1", "3")
    assert list(rows[0])[:8] == [
        "preset",
        "batch",
        "dtype",
        "setting",
        "mode",
        "way",
        "median_ms",
        "p90_ms",
    ]
    assert {"machine", "warmup", "repeats"} < set(rows[0])
    assert [row["way"] for row in rows[:3]] == ["everything", "window", "stream"]
    assert {row["batch"] for row in rows} == {"1", "3"} and len(rows) == 2 * (3 + 5 + 2)
    assert list(ratios)[:3] == [
        "batch 1, float32: everything eager / stream eager",
        "batch 1, float32: window eager / stream eager",
        "batch 1, float32, eager: stream foresight_3d / stream grmg",
    ]
    assert len(ratios) == 6 and min(ratios.values()) > 0


@pytest.mark.slow  # exports
def test_modes_of_the_stream_are_compared_in_turns(run):
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is in the extra `export`")
    modes = ["eager", "onnx", "onnx-int8", "torch-export"]
    rows, ratios = run("control_step", "--compare", "modes", "--modes", *modes, "--repeats", "1")
    assert [(row["mode"], row["setting"]) for row in rows] == [
        (mode, "batch 1, float32, modes in turns") for mode in modes
    ]
    assert list(ratios) == [f"batch 1, float32: stream eager / stream {mode}" for mode in modes[1:]]


def test_exported_modes_need_a_cpu_and_float32(run, capsys):
    with pytest.raises(SystemExit):
        run("control_step", "--modes", "onnx", "--dtypes", "bfloat16")
    assert "--modes onnx needs --device cpu --dtypes float32" in capsys.readouterr().err


def test_modes_with_a_graph_need_a_gpu(run, capsys):
    with pytest.raises(SystemExit):
        run("control_step", "--modes", "eager", "compiled-graphed")
    assert "--modes compiled-graphed needs --device cuda" in capsys.readouterr().err


@pytest.mark.slow  # measures
def test_training_step_continues_after_a_setting_that_does_not_fit(run, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    script = importlib.import_module("training_step")
    build = script.build_step

    def build_what_fits(preset, size, *rest):
        if size == 2 or preset == "no_flow":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return build(preset, size, *rest)

    monkeypatch.setattr(script, "build_step", build_what_fits)
    presets = ["foresight_3d", "no_flow", "grmg"]
    rows, ratios = run(
        "training_step", "--warmup", "0", "--repeats", "1", "--batches", "1", "2", "--presets", *presets
    )
    assert list(rows[0])[:10] == [
        "preset",
        "batch",
        "checkpointing",
        "compiled",
        "beside",
        "median_ms",
        "p90_ms",
        "samples_per_s",
        "gmac",
        "rate",
    ]
    fits = [
        (row["preset"], row["batch"], row["checkpointing"], row["beside"], row["rate"] != "out of memory")
        for row in rows
    ]
    assert fits == [
        ("foresight_3d", "1", "off", "", True),
        ("foresight_3d", "1", "on", "", True),
        ("foresight_3d", "2", "off", "", False),
        ("foresight_3d", "2", "on", "", False),
        ("foresight_3d", "1", "off", "no_flow", False),
        ("no_flow", "1", "off", "foresight_3d", False),
        ("foresight_3d", "1", "off", "grmg", True),
        ("grmg", "1", "off", "foresight_3d", True),
    ]
    assert list(ratios) == ["foresight_3d / grmg"] and ratios["foresight_3d / grmg"] > 0


@pytest.mark.slow  # diffusion
def test_goal_refresh_compares_the_control_step_beside_a_generator(run, goal_extra):
    rows, ratios = run("goal_refresh", "--steps", "2", "--rounds", "1", "--denoising-steps", "1")
    assert [row["way"] for row in rows] == ["alone", "process", "thread", "awaited"]
    assert list(rows[0])[:5] == ["way", "median_ms", "p90_ms", "max_ms", "goals"]
    assert rows[0]["goals"] == "0" and ratios["alone / alone"] == 1 and ratios["thread / alone"] > 0


def test_what_a_failed_call_made_is_freed(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    measure = importlib.import_module("_measure")
    freed = []

    class Model:
        def __del__(self):
            freed.append(True)

    def fail():
        model = Model()
        model.cycle = model
        raise torch.OutOfMemoryError

    assert measure.catch_out_of_memory(fail, torch.device("cpu")) is None
    assert freed == [True]
