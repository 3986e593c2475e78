"""`lerobot-rollout` with a folder of ours and a robot that is not there."""

import logging
import signal
import sys

import numpy as np
import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import get_policy_class
from lerobot.utils.import_utils import register_third_party_plugins
from transformers import AutoModel, AutoProcessor

from lerobot_policy_foresight.lerobot_files import write_lerobot_files
from modeling_foresight import ForesightForActionPrediction
from tests.lerobot_policy_foresight.fakearm import FakeArm
from tests.tiny import tiny_config, tiny_processor

JOINTS = 5
TASK = "open the drawer"


def write_folder(folder) -> None:
    """A policy for the arm's five joints and two views, whose action depends on what it sees."""
    config = tiny_config(
        history_length=4,
        future_shift=2,
        action_dim=JOINTS,
        state_dim=JOINTS,
        fps=20,
        binary_state_indices=(),
        initializer_range=0.3,
        embedding_initializer_range=0.02,
    )
    stats = {"mean": [0.1] * JOINTS, "std": [0.5] * JOINTS, "min": [-1.0] * JOINTS, "max": [1.0] * JOINTS}
    torch.manual_seed(0)
    ForesightForActionPrediction(config).save_pretrained(folder)
    tiny_processor(config, action_stats=stats, state_stats=stats).save_pretrained(folder)
    write_lerobot_files(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy's folder."""
    folder = tmp_path_factory.mktemp("rollout") / "model"
    write_folder(folder)
    return folder


@pytest.fixture
def rollout(folder, tmp_path, monkeypatch):
    """Runs the command with more options and gives the robot that it moved."""
    from lerobot.scripts import lerobot_rollout

    for name in ("handlers", "level"):  # which LeRobot changes
        monkeypatch.setattr(logging.root, name, getattr(logging.root, name))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(FakeArm, "made", [])

    def run(*options: str) -> FakeArm:
        given = [
            f"--policy.path={folder}",
            "--policy.device=cpu",
            "--robot.type=fake_arm",
            f"--robot.calibration_dir={tmp_path / 'calibration'}",
            f"--task={TASK}",
            "--fps=500",
            "--return_to_initial_position=false",
            "--play_sounds=false",
        ]
        monkeypatch.setattr(sys, "argv", ["lerobot-rollout", *given, *options])
        register_third_party_plugins()
        lerobot_rollout.rollout()
        return FakeArm.made[-1]

    return run


def stream_actions(folder, frames: list[dict], views: dict[str, str]) -> np.ndarray:
    """What the model's own stream does on these observations of the arm, `(frames, joints)`."""
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    stream = model.stream(processor)
    stream.reset(TASK)
    actions = []
    for seen in frames:
        state = np.array([value for key, value in seen.items() if key.endswith(".pos")], dtype=np.float32)
        actions.append(stream.step({view: seen[camera] for view, camera in views.items()}, state).numpy())
    return np.stack(actions)


def sent_actions(robot: FakeArm) -> np.ndarray:
    """`(ticks, joints)`."""
    return np.array([list(action.values()) for action in robot.sent])


def test_the_robot_does_what_the_model_says(rollout, folder):
    robot = rollout()
    sent = sent_actions(robot)
    assert list(robot.sent[0]) == list(robot.action_features)
    expected = stream_actions(folder, robot.seen[1:], {"main": "main", "wrist": "wrist"})
    np.testing.assert_allclose(sent, expected, rtol=1e-4, atol=1e-5)
    assert len(sent) == robot.config.frames and np.ptp(sent, axis=0).max() > 1e-2  # it sees and reacts
    assert not robot.is_connected


def test_interpolation_fills_the_time_between_the_models_steps(rollout, folder):
    robot = rollout("--interpolation_multiplier=3", "--robot.frames=7")
    # The first action comes alone; then every third tick asks the model, whose frames are those only.
    asked = [robot.seen[1 + tick] for tick in (0, 1, 4)]
    plan = stream_actions(folder, asked, {"main": "main", "wrist": "wrist"})
    steps = [(plan[i] * (3 - k) + plan[i + 1] * k) / 3 for i in range(2) for k in (1, 2, 3)]
    np.testing.assert_allclose(sent_actions(robot), [plan[0], *steps], rtol=1e-4, atol=1e-5)


def test_other_cameras_are_named_by_option_and_depth_is_not_an_input(rollout, folder):
    robot = rollout(
        "--robot.views=[top, side]",
        "--robot.depth_views=[top]",
        '--policy.cameras={"main": "observation.images.top", "wrist": null}',
    )
    expected = stream_actions(folder, robot.seen[1:], {"main": "top"})
    np.testing.assert_allclose(sent_actions(robot), expected, rtol=1e-4, atol=1e-5)


def test_lerobots_rename_map_names_cameras_too(rollout, folder):
    renamed = '{"observation.images.top": "observation.images.main"}'
    robot = rollout("--robot.views=[top, wrist]", f"--rename_map={renamed}")
    expected = stream_actions(folder, robot.seen[1:], {"main": "top", "wrist": "wrist"})
    np.testing.assert_allclose(sent_actions(robot), expected, rtol=1e-4, atol=1e-5)


def test_what_the_policy_does_is_recorded(rollout, tmp_path):
    root = tmp_path / "data"
    robot = rollout(
        "--robot.depth_views=[main]",
        "--strategy.type=episodic",
        "--dataset.repo_id=local/rollout_fake",
        f"--dataset.root={root}",
        f"--dataset.single_task={TASK}",
        "--dataset.fps=500",
        "--dataset.num_episodes=1",
        "--dataset.video=false",
        "--dataset.push_to_hub=false",
    )
    data = LeRobotDataset("local/rollout_fake", root=root)
    assert data.num_frames == robot.config.frames and data.meta.depth_keys == [
        "observation.images.main_depth"
    ]
    np.testing.assert_allclose(
        torch.stack([data[t]["action"] for t in range(len(data))]), sent_actions(robot), rtol=1e-6
    )


def test_real_time_chunking_is_refused_before_the_robot_is_touched(rollout):
    with pytest.raises(ValueError, match="RTC inference is not supported by policy type 'foresight'"):
        rollout("--inference.type=rtc")
    assert FakeArm.made == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--robot.joints=[pan, lift, elbow]"], r"state has 3 entries.*made for 5"),
        (["--robot.views=[main]"], r"lacks 'observation.images.wrist'.*--policy.cameras"),
        (["--robot.views=[main, top]"], r"Visual feature mismatch"),
    ],
)
def test_a_robot_that_does_not_fit_is_named_and_not_moved(rollout, options, message):
    with pytest.raises(ValueError, match=message):
        rollout(*options)
    assert FakeArm.made[-1].sent == []


@pytest.mark.slow  # tests/modeling_foresight/test_streaming.py compiles the step quickly
def test_the_step_alone_is_compiled(rollout, folder, monkeypatch):
    compiled, compile_anything = [], torch.compile

    def traced(function, **options):
        compiled.append(options)
        return compile_anything(function, **options | {"backend": "eager"})  # generating code takes minutes

    monkeypatch.setattr(torch, "compile", traced)
    robot = rollout("--use_torch_compile=true")
    expected = stream_actions(folder, robot.seen[1:], {"main": "main", "wrist": "wrist"})
    np.testing.assert_allclose(sent_actions(robot), expected, rtol=1e-4, atol=1e-5)
    assert [options.get("fullgraph") for options in compiled] == [
        None,
        True,
    ]  # LeRobot's, which is idle; ours
    policy = get_policy_class("foresight").from_pretrained(folder)
    policy.config.compile_model = True
    policy._update_stream([TASK])
    stream = policy._stream
    policy.reset()
    policy._update_stream([TASK])
    assert policy._stream is stream  # or every episode would compile again
