import csv
import importlib
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("depth_sources")


def test_a_source_is_measured_on_a_clip_that_is_decoded(script, tmp_path, capsys):
    output = tmp_path / "a" / "depth.csv"
    size = ["--frames", "5", "--image-size", "64", "80"]
    script.main(["--small", "--device", "cpu", *size, "--output", str(output)])
    with open(output, newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["model"], row["frames"], row["height"]) == ("depth-anything-v2-tiny", "5", "64")
    assert float(row["frames_per_s"]) > 0 and 0 < float(row["forward_share"]) <= 1 and row["machine"]
    assert list(json.loads(capsys.readouterr().out.splitlines()[-1])) == ["depth-anything-v2-tiny"]


def test_unknown_models_are_refused(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--models", "depth-anything-v2-huge"])
    assert "unknown model depth-anything-v2-huge" in capsys.readouterr().err
