"""The model card: measured figures only, its metadata, and an example that runs."""

import copy
import json
import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard

from hub_cards.build import main
from modeling_foresight import ForesightForActionPrediction
from tests.tiny import tiny_config, tiny_processor
from training.run_facts import describe_run

TASK = "drawer-open-v3"
RUN = {"train.py": ["--seed", "3"], "evaluate.py": ["--episodes", "20"]}


def validation():
    def patches(model, mean, **more):
        return {
            view: {"model": {"mse": model}, "mean": {"mse": mean}, **{k: {"mse": v} for k, v in more.items()}}
            for view in ("main", "wrist")
        }

    flow = {"x_px": 0.51, "y_px": 0.62, "xy_px": 0.913, "xy_rmse": 0.01}
    worse = {name: 2 * value for name, value in flow.items()}
    return {
        "windows": 97,
        "losses": {"total": 0.2},
        "depth": patches(0.2101, 0.5),
        "future_rgb": patches(0.3, 0.6, current=0.4),
        "future_depth": patches(0.3, 0.6, current=0.25),
        "flow": {
            "moving": {
                "model": {**flow, "z_m": 0.0123, "z_rmse_m": 0.02},
                "stay_put": worse,
                "mean": {**worse, "z_m": 0.3, "z_rmse_m": 0.4},
            }
        },
        "actions": {
            name: {"model": {"l1": [0.1] * 4, "l1_mean": 0.1}, "mean": {"l1": [0.4] * 4, "l1_mean": 0.4}}
            for name in ("chunk", "first")
        },
        "progress": {"all": {"model": {"mae": 0.05}, "mean": {"mae": 0.25}}},
    }


def summary():
    return {
        **describe_run("training/train.py", RUN["train.py"]),
        "seed": 3,
        "steps": 1234,
        "train_seconds": 90.0,
        "datasets": [
            {
                "name": "someone/demos",
                "train_episodes": 45,
                "train_windows": 1111,
                "validation_episodes": [4, 9, 11],
                "fps": 20,
                "tasks": ["Open a drawer"],
                "labels": {"main": {"depth": {"source": "mujoco"}, "tracks": {"source": "rigid bodies"}}},
            }
        ],
        "parameters": 987654,
        "trained_parameters": 987000,
        "objectives": ["action", "depth", "future", "flow", "progress"],
        "processes": 1,
        "device": "cpu",
        "mixed_precision": "bf16",
        "validation": validation(),
    }


