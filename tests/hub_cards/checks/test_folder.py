"""The checker: what the repository ships passes; what must not be published is named, and why."""

import json
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import metadata_load, metadata_save
from lerobot.processor import ProcessorStep, ProcessorStepRegistry
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from hub_cards.build import main as build
from hub_cards.check import main
from hub_cards.checks.card import check_card
from hub_cards.checks.folder import check_folder
from hub_cards.checks.unsafe_files import check_files
from modeling_foresight import ForesightForActionPrediction
from modeling_foresight.lora import lora_config
from modeling_foresight.remote_code import export_with_code
from tests.hub_cards.finished_run import latency, stats, summary
from tests.tiny import tiny_config, tiny_processor
from training.config import RunConfig
from training.config_reading import save_config
from training.models.adapters import describe_base, write_adapter
from training.models.model_folder import weights_digest

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = sorted(path.parent for path in (ROOT / "hub_cards").glob("*/*/README.md"))
SAMPLE = ROOT / "hub_cards" / "sample_data" / "metaworld"


@pytest.fixture
def folder(built, tmp_path):
    return shutil.copytree(built, tmp_path / "model")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_card(folder, old, new):
    card = folder / "README.md"
    assert old in card.read_text()
    card.write_text(card.read_text().replace(old, new))


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda path: path.name)
def test_what_the_repository_ships_is_fit_to_publish(folder):
    assert check_folder(folder) == []


def test_a_finished_model_passes_with_exit_code_0(folder, capsys):
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}: fit to publish\n"


def test_a_problem_is_one_line_with_its_remedy_and_exit_code_1(folder, capsys):
    (folder / "model.safetensors").unlink()
    assert main([str(folder), str(folder)]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert (
        first
        == second
        == (
            f"error: {folder}: model.safetensors is missing, the weights: export the model again with "
            "training/train.py"
        )
    )


def test_users_may_add_prose_to_a_card(folder):
    edit_card(folder, "## Limits", "## What we used it for\n\nOpening drawers.\n\n## Limits")
    assert check_card(folder) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: w.pop("model.embed_state.weight", None) or w.popitem(), "the weights lack "),
        (lambda w: w.update(stranger=torch.ones(1)), "beyond the configuration, stranger"),
        (
            lambda w: w.update({max(w): torch.ones(3, 5)}),
            "the weights have another shape for ",
        ),
        (lambda w: w[max(w)].fill_(float("nan")), "the weights are not finite in "),
    ],
)
def test_weights_that_do_not_match_the_configuration(folder, change, reason):
    edit_weights(folder, change)
    (problem,) = check_folder(folder)
    assert reason in problem


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x10\x00", "model.safetensors cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run `git lfs pull`"),
    ],
)
def test_weights_that_are_damaged_or_elsewhere(folder, content, reason):
    (folder / "model.safetensors").write_bytes(content)
    (problem,) = check_folder(folder)
    assert reason in problem


def test_a_folder_without_a_processor(folder):
    (folder / "processor_config.json").unlink()
    (problem,) = check_folder(folder)
    assert problem.startswith("processor_config.json is missing")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"action_stats": None}, "has no action_stats"),
        ({"state_stats": stats(3)}, "state_stats of processor_config.json are not 4 numbers"),
        (
            {"views": ["front", "wrist"]},
            "views is ['front', 'wrist'] in processor_config.json and ['main', 'wrist']",
        ),
    ],
)
def test_a_processor_without_statistics_or_of_another_model(folder, changes, reason):
    edit_json(folder / "processor_config.json", **changes)
    assert any(reason in problem for problem in check_folder(folder))


def test_a_policy_of_lerobot_without_its_pipelines(folder):
    edit_json(folder / "config.json", type="foresight")
    (problem,) = check_folder(folder)
    assert "policy_preprocessor.json" in problem and "python -m lerobot_policy_foresight" in problem
    (folder / "policy_preprocessor.json").write_text('{"steps": [')
    (folder / "policy_postprocessor.json").write_text(
        '{"steps": [{"registry_name": "normalizer_processor", "state_file": "stats.safetensors"}]}'
    )
    (folder / "stats.safetensors").write_bytes(b"")
    (problem,) = check_folder(folder)
    assert "damaged: policy_preprocessor.json, stats.safetensors" in problem


