"""Policies of finished cells in changed scenes: what is tried, resumed, refused and compared."""

import json

import pytest

from datasets_scripts.storage.atomic import write_json
from experiments import cells, robustness
from experiments.plans import load_plan
from experiments.robustness import SCENES, main
from tests.experiments.conftest import row_facts

TASKS = ["reach-v3", "plate-slide-v3"]
WEIGHTS = "a1b2"


def results_of(options):
    """As of `measure_metaworld`: all solved in plain scenes, one of two in changed ones, none in color."""
    changes, tasks = options.perturbation.changes(), options.tasks.split(",")
    solved = {} if "table_color" in changes else {10000} if changes else {10000, 10001}
    episodes = [{"task": task, "seed": s, "success": s in solved} for task in tasks for s in (10000, 10001)]
    return {
        "seeds": {"first": 10000, "last": 10001},
        "settings": {"stride": 4} | ({"perturbation": changes} if changes else {}),
        "checkpoint": {"weights_sha256": WEIGHTS},
        "tasks": dict.fromkeys(tasks),
        "mean": {"successes": sum(one["success"] for one in episodes), "episodes": len(episodes)},
        "episodes": episodes,
        "timing": {"wall_s": 360.0},
        "commit": "def",
    }


@pytest.fixture
def ablation(write_plan, tmp_path, monkeypatch):
    """A finished ablation of two policies; `tried` notes which scenes a policy was tried in."""
    path = write_plan(tasks=TASKS)
    plan, tried, folder = load_plan(path), [], tmp_path / "out"
    cells.open_results(plan, folder)

    def measure(options):
        tried.append(options)
        write_json(options.output, results_of(options))

    monkeypatch.setattr(cells, "measure_metaworld", measure)
    experts = {"noisy": [1, 0], "clean": [1, 1]}
    monkeypatch.setattr(
        "experiments.experts.measure_experts", lambda recording, *_: dict.fromkeys(recording.tasks, experts)
    )
    for cell in plan.cells():
        home = folder / "cells" / cell.name
        cells.try_policy(plan, home, ",".join(TASKS), home / "eval.json")
        row = {"success": {task: [1, 1] for task in TASKS}, "hours": 1} | row_facts(plan, trials=4)
        write_json(cells.row_path(folder, cell), row)
    tried.clear()
    command = ["--plan", str(path), "--output", str(folder), "--variants", "action_only"]
    return command, folder, tried


def test_every_policy_is_tried_once_in_every_kind_of_scenes_and_compared_pair_by_pair(
    ablation, monkeypatch, capsys
):
    command, folder, tried = ablation
    assert main([*command, "--tables"]) == 1
    assert "10 of 10 results are missing, the first is robustness/camera_2cm/" in capsys.readouterr().err
    measure = cells.measure_metaworld

    def interrupt(options):
        if len(tried) == 3:
            raise KeyboardInterrupt
        measure(options)

    with monkeypatch.context() as patch:
        patch.setattr(cells, "measure_metaworld", interrupt)
        assert main(command) == 130
    assert main([*command, "--workers", "3"]) == 0
    assert len(tried) == 2 * (len(SCENES) - 1) and tried[-1].num_envs == 3
    assert {options.tasks for options in tried if options.object_shift_m} == {"reach-v3"}
    before = {path: path.read_bytes() for path in (folder / "rows").iterdir()}
    assert main([*command, "--tables"]) == 0 and len(tried) == 10
    assert before == {path: path.read_bytes() for path in (folder / "rows").iterdir()}

    results = json.loads((folder / "robustness" / "results.json").read_text())
    scenes = results["scenes"]
    assert list(scenes) == list(SCENES)
    assert scenes["unchanged"]["variants"]["action_only"]["success_rate"] == 1.0
    moved = scenes["camera_5cm"]
    assert (moved["changes"], moved["tasks"]) == ({"camera_shift_m": 0.05}, TASKS)
    assert moved["variants"]["foresight_3d"]["loss"]["mean"] == 0.5
    (pair,) = moved["differences"]
    assert (pair["first"], pair["second"], pair["mean"]) == ("foresight_3d", "action_only", 0.0)
    assert pair["loss"]["ci95"] == pytest.approx([-1.96 / 6, 1.96 / 6], abs=1e-3)  # four pairs that agree
    assert scenes["table_color"]["variants"]["action_only"]["loss"]["mean"] == 1.0
    displaced = scenes["objects_5cm_nearer"]
    assert (displaced["tasks"], displaced["experts"]["noisy"]) == (["reach-v3"], 0.5)
    assert (results["hours"], results["commit"], results["tried_with_commit"]) == (1.0, "abc", "def")
    text = (folder / "robustness" / "tables.md").read_text()
    assert "| camera_5cm | action_only | 2/4 | 50.0 |" in text
    assert "| table_color | foresight_3d - action_only | +0.0 |" in text


def test_results_of_other_scenes_or_weights_are_refused_and_kept(ablation, monkeypatch, capsys):
    command, folder, _ = ablation
    assert main(command) == 0
    found = next((folder / "robustness" / "camera_2cm").glob("action_only*"))
    kept = found.read_bytes()
    with monkeypatch.context() as patch:
        patch.setitem(robustness.SCENES, "camera_2cm", SCENES["camera_5cm"])
        assert main(command) == 1
    assert "was measured with settings.perturbation {'camera_shift_m': 0.02}, not" in capsys.readouterr().err
    assert found.read_bytes() == kept
    write_json(found, json.loads(kept) | {"checkpoint": {"weights_sha256": "other"}})
    assert main(command) == 1
    assert f"{found} was measured with weights other, not {WEIGHTS}" in capsys.readouterr().err


def test_unfinished_cells_and_what_the_plan_does_not_have_are_named_before_any_trial(
    ablation, write_plan, capsys
):
    command, folder, tried = ablation
    for given, words in (
        (["--variants", "foresight_2d"], "--variants has foresight_2d, which the plan does not: choose from"),
        (["--demonstrations", "7"], "--demonstrations has 7, which the plan does not: choose from 2"),
    ):
        assert main([*command, *given]) == 1
        assert words in capsys.readouterr().err
    write_plan(tasks=TASKS, steps=3)
    assert main(command) == 1
    assert "steps: 2 there, 3 here" in capsys.readouterr().err
    write_plan(tasks=TASKS, seeds=[0, 1])
    assert main(command) == 1
    assert "2 of 4 cells are not finished: foresight_3d-steps-2demos-seed1" in capsys.readouterr().err
    write_plan(tasks=["plate-slide-v3"])
    assert main([*command, "--output", str(folder / "none")]) == 1
    assert "none holds no results: run its cells first" in capsys.readouterr().err
    assert not tried and not (folder / "robustness").exists() and not (folder / "none").exists()
