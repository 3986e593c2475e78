import importlib
import json
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_an_episode_is_recorded_annotated_and_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    script = importlib.import_module("annotation")
    script.main(["--minutes=0.02", "--image-size=64", "--n-points=60", f"--folder={tmp_path}"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["frames"] == 36 and figures["frames_per_s"] > 0 and 0 < figures["moving_share"] < 1
    assert (tmp_path / "annotated/meta/foresight.json").exists()