def evaluation(tasks=(TASK,)):
    figures = {"success_rate": 0.95, "successes": 19, "episodes": 20, "ci95": [0.7639, 0.9911]}
    return {
        "version": 1,
        "benchmark": "MetaWorld",
        "checkpoint": {"path": "model", "revision": None},
        "tasks": {task: dict(figures) for task in tasks},
        "mean": dict(figures),
        "seeds": {"first": 10000, "last": 10019, "checked_against": "50 demonstrations of dataset"},
        "settings": {
            "control_hz": 20.0,
            "stride": 4,
            "execute_steps": 1,
            "max_steps": 125,
            "max_simulation_steps": 500,
            "render_quality": "fast",
            "image_size": 48,
        },
        "timing": {
            "wall_s": 60.0,
            "parallel_environments": 2,
            "policy_ms": {"median": 12.34, "p90": 20.0, "count": 400},
        },
        "episodes": [],
        **describe_run("training/evaluate.py", RUN["evaluate.py"]),
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run; the model is real, the figures are made up."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    config = tiny_config(action_dim=4, binary_action_indices=(), state_dim=4, binary_state_indices=())
    torch.manual_seed(0)
    ForesightForActionPrediction(config).save_pretrained(folder / "model")
    tiny_processor(config).save_pretrained(folder / "model")
    (folder / "training").mkdir()
    (folder / "training" / "summary.json").write_text(json.dumps(summary()))
    (folder / "eval.json").write_text(json.dumps(evaluation()))
    (folder / "foresight.png").write_bytes(b"a picture")
    (folder / "rollout.mp4").write_bytes(b"a film")
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_the_card_carries_the_metadata_that_the_hub_reads(folder):
    assert main([str(folder)]) == 0
    data = ModelCard.load(folder / "README.md").data
    assert (data.pipeline_tag, data.library_name, data.license) == ("robotics", "transformers", "apache-2.0")
    assert data.tags == ["robotics", "foresight", "lerobot"]
    assert data.datasets == ["someone/demos"]
    (result,) = data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == (
        f"MetaWorld {TASK}",
        "success_rate",
        0.95,
    )


def test_the_card_shows_every_figure_with_how_it_was_obtained(folder):
    assert main([str(folder)]) == 0
    text = (folder / "README.md").read_text()
    assert f"| {TASK} | Open a drawer | **95 %** | 19 of 20 | 76.4 to 99.1 % |" in text
    assert "| depth, main | squared, per-patch normalised | **0.210** | 0.500 |  |" in text
    assert "| future image, wrist | squared, per-patch normalised | **0.300** | 0.600 | 0.400 |" in text
    assert "| flow, moving points: x and y | pixels, distance | **0.913** | 1.83 | 1.83 |" in text
    assert "| flow, moving points: z | mm | **12.3** | 300 |  |" in text
    assert "starts 10000 to\n10019 (none of them among the 50 demonstrations of dataset)" in text
    for command in ("python training/train.py --seed 3", "python training/evaluate.py --episodes 20"):
        assert f"\n{command}\n" in text
    assert "1.5 minutes" in text and "987,654" in text and "45 episodes of `someone/demos`" in text
    assert describe_run()["hardware"]["cpu"] in text
    assert "{{" not in text and "{%" not in text


def test_what_a_trivial_predictor_does_better_is_said(folder):
    assert main([str(folder)]) == 0
    text = (folder / "README.md").read_text()
    assert "**Not better than a trivial predictor:** future depth, main; future depth, wrist." in text
    assert "| future depth, main | squared, per-patch normalised | 0.300 | 0.600 | 0.250 |" in text


def test_the_model_folder_gets_the_card_with_its_pictures(folder):
    assert main([str(folder)]) == 0
    assert (folder / "model" / "README.md").read_text() == (folder / "README.md").read_text()
    assert (folder / "model" / "foresight.png").read_bytes() == b"a picture"
    assert (folder / "model" / "rollout.mp4").read_bytes() == b"a film"


def test_the_example_of_the_card_runs(folder, monkeypatch):
    assert main([str(folder)]) == 0
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["actions"].shape == (1, 4, 4)
    assert len([line for line in code.splitlines() if line.strip()]) <= 11


def test_a_hub_id_takes_the_place_of_the_folder(folder):
    assert main([str(folder), "--repo-id", "someone/policy"]) == 0
    assert 'from_pretrained("someone/policy")' in (folder / "README.md").read_text()


def test_several_tasks_have_a_row_and_an_entry_each_and_one_for_all(folder):
    (folder / "eval.json").write_text(json.dumps(evaluation((TASK, "door-open-v3"))))
    assert main([str(folder)]) == 0
    card = ModelCard.load(folder / "README.md")
    assert [r.dataset_name for r in card.data.eval_results] == [
        f"MetaWorld {name}" for name in (TASK, "door-open-v3", "all")
    ]
    assert "# 3D Foresight: 2 MetaWorld tasks" in card.text


@pytest.mark.parametrize(
    ("lost", "command"),
    [
        ("model/config.json", "train.py"),
        ("training/summary.json", "train.py"),
        ("eval.json", "evaluate.py"),
        ("rollout.mp4", "evaluate.py"),
        ("foresight.png", "visualize.py"),
    ],
)
def test_a_missing_measurement_is_refused_with_the_command_that_makes_it(folder, capsys, lost, command):
    (folder / lost).unlink()
    assert main([str(folder)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and f"{folder / lost} is missing" in error and command in error
    assert not (folder / "README.md").exists()


def test_everything_that_is_missing_is_named_at_once(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("is missing") == 5


@pytest.mark.parametrize(
    ("file", "path"),
    [
        ("training/summary.json", ("train_seconds",)),
        ("training/summary.json", ("validation", "depth", "main", "model", "mse")),
        ("eval.json", ("tasks", TASK, "ci95")),
        ("eval.json", ("timing", "policy_ms")),
        ("eval.json", ("hardware", "cpu")),
    ],
)
def test_a_figure_that_is_missing_inside_a_file_never_becomes_an_empty_place(folder, capsys, file, path):
    content = json.loads((folder / file).read_text())
    place = content
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    (folder / file).write_text(json.dumps(content))
    code = main([str(folder)])
    if path[0] == "validation":  # an error that was not measured has no row
        assert code == 0 and "| depth, main |" not in (folder / "README.md").read_text()
    else:
        assert code == 1 and path[-1] in capsys.readouterr().err
        assert not (folder / "README.md").exists()


def test_a_run_without_held_out_episodes_is_refused_unless_evaluate_measured_them(folder, capsys):
    content = summary() | {"validation": {}}
    (folder / "training" / "summary.json").write_text(json.dumps(content))
    assert main([str(folder)]) == 1
    assert "--dataset" in capsys.readouterr().err
    measured = evaluation() | {"open_loop": {"metrics": validation()}}
    (folder / "eval.json").write_text(json.dumps(measured))
    assert main([str(folder)]) == 0


def test_an_evaluation_of_another_model_is_refused(folder, capsys):
    content = copy.deepcopy(evaluation())
    content["checkpoint"]["path"] = "../other/model"
    (folder / "eval.json").write_text(json.dumps(content))
    assert main([str(folder)]) == 1
    assert "../other/model" in capsys.readouterr().err


def test_a_damaged_file_is_named(folder, capsys):
    (folder / "eval.json").write_text('{"version": 1')
    assert main([str(folder)]) == 1
    assert "eval.json is damaged" in capsys.readouterr().err


def test_the_card_of_a_model_without_depth_that_acts_in_local_deltas_says_so(folder):
    path = folder / "model" / "config.json"
    config = json.loads(path.read_text())
    config |= {"objectives": ["action", "future_rgb", "flow_2d"], "action_codec": "local_delta"}
    path.write_text(json.dumps(config))
    content = summary()
    for section in ("depth", "future_depth", "progress"):
        del content["validation"][section]
    for errors in content["validation"]["flow"]["moving"].values():
        errors.pop("z_m", None), errors.pop("z_rmse_m", None)
    (folder / "training" / "summary.json").write_text(json.dumps(content))
    assert main([str(folder)]) == 0
    card = (folder / "README.md").read_text()
    assert "what it will see (RGB) and where points in the scene will move in the image" in card
    assert "| absolute, 2 cm or 0.05 rad, mean |" in card
    assert "predict_action(**inputs), state[None])" in card
    for absent in ("| depth, ", "RGB and depth", "Depth labels", "moving points: z"):
        assert absent not in card
