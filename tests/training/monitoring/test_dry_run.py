# ruff: noqa: F401, F811  (fixtures of another file)
"""A rehearsal tells what a run takes and leaves none."""

import pytest

from tests.training.test_train import config_file, dataset, fresh_accelerate, spoil_step
from training.config_reading import load_config
from training.loop import dry_run


def test_a_dry_run_prints_shapes_memory_and_time_and_leaves_no_run(config_file, dataset, tmp_path, capsys):
    flags = ["--dataset", str(dataset), "--output", str(tmp_path / "run"), "--train.steps", "20000"]
    assert dry_run(load_config(config_file, [*flags, "--train.gradient_accumulation_steps", "2"])) == 0
    printed = capsys.readouterr().out
    assert "a micro-batch of this process, 2 a step" in printed
    assert "pixel_values           float32  (2, 3, 2, 3, 32, 32)" in printed
    assert "memory: weights 0.000" in printed and "20000 steps take about " in printed
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "tiny.yaml"}
    assert not (tmp_path / "cache" / "frames").exists()


def test_a_dry_run_that_diverges_leaves_the_checkpoints_of_the_run_and_says_that_it_saved_nothing(
    config_file, dataset, tmp_path, monkeypatch
):
    kept = {tmp_path / "run" / "checkpoints" / f"step-{step:07d}" / "model" for step in (400, 500)}
    for file in kept:
        file.parent.mkdir(parents=True)
        file.write_text("hours of work")
    spoil_step(monkeypatch, 2)
    flags = ["--dataset", str(dataset), "--output", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="not finite at step 2 of the dry run, .* Nothing of a dry run is"):
        dry_run(load_config(config_file, flags))
    assert {path for path in (tmp_path / "run").rglob("*") if path.is_file()} == kept


def test_a_run_of_one_step_can_be_rehearsed(config_file, dataset, tmp_path, capsys):
    flags = ["--dataset", str(dataset), "--output", str(tmp_path / "run")]
    assert dry_run(load_config(config_file, [*flags, "--train.steps=1", "--train.warmup_steps=0"])) == 0
    assert "1 steps take about " in capsys.readouterr().out
