"""Robots of other shapes: two arms with three cameras, a small arm in degrees, a humanoid with its own names,
a single joint.

Each dataset is written by the stock writer and trained both ways; what comes out is opened by LeRobot and by
`transformers`, and acts.
"""

import dataclasses
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from lerobot.configs import PreTrainedConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from datasets_scripts.conversion.column_renaming import rename_columns
from lerobot_policy_foresight.config_from_dataset import check_column_names
from tests.lerobot_policy_foresight.miniature import (
    assert_same_actions,
    lerobot_train,
    policy_options,
    run_options,
    small_model,
)
from tests.synthetic import make_dataset
from training.config_reading import load_config
from training.loop import train

ALOHA_CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")
GRIPPER = (0.0, 100.0)  # of an SO-101, in percent


@dataclasses.dataclass(frozen=True)
class Robot:
    """A robot's dataset: what the stock writer is asked for, and what stands for it in LeRobot."""

    dataset: dict
    views: tuple[str, ...]
    fps: int
    names: dict[str, str] = dataclasses.field(default_factory=dict)  # columns that LeRobot must get renamed

    @property
    def joints(self) -> int:
        return len(self.dataset["limits"])


ROBOTS = {
    "aloha": Robot(
        {
            "cameras": dict.fromkeys(ALOHA_CAMERAS, (30, 40)),
            "limits": (*[(-3.0, 3.0)] * 6, (0.0, 1.0)) * 2,
            "depth": ("cam_high",),
        },
        ALOHA_CAMERAS,
        50,
    ),
    "so101": Robot(
        {"cameras": {"front": (24, 32)}, "limits": (*[(-100.0, 100.0)] * 5, GRIPPER), "depth": False},
        ("front",),
        30,
    ),
    "slider": Robot({"cameras": {"front": (24, 32)}, "limits": [(0.0, 0.3)], "depth": False}, ("front",), 10),
    "humanoid": Robot(
        {
            "cameras": {"image": (32, 32)},
            "image_prefix": "",
            "state_key": "state",
            "action_key": "actions",
            "limits": [(-2.0, 2.0)] * 34,
            "depth": False,
        },
        ("image",),
        60,
        {"image": "observation.images.image", "state": "observation.state", "actions": "action"},
    ),
}


SLOW = ("slider", "humanoid")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in ROBOTS],
)
def robot(request, tmp_path_factory):
    """A robot and its dataset, as recorded and as LeRobot gets it."""
    kind = ROBOTS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    facts = make_dataset(
        root / "recorded",
        frames=[9, 11, 10],
        tracks=False,
        use_videos=request.param == "aloha",
        action_dim=kind.joints,
        state_dim=kind.joints,
        fps=kind.fps,
        **kind.dataset,
    )
    seen = facts.root
    if kind.names:
        seen = root / "renamed"
        rename_columns(facts.root, seen, kind.names)
    return SimpleNamespace(name=request.param, kind=kind, facts=facts, seen=seen, root=root)


def assert_acts(folder, robot, *overrides: str) -> None:
    """Policy and model of one folder act the same, in the robot's units and by what they see."""
    config = PreTrainedConfig.from_pretrained(folder, cli_overrides=list(overrides))
    policy = get_policy_class("foresight").from_pretrained(folder, config=config)
    before, after = make_pre_post_processors(policy.config, str(folder))
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    assert list(model.config.views) == list(robot.kind.views) and model.config.fps == robot.kind.fps
    assert model.config.action_dim == model.config.state_dim == robot.kind.joints
    assert not model.config.binary_action_indices and not model.config.binary_state_indices
    data = LeRobotDataset("local/synthetic", root=robot.seen)
    stream = model.stream(processor, num_envs=1)
    stream.reset([data[0]["task"]])
    given = []
    for t in range(model.config.history_length + 2):
        item = data[t]
        seen = {key: torch.atleast_1d(item[key])[None] for key in policy.config.input_features}
        seen["task"] = [item["task"]]
        images = {view: seen[key] for view, key in policy.config.cameras.items()}
        images = {view: (image * 255).round().to(torch.uint8) for view, image in images.items()}
        expected = stream.step(images, seen["observation.state"])
        given.append(after(policy.select_action(before(seen))))
        torch.testing.assert_close(given[-1], expected, rtol=1e-4, atol=1e-4)
    # A fresh model's normalized actions are near 0 and a few units at most: near the mean, in these units.
    stats, actions = data.meta.stats["action"], torch.cat(given).numpy()
    assert actions.shape == (len(given), robot.kind.joints)
    assert (np.abs(actions - stats["mean"]) < 4 * stats["std"]).all()
    # Nor is an entry one of two values, or the same whatever is seen.
    assert (np.ptp(actions, axis=0) > 1e-4 * stats["std"]).all()