@pytest.mark.parametrize(
    "name", ["config.json", "evaluation/eval.json", "evaluation/training.json", "evaluation/latency.json"]
)
@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"a', "\ufeff"])
def test_a_file_that_holds_something_else_is_a_problem_in_a_line(folder, name, content, monkeypatch):
    if name != "config.json":  # the model itself has no problem
        monkeypatch.setattr("hub_cards.checks.folder.check_model", lambda folder: [])
    (folder / name).write_text(content)
    problems = check_folder(folder)
    assert problems and not any("\n" in problem for problem in problems)


def test_a_card_that_is_missing_or_says_nothing(folder):
    card = folder / "README.md"
    card.write_text("---\nlicense: mit\n---\n")
    assert "README.md says nothing" in check_card(folder)[0]
    card.unlink()
    assert check_card(folder) == ["README.md is missing, the card: write it with hub_cards/build.py"]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("**95 %**", "**99 %**", "other figures for 'drawer-open-v3'"),
        ("4.32 ms", "1.2 ms", "README.md has other figures"),
        ("value: 0.95", "value: 0.99", "model-index differs"),
        ("19 of 20", "", "an empty cell in the row of 'drawer-open-v3'"),
        ("## Limits", "TODO: more tasks.", "never filled in (TODO)"),
        ("## Limits", "[More Information Needed]", "never filled in ([More Information Needed])"),
        ("\n| drawer-open", "\n| push-v3 | Push | 1 | 1 | 1 |\n| drawer-open", "for 'push-v3' that nothing"),
        ("(foresight.png)", "(beautiful.png)", "shows beautiful.png, which is missing"),
    ],
)
def test_a_card_with_figures_that_nobody_measured(folder, old, new, reason):
    edit_card(folder, old, new)
    assert any(reason in problem for problem in check_card(folder))


def test_a_card_whose_metadata_is_nested_too_deeply(tmp_path):
    (tmp_path / "README.md").write_text("---\na: " + "[" * 5000 + "\n---\n# Notes\n")
    assert "would reject the card's metadata" in check_card(tmp_path)[0]


def test_a_word_of_an_instruction_is_not_a_placeholder(folder):
    edit_card(folder, "## Limits", "abrir todo\n\n## Limits")
    assert check_card(folder) == []


def test_a_table_of_figures_whose_source_is_gone(folder):
    (folder / "evaluation" / "latency.json").unlink()
    (problem,) = check_card(folder)
    assert "a table of 'hardware' that nothing in evaluation/ measured" in problem


def test_figures_whose_source_is_not_there(folder):
    shutil.rmtree(folder / "evaluation")
    (problem,) = check_card(folder)
    assert "evaluation/training.json is missing" in problem


def test_figures_of_weights_that_were_there_before(folder):
    path = folder / "evaluation" / "eval.json"
    facts = json.loads(path.read_text())["checkpoint"]
    edit_json(path, checkpoint=facts | {"weights_sha256": weights_digest(folder)})
    assert check_card(folder) == []
    edit_weights(folder, lambda weights: weights[max(weights)].add_(1))
    (problem,) = check_card(folder)
    assert problem.startswith("evaluation/eval.json measured other weights")


def test_results_for_machines_that_are_missing_or_others(folder):
    path = folder / ".eval_results" / "metaworld.yaml"
    entries = yaml.safe_load(path.read_text())
    entries[0]["value"] = 100.0
    path.write_text(yaml.safe_dump(entries))
    assert ".eval_results differs from evaluation/eval.json" in check_card(folder)[0]
    path.unlink()
    assert ".eval_results is missing" in check_card(folder)[0]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("license: apache-2.0", "license: free", "license: 'free'"),
        ("license: apache-2.0\n", "", "names no license"),
        ("- someone/demos", "- some one/demos", "datasets: 'some one/demos'"),
        ("tags:\n", "tags: robotics\nmore:\n", "tags: 'robotics'"),
        ("license: apache-2.0", "license: {a: b}", "license: {'a': 'b'}"),
        ("pipeline_tag: robotics", "pipeline_tag: [", "would reject the card's metadata"),
    ],
)
def test_metadata_that_the_hub_would_reject(folder, old, new, reason):
    edit_card(folder, old, new)
    (problem,) = check_card(folder)
    assert reason in problem


