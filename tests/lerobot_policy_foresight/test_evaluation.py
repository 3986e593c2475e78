"""`lerobot-eval` on LeRobot's own MetaWorld environment, which has one camera."""

import pytest

from lerobot_policy_foresight.lerobot_files import write_lerobot_files
from modeling_foresight import ForesightForActionPrediction
from tests.lerobot_policy_foresight.miniature import lerobot_eval
from tests.tiny import tiny_config, tiny_processor

STEPS = 3


@pytest.mark.sim
@pytest.mark.slow  # test_lerobot_eval_gives_what_training_evaluate_gives runs one quickly
def test_lerobot_eval_runs_a_folder_of_transformers(simulator, tmp_path, monkeypatch):
    from lerobot.envs.metaworld import MetaworldEnv

    config = tiny_config(
        views=("main",),
        history_length=4,
        action_dim=4,
        binary_action_indices=(),
        state_dim=4,
        binary_state_indices=(),
    )
    stats = {"mean": [0.1] * 4, "std": [0.5] * 4, "min": [-1.0] * 4, "max": [1.0] * 4}
    folder = tmp_path / "model"
    ForesightForActionPrediction(config).save_pretrained(folder)
    tiny_processor(config, action_stats=stats, state_stats=stats).save_pretrained(folder)
    write_lerobot_files(folder, {"main": "observation.image"})  # LeRobot's environment has one camera

    made = MetaworldEnv.__init__

    def short(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self._max_episode_steps = STEPS  # --env.episode_length is not passed on: 500 steps otherwise

    monkeypatch.setattr(MetaworldEnv, "__init__", short)
    info = lerobot_eval(
        folder,
        tmp_path / "evaluation",
        "--env.type=metaworld",
        "--env.task=reach-v3",
        "--eval.n_episodes=1",
        "--eval.batch_size=1",
        "--eval.use_async_envs=false",
    )
    assert info["overall"]["n_episodes"] == 1
