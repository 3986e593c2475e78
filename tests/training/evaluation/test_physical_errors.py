"""Predictions on recorded windows in meters, pixels and commands, beside predictors that need no model."""

import dataclasses

import numpy as np
import pytest
import torch

from modeling_foresight import ForesightForActionPrediction
from tests.synthetic import make_dataset
from tests.tiny import tiny_config, tiny_processor
from training.config import DataConfig, RunConfig
from training.evaluation.open_loop import format_open_loop
from training.evaluation.physical_errors import measure_physical_errors
from training.evaluation.predictions import predict_windows
from training.run_data import window_config
from training.windows import ForesightWindows

EPISODES, FRAMES, SIDE, STATE, ACTION = 2, 9, 40, 4, 4
GRIPPER = 3
INTRINSICS = {"fx": 30.0, "fy": 30.0, "cx": 20.0, "cy": 20.0}
DATA = {"episodes": EPISODES, "frames": FRAMES, "use_videos": False, "state_dim": STATE, "action_dim": ACTION}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("real_units") / "data", size=(SIDE, SIDE), **DATA)


@pytest.fixture(scope="module")
def policy():
    config = tiny_config(
        action_dim=ACTION,
        binary_action_indices=(GRIPPER,),
        state_dim=STATE,
        binary_state_indices=(),
        fps=20.0,
        future_targets="lookahead",
    )
    torch.manual_seed(1)
    stats = {name: [value] * ACTION for name, value in (("mean", 0.0), ("std", 1.0))}
    # A gripper in meters: half way between its two values is 0.02.
    stats |= {"min": [-1.0] * GRIPPER + [0.0], "max": [1.0] * GRIPPER + [0.04]}
    return ForesightForActionPrediction(config).eval(), tiny_processor(config, action_stats=stats)


def windows_of(root, config, **options):
    return ForesightWindows(root, window_config(config, RunConfig(**options)).for_evaluation([0]))


def test_every_prediction_is_measured_beside_one_without_a_model(dataset, policy):
    model, processor = policy
    windows = windows_of(dataset.root, model.config)

    figures = measure_physical_errors(model, processor, windows, INTRINSICS)

    newest = [int(windows[i]["index"]) for i in range(len(windows))]
    assert figures["windows"] == len(newest)
    actions = figures["robot_action"]["chunk"]["model"]
    assert actions["actions"] == sum(min(model.config.chunk_size, FRAMES - i) for i in newest)
    assert len(actions["l1"]) == ACTION - 1
    for name, views, trivial in (
        ("flow_3d", {"main"}, "stay_put"),
        ("masked_depth", {"main", "wrist"}, "patch_mean"),
        ("future_rgbd", {"main", "wrist"}, "current"),
    ):
        assert figures[name].keys() == views
        for predictors in figures[name].values():
            assert predictors.keys() == {"model", trivial}
            for count in {"points", "pixels", "frames"} & predictors["model"].keys():
                assert predictors["model"][count] == predictors[trivial][count], "on the same elements"
    assert figures["flow_3d"]["main"]["model"]["epe_cm"] > 0
    # The episode's last frames have no future.
    future = figures["future_rgbd"]["main"]["model"]
    assert future["frames"] == sum(i + model.config.future_shift < FRAMES for i in newest)
    assert future["depth_rmse_m"] > 0
    text = format_open_loop(figures)
    assert "flow_3d main: epe_px " in text and "(stay_put " in text


def test_a_gripper_is_right_on_the_right_side_of_its_own_two_values(dataset, policy):
    model, processor = policy
    windows = windows_of(dataset.root, model.config)
    figures = measure_physical_errors(model, processor, windows)["robot_action"]["chunk"]["model"]
    ahead = ForesightWindows(dataset.root, dataclasses.replace(windows.config, lookahead=True))
    agree = []
    for prediction in predict_windows(model, processor, ahead, range(len(ahead))):
        recorded, predicted = (chunk[:, GRIPPER] for chunk in prediction.actions)
        known = np.isfinite(recorded)
        agree += list((predicted[known] > 0.02) == (recorded[known] > 0.02))
    assert 0 < np.mean(agree) < 1
    assert figures["binary_accuracy"] == [pytest.approx(np.mean(agree))]


def test_a_camera_whose_depth_is_all_invalid_has_no_depth_errors(policy, tmp_path):
    model, processor = policy
    broken = make_dataset(tmp_path / "data", size=(SIDE, SIDE), depth_factor=0.0, **DATA)
    figures = measure_physical_errors(model, processor, windows_of(broken.root, model.config), count=2)
    assert figures.keys() == {"windows", "robot_action", "flow_3d", "future_rgbd"}
    assert not [name for name in figures["future_rgbd"]["main"]["model"] if "depth" in name]


def test_without_labels_only_what_was_recorded_is_measured(policy, tmp_path):
    model, processor = policy
    bare = make_dataset(tmp_path / "data", size=(SIDE, SIDE), depth=False, tracks=False, **DATA)
    windows = windows_of(bare.root, model.config, data=DataConfig(missing_targets=True))
    figures = measure_physical_errors(model, processor, windows, count=3)
    assert figures.keys() == {"windows", "robot_action", "future_rgbd"} and figures["windows"] == 3
    assert not [name for name in figures["future_rgbd"]["main"]["model"] if "depth" in name]
