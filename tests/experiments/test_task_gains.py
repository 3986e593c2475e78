"""Gains by task between two results: figures, picture, what cannot be compared."""

import json

import pytest

from experiments.task_gains import main, success_gains


def results(successes, **changes):
    """Results of `evaluate.py` with 20 tries of each task."""
    tasks = {t: {"success_rate": s / 20, "successes": s, "episodes": 20} for t, s in successes.items()}
    settings = {"max_steps": 360, "environment": "D"}
    return {"benchmark": "CALVIN", "settings": settings, "tasks": tasks, **changes}


BASE = results({"stack_block": 10, "open_drawer": 20, "lift_red_block_slider": 4, "push_into_drawer": 1})
OTHER = results({"stack_block": 9, "open_drawer": 20, "lift_red_block_slider": 16})


def test_the_largest_gain_is_first_and_tasks_that_one_never_tried_are_left_out():
    rows = success_gains(BASE, OTHER)
    assert [row["task"] for row in rows] == ["lift_red_block_slider", "open_drawer", "stack_block"]
    assert [row["gain"] for row in rows] == pytest.approx([0.6, 0, -0.05])
    # Agresti and Caffo: 5 and 17 of 22.
    assert rows[0]["ci95"] == pytest.approx([0.2978, 0.7931], abs=1e-4)


def test_the_command_draws_and_prints_the_gains(tmp_path, capsys):
    for name, content in (("2d", BASE), ("3d", OTHER)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    places = [str(tmp_path / "2d.json"), str(tmp_path / "3d.json"), "--output", str(tmp_path / "gains.png")]
    assert main(places) == 0
    printed = capsys.readouterr().out
    assert "lift_red_block_slider: +60.0 points (+29.8 to +79.3), 20.0% of 20 tries to 80.0% of 20" in printed
    assert (tmp_path / "gains.png").read_bytes().startswith(b"\x89PNG")
    assert main([places[0], str(tmp_path / "none.json")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_the_picture_has_the_format_of_its_name_and_others_are_refused(tmp_path, capsys):
    place = tmp_path / "2d.json"
    place.write_text(json.dumps(BASE))
    assert main([str(place), str(place), "--output", str(tmp_path / "gains.pdf")]) == 0
    assert (tmp_path / "gains.pdf").read_bytes().startswith(b"%PDF")
    assert main([str(place), str(place), "--output", str(tmp_path / "gains.txt")]) == 1
    assert "its name must end in .png, .pdf, .svg" in capsys.readouterr().err
    assert not (tmp_path / "gains.txt").exists()


@pytest.mark.parametrize("content", [{}, BASE | {"tasks": {"stack_block": 3}}, {"tasks": BASE["tasks"]}])
def test_a_file_of_something_else_is_named_in_one_line(tmp_path, capsys, content):
    for name, what in (("2d", BASE), ("other", content)):
        (tmp_path / f"{name}.json").write_text(json.dumps(what))
    assert main([str(tmp_path / "2d.json"), str(tmp_path / "other.json")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "other.json has no success rates by task" in error


def test_the_same_generator_of_goals_may_have_two_names():
    def drawn(name, steps):
        goals = {"name": name, "sha256": "12ab", "sampling": {"steps": steps}}
        return {"settings": BASE["settings"] | {"goal_generator": goals}}

    assert success_gains(BASE | drawn("base", 50), OTHER | drawn("copy", 50))
    with pytest.raises(ValueError, match="goal_generator.sampling.steps: 50 there, 9 here$"):
        success_gains(BASE | drawn("base", 50), OTHER | drawn("copy", 9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmark": "LIBERO"}, "of different benchmarks: CALVIN and LIBERO"),
        (
            {"settings": {"environment": "D", "max_steps": 100}},
            r"different settings .*: max_steps: 360 there, 100 here$",
        ),
        ({"settings": {"environment": "D"}}, "different settings .*: max_steps: 360 there, None here$"),
        ({"tasks": {}}, "no task in common"),
    ],
)
def test_results_that_cannot_be_compared_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        success_gains(BASE, OTHER | changes)
