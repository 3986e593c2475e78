"""`lerobot-eval` on MetaWorld with a folder of ours, the simulator included."""

import json
import logging
import sys

import pytest
from lerobot.utils.import_utils import register_third_party_plugins

from lerobot_policy_foresight.checkpoint_files import write_lerobot_files
from modeling_foresight import ForesightForActionPrediction
from tests.tiny import tiny_config, tiny_processor

STEPS = 3


@pytest.mark.sim
def test_lerobot_eval_runs_a_folder_of_transformers(simulator, tmp_path, monkeypatch):
    from lerobot.envs.metaworld import MetaworldEnv
    from lerobot.scripts import lerobot_eval

    config = tiny_config(
        views=("main",),
        history_length=4,
        action_dim=4,
        binary_action_indices=(),
        state_dim=4,
        binary_state_indices=(),
    )
    stats = {"mean": [0.1] * 4, "std": [0.5] * 4, "min": [-1.0] * 4, "max": [1.0] * 4}
    folder, output = tmp_path / "model", tmp_path / "evaluation"
    ForesightForActionPrediction(config).save_pretrained(folder)
    tiny_processor(config, action_stats=stats, state_stats=stats).save_pretrained(folder)
    write_lerobot_files(folder, {"main": "observation.image"})  # LeRobot's environment has one camera

    made = MetaworldEnv.__init__

    def short(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self._max_episode_steps = STEPS  # --env.episode_length is not passed on: 500 steps otherwise

    monkeypatch.setattr(MetaworldEnv, "__init__", short)
    for name in ("handlers", "level"):  # which LeRobot changes
        monkeypatch.setattr(logging.root, name, getattr(logging.root, name))
    register_third_party_plugins()
    options = [
        f"--policy.path={folder}",
        "--policy.device=cpu",
        "--env.type=metaworld",
        "--env.task=reach-v3",
        "--eval.n_episodes=1",
        "--eval.batch_size=1",
        "--eval.use_async_envs=false",
        f"--output_dir={output}",
    ]
    monkeypatch.setattr(sys, "argv", ["lerobot-eval", *options])
    lerobot_eval.main()
    assert json.loads((output / "eval_info.json").read_text())["overall"]["n_episodes"] == 1