@pytest.mark.parametrize("index", [None, [], {}, "x", [{"results": None}], [{"results": [{}]}]])
def test_a_model_index_of_another_shape_is_a_problem(folder, index):
    metadata = metadata_load(folder / "README.md") | {"model-index": index}
    metadata_save(folder / "README.md", metadata)
    (problem,) = check_card(folder)
    assert problem.startswith(
        "the Hub would reject the card's metadata" if index else "the card's model-index differs"
    )


class Bomb:
    """Its pickle makes a file where it is loaded."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return Path.touch, (self.place,)


@pytest.mark.parametrize("name", ["extra.pt", "notes.dat", "archive"])
def test_pickles_are_found_by_what_they_are_and_not_loaded(folder, tmp_path, name):
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    if name == "archive":  # as torch.save writes it
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("archive/data.pkl", bomb)
    else:
        (folder / name).write_bytes(bomb)
    (problem,) = check_folder(folder)
    assert problem.startswith(f"{name} may run code when it is loaded (a pickle)")
    assert not (tmp_path / "exploded").exists()


def test_code_and_programs_that_are_not_the_projects(folder):
    (folder / "losses.py").write_text("import os\n")
    (folder / "run").write_bytes(b"#!/bin/sh\n")
    (folder / "weights.json").symlink_to(folder / "config.json")
    assert [re.split("[,:]", problem)[0] for problem in check_folder(folder)] == [
        "losses.py is code",
        "run is a program",
        "weights.json is a link",
    ]


def test_code_of_another_repository_is_named(folder):
    edit_json(folder / "config.json", auto_map={"AutoModel": "someone/else--modeling.Model"})
    edit_json(folder / "processor_config.json", auto_map={"AutoProcessor": "processing_foresight.Gone"})
    assert [problem.split(":")[0] for problem in check_folder(folder)] == [
        "config.json takes code from elsewhere (auto_map",
        "processor_config.json takes code from elsewhere (auto_map",
    ]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("policy_preprocessor.json", {"steps": [{"class": "subprocess.Popen"}]}, "subprocess.Popen"),
        ("any/other.json", {"steps": [{"registry_name": "gone", "class": "os.system"}]}, "step .*gone"),
        ("policy_postprocessor.json", {"steps": ["x", None, [], {"registry_name": ["x"]}]}, "step .*x"),
        (
            "policy_preprocessor.json",
            {"steps": [{"registry_name": "action_tokenizer_processor"}]},
            "action_tokenizer_processor",
        ),
        ("processor_config.json", {"processor_class": "StrangeProcessor"}, "processor_class: StrangeProc"),
        ("tokenizer_config.json", {"tokenizer_class": "StrangeTokenizer"}, "tokenizer_class: StrangeTok"),
        ("tokenizer_config.json", {"tokenizer_class": ["A", None]}, "tokenizer_class: "),
        ("preprocessor_config.json", {"image_processor_type": "AnyProcessor"}, "image_processor_type: Any"),
        ("config.json", {"custom_pipelines": {"x": {"impl": "x.Y"}}}, "custom_pipelines: "),
        ("config.json", {"text_config": {"auto_map": {"AutoConfig": "x.Y"}}}, "auto_map: x.Y"),
        ("config.json", {"parts": [{"auto_map": "a/b--x.Y"}]}, "auto_map: a/b--x.Y"),
        ("train_config.json", {"env": {"trust_remote_code": True}}, "trust_remote_code: True"),
        ("adapter_config.json", {"auto_mapping": {"parent_library": "antigravity"}}, "antigravity"),
        ("adapter_config.json", {"megatron_config": {}, "megatron_core": "antigravity"}, "antigravity"),
    ],
)
def test_a_name_of_foreign_code_in_any_json_file_is_refused(tmp_path, name, content, reason):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(json.dumps(content))
    problems = check_files(tmp_path)
    assert re.search(rf"^{Path(name).name} .*{reason}", problems[0]) and not any("\n" in x for x in problems)


def test_a_json_file_of_any_depth_is_a_problem_in_a_line(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000 + "]" * 100_000)
    (problem,) = check_files(tmp_path)
    assert "nested too deeply" in problem


def test_steps_of_lerobot_and_of_plugins_may_be_in_a_pipeline(tmp_path):
    @ProcessorStepRegistry.register("step_of_a_plugin")
    class Step(ProcessorStep):
        pass

    names = ["step_of_a_plugin", "rename_observations_processor", "map_tensor_to_delta_action_dict"]
    steps = [{"registry_name": name, "config": {}} for name in names]
    (tmp_path / "policy_preprocessor.json").write_text(json.dumps({"steps": steps}))
    try:
        assert check_files(tmp_path) == []
    finally:
        ProcessorStepRegistry.unregister("step_of_a_plugin")


def test_the_projects_own_code_may_be_published(folder):
    config = tiny_config(action_dim=4, binary_action_indices=(), state_dim=4, binary_state_indices=())
    processor = tiny_processor(config, action_stats=stats(4), state_stats=stats(4))
    export_with_code(ForesightForActionPrediction(config), processor, folder)
    assert (folder / "streaming.py").is_file() and check_folder(folder) == []


def test_a_folder_that_holds_nothing_of_ours(tmp_path):
    (problem,) = check_folder(tmp_path / "nowhere")
    assert problem.startswith("no adapter_config.json, config.json, meta/info.json")


def test_a_configuration_that_is_not_json(folder):
    (folder / "config.json").write_text("{")
    assert "the model does not load" in check_folder(folder)[0]


@pytest.fixture
def adapter(built, tmp_path):
    """A run that adapted `built`, a folder of this machine."""
    run, model = tmp_path / "run", ForesightForActionPrediction.from_pretrained(built)
    facts = describe_base(model)
    (run / "training").mkdir(parents=True)
    write_adapter(get_peft_model(model, lora_config(model, r=2)), run / "model", facts)
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(built / name, run / "model" / name)
    (run / "model" / "evaluation").mkdir()
    (run / "model" / "evaluation" / "latency.json").write_text(json.dumps(latency()))
    save_config(RunConfig(init_from=str(built)), run / "training" / "config.yaml")
    (run / "training" / "summary.json").write_text(json.dumps(summary() | {"lora": {"r": 2}}))
    (run / "foresight.png").write_bytes(b"a picture")
    assert build([str(run), "--open-loop"]) == 0
    return run / "model"


def test_an_adapter_on_a_folder_needs_a_base_that_others_have(adapter, built):
    (problem,) = check_folder(adapter)
    assert problem.startswith(
        f"its base '{built}' is a folder of this machine: publish it (python hub_cards/"
    )


def test_an_adapter_whose_base_cannot_be_had(adapter):
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="someone/base")
    assert any("the adapter does not load: " in problem for problem in check_folder(adapter))


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def dataset(tmp_path):
    return shutil.copytree(SAMPLE, tmp_path / "dataset")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda root: next(root.rglob("*.mp4")).unlink(), "videos are missing: videos/"),
        (lambda root: (root / "meta/stats.json").unlink(), "lacks observation.state and action"),
        (lambda root: edit_json(root / "meta/info.json", total_frames=7), "has 230 frames"),
        (lambda root: shutil.rmtree(root / "data"), "has no data files"),
        (lambda root: (root / "meta" / "cache.pkl").write_bytes(b""), "meta/cache.pkl may run code"),
        (lambda root: (root / "meta/stats.json").write_text("[1"), "lacks observation.state and action"),
        (
            lambda root: next(root.glob("meta/episodes/*/*")).write_bytes(b"PK"),
            "meta/episodes cannot be read",
        ),
        (
            lambda root: halve(next(root.glob("videos/observation.images.main/*/*"))),
            "LeRobot does not read it",
        ),
        (lambda root: (root / "meta/foresight.json").write_text("[]"), "foresight.json is damaged"),
        (lambda root: (root / "meta/foresight.json").unlink(), "meta/foresight.json is missing"),
    ],
)
def test_a_dataset_that_is_not_whole(dataset, spoil, reason):
    spoil(dataset)
    assert any(reason in problem for problem in check_folder(dataset))


def test_a_dataset_whose_card_is_missing_or_has_other_figures(dataset):
    edit_card(dataset, "| push-v3 | 1 |", "| push-v3 | 900 |")
    (problem,) = check_card(dataset)
    assert "other figures for 'push-v3'" in problem
    (dataset / "README.md").unlink()
    assert "README.md is missing" in check_card(dataset)[0]
