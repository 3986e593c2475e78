"""MT50: its one row, its groups, the experts beside it."""

import json

import pytest

from experiments import mt50
from experiments.cells import open_results
from experiments.mt50 import build_mt50, check_one_row, main
from experiments.plans import load_plan
from tests.experiments.conftest import row_facts

PUSHES = ["push-v3", "push-back-v3", "reach-v3"]


@pytest.fixture
def rows_of(tmp_path, monkeypatch):
    """Writes rows and outcomes of experts, as if they had been measured."""

    def write(plan, outcomes):
        (cell,) = plan.cells()
        trials = sum(map(len, outcomes.values()))
        row = {"success": outcomes, "parameters": 7, "hours": 1.5} | row_facts(plan, trials)
        path = tmp_path / "rows" / f"{cell.name}.json"
        path.parent.mkdir()
        path.write_text(json.dumps(row))
        experts = {task: {"noisy": [1, 0], "clean": [1, 1]} for task in plan.tasks}
        monkeypatch.setattr(mt50, "run_experts", lambda plan, folder, only_read: experts)
        return tmp_path

    return write


def test_the_mean_is_over_tasks_and_groups_are_those_of_lerobot(write_plan, rows_of):
    plan = load_plan(write_plan(tasks=PUSHES, variants={"foresight_3d": {}}, demonstrations=[50]))
    folder = rows_of(plan, {"push-v3": [1, 1], "push-back-v3": [0, 1], "reach-v3": [0, 0]})
    found = build_mt50(plan, folder, only_read=True)
    assert found["success_rate"] == 0.5
    assert (found["successes"], found["episodes"], found["tasks"]["push-back-v3"]["successes"]) == (3, 6, 1)
    assert {name: group["success_rate"] for name, group in found["groups"].items()} == {
        "easy": 0.0,
        "hard": 0.75,
    }
    # Wilson of 3 in 6: half = z / (1 + z^2/n) sqrt(p (1 - p) / n + z^2 / 4n^2) around 1/2.
    half = 1.96 / (1 + 1.96**2 / 6) * (0.25 / 6 + 1.96**2 / 144) ** 0.5
    assert found["ci95"] == pytest.approx([0.5 - half, 0.5 + half], abs=1e-3)
    assert found["shared_instructions"] == {"Push the puck to a goal": ["push-v3", "push-back-v3"]}
    assert (found["experts_noisy"], found["experts"]["clean"]["success_rate"]) == (0.5, 1.0)
    assert (found["row"], found["hours"], found["commit"]) == ("at most 50 a task", 1.5, "abc")
    assert "| push-v3 | 2/2 | 100.0 |" in mt50.format_mt50(found)


def test_more_demonstrations_than_the_public_dataset_are_said(write_plan, rows_of):
    plan = load_plan(write_plan(tasks=PUSHES, variants={"foresight_3d": {}}, demonstrations=[51]))
    folder = rows_of(plan, {task: [1, 1] for task in PUSHES})
    assert build_mt50(plan, folder, only_read=True)["row"].startswith("more scripted demonstrations")


def test_an_unfinished_row_and_a_plan_of_two_rows_are_named(write_plan, tmp_path, capsys):
    path = write_plan(variants={"foresight_3d": {}})
    command = ["--plan", str(path), "--output", str(tmp_path / "out"), "--tables"]
    assert main(command) == 1
    assert "out holds no results: run its cells first" in capsys.readouterr().err
    open_results(load_plan(path), tmp_path / "out")
    assert main(command) == 1
    assert "1 of 1 cells are not finished: foresight_3d-steps" in capsys.readouterr().err
    with pytest.raises(ValueError, match="one row"):
        check_one_row(load_plan(write_plan()))


def test_experts_are_measured_once_and_only_under_the_same_settings(
    simulator, write_plan, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(mt50, "EXPERT_STARTS", 1)
    plan = {"variants": {"foresight_3d": {}}, "tasks": ["reach-v3"], "max_steps": 500}
    command = ["--plan", str(write_plan(**plan)), "--output", str(tmp_path / "out"), "--experts"]
    assert main(command) == 0
    assert "reach-v3: with noise 1/1, without 1" in capsys.readouterr().out
    monkeypatch.setattr("experiments.experts.try_expert", None)
    assert main(command) == 0
    write_plan(**plan, recording={"noise": 0.5})
    assert main(command) == 1
    assert "recording.noise: 0.0 there, 0.5 here" in capsys.readouterr().err
