"""An ablation as a user runs it: killed, resumed, its tables, and what it refuses."""

import json
import signal
from pathlib import Path

import pytest

import training.loop
from experiments.ablation import main

PRETRAINING = {"pretraining": "training/configs/pretrain_small.yaml", "pretrained": ["foresight_3d"]}
SAMPLE = Path(__file__).resolve().parents[2] / "hub_cards" / "sample_data" / "metaworld"
CELLS = ("foresight_3d-steps-2demos-seed0-drawer-open-v3", "action_only-steps-2demos-seed0-drawer-open-v3")


@pytest.mark.slow  # trains and is killed twice
def test_a_plan_that_is_killed_twice_resumes_and_ends_in_tables(
    write_plan, local_pool, tmp_path, monkeypatch, capsys
):
    command = ["--plan", str(write_plan()), "--output", str(tmp_path / "out")]
    check_step, rows = training.loop.check_step, tmp_path / "out" / "rows"

    def kill_in_the_first_step(run, step, *rest):
        signal.raise_signal(signal.SIGTERM)
        return check_step(run, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("training.loop.check_step", kill_in_the_first_step)
        assert main(command) == 128 + signal.SIGTERM
    assert not rows.exists()

    def interrupt_the_second_cell(self, *_):
        if (rows / f"{CELLS[0]}.json").exists():
            raise KeyboardInterrupt
        return step(self, *_)

    step = local_pool.step
    with monkeypatch.context() as patch:
        patch.setattr(local_pool, "step", interrupt_the_second_cell)
        assert main(command) == 130
    assert "continuing from step 1" in capsys.readouterr().out
    first = (rows / f"{CELLS[0]}.json").stat().st_mtime_ns
    assert main([*command, "--tables"]) == 1
    assert f"error: 1 of 2 cells are not finished: {CELLS[1]}" in capsys.readouterr().err

    assert main(command) == 0
    told = capsys.readouterr().out
    assert "holds this finished run" in told, "the second cell was trained again"
    assert f"[2/2] {CELLS[1]}: " in told
    assert (rows / f"{CELLS[0]}.json").stat().st_mtime_ns == first
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    table = results["success"]["steps"]["2"]
    assert table["variants"]["action_only"]["episodes"] == 2
    assert (
        results["episodes"] == results["success_by_task"]["drawer-open-v3"]["foresight_3d"]["episodes"] == 2
    )
    (difference,) = table["differences"]
    assert (difference["first"], difference["second"]) == ("foresight_3d", "action_only")
    losses = results["validation_losses"]["steps"]["2"]
    assert losses["foresight_3d"].keys() == {"action", "depth", "flow"}
    assert losses["action_only"].keys() == {"action"}
    assert losses["action_only"]["action"]["difference"]["ci95"] is None, "one seed"
    assert results["training"]["steps"]["2"]["action_only"]["steps"] == 2
    assert 0 < results["depth_motion"]["steps"]["share_in_depth"]["drawer-open-v3"] < 1
    assert results["commit"] and results["command"] and results["hours"] >= 0
    assert "| action_only |" in (tmp_path / "out" / "tables.md").read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 3}, "steps: 2 there, 3 here"),
        ({"episodes": 3}, "episodes: 2 there, 3 here"),
        (
            {"variants": {"foresight_3d": {"flow_loss_weight": 0.5}}},
            "variants.foresight_3d.model.flow_loss_weight: 0.1 there, 0.5 here",
        ),
    ],
)
def test_changed_settings_are_refused_and_change_nothing(changes, words, write_plan, tmp_path, capsys):
    from experiments.cells import open_results
    from experiments.plans import load_plan

    folder = tmp_path / "out"
    open_results(load_plan(write_plan()), folder)
    before = (folder / "plan.json").read_bytes()
    assert main(["--plan", str(write_plan(**changes)), "--output", str(folder)]) == 1
    assert words in capsys.readouterr().err
    assert (folder / "plan.json").read_bytes() == before


