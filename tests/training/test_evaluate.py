"""Closed loop: histories, scheduling, determinism, what is refused and what is written."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from datasets_scripts.simulation.metaworld import MetaWorldSim
from datasets_scripts.simulation.perturbation import Perturbation
from datasets_scripts.storage.provenance import write_provenance
from modeling_foresight import ForesightForActionPrediction, ForesightStream
from modeling_foresight.export import main as export
from tests.simulators import SIDE, CommandPool, FakePool
from tests.synthetic import make_dataset
from tests.tiny import tiny_config, tiny_processor
from training import evaluate
from training.evaluation.simulated.closed_loop import run_episodes
from training.evaluation.simulated.metaworld_success import MetaWorld, MetaWorldOptions, _check_unseen
from training.evaluation.simulated.simulation_pool import SimulationPool
from training.evaluation.videos import GREEN, RED, rollout_grid, write_video
from training.models.model_folder import load_checkpoint
from training.run_record import portable_command, portable_path

ROOT = Path(evaluate.__file__).parents[1]
TASK = "drawer-open-v3"


def robot_config(**overrides):
    """A tiny policy for MetaWorld's robot."""
    sizes = {"action_dim": 4, "binary_action_indices": (), "state_dim": 4, "binary_state_indices": ()}
    return tiny_config(**{**sizes, "fps": 20, **overrides})


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    config = robot_config()
    model, processor = ForesightForActionPrediction(config).eval(), tiny_processor(config)
    return SimpleNamespace(model=model, processor=processor)


