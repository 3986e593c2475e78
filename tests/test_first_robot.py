"""docs/first_robot.md, in its order, in miniature: what one step leaves is what the next one takes."""

import importlib
import shlex

import pytest
import torch
from accelerate.state import AcceleratorState
from lerobot.configs.policies import PreTrainedConfig

import lerobot_policy_foresight  # noqa: F401 - registers the policy with LeRobot
from modeling_foresight import ForesightForActionPrediction
from tests.synthetic import make_dataset
from tests.test_docs import ROOT, commands, our_module
from tests.tiny import tiny_config, tiny_processor

SMALL = {
    "datasets_scripts.annotate": ["--workers", "1"],
    "training.train": ["--train.steps", "2", "--train.batch_size", "2", "--data.num_workers", "0"],
    "training.visualize": ["--moments", "1"],
}


@pytest.mark.slow  # annotates, trains, draws and makes a card
def test_every_step_takes_what_the_one_before_left(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORESIGHT_CACHE", str(tmp_path / "cache"))
    sizes = {"cameras": ("front",), "size": (48, 64), "action_dim": 6, "state_dim": 6, "tracks": False}
    make_dataset(tmp_path / "outputs" / "first" / "recorded", episodes=5, frames=16, **sizes)
    torch.manual_seed(0)
    config = tiny_config(action_dim=6, state_dim=6, binary_action_indices=(), binary_state_indices=(), fps=20)
    ForesightForActionPrediction(config).save_pretrained(tmp_path / "base")
    tiny_processor(config).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")

    played = []
    for page, command in commands():
        if page != "first_robot.md" or not (found := our_module(shlex.split(command))):
            continue
        module, arguments = found
        arguments = [str(tmp_path / "base") if word == "BASE" else word for word in arguments]
        if "--depth" in arguments:  # its weights are not here: what a depth camera recorded is taken
            place = arguments.index("--depth")
            arguments[place : place + 2] = []
        # The configs are those of the checkout.
        arguments = [str(ROOT / word) if word.endswith(".yaml") else word for word in arguments]
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr("sys.argv", [module, *arguments, *SMALL.get(module, [])])
        code = importlib.import_module(module).main()
        said = capsys.readouterr().err
        # Before publishing, the base has to be on the Hub.
        assert not code or "is a folder of this machine: publish it" in said, f"{command}: {said}"
        played.append(module)
    assert played[0] == "datasets_scripts.annotate" and played[-1] == "hub_cards.publish"
    (rollout,) = (
        command for page, command in commands() if page == "first_robot.md" and "rollout" in command
    )
    (policy,) = (word for word in shlex.split(rollout) if word.startswith("--policy.path="))
    wanted = PreTrainedConfig.from_pretrained(policy.partition("=")[2])
    assert wanted.type == "foresight" and set(wanted.image_features) == {"observation.images.front"}