def test_seeds_and_variants_may_be_added_and_left_out(write_plan, tmp_path):
    from experiments.cells import open_results
    from experiments.plans import load_plan

    for changes in ({}, {"variants": {"foresight_3d": {}, "no_flow": {}}, "seeds": [0, 1]}, {}):
        open_results(load_plan(write_plan(**changes)), tmp_path / "out")
    assert "variants/no_flow/seed" in json.loads((tmp_path / "out" / "plan.json").read_text())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": ["draw-open-v3"]}, "unknown MetaWorld task 'draw-open-v3'"),
        ({"plan.speed is unknown": 1}, "plan.speed is unknown"),
        ({"reference": "grmg"}, "reference is 'grmg', which is not among the variants"),
        ({"variants": {"foresight_3d": {}, "foresight_4d": {}}}, "variants.foresight_4d is not a preset"),
        (
            {"variants": {"foresight_3d": {"objectives": ["depth"]}}},
            "variants.foresight_3d has no action objective",
        ),
        ({"losses": ["speed"]}, "no variant is trained with that objective"),
        ({"budgets": ["hours"]}, "use steps and time"),
        ({"recording": {"resolution": 1}}, "recording.resolution is unknown"),
        ({"overrides": {"train.batchsize": 2}}, "train.batchsize is unknown"),
        ({"seeds": [0, 0]}, "each of them once"),
        ({"seeds": "all"}, "plan.seeds is 'all'"),
        ({"config": "training/configs/none.yaml"}, "does not exist"),
        ({"simulator": "robosuite"}, "simulator is 'robosuite'; use metaworld or libero"),
        ({"pretrained": ["foresight_3d"]}, "pretraining is None and pretrained is ['foresight_3d']"),
        ({"pretraining": "training/configs/pretrain_small.yaml"}, "and pretrained is []"),
        ({**PRETRAINING, "pretrained": ["foresight_2d"]}, "and pretrained is ['foresight_2d']"),
        ({**PRETRAINING, "pretraining": "training/configs/none.yaml"}, "none.yaml does not exist"),
        ({**PRETRAINING, "pretraining_overrides": {"train.epoch": 2}}, "train.epoch is unknown"),
    ],
)
def test_a_wrong_plan_is_one_line_before_any_work(changes, words, write_plan, tmp_path, capsys):
    assert main(["--plan", str(write_plan(**changes)), "--output", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ") and words in told and told.count("\n") == 1, told
    assert not (tmp_path / "out").exists()


def test_a_missing_plan_names_those_that_exist(tmp_path, capsys):
    assert main(["--plan", str(tmp_path / "none.yaml")]) == 1
    assert "ablation.yaml, ablation_longer.yaml, libero_object.yaml, mt50.yaml" in capsys.readouterr().err


@pytest.mark.slow
def test_pretraining_gives_each_seed_its_start_once(write_plan, local_pool, tmp_path, monkeypatch, capsys):
    overrides = {
        "data.datasets": [{"path": str(SAMPLE)}],
        "data.baseline_windows": 4,
        "model.image_size": 32,
        "model.vision_config.model_args.img_size": 32,
        "train.epochs": 0.04,
        "train.warmup_epochs": 0.02,
        "train.batch_size": 2,
    }
    variants = {"variants": {"foresight_3d": {"flow_form": "displacement"}, "action_only": None}}
    plan = write_plan(**PRETRAINING, **variants, pretraining_overrides=overrides)
    command = ["--plan", str(plan), "--output", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr("training.loop.check_step", lambda *_: signal.raise_signal(signal.SIGTERM))
        assert main(command) == 128 + signal.SIGTERM
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "continuing from step 1" in told and "seed0/model starts fresh: action_decoder" in told
    first, second = (json.loads((tmp_path / "out" / "rows" / f"{cell}.json").read_text()) for cell in CELLS)
    assert first["pretraining"]["steps"] == 4 and second["pretraining"] == {}
    summary = json.loads((tmp_path / "out" / "cells" / CELLS[0] / "training" / "summary.json").read_text())
    assert summary["init_from"] == "model"  # of seed 0, outside of this test's working directory
    assert json.loads((tmp_path / "out" / "results.json").read_text())["pretraining_hours"] >= 0
    assert "**Motion in depth" in told, "3D Foresight against the action alone"
    changed = write_plan(**PRETRAINING, **variants, pretraining_overrides=overrides | {"train.epochs": 0.05})
    assert main(["--plan", str(changed), "--output", str(tmp_path / "out")]) == 1
    assert "pretraining.train.epochs: 0.04 there, 0.05 here" in capsys.readouterr().err