def test_lerobot_trains_it_and_the_checkpoint_acts(robot):
    model = small_model(initializer_range=0.3, embedding_initializer_range=0.02)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lerobot_train(*policy_options(model), *run_options(robot.seen, robot.root / "run"))
    said = [str(warning.message) for warning in caught if "are not trained" in str(warning.message)]
    assert len(said) == 1 and "flow" in said[0] and ("depth" in said[0]) is (robot.name != "aloha")
    folder = robot.root / "run" / "checkpoints" / "last" / "pretrained_model"
    assert_acts(folder, robot)
    if robot.name == "aloha":  # and without one of its cameras
        assert_acts(folder, robot, '--cameras={"cam_left_wrist": null}')


def test_our_trainer_trains_it_under_its_own_names_and_the_export_acts(robot, monkeypatch):
    monkeypatch.setenv("FORESIGHT_CACHE", str(robot.root / "cache"))
    model = small_model(
        views=list(robot.kind.views),
        objectives=["action", "depth", "future", "progress"],
        initializer_range=0.3,
        embedding_initializer_range=0.02,
    )
    dataset = robot.kind.dataset
    cameras = dict(zip(robot.kind.views, dataset["cameras"], strict=True))
    values = {
        "model": model,
        "data": {
            "datasets": [{"path": str(robot.facts.root), "cameras": cameras}],
            "state_key": dataset.get("state_key", "observation.state"),
            "action_key": dataset.get("action_key", "action"),
            "missing_targets": True,
            "val_fraction": 0,
            "random_shift": 0,
        },
        "train": {"steps": 2, "batch_size": 2},
        "output": str(robot.root / "ours"),
    }
    (robot.root / "run.yaml").write_text(yaml.safe_dump(values))
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        assert train(load_config(robot.root / "run.yaml", []), resume=False) == 0
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert_acts(robot.root / "ours" / "model", robot)


@pytest.mark.parametrize("videos", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_policy_without_a_history_trains_and_acts(tmp_path, videos):
    facts = make_dataset(tmp_path / "data", episodes=2, frames=9, use_videos=videos, cameras=("main",))
    sees = {"initializer_range": 0.3, "embedding_initializer_range": 0.02}
    model = small_model(history_length=1, objectives=["action", "depth", "progress"], **sees)
    lerobot_train(*policy_options(model), *run_options(facts.root, tmp_path / "run"))
    assert_same_actions(tmp_path / "run" / "checkpoints" / "last" / "pretrained_model", facts)


def test_names_that_lerobot_drops_are_refused_with_the_command_that_renames_them(tmp_path):
    humanoid = ROBOTS["humanoid"]
    joints = {"action_dim": 34, "state_dim": 34, "use_videos": False, "tracks": False}
    facts = make_dataset(tmp_path / "data", episodes=1, frames=5, **joints, **humanoid.dataset)
    names = "image=observation.images.image state=observation.state actions=action"
    with pytest.raises(ValueError, match=rf"rename_columns --dataset .* --output DIR --rename {names}"):
        lerobot_train(*policy_options(small_model()), *run_options(facts.root, tmp_path / "run"))
    # Nor is a state left out that has another name, unless that is meant.
    seen = tmp_path / "seen"
    rename_columns(facts.root, seen, {"image": "observation.images.image", "actions": "action"})
    with pytest.raises(ValueError, match="state=observation.state.*--policy.state_dim=0"):
        lerobot_train(*policy_options(small_model()), *run_options(seen, tmp_path / "run"))
    meta = LeRobotDataset("local/synthetic", root=seen).meta
    check_column_names(meta.features, meta.root, with_state=False)


def test_a_trap_in_every_episode_trains_anyway(tmp_path):
    """Episodes shorter than a window, instructions of any language and length, unused columns."""
    facts = make_dataset(
        tmp_path / "data",
        frames=[1, 2, 5, 9],  # LeRobot's sampler leaves the first one out: nothing follows its frame
        tasks=("open", "打开抽屉，把红色的方块放进去", "Öffne die Schublade! " * 30, "push it"),
        extra=("observation.environment_state", "observation.effort"),
        use_videos=False,
        n_points=12,
    )
    with pytest.warns(UserWarning, match="'Öffne die Schublade!.* tokens, but the text tower reads 16"):
        lerobot_train(
            *policy_options(small_model()),
            *run_options(facts.root, tmp_path / "run"),
            "--batch_size=13",  # all windows
            "--save_checkpoint=true",
        )
    folder = tmp_path / "run" / "checkpoints" / "last" / "pretrained_model"
    inputs = PreTrainedConfig.from_pretrained(folder).input_features
    assert set(inputs) == {f"observation.{name}" for name in ("images.main", "images.wrist", "state")}
    weights = load_file(folder / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    ids = tokenizer(facts.tasks[1])["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == facts.tasks[1]
