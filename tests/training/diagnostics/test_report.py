"""The command `training/diagnose.py` with fake simulators: conditions, pairs, files, what is refused."""

import json
from types import SimpleNamespace

import pytest
import torch

from datasets_scripts.simulation.metaworld import SHARED_SCENES, scene_partners
from modeling_foresight import ForesightForActionPrediction
from tests.simulators import CommandPool
from tests.tiny import tiny_config, tiny_processor
from training import diagnose
from training.diagnostics.benchmarks import LiberoDiagnostics, MetaWorldDiagnostics
from training.diagnostics.closed_loop import list_conditions

TASKS = ("drawer-open-v3", "drawer-close-v3", "button-press-v3")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"action_dim": 4, "binary_action_indices": (), "state_dim": 4, "binary_state_indices": ()}
    config = tiny_config(history_length=2, chunk_size=2, objectives=["action"], fps=20, **sizes)
    folder = tmp_path_factory.mktemp("diagnosed") / "model"
    ForesightForActionPrediction(config).save_pretrained(folder)
    tiny_processor(config).save_pretrained(folder)
    return folder


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch, capsys):
    class Pool(CommandPool):
        notes = SimpleNamespace(opened=None, used=[])

        def receive(self, worker):
            seen = super().receive(worker)
            task = seen["instruction"]
            return {
                **seen,
                "instruction": {TASKS[0]: "Open a drawer", TASKS[1]: "Push and close a drawer"}.get(
                    task, task
                ),
            }

    monkeypatch.setattr("training.evaluation.simulated.simulation_pool.SimulationPool", Pool)
    output = tmp_path / "diagnostics.json"

    def run(*options, tasks=TASKS):
        given = ["--checkpoint", str(checkpoint), "--tasks", ",".join(tasks), "--output", str(output)]
        code = diagnose.main([*given, "--episodes", "3", "--seed", "7", "--max_steps", "16", *options])
        results = json.loads(output.read_text()) if output.exists() else None
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, out=printed.out, err=printed.err, results=results, notes=Pool.notes)

    run.folder = output.with_suffix("")
    return run


@pytest.mark.slow  # simulates every condition
def test_every_condition_is_tried_on_the_same_starts_and_never_measured_again(run):
    done = run("--only", "other_instruction", "execute_2")
    assert done.code == 0, done.err
    loop, names = done.results["closed_loop"], ["plain", "other_instruction", "execute_2"]
    assert list(loop) == names and sorted(p.stem for p in run.folder.glob("*.json")) == sorted(names)
    assert loop["plain"]["outcomes"] == dict.fromkeys(TASKS, "011"), "seeds 7, 8, 9"
    assert loop["plain"]["tasks"] == dict.fromkeys(TASKS, 2) and "difference" not in loop["plain"]
    assert list(loop["other_instruction"]["tasks"]) == list(TASKS[:2])
    assert (loop["other_instruction"]["plain_successes"], loop["other_instruction"]["episodes"]) == (4, 6)
    assert loop["execute_2"]["difference"]["mean"] == 0
    assert done.results["scene_partners"] == {TASKS[0]: TASKS[1], TASKS[1]: TASKS[0]}
    assert done.results["seeds"] == {"first": 7, "last": 9}
    assert done.results["command"].startswith("python training/diagnose.py --checkpoint ")
    kept = json.loads((run.folder / "execute_2.json").read_text())["settings"]
    assert (kept["change"], kept["execute_steps"]) == ("execute_2", 2)

    done.notes.used = []
    again = run("--only", "execute_2")
    assert again.code == 0 and not again.notes.used
    assert again.results["closed_loop"]["execute_2"] == loop["execute_2"]
    refused = run("--only", "execute_2", "--seed", "8")
    told = "plain.json holds an evaluation with other parameters (seeds.first: 7 there, 8 here"
    assert refused.code == 1 and told in refused.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "swapped_eyes"], "--only has swapped_eyes"),
        (["--episodes", "0"], "--episodes is 0"),
        (["--output", "results.txt"], "must end in .json"),
        (["--dataset", "no/such/data/here"], "no/such/data/here"),
    ],
)
def test_user_mistakes_are_one_clear_message(run, options, message):
    done = run(*options)
    assert done.code == 1 and done.results is None
    assert done.err.splitlines()[-1].startswith("error: ") and message in done.err


def test_conditions_follow_the_policy():
    one = SimpleNamespace(views=["main"], history_length=1, chunk_size=1)
    conditions, skipped = list_conditions(one, ["button-press-v3"], [])
    assert list(conditions) == ["plain", "frozen_camera"]
    assert set(skipped) == {"swapped_views", "other_instruction", "history_1", "execute_2"}
    long = SimpleNamespace(views=["main", "wrist"], history_length=10, chunk_size=10)
    options = MetaWorldDiagnostics("nowhere", ",".join(TASKS))
    told_others = options.other_task_conditions(options.other_tasks(TASKS))
    conditions, skipped = list_conditions(long, TASKS, told_others)
    executed = [f"execute_{n}" for n in (2, 3, 4, 5)]
    changed = ["frozen_camera", "swapped_views", "other_instruction", "history_1", "history_2"]
    assert list(conditions) == ["plain", *changed, *executed] and not skipped


def test_in_libero_the_named_task_is_judged_too(monkeypatch):
    tasks = ["libero_object/pick_up_the_milk", "libero_object/pick_up_the_butter"]
    for place in (
        "diagnostics.benchmarks",
        "evaluation.simulated.libero_success",
    ):  # LIBERO may not be installed
        monkeypatch.setattr(f"training.{place}.resolve_libero_tasks", lambda *_: tasks)
        monkeypatch.setattr(f"training.{place}.libero_partners", lambda tasks: {tasks[0]: tasks[1]})
    options = LiberoDiagnostics("nowhere", "libero_object")
    partners = options.other_tasks(tasks)
    by_scene, by_name = options.other_task_conditions(partners)
    assert (by_scene.name, by_scene.options) == ("other_instruction", {"other_task": "scene"})
    assert (by_name.name, by_name.options) == ("named_task", {"other_task": "named"})
    assert by_scene.tasks == by_name.tasks == (tasks[0],)
    assert options.other_task_conditions({}) == []
    assert options.other_instructions(["pick up the milk"]) == {"pick up the milk": "pick up the butter"}
    assert options.other_instructions(["pick up the butter"]) == {}


def test_partners_are_other_tasks_of_the_same_line():
    assert scene_partners(["push-v3", "reach-v3", "dial-turn-v3"]) == {
        "push-v3": "reach-v3",
        "reach-v3": "push-v3",
    }
    three = scene_partners(["coffee-pull-v3", "coffee-button-v3", "coffee-push-v3"])
    assert three["coffee-pull-v3"] == "coffee-push-v3" and sorted(three) == sorted(three.values())


@pytest.mark.slow  # imports the simulator
def test_tasks_of_one_line_share_a_model(simulator):
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    for scene in SHARED_SCENES:
        models = {ALL_V3_ENVIRONMENTS[task]().model_name for task in scene}
        assert len(models) == (3 if "reach-v3" in scene else 1), scene
