# ruff: noqa: F401, F811  (fixtures of another file)
"""A rehearsal tells what a run takes and leaves none."""

from tests.training.test_train import config_file, dataset, fresh_accelerate
from training.config import load_config
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
