# ruff: noqa: F401, F811  (fixtures of another file)
"""Pictures of predictions in training: of a view that the data have, or refused before the first step."""

import sys

import pytest

from tests.training.test_train import config_file, dataset, fresh_accelerate, run
from training.config_reading import load_config
from training.loop import train

FEW = ["--train.steps", "2", "--train.warmup_steps", "0", "--train.picture_every", "1"]


@pytest.mark.parametrize("elsewhere", [True, False])
def test_the_picture_is_of_a_view_that_a_dataset_has(config_file, dataset, tmp_path, elsewhere):
    other = "" if elsewhere else ", cameras: {front: null}"
    mixture = f"[{{path: {dataset}, cameras: {{front: null}}}}, {{path: {dataset}{other}}}]"
    flags = [*FEW, "--data.datasets", mixture, "--model.objectives", "[depth, progress]"]
    assert train(load_config(config_file, [*flags, "--output", str(tmp_path / "run")]), False) == 0
    assert [path.name for path in (tmp_path / "run" / "pictures").iterdir()] == ["step-0000001.png"]


def test_pictures_without_matplotlib_are_refused_before_any_work(config_file, dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"train.picture_every: .*matplotlib.*\[viz\].*set it to 0"):
        run(config_file, dataset, tmp_path / "run", *FEW)
    assert not (tmp_path / "run").exists()
