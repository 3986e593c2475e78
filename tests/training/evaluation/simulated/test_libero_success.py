"""Success in LIBERO: suites, limits and starts of the protocol, the paper's table, and what is refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from datasets_scripts.simulation import libero_files
from datasets_scripts.simulation.libero_files import SUITES
from modeling_foresight import ForesightForActionPrediction
from tests.simulators import CommandPool
from tests.tiny import tiny_config, tiny_processor
from training import diagnose, evaluate
from training.evaluation.simulated.libero_success import make_libero, suite_table

TASKS = {suite: [f"{suite}_{number}" for number in range(10)] for suite in SUITES}


def save_policy(folder, **overrides):
    sizes = {"action_dim": 7, "binary_action_indices": (6,), "state_dim": 7, "binary_state_indices": (6,)}
    config = tiny_config(**{**sizes, "fps": 20, **overrides})
    torch.manual_seed(0)
    ForesightForActionPrediction(config).save_pretrained(folder)
    tiny_processor(config).save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command with fake simulators; gives the exit code, the output and the results."""
    monkeypatch.setattr(libero_files, "_load_tasks", lambda: TASKS)

    class Pool(CommandPool):
        notes = SimpleNamespace(opened=None, used=[])

        def step(self, worker, action, repeat):
            assert repeat == 1
            super().step(worker, action, repeat)

        def receive(self, worker):
            seen = super().receive(worker)
            return {**seen, "state": np.zeros(7, np.float32), "simulation_steps": seen["state"][1].item()}

    monkeypatch.setattr("training.evaluation.simulated.simulation_pool.SimulationPool", Pool)
    output = tmp_path / "eval.json"

    def run(*options, checkpoint, command=evaluate):
        arguments = ["--benchmark", "libero", "--checkpoint", str(checkpoint), "--output", str(output)]
        code = command.main([*arguments, *options])
        results = json.loads(output.read_text()) if output.exists() else None
        return SimpleNamespace(code=code, results=results, **capsys.readouterr()._asdict())

    run.notes = Pool.notes
    return run


def test_a_suite_is_tried_from_its_own_starts_and_reported_as_in_the_paper(run, tmp_path):
    goal = {"suites": {"libero_goal": {"success_rate": 0.948}}, "settings": {}}
    goal["tasks"] = [f"libero_goal/{number}" for number in range(10)]
    (tmp_path / "goal.json").write_text(json.dumps(goal))
    done = run(
        *("--suite", "libero_object,libero_10", "--tasks", "0", "3", "--episodes", "3", "--seed", "7"),
        *("--max-steps", "4", "--others", str(tmp_path / "goal.json")),
        checkpoint=save_policy(tmp_path / "model"),
    )
    assert done.code == 0, done.err
    results = done.results
    assert list(results["tasks"])[::3] == ["libero_object/libero_object_0", "libero_10/libero_10_3"]
    # The stand-in succeeds after seed % 7 steps, and never from 7.
    assert results["suites"]["libero_object"]["successes"] == 4 and results["mean"]["episodes"] == 12
    assert [e["seed"] for e in results["episodes"][:4]] == [7, 8, 9, 7]
    assert results["settings"]["max_steps"] == {"libero_object": 4, "libero_10": 4}
    assert (run.notes.opened["form"], run.notes.opened["first_seed"]) == ("converted", 7)
    assert results["benchmark"] == "LIBERO" and results["settings"]["control_hz"] == 20
    table = ["| Spatial | Object | Goal | Long | Avg. SR |", "| --- | --- | --- | --- | --- |"]
    table.append("| - | 66.7 | 94.8 | 66.7 | - |")
    table.append("Not whole: libero_10: 2 of its 10 tasks, libero_object: 2 of its 10 tasks")
    assert done.out.rstrip().endswith("\n".join(table))


def test_limits_and_episodes_are_those_of_the_protocol(run, tmp_path, monkeypatch):
    seen = {}

    def stopped(stream, pool, trials, stride, max_steps, *more, **options):
        seen.update(trials=trials, limits=max_steps)
        raise KeyboardInterrupt

    monkeypatch.setattr("training.evaluation.simulated.closed_loop.run_episodes", stopped)
    done = run("--suite", "libero_spatial,libero_10", checkpoint=save_policy(tmp_path / "model"))
    assert done.code == 130
    assert len(seen["trials"]) == 1000 and seen["trials"][0] == ("libero_spatial/libero_spatial_0", 1000)
    assert set(seen["limits"].values()) == {280, 520}


@pytest.mark.parametrize("judge", ["named", "scene"])
def test_a_policy_is_told_another_task_of_the_scene_and_judged_by_one_of_the_two(
    run, tmp_path, monkeypatch, judge
):
    first, other = (f"libero_object/libero_object_{number}" for number in (0, 1))
    monkeypatch.setattr(
        "training.evaluation.simulated.libero_success.libero_partners", lambda tasks: {first: other}
    )
    made = {}
    monkeypatch.setattr(
        "training.evaluation.simulated.libero_success.LiberoSim", lambda task, **options: made.update(options)
    )
    options = ("--suite", "libero_object", "--episodes", "1", "--max-steps", "2", "--other-task", judge)
    done = run(*options, checkpoint=save_policy(tmp_path / "model"))
    assert done.code == 0, done.err
    assert list(done.results["tasks"]) == [first], "the others have no partner"
    settings = done.results["settings"]
    assert (settings["change"], settings["named_tasks"]) == (f"other_task_{judge}", {first: other})
    make_libero(first, **run.notes.opened)
    assert (made["told"], made["judged"]) == (other, other if judge == "named" else None)


