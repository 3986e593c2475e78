"""The sample beside the weights: it tells other weights, another processor and damage from the same model."""

import functools
import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from hub_cards.checks import sample
from hub_cards.checks.folder import check_folder
from hub_cards.checks.sample import SAMPLE_FILE, check_sample, write_sample
from modeling_foresight import ForesightForActionPrediction
from tests.hub_cards.finished_run import make_run

VARIANTS = {
    "all": {},
    "goal": {"goal_image": True, "objectives": ["action", "progress"]},
    "binary": {"binary_action_indices": (3,), "binary_state_indices": (2,)},
    "video": {"objectives": ["depth", "future", "flow"]},
}


@pytest.fixture(scope="module")
def sampled(finished, tmp_path_factory):
    """A model's folder with its sample; read only."""
    model = shutil.copytree(finished / "model", tmp_path_factory.mktemp("sampled") / "model")
    write_sample(model)
    return model


@pytest.fixture
def folder(sampled, tmp_path):
    return shutil.copytree(sampled, tmp_path / "model")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_model_gives_its_sample_again(variant, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "load_checkpoint", functools.cache(sample.load_checkpoint))
    model = make_run(tmp_path / "run", **VARIANTS[variant]) / "model"
    write_sample(model)
    check_sample(model)
    first = (model / SAMPLE_FILE).read_bytes()
    write_sample(model)
    assert (model / SAMPLE_FILE).read_bytes() == first


def test_a_sample_holds_a_window_and_the_newest_frames_outputs(sampled):
    stored = load_file(sampled / SAMPLE_FILE)
    assert stored["images.wrist"].shape == (5, 40, 40, 3) and stored["state"].shape == (5, 4)
    assert stored["output.commands"].shape == stored["output.actions"].shape == (4, 4)
    assert stored["output.future_rgb"].shape == (2, 25, 192)


def test_weights_in_several_files_are_the_same_weights(folder):
    model = ForesightForActionPrediction.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="500KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    check_sample(folder)


def test_other_weights_are_named(folder):
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).flatten()[0] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="was made with other weights"):
        check_sample(folder)


def test_a_small_entry_with_other_statistics_is_found_beside_a_large_one(folder):
    path = folder / "processor_config.json"
    content = json.loads(path.read_text())
    content["action_stats"] |= {"mean": [0.0] * 4, "std": [5e-4, 1.0, 1.0, 1.0]}
    path.write_text(json.dumps(content))
    write_sample(folder)
    content["action_stats"]["std"][0] = 1.5e-3
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="commands differs"):
        check_sample(folder)


def test_another_processor_is_named_by_the_output_that_differs(folder):
    path = folder / "processor_config.json"
    content = json.loads(path.read_text())
    content["action_stats"]["std"] = [2.0] * 4
    path.write_text(json.dumps(content))
    (problem,) = [problem for problem in check_folder(folder) if SAMPLE_FILE in problem]
    assert "does not give the outputs of sample.safetensors: commands differs" in problem


@pytest.mark.parametrize("content", [b"", b"{}", None])
def test_a_sample_that_is_damaged_or_missing(folder, content):
    (folder / SAMPLE_FILE).unlink()
    if content is not None:
        (folder / SAMPLE_FILE).write_bytes(content)
    with pytest.raises(ValueError, match="write it again with hub_cards/build.py FOLDER --sample"):
        check_sample(folder)


def test_a_folder_that_does_not_load_gets_none(tmp_path):
    with pytest.raises(ValueError, match="has no config.json"):
        write_sample(tmp_path)