@pytest.fixture(scope="module")
def checkpoint(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    policy.model.save_pretrained(folder)
    policy.processor.save_pretrained(folder)
    return folder


class FakeStream:
    """Acts with the seed it reads from the state, and notes what it was shown."""

    def __init__(self, chunk=4):
        self.model = SimpleNamespace(config=SimpleNamespace(views=["main", "wrist"]))
        self.chunk, self.episodes, self.current, self.state_dim = chunk, [], {}, 4

    def reset(self, instruction, envs):
        for env in envs:
            self.current[env] = (instruction, [])
            self.episodes.append(self.current[env])

    def step_chunk(self, images, state, envs):
        for env, row, main in zip(envs, state, images["main"], strict=True):
            assert (main == row[1]).all(), "an image of another step"
            seen = self.current[env][1]
            assert all(seed == row[0] for seed, _ in seen), "an episode goes on in another"
            seen.append((int(row[0]), int(row[1])))
        return torch.from_numpy(np.repeat(state[:, None, :1], 4, axis=2).repeat(self.chunk, axis=1))


LIMITS = {"a": 5, "b": 5}
TRIALS = [("a", seed) for seed in range(8)] + [("b", seed) for seed in range(8, 11)]


@pytest.mark.parametrize("size", [1, 3, 11])
@pytest.mark.parametrize("execute_steps", [1, 3])
def test_the_outcome_does_not_depend_on_how_many_run_side_by_side(size, execute_steps):
    finished = []
    episodes, timing = run_episodes(
        FakeStream(),
        FakePool(size),
        TRIALS,
        4,
        LIMITS,
        execute_steps,
        on_done=lambda e: finished.append(e.seed),
    )
    assert [(e.task, e.seed) for e in episodes] == TRIALS
    for episode in episodes:
        needed = episode.seed % 7
        assert episode.success == (0 < needed <= 5)
        assert episode.steps == (needed if episode.success else 5)
        assert episode.simulation_steps == 4 * episode.steps
        assert episode.frames == []
    assert sorted(finished) == list(range(11))
    if size == len(TRIALS):  # all together: the longest episode decides how often the policy is asked
        assert len(timing.policy) == 5


@pytest.mark.parametrize("execute_steps", [1, 3])
def test_every_episode_starts_empty_and_shows_all_its_observations(execute_steps):
    stream = FakeStream()
    run_episodes(stream, FakePool(1), [("a", 5), ("b", 4)], 4, {"a": 9, "b": 9}, execute_steps)
    assert stream.episodes == [
        ("a", [(5, step) for step in range(5)]),
        ("b", [(4, step) for step in range(4)]),
    ]


def test_film_keeps_the_given_trials_up_to_their_last_picture():
    episodes, _ = run_episodes(FakeStream(), FakePool(2), TRIALS[1:6], 4, LIMITS, film=TRIALS[1:3])
    assert [[int(frame[0, 0, 0]) for frame in e.frames] for e in episodes] == [[0, 1], [0, 1, 2], [], [], []]


def test_a_failure_is_where_the_predicted_progress_was_highest():
    class Stream(FakeStream):
        with_progress = True

        def step_chunk(self, images, state, envs):
            self.progress = {env: -abs(row[1] - 2) for env, row in zip(envs, state, strict=True)}
            return super().step_chunk(images, state, envs)

    for stream, failed_at in ((Stream(), 2), (FakeStream(), 5)):
        episodes, _ = run_episodes(stream, FakePool(2), TRIALS[:3], 4, LIMITS, film=TRIALS[:2])
        assert [e.find_failure() for e in episodes] == [failed_at, None, None]  # seed 0 never succeeds
        assert [len(e.actions) for e in episodes] == [5, 1, 2]


def test_videos_hold_every_frame_and_show_the_outcome(tmp_path):
    clips = [[np.full((31, 45, 3), 10 * i, np.uint8)] * n for i, n in enumerate((3, 6))]
    frames = list(rollout_grid(clips, ["7", "8"], [None, 4], hold=2))
    assert len(frames) == 6 + 2 + 2
    green, red = ([(frame == color).all(-1).any() for frame in frames] for color in (GREEN, RED))
    assert green == [step >= 2 for step in range(10)]  # its last picture
    assert red == [step >= 4 for step in range(10)]  # its failure, which stands still for two more frames
    write_video(tmp_path / "film.mp4", frames, 20)
    with av.open(str(tmp_path / "film.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 10
    with pytest.raises(ValueError, match="no frames"):
        write_video(tmp_path / "none.mp4", [], 20)
    assert [p.name for p in tmp_path.iterdir()] == ["film.mp4"]


# ------------------------------------------------------------------ the command


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch, capsys):
    """Runs the command with fake simulators; gives the exit code, the output and the results."""

    class Pool(CommandPool):
        notes = SimpleNamespace(opened=None, used=[])

    monkeypatch.setattr("training.evaluation.simulated.simulation_pool.SimulationPool", Pool)
    output = tmp_path / "results" / "eval.json"

    def run(*options, checkpoint=checkpoint, tasks=TASK, again=False):
        if not again:  # results of another evaluation are not overwritten
            output.unlink(missing_ok=True)
        arguments = ["--checkpoint", str(checkpoint), "--tasks", tasks, "--output", str(output), *options]
        code = evaluate.main(arguments)
        printed = capsys.readouterr()
        results = json.loads(output.read_text()) if output.exists() else None
        return SimpleNamespace(code=code, out=printed.out, err=printed.err, results=results, text=printed)

    run.output, run.notes = output, Pool.notes
    return run


def test_results_hold_what_a_card_needs_and_no_place_of_the_machine(run, checkpoint):
    done = run("--episodes", "7", "--seed", "7", "--num-envs", "3", "--tasks", f"{TASK},door-open-v3")
    assert done.code == 0
    results = done.results
    assert list(results["tasks"]) == [TASK, "door-open-v3"]
    assert results["command"].startswith("python training/evaluate.py --checkpoint ")
    task = results["tasks"][TASK]
    assert (task["successes"], task["episodes"]) == (6, 7)
    assert task["success_rate"] == pytest.approx(6 / 7)
    assert task["ci95"] == pytest.approx([0.4869, 0.9743], abs=1e-4)
    assert results["mean"]["episodes"] == 14
    assert [e["seed"] for e in results["episodes"]] == list(range(7, 14)) * 2
    assert results["episodes"][2] == {
        "task": TASK,
        "seed": 9,
        "success": True,
        "steps": 2,
        "simulation_steps": 8,
    }
    settings = results["settings"]
    assert (settings["stride"], settings["max_steps"], settings["execute_steps"]) == (4, 125, 1)
    assert (settings["image_size"], settings["control_hz"]) == (40, 20)
    assert (run.notes.opened["size"], run.notes.opened["cameras"]) == (3, ("main", "wrist"))
    assert (run.notes.opened["image_size"], run.notes.opened["quality"]) == (40, "fast")
    assert run.notes.opened["perturbation"] == Perturbation() and "perturbation" not in settings
    assert results["timing"]["policy_ms"]["median"] > 0
    assert {"torch", "transformers", "mujoco", "lerobot_policy_foresight"} <= set(results["versions"])
    assert {"cpu", "cores"} <= set(results["hardware"])
    assert results["hardware"]["torch_threads"] == 1, "a small model"
    text = run.output.read_text()
    assert str(checkpoint.parent) not in text and str(run.output.parent) not in text
    assert "6/7 = 85.7%" in done.out


@pytest.mark.slow  # tracing takes seconds
def test_an_exported_policy_is_measured_as_its_model_is(run, checkpoint, tmp_path):
    exported = tmp_path / "pt2"
    assert (
        export(["--checkpoint", str(checkpoint), "--format", "torch-export", "--output", str(exported)]) == 0
    )
    ours, theirs = (run("--episodes", "3", checkpoint=folder) for folder in (checkpoint, exported))
    assert (ours.code, theirs.code) == (0, 0), theirs.err
    assert ours.results["episodes"] == theirs.results["episodes"]
    digests = [done.results["checkpoint"]["weights_sha256"] for done in (ours, theirs)]
    assert len(set(digests)) == 2 and None not in digests
    refused = run("--dataset", str(tmp_path), checkpoint=exported)
    assert refused.code == 1 and "--dataset needs all heads, and an exported policy acts only" in refused.err
    refused = run("--device", "cuda", checkpoint=exported)
    assert refused.code == 1 and "--device cuda: an exported policy acts on the CPU" in refused.err


@pytest.fixture(scope="module")
def goal_checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder, config = tmp_path_factory.mktemp("goals") / "model", robot_config(goal_image=True)
    ForesightForActionPrediction(config).save_pretrained(folder)
    tiny_processor(config).save_pretrained(folder)
    return folder


def test_a_policy_trained_with_goals_needs_a_source_of_them_or_acts_without_on_request(run, goal_checkpoint):
    done = run("--episodes", "1", checkpoint=goal_checkpoint)
    assert done.code == 1 and "--goal_source none" in done.err and done.results is None
    done = run("--episodes", "1", "--goal-source", "none", checkpoint=goal_checkpoint)
    assert done.code == 0 and done.results["settings"]["goal_source"] == "none"
    assert "goal_ms" not in done.results["timing"]


def test_goals_of_recorded_demonstrations_are_shown_to_every_robot(
    run, goal_checkpoint, tmp_path, monkeypatch
):
    sizes = {"size": (SIDE, SIDE), "depth": False, "tracks": False, "use_videos": False}
    demos = make_dataset(tmp_path / "demos", episodes=1, frames=30, tasks=(TASK,), **sizes)
    shown = []
    give = ForesightStream.set_goal
    monkeypatch.setattr(
        ForesightStream,
        "set_goal",
        lambda self, *given, **more: [shown.append(given[0]), give(self, *given, **more)],
    )
    source = ("--goal-source", "recorded", "--goal-dataset", str(demos.root), "--max-steps", "84")
    done = run("--episodes", "2", "--seed", "7", "--num-envs", "2", *source, checkpoint=goal_checkpoint)
    assert done.code == 0, done.err
    assert done.results["settings"]["goal_dataset"]["name"] == "demos"
    assert done.results["settings"]["goal_camera"] == "main"
    assert done.results["timing"]["goal_ms"]["count"] == 2, "21 steps of the start that never succeeds"
    np.testing.assert_array_equal(shown[0], [demos.image(0, 21, "main")] * 2)
    assert [len(goals) for goals in shown] == [2, 1]
    done = run("--episodes", "1", *source, tasks="door-open-v3", checkpoint=goal_checkpoint)
    assert done.code == 1 and "no demonstration of 'door-open-v3'" in done.err


def test_settings_follow_the_training_data_unless_given(run, checkpoint, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(checkpoint, folder / "model")
    (folder / "config.yaml").write_text("seed: 3\n")
    labels = {"main": {"intrinsics": {"height": 96, "width": 96}}}
    (folder / "summary.json").write_text(json.dumps({"datasets": [{"labels": labels}]}))
    done = run("--episodes", "1", checkpoint=folder / "model")
    assert done.results["settings"]["image_size"] == 96
    done = run(
        *(
            "--episodes",
            "1",
            "--image-size",
            "32",
            "--stride",
            "5",
            "--max-steps",
            "50",
            "--execute-steps",
            "2",
        ),
        *("--quality", "default", "--camera-shift-m", "0.05", "--object-shift-m", "-0.02"),
        *("--table-color", "0", "0.5", "1"),
        checkpoint=folder / "model",
    )
    settings = done.results["settings"]
    assert (settings["image_size"], settings["stride"], settings["max_steps"]) == (32, 5, 10)
    assert (settings["execute_steps"], run.notes.opened["quality"]) == (2, "default")
    assert run.notes.opened["perturbation"] == Perturbation(0.05, -0.02, (0.0, 0.5, 1.0))
    changes = {"camera_shift_m": 0.05, "object_shift_m": -0.02, "table_color": [0.0, 0.5, 1.0]}
    assert settings["perturbation"] == changes


def test_starts_that_were_demonstrated_are_refused(run, tmp_path):
    dataset = tmp_path / "results" / "demos"
    (dataset / "meta").mkdir(parents=True)
    (dataset / "meta" / "info.json").write_text('{"features": {}}')
    episodes = {"0": {"task": TASK, "seed": 10003}, "1": {"task": "door-open-v3", "seed": 10001}}
    write_provenance(dataset, {"episodes": episodes})
    done = run("--episodes", "5", "--dataset", str(dataset))
    assert done.code == 1 and "10003" in done.err and "--seed" in done.err
    assert "10001" not in done.err, "a start of another task is another start"
    assert done.results is None


def test_starts_of_every_dataset_of_a_mixture_count(tmp_path):
    for name, seed in (("goals", 10003), ("objects", 10007)):
        (tmp_path / name / "meta").mkdir(parents=True)
        (tmp_path / name / "meta" / "info.json").write_text('{"features": {}}')
        write_provenance(tmp_path / name, {"episodes": {"0": {"task": TASK, "seed": seed}}})
    both = [tmp_path / "goals", tmp_path / "objects"]
    with pytest.raises(ValueError, match=r"objects has demonstrations from the starts \[10007\]"):
        _check_unseen([TASK], range(10005, 10010), both)
    checked = _check_unseen([TASK], range(10010, 10020), both)
    assert checked == {"checked_against": "1 demonstrations of goals and 1 demonstrations of objects"}


def test_a_metric_that_cannot_be_loaded_costs_no_episodes(run, monkeypatch):
    def read_only(name):
        raise PermissionError(f"the cache of {name} is read-only")

    monkeypatch.setattr("training.evaluation.metric_loader.load_metric", read_only)
    run.notes.opened = None
    done = run("--episodes", "1")
    assert done.code == 1 and "read-only" in done.err and run.notes.opened is None


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    root = tmp_path_factory.mktemp("recorded") / "demos"
    sizes = {"size": (SIDE, SIDE), "state_dim": 4, "action_dim": 4}
    return make_dataset(root, episodes=2, frames=8, use_videos=False, **sizes).root


def trained_on(checkpoint, folder, dataset):
    """A copy of the checkpoint in a run that trained on one half of a dataset."""
    shutil.copytree(checkpoint, folder / "model")
    data = {"datasets": [{"path": str(dataset)}], "val_fraction": 0.5, "frame_cache": "off"}
    (folder / "config.yaml").write_text(json.dumps({"data": data}))
    return folder / "model"


def test_held_out_episodes_are_measured_in_the_losses_and_in_real_units(run, checkpoint, demos, tmp_path):
    model = trained_on(checkpoint, tmp_path / "run", demos)
    done = run("--episodes", "1", "--dataset", str(demos), checkpoint=model)
    assert done.code == 0, done.err
    recorded = done.results["open_loop"]
    assert (recorded["dataset"], len(recorded["episodes"])) == ("demos", 1)
    assert {"losses", "flow", "actions"} <= recorded["metrics"].keys()
    errors = recorded["real_units"]["flow_3d"]["main"]
    assert errors["model"]["epe_px"] > 0 and f"epe_px {errors['model']['epe_px']:.4g} (stay_put" in done.out
    json.loads(run.output.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_dataset_that_the_run_did_not_split_is_refused_before_anything_is_simulated(
    run, checkpoint, demos, tmp_path
):
    shutil.copytree(demos, tmp_path / "others")
    model, run.notes.opened = trained_on(checkpoint, tmp_path / "run", tmp_path / "demos"), None
    done = run("--episodes", "1", "--dataset", str(tmp_path / "others"), checkpoint=model)
    assert done.code == 1 and "others is not among the data of the run" in done.err
    assert done.results is None and run.notes.opened is None


def test_what_fails_after_the_episodes_does_not_cost_them(run, checkpoint, demos, tmp_path, monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise RuntimeError("out of memory")

    model = trained_on(checkpoint, tmp_path / "run", demos)
    monkeypatch.setattr("training.evaluation.open_loop.fit_baselines", out_of_memory)
    done = run("--episodes", "7", "--seed", "7", "--dataset", str(demos), checkpoint=model)
    assert done.code == 1 and "out of memory" in done.err
    assert done.results["mean"]["successes"] == 6 and "open_loop" not in done.results


def test_a_finished_evaluation_is_read_and_another_one_does_not_replace_it(run, tmp_path):
    options = ("--episodes", "2", "--seed", "8", "--video", str(tmp_path / "film.mp4"))
    first = run(*options)
    assert first.code == 0, first.err
    run.notes.used = []
    second = run(*options, again=True)
    assert second.code == 0 and second.results == first.results and not run.notes.used
    assert "holds this evaluation, which is finished" in second.out
    (tmp_path / "film.mp4").unlink()
    assert run(*options, again=True).code == 0 and run.notes.used, "the film needs the episodes"
    assert (tmp_path / "film.mp4").exists()
    other = run("--episodes", "2", "--seed", "9", again=True)
    assert other.code == 1 and "(seeds.first: 8 there, 9 here)" in other.err
    fewer = run("--episodes", "1", "--seed", "8", again=True)
    assert fewer.code == 1 and "eval.json has finished more than --episodes 1: take --episodes 2" in fewer.err
    assert fewer.results["episodes"] == first.results["episodes"]
    run.output.write_text(json.dumps({"a": 1}))
    foreign = run("--episodes", "2", again=True)
    assert foreign.code == 1 and "holds no results of this benchmark" in foreign.err
    assert foreign.results == {"a": 1}


def test_a_finished_evaluation_grows_by_the_episodes_that_it_lacks(run):
    first = run("--episodes", "2", "--seed", "8")
    run.notes.used = []
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, seed=11)
        cut = run("--episodes", "4", "--seed", "8", "--num-envs", "1", again=True)
    assert cut.code == 130 and cut.results == first.results, "the results stay until all episodes are there"
    fewer = run("--episodes", "2", "--seed", "8", again=True)
    assert fewer.code == 1 and "eval.json.partial has finished more than --episodes 2" in fewer.err
    grown = run("--episodes", "4", "--seed", "8", again=True)
    assert grown.code == 0 and run.notes.used == [(TASK, 11)], "the one that it lacks"
    assert grown.results["timing"]["resumed_after"] == 3
    assert {one["command"] for one in grown.results["earlier_sessions"]} >= {first.results["command"]}
    whole = run("--episodes", "4", "--seed", "8").results
    for part in ("tasks", "mean", "episodes", "settings", "seeds", "checkpoint"):
        assert grown.results[part] == whole[part]
    assert grown.results.keys() - whole.keys() == {"earlier_sessions"} and not whole.keys() - grown.results


def test_errors_on_recorded_episodes_stay_when_an_evaluation_grows(run, checkpoint, demos, tmp_path):
    model = trained_on(checkpoint, tmp_path / "run", demos)
    first = run("--episodes", "2", "--seed", "7", "--dataset", str(demos), checkpoint=model)
    assert first.code == 0 and first.results["open_loop"]["dataset"] == demos.name
    grown = run("--episodes", "3", "--seed", "7", checkpoint=model, again=True)
    assert grown.code == 0 and grown.results["open_loop"] == first.results["open_loop"]
    grown.results["open_loop"]["dataset"] = "another"
    run.output.write_text(json.dumps(grown.results))
    other = run("--episodes", "3", "--seed", "7", "--dataset", str(demos), checkpoint=model, again=True)
    assert other.code == 1 and "has the errors on another, which those on" in other.err


def test_a_film_of_a_finished_evaluation_runs_only_what_it_shows(run, tmp_path, monkeypatch):
    monkeypatch.setattr("training.evaluation.simulated.film.MAX_FILMED", 1)
    options = ("--episodes", "8", "--seed", "8", "--max-steps", "20")
    first = run(*options)
    run.notes.used = []
    filmed = run(*options, "--video", str(tmp_path / "film.mp4"), again=True)
    assert filmed.code == 0 and (tmp_path / "film.mp4").exists()
    failed = [e["seed"] for e in first.results["episodes"] if not e["success"]]
    assert sorted(run.notes.used) == [(TASK, 8), (TASK, failed[0])], "the first start, and the first failure"
    assert filmed.results["mean"] == first.results["mean"]
    (tmp_path / "film.mp4").write_bytes(b"of another evaluation")
    again = run(*options, "--video", str(tmp_path / "film.mp4"), again=True)
    assert again.code == 0 and run.notes.used, "the film that is there is not its own"


def test_a_film_changes_no_outcome_that_was_counted(run, tmp_path, monkeypatch):
    """Failures that run again for the film, and succeed this time, would raise the success rate."""
    options = ("--episodes", "8", "--seed", "8", "--max-steps", "20")
    first = run(*options)
    receive = FakePool.receive

    def succeed(self, worker):
        answer = receive(self, worker)
        return answer | {"success": True} if self.state[worker].steps else answer

    monkeypatch.setattr(FakePool, "receive", succeed)
    filmed = run(*options, "--video", str(tmp_path / "film.mp4"), again=True)
    assert filmed.code == 0 and "ended otherwise again, so the film leaves it out" in filmed.out
    assert filmed.results["mean"] == first.results["mean"]
    counted = [(e["success"], e["steps"]) for e in first.results["episodes"]]
    assert [(e["success"], e["steps"]) for e in filmed.results["episodes"]] == counted


def test_a_film_that_cannot_be_written_costs_no_episode(run, tmp_path, monkeypatch):
    options = ("--episodes", "2", "--seed", "8", "--video", str(tmp_path / "film.mp4"))

    def fail(*args, **kwargs):
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr("training.evaluation.videos.write_video", fail)
        done = run(*options)
    assert done.code == 1 and done.results["mean"]["episodes"] == 2
    run.notes.used = []
    again = run(*options, again=True)
    assert again.code == 0 and not run.notes.used and (tmp_path / "film.mp4").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"task": "x"}', ""])
def test_a_damaged_file_of_an_episode_costs_that_episode_alone(run, content):
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, seed=10)
        assert run("--episodes", "3", "--seed", "8", "--num-envs", "1").code == 130
    kept = run.output.with_name("eval.json.partial") / f"8-{TASK}.json"
    assert kept.exists()
    kept.write_text(content)
    done = run("--episodes", "3", "--seed", "8", "--num-envs", "1")
    assert done.code == 0 and f"8-{TASK}.json is damaged" in done.out
    assert done.results["timing"]["resumed_after"] == 1 and len(done.results["episodes"]) == 3


def interrupt(patch, seed):
    """Ctrl-C after the first action from a start."""
    receive = FakePool.receive

    def interrupted(self, worker):
        if self.state[worker].seed == seed and self.state[worker].steps == 1:
            raise KeyboardInterrupt
        return receive(self, worker)

    patch.setattr(FakePool, "receive", interrupted)


def test_an_interrupted_evaluation_resumes_to_the_same_results(run, tmp_path):
    options = ("--episodes", "4", "--seed", "8", "--num-envs", "1", "--video", str(tmp_path / "film.mp4"))
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, seed=10)
        done = run(*options)
    assert done.code == 130 and done.results is None and "again to resume" in done.err
    partial = run.output.with_name("eval.json.partial")
    kept = [f"{seed}-{TASK}.{kind}" for seed in (8, 9) for kind in ("json", "npz")]
    assert sorted(path.name for path in partial.glob("[0-9]*")) == kept
    sessions = partial / "sessions.json"
    known = json.loads(sessions.read_text())
    sessions.write_text(json.dumps(known | {"wall_s": known["wall_s"] + 1000}))
    resumed = run(*options)
    assert resumed.code == 0, resumed.err
    assert run.notes.used == [(TASK, 10), (TASK, 11)] and resumed.results["timing"]["resumed_after"] == 2
    assert resumed.results["timing"]["wall_s"] > 1000, "seconds of both sessions"
    assert not partial.exists() and (tmp_path / "film.mp4").exists()
    run.output.unlink()
    whole = run(*options)
    for part in ("tasks", "mean", "episodes", "settings", "seeds", "checkpoint"):
        assert whole.results[part] == resumed.results[part]


def test_failures_come_first_in_the_video_and_their_moment_is_in_the_results(run, tmp_path, monkeypatch):
    shown = []

    def grid(clips, captions, failures):
        shown.append((captions, failures))
        return rollout_grid(clips, captions, failures)

    monkeypatch.setattr("training.evaluation.videos.rollout_grid", grid)
    monkeypatch.setattr("training.evaluation.simulated.film.MAX_FILMED", 3)
    options = ("--episodes", "8", "--seed", "8", "--max-steps", "20", "--num-envs", "8")
    recorded = []
    monkeypatch.setattr(
        "datasets_scripts.simulation.job.record_rollouts", lambda *given: recorded.append(given[1:])
    )
    options += ("--record", str(tmp_path / "own"))
    done = run(*options, "--video", str(tmp_path / "film.mp4"))
    assert done.code == 0, done.err
    found = {e["seed"]: e["failed_at"] for e in done.results["episodes"] if "failed_at" in e}
    assert sorted(found) == [13, 14] and all(0 <= step <= 5 for step in found.values())
    assert shown == [(["13", "14", "8"], [found[13], found[14], None])]
    ((rollouts, folder, policy),) = recorded
    assert [(r.seed, len(r.actions)) for r in rollouts] == [(13, 5), (14, 5), (8, 1)]
    assert rollouts[1].outcome == {"success": False, "steps": 5, "failed_at": found[14]}
    assert folder == tmp_path / "own" and policy["weights_sha256"]


def test_an_interrupted_evaluation_of_another_policy_or_setting_is_not_resumed(run, policy, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, seed=8)
        assert run("--episodes", "2", "--seed", "8", "--num-envs", "1").code == 130
        assert not any(run.output.parent.iterdir()), "no episode was finished"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, seed=9)
        assert run("--episodes", "2", "--seed", "8", "--num-envs", "1").code == 130
    kept = sorted(path.name for path in run.output.with_name("eval.json.partial").iterdir())
    ForesightForActionPrediction(policy.model.config).save_pretrained(tmp_path / "other")
    policy.processor.save_pretrained(tmp_path / "other")
    refused = run("--episodes", "2", "--seed", "8", checkpoint=tmp_path / "other")
    assert refused.code == 1 and "with other parameters (checkpoint: weights " in refused.err
    assert "delete" in refused.err and refused.results is None
    refused = run("--episodes", "2", "--seed", "8", "--execute-steps", "2")
    assert (
        refused.code == 1 and "with other parameters (settings.execute_steps: 1 there, 2 here)" in refused.err
    )
    assert sorted(path.name for path in run.output.with_name("eval.json.partial").iterdir()) == kept


