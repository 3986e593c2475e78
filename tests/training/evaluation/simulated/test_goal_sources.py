"""Goal images in closed loop: what is refused, and episodes in the simulator with each source."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from datasets_scripts.storage.atomic import read_json, write_json
from modeling_foresight import ForesightForActionPrediction, ForesightStream
from tests.synthetic import make_dataset
from tests.tiny import tiny_config, tiny_processor
from tests.tiny_pipeline import SIDE, save_tiny_pipeline
from training import evaluate
from training.evaluation.simulated.goal_sources import check_goal_options, describe_goals
from training.evaluation.simulated.options import GoalOptions


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({}, {}, "trained with goal images, and there is no source of them: add --goal_source"),
        ({}, {"goal_source": "recorded"}, "recorded needs --goal_dataset"),
        ({}, {"goal_source": "generator"}, "generator needs --goal_generator"),
        ({}, {"goal_source": "none", "goal_dataset": "demos"}, "read with --goal_source recorded alone"),
        (
            {},
            {"goal_source": "recorded", "goal_dataset": "demos", "goal_generator": "pipeline"},
            "--goal_generator is read with --goal_source generator alone",
        ),
        (
            {},
            {"goal_source": "recorded", "goal_dataset": "demos", "goal_background": True},
            "--goal_background is for --goal_source generator",
        ),
        (
            {"objectives": ["action"]},
            {"goal_source": "generator", "goal_generator": "pipeline"},
            "which the checkpoint does not predict: train with the objective progress",
        ),
        (
            {"auxiliary_heads": False},
            {"goal_source": "generator", "goal_generator": "pipeline"},
            "which the checkpoint does not predict: give the model it came from",
        ),
        (
            {"goal_image": False},
            {"goal_source": "generator", "goal_generator": "pipeline"},
            "takes no goal images",
        ),
        ({"goal_image": False}, {"goal_dataset": "demos"}, "read with --goal_source recorded alone"),
        (
            {},
            {"goal_source": "none", "goal_camera": "top"},
            "goal_camera is read with --goal_source recorded",
        ),
    ],
)
def test_a_goal_source_that_does_not_fit_is_refused_with_the_remedy(fields, options, message):
    with pytest.raises(ValueError, match=message):
        check_goal_options(tiny_config(**{"goal_image": True, **fields}), GoalOptions(**options))


def test_a_policy_without_goals_needs_no_source():
    check_goal_options(tiny_config(), SimpleNamespace(**vars(GoalOptions())))
    check_goal_options(tiny_config(), GoalOptions(goal_source="none"))


# ------------------------------------------------------------------ what the results say


def describe(checkpoint="none", embodiment=None, **options):
    given = SimpleNamespace(**vars(GoalOptions(**options)), checkpoint=str(checkpoint), embodiment=embodiment)
    return describe_goals(tiny_config(goal_image=True), given)


def record(folder, **changed):
    sizes = {"size": (16, 16), "depth": False, "tracks": False, "use_videos": False}
    return make_dataset(folder, **{"episodes": 2, "frames": 4, **sizes, **changed}).root


def test_recorded_goals_are_of_the_same_dataset_wherever_it_lies_and_of_no_other_one(tmp_path):
    one = record(tmp_path / "one" / "demos")
    copy = shutil.copytree(one, tmp_path / "copy" / "demos")
    others = [
        record(tmp_path / "two" / "demos", tasks=("close the drawer", "open the drawer")),
        record(tmp_path / "three" / "demos", frames=[5, 3]),
        shutil.copytree(one, tmp_path / "four" / "demos"),
    ]
    statistics = read_json(others[-1] / "meta" / "stats.json")  # of other pictures with all else in common
    statistics["observation.images.main"]["mean"][0][0][0] += 0.1
    write_json(others[-1] / "meta" / "stats.json", statistics)
    facts = describe(goal_source="recorded", goal_dataset=str(one))
    assert facts["goal_dataset"]["name"] == "demos" and str(tmp_path) not in json.dumps(facts)
    assert describe(goal_source="recorded", goal_dataset=str(copy)) == facts
    for other in others:
        assert describe(goal_source="recorded", goal_dataset=str(other)) != facts
    with pytest.raises(ValueError, match="neither a folder nor a Hub id"):
        describe(goal_source="recorded", goal_dataset=str(tmp_path / "none"))


def test_goals_are_of_the_named_camera_or_of_the_one_that_the_robot_was_trained_on(tmp_path):
    demos = str(record(tmp_path / "demos"))
    sources = [
        {"path": "a", "embodiment": "arm", "cameras": {"main": "front"}},
        {"path": "b", "embodiment": "hand", "cameras": {"main": "top"}},
    ]
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(json.dumps({"data": {"datasets": sources}}))

    def camera(checkpoint, **options):
        source = {"goal_source": "recorded", "goal_dataset": demos}
        return describe(checkpoint, **source, **options)["goal_camera"]

    trained = tmp_path / "run" / "model"
    assert camera(trained) == "front" and camera(trained, embodiment="hand") == "top"
    assert camera(trained, embodiment="hand", goal_camera="image") == "image"
    assert camera("owner/published") == "main" and camera("owner/published", goal_camera="image") == "image"


def test_a_generator_is_told_by_its_weights_and_its_sampling_and_not_by_its_place(generator, tmp_path):
    def drawn(folder):
        return describe(goal_source="generator", goal_generator=str(folder))

    facts, copy = drawn(generator), shutil.copytree(generator, tmp_path / generator.name)
    assert facts["goal_generator"]["name"] == generator.name and facts["goal_background"] is False
    assert facts["goal_generator"]["sampling"]["steps"] == 2
    assert drawn(copy) == facts
    write_json(copy / "goal_images.json", {"image_size": SIDE, "steps": 9, "guidance": 1.5})
    assert drawn(copy) != facts
    shutil.rmtree(copy)
    save_tiny_pipeline(copy, seed=1)
    assert drawn(copy) != facts


# ------------------------------------------------------------------ in the simulator


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    robot = {"action_dim": 4, "binary_action_indices": (), "state_dim": 4, "binary_state_indices": ()}
    config = tiny_config(**robot, fps=20, goal_image=True)
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    ForesightForActionPrediction(config).save_pretrained(folder)
    tiny_processor(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def generator(goal_extra, tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny")


@pytest.fixture
def run(checkpoint, tmp_path, capsys):
    def run(name, *options):
        output = tmp_path / name
        flags = ("--checkpoint", str(checkpoint), "--tasks", "drawer-open-v3", "--episodes", "2")
        code = evaluate.main([*flags, "--max_steps", "100", "--output", str(output), *options])
        printed = capsys.readouterr()
        return SimpleNamespace(
            code=code, err=printed.err, results=json.loads(output.read_text()) if output.exists() else None
        )

    return run


@pytest.mark.slow
def test_episodes_with_a_generator_repeat_and_are_the_same_side_by_side(
    simulator, run, generator, monkeypatch
):
    given = []
    set_goal = ForesightStream.set_goal

    def note(stream, image, envs):
        given.extend(zip(envs, image.reshape(len(envs), -1).sum(1), strict=True))
        set_goal(stream, image, envs)

    monkeypatch.setattr(ForesightStream, "set_goal", note)
    source = ("--goal_source", "generator", "--goal_generator", str(generator))
    sums = {}
    for name, robots in (("one", 1), ("again", 1), ("two", 2)):
        done = run(f"{name}.json", *source, "--num_envs", str(robots))
        assert done.code == 0, done.err
        settings, timing = done.results["settings"], done.results["timing"]
        assert settings["goal_generator"]["name"] == generator.name and timing["goal_ms"]["median"] > 0
        sums[name] = [int(total) for _, total in sorted(given)] if robots == 2 else [int(t) for _, t in given]
        given.clear()
    # 25 steps of each episode: a goal at the start and one at step 20.
    assert len(sums["one"]) == 4 and sums["one"] == sums["again"]
    np.testing.assert_allclose(sorted(sums["one"]), sorted(sums["two"]), rtol=1e-3)


@pytest.mark.slow
def test_goals_may_be_drawn_beside_the_simulation_and_a_bad_generator_costs_nothing(
    simulator, run, generator, tmp_path
):
    source = ("--goal_source", "generator", "--goal_background", "true", "--num_envs", "1")
    done = run("beside.json", *source, "--goal_generator", str(generator))
    assert done.code == 0, done.err
    assert done.results["timing"]["goal_ms"]["count"] == 2, "the first goal of each episode is awaited"
    done = run("bad.json", *source, "--goal_generator", str(tmp_path))
    assert done.code == 1 and "has no model_index.json" in done.err
    assert done.results is None and not (tmp_path / "bad.json.partial").exists()
