"""Tables of finished cells that were copied from the machine that ran them: no data, no models."""

import json

import pytest

from datasets_scripts.storage.atomic import write_json
from experiments.ablation import main
from experiments.cells import open_results, row_path
from experiments.plans import load_plan
from experiments.tables import loss_form
from tests.experiments.conftest import row_facts

VARIANTS = {"foresight_3d": None, "foresight_2d": None, "action_only": None}
SOLVED = {"foresight_3d": [1, 1], "foresight_2d": [1, 0], "action_only": [0, 0]}
LOSSES = {
    "foresight_3d": {"action": 0.2, "depth": 0.4, "future": 0.5, "flow": 0.01, "total": 1.0},
    "foresight_2d": {"action": 0.3, "future": 0.6, "flow": 0.02, "total": 1.0},
    "action_only": {"action": 0.25, "total": 0.25},
}


@pytest.fixture
def copied(write_plan, tmp_path):
    """Finished cells of two seeds, two numbers of demonstrations and two budgets: command, folder, plan."""
    settings = {"variants": VARIANTS, "seeds": [0, 1], "demonstrations": [2, 3], "budgets": ["steps", "time"]}
    path, folder = write_plan(**settings, losses=["depth", "future", "flow"]), tmp_path / "out"
    plan = load_plan(path)
    open_results(plan, folder)
    write_json(folder / "clock.json", {name: {"steps": plan.steps} for name in VARIANTS})
    write_json(folder / "depth_motion.json", {"drawer-open-v3": 0.3})
    for cell in plan.cells():
        losses = {name: value + cell.seed / 100 for name, value in LOSSES[cell.variant].items()}
        if cell.variant == "action_only":
            losses["action"] += cell.seed / 10  # the difference is 0.05 with one seed, 0.15 with the other
        row = {"success": {"drawer-open-v3": SOLVED[cell.variant]}, "hours": 0.5}
        row |= {"validation": {"losses": losses}, **row_facts(plan, trials=2)}
        write_json(row_path(folder, cell), row | {"hardware": {"cpu": f"cpu {cell.seed}"}})
    return ["--plan", str(path), "--output", str(folder), "--tables"], folder, plan


def test_copied_rows_give_tables_with_differences_of_losses_of_one_form(copied, capsys):
    command, folder, _ = copied
    assert main(command) == 0
    results = json.loads((folder / "results.json").read_text())
    losses = results["validation_losses"]["time"]["3"]
    difference = losses["action_only"]["action"]["difference"]
    assert difference["mean"] == pytest.approx(0.1)
    # Student's t with one degree of freedom: 12.706 times the standard error of 0.05
    assert difference["ci95"] == pytest.approx([0.1 - 12.706 * 0.05, 0.1 + 12.706 * 0.05], abs=1e-3)
    assert losses["foresight_2d"]["flow"]["mean"] == pytest.approx(0.025)
    for name in ("flow", "future"):
        assert "difference" not in losses["foresight_2d"][name], "2D and 3D are different losses"
    assert "total" not in losses["foresight_3d"]
    assert results["training"]["steps"]["2"]["action_only"]["cpu_minutes"] == [0.02, 0.02]
    assert results["hardware"] == [{"cpu": "cpu 0"}, {"cpu": "cpu 1"}] and results["command"] == "made"
    told = capsys.readouterr().out
    assert "| action_only | 0.305 | +0.1 (-0.54 to +0.74) |" in told
    assert "One training seed" not in told


def test_the_same_starts_with_other_numbers_of_demonstrations_are_no_further_starts(copied):
    command, folder, _ = copied
    assert main(command) == 0
    tables = json.loads((folder / "results.json").read_text())["success"]["steps"]
    pooled, single = (tables[name]["variants"]["foresight_2d"] for name in ("pooled", "2"))
    assert (pooled["episodes"], single["episodes"]) == (8, 4)
    assert pooled["ci95"] == single["ci95"] == [0.0, 1.0], "one of two starts is solved, always the same one"


def test_tables_are_of_the_settings_that_the_cells_were_made_with(copied, write_plan, capsys):
    command, folder, plan = copied
    settings = {"variants": VARIANTS, "seeds": [0, 1], "demonstrations": [2, 3]}
    write_plan(**settings, steps=9999)
    assert main(command) == 1
    assert "steps: 2 there, 9999 here" in capsys.readouterr().err
    write_plan(**settings)
    row = row_path(folder, plan.cells()[0])
    kept = json.loads(row.read_text())
    write_json(row, kept | {"trials": 20})
    assert main(command) == 1
    assert f"{row} was made with other settings (trials: 20 there, 2 here)" in capsys.readouterr().err
    write_json(row, kept)
    (folder / "depth_motion.json").unlink()
    assert main(command) == 1
    assert "depth_motion.json is missing, and so are the demonstrations in" in capsys.readouterr().err
    assert not (folder / "results.json").exists() and not (folder / "tables.md").exists()


def test_a_form_that_a_config_leaves_out_is_the_default():
    named, left_out = {"objectives": ["depth"], "depth_form": "normalized"}, {"objectives": ["depth"]}
    assert loss_form(named, "depth") == loss_form(left_out, "depth")
    assert loss_form(named | {"depth_form": "metric"}, "depth") != loss_form(left_out, "depth")
