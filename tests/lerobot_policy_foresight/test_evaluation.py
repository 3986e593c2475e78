"""`lerobot-eval` on LeRobot's own MetaWorld environment, which has one camera."""

import numpy as np
import pytest

from lerobot_policy_foresight.lerobot_files import write_lerobot_files
from modeling_foresight import ForesightForActionPrediction
from tests.lerobot_policy_foresight.miniature import lerobot_eval
from tests.tiny import tiny_config, tiny_processor

STEPS = 3


@pytest.mark.sim
@pytest.mark.slow  # test_lerobot_eval_gives_what_training_evaluate_gives runs one quickly
def test_lerobot_eval_acts_as_the_stream_of_a_folder_of_transformers(simulator, tmp_path, monkeypatch):
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
    model = ForesightForActionPrediction(config)
    processor = tiny_processor(config, action_stats=stats, state_stats=stats)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_lerobot_files(folder, {"main": "observation.image"})  # LeRobot's environment has one camera

    made, reset, step = MetaworldEnv.__init__, MetaworldEnv.reset, MetaworldEnv.step
    seen, sent = [], []

    def short(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self._max_episode_steps = STEPS  # --env.episode_length is not passed on: 500 steps otherwise

    def record_reset(self, *args, **kwargs):
        observation, info = reset(self, *args, **kwargs)
        seen[:] = [observation]
        return observation, info

    def record_step(self, action):
        sent.append(np.array(action))
        answer = step(self, action)
        seen.append(answer[0])
        return answer

    for name, function in (("__init__", short), ("reset", record_reset), ("step", record_step)):
        monkeypatch.setattr(MetaworldEnv, name, function)
    info = lerobot_eval(
        folder,
        tmp_path / "evaluation",
        "--env.type=metaworld",
        "--env.task=reach-v3",
        "--eval.n_episodes=1",
        "--eval.batch_size=1",
        "--eval.use_async_envs=false",
    )
    assert info["overall"]["n_episodes"] == 1 and len(sent) == STEPS
    stream = model.eval().stream(processor)
    stream.reset(MetaworldEnv(task="reach-v3").task_description)
    for observation, action in zip(seen, sent, strict=False):
        expected = stream.step({"main": observation["pixels"]}, observation["agent_pos"])
        np.testing.assert_allclose(action, expected, atol=1e-4)
