"""Errors by task, calibration, and that nothing later reaches an action."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from modeling_foresight import ForesightForActionPrediction, ForesightProcessor
from tests.synthetic import make_dataset
from tests.tiny import tiny_config, tiny_processor, tiny_tokenizer
from training.diagnostics import demonstrations
from training.diagnostics.benchmarks import MetaWorldDiagnostics
from training.diagnostics.demonstrations import (
    measure_calibration,
    measure_causality,
    measure_once,
    open_demonstrations,
)
from training.windows import ForesightWindows, collate_windows

INSTRUCTIONS = ("Open a drawer", "Push and close a drawer", "Press a button")


def make_policy(**overrides):
    torch.manual_seed(0)
    sizes = {"action_dim": 4, "binary_action_indices": (), "state_dim": 4, "binary_state_indices": ()}
    # Weights that start larger, so that what the policy sees reaches its actions.
    config = tiny_config(**(sizes | {"initializer_range": 0.3} | overrides))
    return ForesightForActionPrediction(config).eval(), tiny_processor(config)


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    root = tmp_path_factory.mktemp("recorded") / "demos"
    sizes = {"size": (24, 24), "state_dim": 4, "action_dim": 4, "tasks": INSTRUCTIONS}
    return make_dataset(root, episodes=3, frames=8, use_videos=False, **sizes).root


@pytest.fixture(scope="module")
def policy():
    return make_policy()


@pytest.fixture(scope="module")
def windows(policy, demos):
    opened, origin = open_demonstrations("nowhere", policy[0].config, str(demos))
    assert origin == "unknown"
    return opened


def raw_batch(windows, config):
    ahead = config.future_targets == "lookahead"
    own = dataclasses.replace(
        windows.config,
        history_length=config.history_length,
        lookahead=ahead,
        goal_image=config.goal_image,
    )
    changed = ForesightWindows(windows.datasets[0].rows, own)
    return collate_windows([changed[i] for i in (0, 2)])


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"history_length": 1, "future_targets": "lookahead"},
        {"objectives": ["action"], "within_frame": "full"},
        {"action_sees_flow": False, "vision_sees_state": True},
        {"goal_image": True},
    ],
    ids=["all objectives", "one frame", "action alone", "state in vision", "goals"],
)
def test_nothing_that_comes_later_and_no_label_reaches_an_action(overrides, windows):
    model, processor = make_policy(**overrides)
    found = measure_causality(model, processor, raw_batch(windows, model.config))
    assert found["windows"] == 2 and found["labels"] == 0
    if model.config.history_length == 1:
        assert found["later_frames"] is None
    else:
        assert found["later_frames"] == 0
    assert found["stream"] < 1e-5


def test_the_stream_sees_the_goals_and_cameras_that_the_windows_have(windows):
    model, processor = make_policy(goal_image=True)
    raw = raw_batch(windows, model.config)
    raw["goal_mask"][0] = False
    raw["view_mask"][:, 1] = False
    assert measure_causality(model, processor, raw)["stream"] < 1e-5


def test_a_policy_that_looks_ahead_is_found_out(policy, windows, monkeypatch):
    model, processor = policy
    raw, see = raw_batch(windows, model.config), type(model).forward

    def looks_ahead(self, **batch):
        pixels = batch["pixel_values"]
        return see(self, **{**batch, "pixel_values": pixels + pixels.mean(1, keepdim=True)})

    monkeypatch.setattr(type(model), "forward", looks_ahead)
    found = measure_causality(model, processor, raw)
    assert found["later_frames"] > 1e-4 and found["stream"] > 1e-4 and found["labels"] == 0


def test_calibration_is_the_distance_of_means_in_bins():
    found = measure_calibration(np.array([0.0, 0.04, 0.5, 1.2]), np.array([0.02, 0.02, 0.9, 1.0]), bins=10)
    assert found["mae"] == pytest.approx((0.02 + 0.02 + 0.4 + 0.2) / 4)
    assert found["ece"] == pytest.approx((0.0 + 0.4 + 0.2) / 4), "errors of both signs in one bin cancel"
    assert [row["windows"] for row in found["bins"]] == [2, 0, 0, 0, 0, 1, 0, 0, 0, 1]
    assert "true" not in found["bins"][1] and found["bins"][9]["predicted"] == pytest.approx(1.2)


@pytest.mark.slow  # measures several tasks
def test_errors_are_those_of_each_task_and_the_other_instruction_is_of_the_same_scene(
    policy, windows, tmp_path, monkeypatch
):
    model, processor = policy
    replaced = MetaWorldDiagnostics("nowhere", "all").other_instructions(INSTRUCTIONS)
    results = measure_once(model, processor, windows, replaced, "digest", tmp_path / "kept.json")
    monkeypatch.setattr(demonstrations, "measure_demonstrations", lambda *_: pytest.fail("measured again"))
    assert measure_once(model, processor, windows, replaced, "digest", tmp_path / "kept.json") == results
    with pytest.raises(ValueError, match="kept.json was measured with other weights_sha256"):
        measure_once(model, processor, windows, replaced, "of others", tmp_path / "kept.json")
    with pytest.raises(ValueError, match="kept.json was measured with other instructions_in_place"):
        measure_once(model, processor, windows, {}, "digest", tmp_path / "kept.json")
    json.dumps(results, allow_nan=False)
    assert (results["dataset"], results["episodes"]) == ("demos", 3)
    assert set(results["tasks"]) == set(INSTRUCTIONS)
    one = results["tasks"]["Press a button"]
    assert one["windows"] * 3 == results["windows"] and one["next_action_l1"] > 0
    assert {"progress_mae", "depth/main/mse", "flow/all/xy_px"} <= one.keys()
    named = results["instruction"]
    assert named["windows"] == 2 * one["windows"], "the button's scene has no other task here"
    own = [results["tasks"][text]["next_action_l1"] for text in INSTRUCTIONS[:2]]
    assert named["named_l1"] == pytest.approx(np.mean(own)) and named["change_l1"] > 0


def test_of_the_training_data_only_held_out_episodes_are_opened(policy, demos, tmp_path):
    config = policy[0].config
    data = {"datasets": [{"path": str(demos)}], "val_fraction": 0.34, "frame_cache": "off"}
    (tmp_path / "config.yaml").write_text(json.dumps({"data": data}))
    (tmp_path / "model" / "evaluation").mkdir(parents=True)
    held_out, origin = open_demonstrations(str(tmp_path / "model"), config, str(demos))
    assert len(held_out.datasets[0].episodes) == 1 and origin == "held out"
    (tmp_path / "config.yaml").unlink()
    card = tmp_path / "model" / "evaluation" / "training.json"
    card.write_text(json.dumps({"datasets": [{"name": demos.name}]}))
    with pytest.raises(ValueError, match="which episodes it held out is unknown"):
        open_demonstrations(str(tmp_path / "model"), config, str(demos))
    shutil.copytree(demos, tmp_path / "others")
    others, origin = open_demonstrations(str(tmp_path / "model"), config, str(tmp_path / "others"))
    assert len(others.datasets[0].episodes) == 3 and origin == "unknown"
    card.write_text(json.dumps({"datasets": [{"name": demos.name, "digest": "of other data"}]}))
    assert open_demonstrations(str(tmp_path / "model"), config, str(tmp_path / "others"))[1] == "other"


def test_of_several_robots_the_state_and_actions_are_those_of_the_one_that_is_named(demos):
    """The second robot's entries have places of their own in the model's states and actions."""
    places = {"arm": range(7), "saw": range(7, 11)}
    robots = {name: {"action": list(own), "state": list(own)} for name, own in places.items()}
    sizes = {"action_dim": 11, "state_dim": 11, "binary_action_indices": (), "binary_state_indices": ()}
    config = tiny_config(embodiments=robots, initializer_range=0.3, **sizes)
    torch.manual_seed(0)
    model = ForesightForActionPrediction(config).eval()

    def spread(size):
        return {"mean": [0.5] * size, "std": [2.0] * size, "min": [-2.0] * size, "max": [2.0] * size}

    statistics = {n: {kind: spread(len(own)) for kind in ("action", "state")} for n, own in places.items()}
    processor = ForesightProcessor.from_config(config, tiny_tokenizer(), statistics=statistics)
    processor = processor.for_embodiment("saw")
    windows, _ = open_demonstrations("nowhere", config, str(demos), embodiment="saw")
    found = demonstrations._predict(model, processor, windows)
    assert found["action"].shape == found["true_action"].shape == (len(windows), 4)
    np.testing.assert_array_equal(
        found["true_action"], [windows.datasets[0][i]["actions"][-1, 0] for i in range(len(windows))]
    )
    causality = measure_causality(model, processor, collate_windows([windows[0], windows[1]]))
    assert causality["labels"] == causality["later_frames"] == 0 and causality["stream"] < 1e-5


def test_bins_cover_the_whole_range():
    found = measure_calibration(np.linspace(0, 1, 101), np.linspace(0, 1, 101))
    assert found["ece"] == pytest.approx(0) and len(found["bins"]) == demonstrations.BINS


def test_actions_that_do_not_exist_are_no_errors(policy, windows, monkeypatch):
    """The last of a chunk that is cut at an episode's end, as with a frame stride, is masked zeros."""
    model, processor = policy
    raw = collate_windows([windows[i] for i in range(3)])
    whole = dict(demonstrations._predict_newest(model, processor, raw, None))
    newest = model.config.history_length - 1
    raw["action_mask"][1, newest, 0] = False
    raw["actions"][1, newest, 0] = 0
    cut = dict(demonstrations._predict_newest(model, processor, raw, None))
    assert cut["true_action"][1].isnan().all()
    assert torch.equal(cut["true_action"][[0, 2]], whole["true_action"][[0, 2]])
    error = (cut["action"] - cut["true_action"]).numpy()
    assert demonstrations._mean_size(error) == pytest.approx(np.abs(error[[0, 2]]).mean())
    assert demonstrations._mean_size(error[[1]]) is None