def test_a_diagnosis_judges_both_tasks_and_limits_are_those_of_the_suite(run, tmp_path, monkeypatch):
    first, other = (f"libero_object/libero_object_{number}" for number in (0, 1))
    for place in ("diagnostics.benchmarks", "evaluation.simulated.libero_success"):
        monkeypatch.setattr(f"training.{place}.libero_partners", lambda tasks: {first: other})
    checkpoint = save_policy(tmp_path / "model")
    options = ("--suite", "libero_object", "--tasks", "0", "2", "--episodes", "2", "--seed", "5")
    done = run(*options, "--only", "named_task", "other_instruction", checkpoint=checkpoint, command=diagnose)
    assert done.code == 0, done.err
    loop = done.results["closed_loop"]
    assert list(loop) == ["plain", "other_instruction", "named_task"]
    assert [list(one["tasks"]) for one in loop.values()] == [[first, first[:-1] + "2"], [first], [first]]
    assert loop["named_task"]["plain_successes"] == loop["plain"]["tasks"][first]
    assert done.results["scene_partners"] == {first: other}
    assert done.results["settings"]["max_steps"] == {"libero_object": 280}
    kept = json.loads((tmp_path / "eval" / "named_task.json").read_text())["settings"]
    assert (kept["change"], kept["named_tasks"]) == ("named_task", {first: other})
    limited = run(*options, "--max-steps", "9", checkpoint=checkpoint, command=diagnose)
    assert limited.code == 1 and "(settings.max_steps.libero_object: 280 there, 9 here)" in limited.err


def test_the_paper_s_mean_needs_all_four_suites():
    rates = {"libero_spatial": 0.964, "libero_object": 0.98, "libero_goal": 0.948, "libero_10": 0.92}
    results = [
        {"suites": {suite: {"success_rate": rate}}, "tasks": [f"{suite}/{number}" for number in range(10)]}
        for suite, rate in rates.items()
    ]
    assert suite_table(results).splitlines()[-1] == "| 96.4 | 98.0 | 94.8 | 92.0 | 95.3 |"


@pytest.mark.parametrize(
    ("options", "policy", "message"),
    [
        (["--suite", "libero_objects"], {}, "did you mean libero_object"),
        (["--tasks", "11"], {}, "11 is not one of them"),
        (["--other-task", "named"], {}, "no scene of libero_object has what another of its tasks is about"),
        (["--others", "nowhere.json"], {}, "nowhere.json"),
        ([], {"views": ("main",)}, "needs the wrist view"),
        ([], {"state_dim": 4, "binary_state_indices": ()}, "state_dim 4"),
        ([], {"action_dim": 4, "binary_action_indices": ()}, "action_dim 4"),
        ([], {"fps": 10}, "acts at 10 steps a second"),
        ([], {"fps": 5, "state_dim": 8, "binary_state_indices": ()}, "acts at 5 steps a second"),
        ([], {"action_codec": "local_delta"}, "train on recorded actions"),
        ([], {"state_dim": 0, "binary_state_indices": ()}, "give --form converted"),
        (["--form", "lerobot"], {}, "--form is lerobot, but a state of 7 entries is of the form converted"),
        ([], {"objectives": ("depth",)}, "no action head"),
    ],
)
def test_what_does_not_fit_is_one_clear_message(run, tmp_path, monkeypatch, options, policy, message):
    run.notes.opened = None
    monkeypatch.setattr("training.evaluation.simulated.libero_success.libero_partners", lambda tasks: {})
    checkpoint = save_policy(tmp_path / "model", **policy)
    done = run("--suite", "libero_object", *options, checkpoint=checkpoint)
    assert done.code == 1 and done.err.splitlines()[-1].startswith("error: ") and message in done.err
    assert run.notes.opened is None and done.results is None


@pytest.mark.slow
def test_the_command_runs_in_liberos_own_simulator(libero_simulator, tmp_path, capsys):
    output = tmp_path / "eval.json"
    arguments = f"--benchmark libero --checkpoint {save_policy(tmp_path / 'model')} --suite libero_object"
    arguments += f" --tasks 0 --episodes 2 --max-steps 3 --image-size 48 --num-envs 1 --output {output}"
    assert evaluate.main([*arguments.split(), "--video", str(tmp_path / "film.mp4")]) == 0
    results = json.loads(output.read_text())
    assert [(e["seed"], e["steps"]) for e in results["episodes"]] == [(1000, 3), (1001, 3)]
    assert "| - | 0.0 | - | - | - |" in capsys.readouterr().out
    assert (tmp_path / "film.mp4").stat().st_size > 1000


@pytest.mark.slow
def test_a_policy_is_diagnosed_in_liberos_own_simulator(libero_simulator, tmp_path):
    arguments = f"--benchmark libero --checkpoint {save_policy(tmp_path / 'model')} --suite libero_object"
    arguments += f" --tasks 0 --episodes 1 --max-steps 2 --num-envs 1 --output {tmp_path / 'told.json'}"
    assert diagnose.main([*arguments.split(), "--only", "named_task", "frozen_camera"]) == 0
    results = json.loads((tmp_path / "told.json").read_text())
    assert list(results["closed_loop"]) == ["plain", "frozen_camera", "named_task"]
    assert len(results["scene_partners"]) == 1
