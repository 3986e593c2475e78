import importlib
import json
import sys
from pathlib import Path

import pytest

from tests.synthetic import make_dataset

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow  # a benchmark, which people run
def test_last_line_is_one_json_object_and_bad_datasets_are_one_message(tmp_path, monkeypatch, capsys):
    root = make_dataset(tmp_path / "ds", episodes=2, frames=9).root
    common = [
        "loader.py",
        "--windows",
        "4",
        "--rounds",
        "2",
        "--grid",
        "4",
        "--cache",
        str(tmp_path / "cache"),
    ]
    monkeypatch.setattr(sys, "argv", [*common, "--dataset", str(root)])
    monkeypatch.syspath_prepend(FOLDER)
    script = importlib.import_module("loader")
    assert script.main() == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["windows"] == 14 and figures["windows_per_s"]["stock"] > 0
    assert set(figures["time_with_labels_to_without"]) == {
        *("cached", "cached_prepared", "on_demand", "on_demand_prepared")
    }
    monkeypatch.setattr(sys, "argv", [*common, "--dataset", str(tmp_path / "no" / "ds")])
    assert script.main() == 1
    assert capsys.readouterr().err.startswith("error: dataset")