def test_a_policy_whose_processor_was_corrected_is_another_one(run, checkpoint, tmp_path):
    model = shutil.copytree(checkpoint, tmp_path / "model")
    first = run("--episodes", "2", "--seed", "8", checkpoint=model)
    assert first.code == 0 and first.results["checkpoint"]["settings_sha256"]
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"n_action_steps": 2}))  # LeRobot's own field
    assert "which is finished" in run("--episodes", "2", "--seed", "8", checkpoint=model, again=True).out
    processor = json.loads((model / "processor_config.json").read_text())
    values = {"mean": 0.1, "std": 0.5, "min": -1.0, "max": 1.0}
    processor["action_stats"] = {name: [value] * 4 for name, value in values.items()}
    (model / "processor_config.json").write_text(json.dumps(processor))
    other = run("--episodes", "2", "--seed", "8", checkpoint=model, again=True)
    assert other.code == 1 and "with other parameters (checkpoint: weights " in other.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "drawer-opn-v3"], "drawer-open-v3"),
        (["--episodes", "0"], "--episodes is 0"),
        (["--num-envs", "0"], "--num-envs is 0"),
        (["--max-steps", "501"], "500"),
        (["--seed", "-1"], "--seed is -1"),
        (["--seed", str(2**32 - 5)], "the starts must be in 0 to 4294967295"),
        (["--output", str(ROOT / "docs")], "--output is"),
        (["--video", str(ROOT / "README.md" / "film.mp4")], "README.md is a file"),
        (["--execute-steps", "5"], "plans 4 actions"),
        (["--video", "film.gif"], ".mp4"),
        (["--record", "new", "--camera-shift-m", "0.1"], "--record replays in MetaWorld's own scenes"),
        (["--record", str(ROOT / "docs")], "which is not a dataset: give a new folder"),
        (["--checkpoint", "nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_user_mistakes_are_one_clear_message(run, options, message):
    done = run(*options)
    assert done.code == 1 and done.results is None
    assert done.err.splitlines()[-1].startswith("error: ") and message in done.err


@pytest.mark.parametrize("lost", ["config.json", "processor_config.json", "model.safetensors"])
def test_a_checkpoint_that_lacks_a_part_is_named(checkpoint, tmp_path, lost):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    (folder / lost).unlink()
    with pytest.raises(ValueError, match=lost.removeprefix("model")):
        load_checkpoint(folder)


def test_where_a_model_is_needed_an_exported_policy_is_refused(checkpoint, tmp_path):
    folder = tmp_path / "exported"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "policy.json").write_text("{}")
    with pytest.raises(ValueError, match="is an exported policy, .* give the model it came from"):
        load_checkpoint(folder)


def test_a_truncated_checkpoint_is_named(checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"views": ["main", "left"]}, "left"),
        ({"action_dim": 7}, "action_dim 7"),
        ({"state_dim": 9}, "state_dim 9"),
    ],
)
def test_a_policy_for_another_robot_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        MetaWorld(MetaWorldOptions("policy", TASK)).check_policy(robot_config(**overrides))


