"""Small models for LeRobot's own commands, and those commands run in this process."""

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.utils.import_utils import register_third_party_plugins
from transformers import AutoModel, AutoProcessor

from tests.tiny import tiny_config

# What a fresh policy takes from the dataset.
FROM_DATASET = ("views", "action_dim", "binary_action_indices", "state_dim", "binary_state_indices")


def small_model(**overrides) -> dict:
    """Fields of the smallest model that has every part; sizes of the robot are left open."""
    fields = json.loads(tiny_config(history_length=4, future_shift=2).to_json_string())
    for name in (*FROM_DATASET, "model_type", "transformers_version"):
        fields.pop(name)
    return fields | overrides


def lerobot_train(*options: str) -> None:
    """`lerobot-train` with these options, in this process, which it leaves as it was."""
    from lerobot.scripts.lerobot_train import train

    register_third_party_plugins()
    root, handlers, level = logging.getLogger(), logging.getLogger().handlers[:], logging.getLogger().level
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lerobot-train", *options])
        try:
            train()
        finally:
            root.handlers[:] = handlers
            root.setLevel(level)
            AcceleratorState._reset_state(True)


def lerobot_eval(folder: Path, output: Path, *options: str) -> dict:
    """`lerobot-eval` of a policy's folder in this process, which it leaves as it was; what it writes."""
    from lerobot.scripts import lerobot_eval

    register_third_party_plugins()
    root, handlers, level = logging.getLogger(), logging.getLogger().handlers[:], logging.getLogger().level
    options = (f"--policy.path={folder}", "--policy.device=cpu", f"--output_dir={output}", *options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lerobot-eval", *options])
        try:
            lerobot_eval.main()
        finally:
            root.handlers[:] = handlers
            root.setLevel(level)
    return json.loads((output / "eval_info.json").read_text())


def run_options(root: Path, output: Path) -> list[str]:
    """Options of any training run on a local dataset, on the CPU and without worker processes."""
    return [
        "--policy.device=cpu",
        "--policy.push_to_hub=false",
        "--dataset.repo_id=local/synthetic",
        f"--dataset.root={root}",
        f"--output_dir={output}",
        "--num_workers=0",
        "--batch_size=2",
        "--steps=2",
        "--log_freq=1",
        "--env_eval_freq=0",
    ]


def policy_options(model: dict) -> list[str]:
    """Options of a fresh policy; YAML, because LeRobot reads JSON's `1e-05` as a word."""
    flow = {"default_flow_style": True, "width": 10**6}
    values = {name: yaml.safe_dump(value, **flow).splitlines()[0] for name, value in model.items()}
    return ["--policy.type=foresight", *(f"--policy.{name}={value}" for name, value in values.items())]


def observation(facts, t: int, episodes: tuple[int, ...]) -> dict:
    """What environments show at time t: images in [0, 1] and states, one row per episode."""
    seen = {
        f"observation.images.{camera}": torch.stack(
            [torch.from_numpy(facts.image(e, t, camera)).permute(2, 0, 1) / 255 for e in episodes]
        )
        for camera in facts.sizes
    }
    states = torch.stack([torch.from_numpy(facts.state(e, t)) for e in episodes])
    return seen | {"observation.state": states, "task": [facts.task(e) for e in episodes]}


def load_policy(folder, **kwargs):
    """The policy and its pipelines, as LeRobot's commands load them."""
    policy = get_policy_class("foresight").from_pretrained(folder, **kwargs)
    return policy, *make_pre_post_processors(policy.config, str(folder))


def assert_same_actions(folder, facts) -> None:
    """The policy between LeRobot's pipelines acts as the model that `transformers` opens in the folder."""
    episodes = (0, 1)
    policy, before, after = load_policy(folder)
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    stream = model.stream(processor, num_envs=len(episodes))
    stream.reset([facts.task(e) for e in episodes])
    with torch.inference_mode():
        for t in range(model.config.history_length + 1):
            seen = observation(facts, t, episodes)
            images = {
                view: (seen[f"observation.images.{view}"] * 255).round().to(torch.uint8)
                for view in model.config.views
            }
            expected = stream.step(images, seen["observation.state"])
            given = after(policy.select_action(before(seen)))
            torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
            # Or nothing that the robots see would matter here.
            assert (expected[0] - expected[1]).abs().max() > 1e-2
