"""Other policies on datasets with our columns: LeRobot's ACT trains on one whose inputs are named."""

import json

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import get_policy_class, make_pre_post_processors

from datasets_scripts.policy_inputs import main as print_inputs
from tests.lerobot_policy_foresight.miniature import lerobot_train, run_options
from tests.synthetic import make_dataset

# A small ACT; its pretrained image encoder would be downloaded.
ACT = [
    "--policy.type=act",
    "--policy.pretrained_backbone_weights=null",
    "--policy.dim_model=16",
    "--policy.n_heads=2",
    "--policy.dim_feedforward=16",
    "--policy.n_encoder_layers=1",
    "--policy.n_vae_encoder_layers=1",
    "--policy.latent_dim=4",
    "--policy.chunk_size=4",
    "--policy.n_action_steps=4",
]


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    root = tmp_path_factory.mktemp("act") / "data"
    return make_dataset(root, frames=[6, 7], size=(32, 40), use_videos=False, n_points=12)


def test_act_trains_with_the_inputs_that_our_command_prints(facts, tmp_path, capsys):
    assert print_inputs([str(facts.root)]) == 0
    inputs = capsys.readouterr().out.strip()
    lerobot_train(*ACT, f"--policy.input_features={inputs}", *run_options(facts.root, tmp_path / "run"))
    folder = tmp_path / "run" / "checkpoints" / "last" / "pretrained_model"
    config = PreTrainedConfig.from_pretrained(folder)
    cameras = ["observation.images.main", "observation.images.wrist"]
    assert set(config.input_features) == set(json.loads(inputs)) == {*cameras, "observation.state"}
    policy = get_policy_class("act").from_pretrained(folder)
    before, after = make_pre_post_processors(policy.config, str(folder))
    item = LeRobotDataset("local/synthetic", root=facts.root)[0]
    seen = {key: item[key] for key in (*cameras, "observation.state")}  # all that a robot has
    with torch.inference_mode():
        assert after(policy.select_action(before(seen))).shape == (1, facts.action_dim)


def test_a_dataset_with_no_inputs_for_lerobot_is_named(tmp_path, capsys):
    names = {"image_prefix": "", "state_key": "state", "action_key": "actions"}
    root = make_dataset(tmp_path / "data", frames=[3], depth=False, tracks=False, use_videos=False, **names)
    assert print_inputs([str(root.root)]) == 1
    said = capsys.readouterr()
    assert not said.out and "(actions, state, main, wrist, " in said.err and "rename them" in said.err


def test_act_alone_takes_depth_for_a_camera(facts, tmp_path):
    """What the page on LeRobot says happens without; if LeRobot learns to tell them apart, it may go."""
    with pytest.raises(RuntimeError, match="expected .* to have 3 channels, but got 1 channels"):
        lerobot_train(*ACT, *run_options(facts.root, tmp_path / "run"))