def test_a_frame_rate_that_the_simulator_cannot_keep_is_refused(checkpoint):
    benchmark = MetaWorld(MetaWorldOptions(str(checkpoint), TASK))
    with pytest.raises(ValueError, match="--stride"):
        benchmark.choose_settings(robot_config(fps=30), SIDE)
    assert benchmark.choose_settings(robot_config(fps=40), SIDE)["stride"] == 2


def test_places_of_the_machine_stay_out_of_what_is_published(tmp_path):
    assert portable_path("owner/name") == "owner/name"
    assert portable_path(tmp_path / "a" / "model", tmp_path / "a") == "model"
    assert portable_path(tmp_path / "model", tmp_path / "results") == "../model"
    command = portable_command("x.py", ["--a", str(tmp_path / "deep" / "b c"), f"--d={tmp_path}/e", "1"])
    assert command == "python x.py --a 'b c' --d=e 1"


def test_the_recorded_command_is_one_that_finds_the_module(tmp_path):
    code = "from training.run_record import describe_run\nprint(describe_run()['command'])"
    (tmp_path / "probe.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    for arguments, expected in ((["-m", "probe", "--a", "1"], "-m probe --a 1"), (["probe.py"], "probe.py")):
        own = [sys.executable, *arguments]
        told = subprocess.run(own, check=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert told.stdout.strip().endswith(expected) and told.stdout.startswith("python ")


def test_the_script_runs_from_anywhere_without_pytorch_at_its_top(tmp_path):
    """Every simulator process imports the script; and its name is that of a library."""
    folder = str(ROOT / "training")
    code = f"""
import runpy, sys
sys.path.insert(0, {folder!r})  # as Python does for a script
runpy.run_path({folder + "/evaluate.py"!r}, run_name="__mp_main__")
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


# ------------------------------------------------------------------ the real simulator


@pytest.mark.sim
def test_the_same_seeds_give_the_same_rollouts_for_one_and_two_simulators(simulator, policy):
    trials = [(TASK, 10000), (TASK, 10001), (TASK, 10000)]
    rollouts = []
    for size in (1, 2):
        with SimulationPool(size, partial(MetaWorldSim, image_size=SIDE)) as pool:
            stream = ForesightStream(policy.model, policy.processor, num_envs=size)
            episodes, _ = run_episodes(stream, pool, trials, 4, {TASK: 4}, film=trials)
        rollouts.append(episodes)
    for one, two in zip(*rollouts, strict=True):
        assert (one.task, one.seed, one.success, one.steps) == (two.task, two.seed, two.success, two.steps)
        assert len(one.frames) == one.steps + 1
        assert (one.frames[0] == two.frames[0]).all()
        # Batches of other sizes may differ in the last bits of the actions.
        assert np.abs(one.frames[-1].astype(int) - two.frames[-1]).mean() < 0.1
    first, _, again = rollouts[0]
    assert all((a == b).all() for a, b in zip(first.frames, again.frames, strict=True)), "a start repeats"
    assert (rollouts[0][1].frames[0] != first.frames[0]).any(), "another seed is another start"


@pytest.mark.sim
def test_a_simulator_that_fails_or_dies_is_an_error_not_a_hang(simulator):
    with SimulationPool(1, partial(MetaWorldSim, cameras=["main"], image_size=SIDE)) as pool:
        pool.reset(0, "no-such-task", 0)
        with pytest.raises(ValueError, match="no-such-task"):
            pool.receive(0)
        pool._processes[0].terminate()
        pool._processes[0].join()
        with pytest.raises(RuntimeError, match="simulator process 0 ended"):
            pool.reset(0, TASK, 0)
            pool.receive(0)
