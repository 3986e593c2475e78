"""The model card: measured figures only, its metadata, and an example that runs."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import DatasetCard, ModelCard, parse_eval_result_entries
from safetensors.torch import save_file

from datasets_scripts.storage.provenance import read_provenance, scripted_in, write_provenance
from hub_cards.build import main
from hub_cards.cards.error_tables import build_error_rows
from hub_cards.cards.model_card import build_card
from hub_cards.checks.card import check_card
from hub_cards.measure_latency import main as latency
from tests.datasets_scripts.inspection.test_template_rendering import HOSTILE, list_structure, spoil
from tests.hub_cards.finished_run import TASK, diagnostics, evaluation, summary, validation
from training.config import DataConfig, DatasetSource, RunConfig, TowerConfig
from training.config_reading import save_config
from training.run_record import describe_run


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
    assert "| depth, main | squared, per-patch normalized | **0.210** | 0.500 | – |" in text
    assert "| future image, wrist | squared, per-patch normalized | **0.300** | 0.600 | 0.400 |" in text
    assert "| flow, moving points: x and y | pixels, distance | **0.913** | 1.83 | 1.83 |" in text
    assert "| flow, moving points: z | mm | **12.3** | 300 | – |" in text
    assert "starts 10000 to 10019 (none of them among the 50 demonstrations of dataset)" in text
    for command in ("python training/train.py --seed 3", "python training/evaluate.py --episodes 20"):
        assert f"\n{command}\n" in text
    assert "1.5 minutes" in text and "987,654" in text and "45 episodes of `someone/demos`" in text
    assert describe_run()["hardware"]["cpu"] in text
    assert "| float32 | 4.32 ms | 5 ms | 50 | " in text  # the control step
    assert "{{" not in text and "{%" not in text


LIBERO_TASK = "libero_object/pick_up_the_milk_and_place_it_in_the_basket"
CALVIN_CHAINS = {f"{k}_in_a_row": 1 - 0.1 * k for k in range(1, 6)} | {
    "avg_len": 3.5,
    "avg_len_se": 0.12,
    "chains": 20,
}


def evaluation_of(benchmark: str) -> dict:
    """What `evaluate.py --benchmark` writes for the two benchmarks that are not MetaWorld."""
    settings = {"control_hz": 20, "execute_steps": 1}
    if benchmark == "LIBERO":
        more = {"max_steps": {"libero_object": 280}, "form": "lerobot", "image_size": 128}
        found = evaluation((LIBERO_TASK,))
        return {
            **found,
            "suites": {"libero_object": found["mean"]},
            "settings": settings | more,
            "benchmark": benchmark,
        }
    found = {
        k: v for k, v in evaluation(("lift_red_block", "open_drawer")).items() if k not in ("mean", "seeds")
    }
    more = {"max_steps": 360, "environment": "D", "goal_source": "recorded"}
    return {**found, "chains": CALVIN_CHAINS, "settings": settings | more, "benchmark": benchmark}


def test_the_card_shows_what_the_policy_depends_on(built, tmp_path):
    folder = shutil.copytree(built, tmp_path / "model")
    assert "What does it depend on?" not in build_card(folder).text
    path, found = folder / "evaluation" / "diagnostics.json", json.loads(json.dumps(diagnostics()))
    path.write_text(json.dumps(found))
    card = build_card(folder)
    rows = [line for line in card.text.splitlines() if line.startswith("|")]
    for row in (
        "| nothing | 2 | **90 %** (9 of 10) | 59.6 to 98.2 % | – | – |",
        "| images stay those of the first step | 2 | **10 %** (1 of 10) | 59.6 to 98.2 % | 9 of 10 | "
        "-80.0 (-100.0 to -50.0) |",
        "| progress, expected calibration error in ten bins | 0.0213 |",
        "| next action, absolute, data units, mean of a task: median task | 3 |",
        "| next action, absolute, data units, mean of a task: highest | 5 (a); 4 (e); 3 (d) |",
        "| change of the next action when another task with the same objects is named | 0.430; "
        "its error 0.450 instead of 0.0700 (77 windows) |",
        "| largest change of an action by noise in all frames after it | 0 |",
        "| largest distance of an action between a whole window and the stream that controls | 4.8e-07 |",
    ):
        assert row in rows
    assert any(row.startswith("| 2 actions executed per plan |") for row in rows)
    assert any(row.startswith("| memory of 1 frame |") for row in rows)
    assert "Not tried: swapped_views (it has one camera)." in card.text
    assert "\npython training/diagnose.py --episodes 5\n" in card.text

    card.save(folder / "README.md")
    assert check_card(folder) == []
    told = json.loads(json.dumps(found))
    told["closed_loop"]["named_task"] = told["closed_loop"]["frozen_camera"]
    told["settings"] = {"max_steps": {"libero_object": 280, "libero_goal": 300}}
    path.write_text(json.dumps(told))
    in_libero = build_card(folder).text
    assert "| the same, and success is that of the named task |" in in_libero
    assert "280 steps (libero_object) and 300 steps (libero_goal)" in in_libero
    assert "that it was not trained on:" in in_libero
    told["demonstrations"]["origin"] = "unknown"
    path.write_text(json.dumps(told))
    assert "that it may have been trained on:" in build_card(folder).text
    found["closed_loop"]["frozen_camera"]["successes"] = 2
    found["checkpoint"]["weights_sha256"] = "of others"
    path.write_text(json.dumps(found))
    figures, weights = check_card(folder)
    assert "README.md has other figures for 'images stay those of the first step'" in figures
    assert "evaluation/diagnostics.json measured other weights than those here" in weights
    path.unlink()
    assert len(check_card(folder)) == 2, "two tables without a source"


def test_diagnostics_of_a_run_join_its_model_unless_they_are_of_other_weights(folder, capsys):
    (folder / "diagnostics.json").write_text(json.dumps(diagnostics()))
    assert main([str(folder)]) == 0
    assert (folder / "model" / "evaluation" / "diagnostics.json").is_file()
    assert "What does it depend on?" in (folder / "README.md").read_text()
    other = diagnostics()
    other["checkpoint"]["weights_sha256"] = "of others"
    (folder / "diagnostics.json").write_text(json.dumps(other))
    assert main([str(folder)]) == 1
    said = capsys.readouterr().err
    assert (
        "diagnostics.json measured other weights" in said
        and "python training/diagnose.py --episodes 5" in said
    )


@pytest.mark.parametrize(
    ("benchmark", "row", "sentence"),
    [
        (
            "LIBERO",
            f"| {LIBERO_TASK} | pick up the milk and place it in the basket | **95 %** | 19 of 20 |",
            "within at most\n280 (libero_object) actions at 20 Hz",
        ),
        (
            "CALVIN",
            "| 20 | 90.0 % | 80.0 % | 70.0 % | 60.0 % | 50.0 % | **3.50** (standard error 0.12) |",
            "How often a task was tried depends on the policy. Goal images: recorded.",
        ),
    ],
)
def test_the_card_of_each_benchmark_states_its_own_protocol(folder, benchmark, row, sentence):
    (folder / "eval.json").write_text(json.dumps(evaluation_of(benchmark)))
    facts = json.loads((folder / "training" / "summary.json").read_text())
    facts["datasets"][0]["scripted_in"] = benchmark
    (folder / "training" / "summary.json").write_text(json.dumps(facts))
    assert main([str(folder)]) == 0
    assert ("not LIBERO's standard protocol" in (folder / "README.md").read_text()) == (benchmark == "LIBERO")
    text = (folder / "README.md").read_text()
    assert row in text.replace("\\_", "_") and sentence in text.replace("\\_", "_")
    assert "MetaWorld" not in text and f"`someone/demos` (scripted experts in {benchmark})" in text
    assert check_card(folder / "model") == []
    names = [result.metric_type for result in ModelCard.load(folder / "README.md").data.eval_results]
    assert ("avg_len" in names) == (benchmark == "CALVIN")


def test_depth_of_flow_is_compared_where_both_know_as_much():
    """Points that stay put are told their depth now, so start and displacement have rows of their own."""
    measured = validation()
    for figures in measured["flow"]["moving"].values():
        figures |= {"start_z_m": 0.05, "displacement_z_m": 0.02}
    del measured["flow"]["moving"]["stay_put"]["start_z_m"]
    found = [row["what"] for row in build_error_rows(measured, "m")]
    rows = {what.rpartition(": ")[2] for what in found if "flow" in what}
    assert rows >= {"z at the start", "displacement in z"} and "z" not in rows


def test_what_a_trivial_predictor_does_better_is_said(folder):
    assert main([str(folder)]) == 0
    text = (folder / "README.md").read_text()
    assert "**Not better than a trivial predictor:** future depth, main; future depth, wrist." in text
    assert "| future depth, main | squared, per-patch normalized | 0.300 | 0.600 | 0.250 |" in text


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


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_of_a_run_change_nothing_around_them_in_the_card(built, tmp_path, text):
    model = shutil.copytree(built, tmp_path / "model")
    plain = build_card(model, "you/policy").text
    for name in ("training", "eval", "latency"):
        path = model / "evaluation" / f"{name}.json"
        facts = json.loads(path.read_text())
        kept = {key: facts[key] for key in ("objectives", "mixed_precision", "benchmark") if key in facts}
        path.write_text(json.dumps(spoil(facts, text) | kept))
    spoiled = build_card(model, "you/policy").text
    assert list_structure(spoiled) == list_structure(plain)
    assert len(spoiled.splitlines()) == len(plain.splitlines())


def test_a_model_with_figures_in_the_spelling_of_before_the_release_has_the_same_card(built, tmp_path):
    model = shutil.copytree(built, tmp_path / "model")
    facts = model / "evaluation" / "training.json"
    part = {"what": "base model", "name": "someone/policy"}
    cards = []
    for parts, license in (("licenses", "license"), ("licences", "licence")):
        content = {name: value for name, value in json.loads(facts.read_text()).items() if name != "licenses"}
        facts.write_text(json.dumps(content | {parts: [part | {license: "cc-by-nc-4.0"}]}))
        cards.append(build_card(model, "you/policy"))
    assert cards[0].text == cards[1].text and cards[1].data.license == "cc-by-nc-4.0"


def test_a_hub_id_takes_the_place_of_the_folder(folder):
    assert main([str(folder), "--repo-id", "someone/policy"]) == 0
    assert 'from_pretrained("someone/policy")' in (folder / "README.md").read_text()


def test_several_tasks_have_a_row_and_an_entry_each_and_one_for_their_mean(folder):
    (folder / "eval.json").write_text(json.dumps(evaluation((TASK, "door-open-v3"))))
    assert main([str(folder)]) == 0
    card = ModelCard.load(folder / "README.md")
    assert [r.dataset_name for r in card.data.eval_results] == [
        f"MetaWorld {name}" for name in (TASK, "door-open-v3", "mean of 2 tasks")
    ]
    assert "# 3D Foresight: 2 MetaWorld tasks" in card.text


@pytest.mark.parametrize(
    ("lost", "command"),
    [
        ("model/config.json", "train.py"),
        ("training/summary.json", "train.py"),
        ("eval.json", "evaluate.py"),
        ("foresight.png", "visualize.py"),
    ],
)
def test_a_missing_measurement_is_refused_with_the_command_that_makes_it(folder, capsys, lost, command):
    (folder / lost).unlink()
    assert main([str(folder)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and f"{folder / lost} is missing" in error and command in error
    assert not (folder / "README.md").exists()


def test_a_run_as_train_leaves_it_has_its_summary_beside_the_model(folder, capsys):
    for name in ("config.yaml", "summary.json"):
        (folder / "training" / name).rename(folder / name)
    (folder / "training").rmdir()
    save_config(RunConfig(data=DataConfig(datasets=[DatasetSource("me/demos")])), folder / "config.yaml")
    picture, seen = (folder / "foresight.png").rename(folder / "p"), (folder / "summary.json").read_text()
    (folder / "summary.json").unlink()
    assert main([str(folder)]) == 1
    error = capsys.readouterr().err
    assert f"train.py --config {folder}/config.yaml --resume" in error
    assert f"visualize.py --checkpoint {folder}/model --dataset me/demos" in error
    assert "quickstart.yaml" not in error
    picture.rename(folder / "foresight.png")
    (folder / "summary.json").write_text(seen)
    assert main([str(folder)]) == 0
    assert "1,234" in (folder / "model" / "README.md").read_text()


def test_everything_that_is_missing_is_named_at_once(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("is missing") == 4


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
    measured = evaluation() | {"open_loop": {"metrics": validation(), "episodes": [1, 2, 7, 8, 9]}}
    (folder / "eval.json").write_text(json.dumps(measured))
    assert main([str(folder)]) == 0
    assert "97 windows of 5 held-out episodes" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("checkpoint", {"path": "../other/model"}, "../other/model"),
        ("checkpoint", {"weights_sha256": "0" * 64}, "had before it was exported again"),
        ("settings", {"perturbation": {"camera_shift_m": 0.05}}, "measured changed scenes (camera_shift_m)"),
    ],
)
def test_an_evaluation_of_another_model_or_earlier_weights_or_changed_scenes_is_refused(
    part, change, words, folder, capsys
):
    content = copy.deepcopy(evaluation())
    content[part] |= change
    (folder / "eval.json").write_text(json.dumps(content))
    assert main([str(folder)]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "reason"),
    [('{"version": 1', "eval.json is damaged"), ("[]", "eval.json is damaged"), ("{}", "'checkpoint'")],
)
def test_a_damaged_file_is_named(folder, capsys, content, reason):
    (folder / "eval.json").write_text(content)
    assert main([str(folder)]) == 1
    assert reason in capsys.readouterr().err


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


def test_results_are_written_for_the_leaderboards_of_the_hub_too(folder):
    (folder / "eval.json").write_text(json.dumps(evaluation((TASK, "door-open-v3"))))
    assert main([str(folder)]) == 0
    content = yaml.safe_load((folder / "model" / ".eval_results" / "metaworld.yaml").read_text())
    first, second = parse_eval_result_entries(content)  # a mean of two is none of `all` tasks
    assert (first.dataset_id, first.task_id, first.value) == ("lerobot/metaworld_mt50", TASK, 95.0)
    assert "20 unseen starts" in first.notes and "--episodes 20" in first.notes
    assert second.task_id == "door-open-v3"
    (folder / "eval.json").write_text(json.dumps(evaluation([f"task{i}-v3" for i in range(50)])))
    assert main([str(folder)]) == 0
    content = yaml.safe_load((folder / "model" / ".eval_results" / "metaworld.yaml").read_text())
    assert parse_eval_result_entries(content)[-1].task_id == "all"


def other_seed(folder, **changes):
    """The same training and evaluation with seed 4, in a run of its own beside `folder`."""
    run = folder.with_name("seed4")
    (run / "training").mkdir(parents=True)
    (run / "model").mkdir()
    (run / "training" / "config.yaml").write_text((folder / "training" / "config.yaml").read_text())
    (run / "training" / "summary.json").write_text(json.dumps(summary() | {"seed": 4} | changes))
    measured = evaluation()
    worse = {"success_rate": 0.5, "successes": 10, "episodes": 20, "ci95": [0.2993, 0.7007]}
    measured |= {"tasks": {TASK: worse}, "mean": worse}
    (run / "eval.json").write_text(json.dumps(measured))
    return run / "eval.json"


def test_another_training_seed_gets_a_column_and_its_own_commands(folder):
    assert main([str(folder), "--seed-eval", str(other_seed(folder))]) == 0
    text = (folder / "README.md").read_text()
    assert "| 95 % interval | training seed 4 |" in text
    assert "| 76.4 to 99.1 % | 50 % (10 of 20; 29.9 to 70.1 %) |" in text
    assert "Training seed 4 (1,234 steps, 1.5 minutes)" in text
    (result,) = ModelCard.load(folder / "README.md").data.eval_results
    assert result.metric_value == 0.95  # of the weights that are here


@pytest.mark.parametrize(
    ("changes", "reason"), [({"seed": 3}, "same seed, 3"), ({"steps": 9}, "other steps of training")]
)
def test_an_evaluation_that_is_not_of_the_same_training_gets_no_column(folder, capsys, changes, reason):
    assert main([str(folder), "--seed-eval", str(other_seed(folder, **changes))]) == 1
    assert reason in capsys.readouterr().err


def test_a_policy_that_was_never_tried_needs_open_loop_and_then_says_so(folder, capsys):
    (folder / "eval.json").unlink()
    assert main([str(folder)]) == 1
    assert "--open-loop" in capsys.readouterr().err
    assert main([str(folder), "--open-loop"]) == 0
    card = ModelCard.load(folder / "README.md")
    assert "**Success in closed loop was not measured.**" in card.text
    assert {result.metric_type for result in card.data.eval_results} == {"error"}
    assert not (folder / "model" / ".eval_results").exists()


def test_a_pretrained_model_is_not_a_policy_and_its_card_shows_what_it_foresees(folder):
    path = folder / "model" / "config.json"
    config = json.loads(path.read_text()) | {"objectives": ["depth", "future", "flow"]}
    path.write_text(json.dumps(config))
    (folder / "training" / "summary.json").write_text(
        json.dumps(summary() | {"objectives": config["objectives"], "epochs": 8.0003})
    )
    (folder / "eval.json").unlink()
    assert main([str(folder)]) == 0
    text = (folder / "README.md").read_text()
    assert "# 3D Foresight, pretrained: someone/demos" in text and "It does not act" in text
    assert "| depth, main | squared, per-patch normalized | **0.210** |" in text
    assert "| steps | 1,234 (8.00 epochs) |" in text
    for absent in ("predict_action", "How fast", "keeps a robot from harm"):
        assert absent not in text


@pytest.fixture
def adapter(folder):
    """The run of an adapter on the policy `someone/base`."""
    base = folder / "base"
    (folder / "model").rename(base)
    (folder / "model" / "evaluation").mkdir(parents=True)
    shutil.copy(base / "evaluation" / "latency.json", folder / "model" / "evaluation")
    (folder / "model" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "someone/base", "revision": "0123abc"})
    )
    # The base is on this machine while the adapter is trained; its license is that of its card.
    (base / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n\n# Base\n")
    save_config(RunConfig(init_from=str(base)), folder / "training" / "config.yaml")
    content = summary() | {"trained_parameters": 12345, "lora": {"r": 8}}
    (folder / "training" / "summary.json").write_text(json.dumps(content))
    return folder


def test_the_card_of_an_adapter_names_its_base_and_inherits_its_license(adapter):
    assert main([str(adapter), "--repo-id", "someone/adapter"]) == 0
    card = ModelCard.load(adapter / "model" / "README.md")
    assert (card.data.base_model, card.data.library_name) == ("someone/base", "peft")
    assert card.data.license == "cc-by-nc-4.0"
    assert 'AutoModel.from_pretrained("someone/base", revision="0123abc")' in card.text
    assert 'PeftModel.from_pretrained(base, "someone/adapter")' in card.text
    assert "12,345 of 987,654 parameters" in card.text and "| LoRA rank | 8 |" in card.text


def test_a_base_that_is_a_folder_is_not_a_base_model_of_the_hub(adapter):
    (adapter / "model" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(adapter / "base"), "revision": None})
    )
    assert main([str(adapter)]) == 0
    assert ModelCard.load(adapter / "README.md").data.base_model is None


def test_a_stage_of_the_same_training_is_told_with_its_command_and_hands_on_its_license(folder):
    stage = folder / "stage"
    (stage / "training").mkdir(parents=True)
    shutil.copytree(folder / "model", stage / "model")
    towers = TowerConfig(vision="facebook/vit-mae-base")
    save_config(RunConfig(towers=towers), stage / "training" / "config.yaml")
    made = summary() | {"steps": 77, "command": "accelerate launch training/train.py --train.steps 77"}
    (stage / "training" / "summary.json").write_text(json.dumps(made))
    save_config(RunConfig(init_from=str(stage / "model")), folder / "training" / "config.yaml")
    assert main([str(folder)]) == 0
    card = ModelCard.load(folder / "model" / "README.md")
    assert "That was made in 77 steps" in card.text and made["command"] in card.text
    assert card.data.license == "cc-by-nc-4.0" and card.data.base_model is None


def test_a_start_that_has_a_card_is_named_by_it_if_it_is_the_same_model(folder, capsys):
    start, published = folder / "start", folder / "3d-foresight-pretrained"
    start.mkdir()
    save_file({"weight": torch.zeros(3)}, start / "model.safetensors")
    save_config(RunConfig(init_from=str(start)), folder / "training" / "config.yaml")
    shutil.copytree(start, published)
    command = [str(folder), "--base", str(published)]
    assert main(command) == 1
    assert "3d-foresight-pretrained has no evaluation/training.json" in capsys.readouterr().err
    (published / "evaluation").mkdir()
    made = summary() | {"steps": 77, "command": "python experiments/ablation.py"}
    (published / "evaluation" / "training.json").write_text(json.dumps(made))
    (published / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n\n# Pretrained\n")
    assert main(command) == 0
    card = ModelCard.load(folder / "model" / "README.md")
    assert "3d-foresight-pretrained`, which has a card of its own. That was made in 77 steps" in card.text
    assert card.data.license == "cc-by-nc-4.0" and "not published" not in card.text
    save_file({"weight": torch.ones(3)}, published / "model.safetensors")
    assert main(command) == 1
    assert "3d-foresight-pretrained has other weights than start" in capsys.readouterr().err
    save_config(RunConfig(), folder / "training" / "config.yaml")
    assert main(command) == 1
    assert "did not start from a folder" in capsys.readouterr().err


def test_a_run_whose_export_took_the_place_of_its_start_is_not_its_own_stage(folder, capsys):
    save_config(RunConfig(init_from=str(folder / "model")), folder / "training" / "config.yaml")
    assert main([str(folder)]) == 1
    assert "that of base model, model (license unknown) is not" in capsys.readouterr().err
    assert main([str(folder), "--license", "mit"]) == 0
    assert "That was made in" not in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("stated", "license"),
    [
        ("license: cc-by-nc-sa-4.0", "cc-by-nc-sa-4.0"),
        ("license: other\nlicense_name: research-only", "other"),
        ("license: [mit, cc-by-nc-4.0]", None),
    ],
)
def test_what_the_card_of_the_base_says_is_handed_on_or_asked_for(folder, capsys, stated, license):
    base = folder / "base"
    base.mkdir()
    (base / "README.md").write_text(f"---\n{stated}\n---\n\n# Base\n")
    save_config(RunConfig(init_from=str(base)), folder / "training" / "config.yaml")
    assert main([str(folder)]) == (license is None)
    if license is None:
        assert "--license" in capsys.readouterr().err
    else:
        assert ModelCard.load(folder / "README.md").data.license == license


@pytest.mark.parametrize(
    ("text", "vision", "license"),
    [
        (None, None, "apache-2.0"),
        ("openai/clip-vit-base-patch32", None, "apache-2.0"),
        ("openai/clip-vit-base-patch32", "facebook/vit-mae-base", "cc-by-nc-4.0"),
        ("openai/clip-vit-base-patch32", "timm/vit_base_patch16_224.mae", "cc-by-nc-4.0"),
    ],
)
def test_the_license_is_that_of_the_strictest_tower(folder, text, vision, license):
    save_config(RunConfig(towers=TowerConfig(text=text, vision=vision)), folder / "training" / "config.yaml")
    assert main([str(folder)]) == 0
    assert ModelCard.load(folder / "README.md").data.license == license


def labeled_by(folder, license):
    content = summary()
    content["datasets"][0]["labels"]["main"]["tracks"]["model"] = {"name": "tracker", "license": license}
    (folder / "training" / "summary.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("stated", "license"),
    [("cc-by-nc-4.0", "cc-by-nc-4.0"), ("Snap Inc., non-commercial research only", "other")],
)
def test_labels_hand_on_the_license_of_the_model_that_made_them(folder, stated, license):
    labeled_by(folder, stated)
    assert main([str(folder)]) == 0
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == license and f"| labels of someone/demos | tracker | {stated} |" in card.text


@pytest.mark.parametrize("stated", ["not stated", "unknown: see the page of the model"])
def test_a_license_that_is_not_known_is_asked_for(folder, capsys, stated):
    labeled_by(folder, stated)
    assert main([str(folder)]) == 1
    error = capsys.readouterr().err
    assert "tracker" in error and "--license" in error and not (folder / "README.md").exists()
    assert main([str(folder), "--license", "mit"]) == 0
    assert ModelCard.load(folder / "README.md").data.license == "mit"


def test_a_license_that_allows_more_than_a_part_does_is_refused(folder, capsys):
    labeled_by(folder, "cc-by-nc-4.0")
    for chosen in ("apache-2.0", "gpl-3.0"):
        assert main([str(folder), "--license", chosen]) == 1
        assert "allows more than labels of someone/demos, tracker (cc-by-nc-4.0)" in capsys.readouterr().err
    assert main([str(folder), "--license", "cc-by-nc-sa-4.0"]) == 0
    assert main([str(folder), "--license", "cc-nc"]) == 1
    assert "is not a name that the Hub knows" in capsys.readouterr().err


def test_the_card_cites_what_the_citation_file_names(folder):
    root = Path(__file__).resolve().parents[3]
    (paper,) = yaml.safe_load((root / "CITATION.cff").read_text())["references"]
    assert main([str(folder)]) == 0
    text = (folder / "README.md").read_text()
    authors = " and ".join(f"{a['family-names']}, {a['given-names']}" for a in paper["authors"])
    for part in (paper["title"], authors, str(paper["year"]), paper["url"]):
        assert part in text


def test_the_control_step_is_measured_on_this_machine_and_joins_what_others_measured(folder):
    path = folder / "model" / "evaluation" / "latency.json"
    others = json.loads(path.read_text())
    others["measurements"][0]["hardware"] = "another machine"
    path.write_text(json.dumps(others))
    options = ["--threads", "1", "--warmup", "1", "--repeats", "3"]
    for _ in range(2):  # the second replaces the first
        assert latency([str(folder / "model"), *options]) == 0
    old, new = json.loads(path.read_text())["measurements"]
    assert (old["hardware"], new["hardware"]) == ("another machine", describe_run()["hardware"]["cpu"])
    assert new["count"] == 3 and 0 < new["median_ms"] <= new["p90_ms"]
    assert main([str(folder)]) == 0
    assert "another machine, 1 of 2 cores" in (folder / "README.md").read_text()


def simulated(root):
    """What simulate.py leaves of a dataset in `meta/`, as far as a card needs it."""
    shipped = Path(__file__).resolve().parents[3] / "hub_cards" / "sample_data" / "metaworld"
    shutil.copytree(shipped / "meta", root / "meta")
    return root


@pytest.mark.parametrize("packages", [["hf-libero", "robosuite"], ["robosuite"]])
def test_the_card_of_a_dataset_names_the_simulator(folder, packages):
    root = simulated(folder / "dataset")
    provenance = read_provenance(root)
    provenance["simulation"]["versions"] = dict.fromkeys([*packages, "mujoco"], "1.0")
    write_provenance(root, provenance)
    assert main([str(folder), "--kind", "dataset"]) == 0
    text, name = (root / "README.md").read_text(), scripted_in(provenance)
    assert name == {"hf-libero": "LIBERO"}.get(packages[0], packages[0])
    assert f"Demonstrations of scripted experts in {name}," in text and "MetaWorld" not in text


def test_the_dataset_of_a_run_gets_a_card_that_says_what_is_exact(folder):
    root = simulated(folder / "dataset")
    assert main([str(folder), "--kind", "dataset", "--repo-id", "someone/demos"]) == 0
    card = DatasetCard.load(root / "README.md")
    assert card.data.license == "apache-2.0" and card.data.task_categories == ["robotics"]
    assert "# 10 MetaWorld tasks with exact depth and 3D tracks" in card.text
    assert "| push-v3 | 1 |" in card.text and "| simulation: seed | 4242 |" in card.text
    assert "| `observation.depth.main` | depth along the optical axis" in card.text
    assert 'LeRobotDataset("someone/demos", depth_output_unit="m")' in card.text
    assert "without a ground truth" not in card.text and "hard links" not in card.text


def test_a_dataset_whose_labels_have_no_history_gets_no_card(folder, capsys):
    (simulated(folder / "dataset") / "meta" / "foresight.json").unlink()
    assert main([str(folder / "dataset")]) == 1
    assert "has no meta/foresight.json" in capsys.readouterr().err


def test_depth_in_meters_has_a_row_of_relative_errors_for_each_camera():
    figures = {"model": {"abs_rel": 0.06, "delta1": 0.9}, "mean": {"abs_rel": 0.03, "delta1": 0.95}}
    (row,) = build_error_rows({"metric_depth": {"main": figures}}, "data units")
    assert row["what"] == "depth in meters, main" and row["unit"] == "absolute, share of the depth"
    assert (row["model"], row["mean"], row["best"]) == ("0.0600", "0.0300", False)
