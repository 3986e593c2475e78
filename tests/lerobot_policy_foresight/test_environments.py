"""The environment `foresight_metaworld`, by itself and under LeRobot's own commands."""

import ast
import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from lerobot.envs.configs import EnvConfig
from lerobot.envs.utils import NEW_ROLLOUT_OPTION, env_to_policy_features, preprocess_observation

from lerobot_policy_foresight import metaworld_env
from lerobot_policy_foresight.lerobot_files import write_lerobot_files
from lerobot_policy_foresight.metaworld_env import ForesightMetaWorldConfig, MetaWorldEnv
from modeling_foresight import ForesightForActionPrediction
from tests.lerobot_policy_foresight.miniature import (
    lerobot_eval,
    lerobot_train,
    policy_options,
    run_options,
    small_model,
)
from tests.tiny import tiny_config, tiny_processor
from training import evaluate

TASK, FIRST_SEED = "coffee-button-v3", 10000
PUSH = np.array([0.0, 0.7, 0.0, 0.0], np.float32)  # presses that button from some of its starts
MAX_STEPS = 60  # simulation steps
SIDE = 40


def make(**options) -> ForesightMetaWorldConfig:
    return ForesightMetaWorldConfig(
        **{"task": TASK, "image_size": SIDE, "episode_length": MAX_STEPS, **options}
    )


def test_lerobot_knows_the_environment_and_what_it_shows():
    config = EnvConfig.get_choice_class("foresight_metaworld")(cameras="main, wrist", image_size=SIDE)
    features = {key: feature.shape for key, feature in env_to_policy_features(config).items()}
    assert features == {
        "observation.images.main": (3, SIDE, SIDE),
        "observation.images.wrist": (3, SIDE, SIDE),
        "observation.state": (4,),
        "action": (4,),
    }


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"fps": 30}, "30, which does not divide MetaWorld's 80 .* choose one of 80, 40, 20"),
        ({"task": "drawer-opn-v3"}, "unknown MetaWorld task 'drawer-opn-v3'; did you mean drawer-open-v3"),
        ({"cameras": "main,front"}, "unknown camera 'front'; the simulator has main, wrist"),
        ({"episode_length": 501}, "501 simulation steps; it must be 1 to 500"),
        ({"image_size": 15}, "15 px; it must be at least 16"),
        ({"task": " ,"}, "no task given; name one, drawer-open-v3 for example"),
        ({"quality": "best"}, "'best'; choose from fast, default"),
        ({"max_parallel_tasks": 2}, "share one policy .* --eval.batch_size"),
    ],
)
def test_settings_that_cannot_be_are_named(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        make(**options)


def test_other_environments_keep_their_choice_of_renderer():
    # Importing the simulator sets MUJOCO_GL, and LeRobot imports the plugin for every command.
    body = ast.parse(Path(metaworld_env.__file__).read_text()).body
    imports = {node.module for node in body if isinstance(node, ast.ImportFrom)}
    ours = {name for name in imports if name.startswith("datasets_scripts")}
    assert ours <= {"datasets_scripts.command_line"}  # which needs the standard library alone


@pytest.mark.sim
def test_environment_keeps_gymnasiums_rules(simulator):
    from gymnasium.utils.env_checker import check_env

    env = MetaWorldEnv(TASK, **make(depth=True, image_size=16).gym_kwargs)
    check_env(env, skip_render_check=True)
    env.close()
    with pytest.raises(gym.error.ResetNeeded):
        env.step(PUSH)


@pytest.mark.sim
def test_environment_shows_what_training_evaluate_shows(simulator):
    from datasets_scripts.simulation.metaworld import MetaWorldSim

    env = MetaWorldEnv(TASK, **make(depth=True).gym_kwargs)
    with MetaWorldSim(TASK, image_size=SIDE) as sim:
        sim.reset(FIRST_SEED)
        seen, info = env.reset(seed=FIRST_SEED)
        done, steps = False, 0
        while not done:
            expected = sim.observe()
            for camera in ("main", "wrist"):
                assert np.array_equal(seen["pixels"][camera], expected["images"][camera])
                assert np.array_equal(seen[f"depth.{camera}"][0], sim.render_depth(camera))
            assert np.array_equal(seen["agent_pos"], expected["state"])
            success = sim.step(PUSH, 4, stop_on_success=True)
            seen, reward, done, truncated, info = env.step(PUSH)
            steps += 1
            assert (reward, done, truncated, info["is_success"]) == (success, success, False, success)
    assert steps == 8
    assert info["simulation_steps"] == 500 - sim.steps_left
    focal = seen["intrinsics.main"][0, 0]
    assert focal == pytest.approx(sim.intrinsics("main")["fx"]) and seen["intrinsics.main"][0, 2] == SIDE / 2
    assert env.render().shape == (SIDE, 2 * SIDE, 3)
    env.close()


@pytest.mark.sim
def test_an_episode_fails_at_its_length_and_names_of_results_tell_the_settings(simulator):
    suites = make(task=f"{TASK},reach-v3", episode_length=9, depth=True).create_envs(n_envs=1)
    assert list(suites) == [f"{TASK}_fast_40px_20fps", "reach-v3_fast_40px_20fps"]
    env = suites[f"{TASK}_fast_40px_20fps"][0]
    assert env.call("_max_episode_steps") == (2,)
    assert env.call("task_description") == ("Push a button on the coffee machine",)
    assert env.metadata["render_fps"] == 20
    seen, _ = env.reset(seed=FIRST_SEED)
    batch = preprocess_observation(seen)
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "observation.images.main": (1, 3, SIDE, SIDE),
        "observation.images.wrist": (1, 3, SIDE, SIDE),
        "observation.state": (1, 4),
        "observation.depth.main": (1, 1, SIDE, SIDE),
        "observation.depth.wrist": (1, 1, SIDE, SIDE),
        "observation.intrinsics.main": (1, 3, 3),
        "observation.intrinsics.wrist": (1, 3, 3),
    }
    for truncates in (False, True):
        _, _, terminated, truncated, info = env.step(PUSH[None])
        assert (terminated[0], truncated[0], info["is_success"][0]) == (False, truncates, False)
    for suite in suites.values():
        suite[0].close()


def roll(env, seeds: list[int], steps: int) -> list[list[tuple]]:
    """What each environment of a batch shows and says until its episode is over, acting by its seed."""
    seen, _ = env.reset(seed=seeds, options={NEW_ROLLOUT_OPTION: True})
    actions = np.stack([PUSH * (1 - 0.01 * (seed - FIRST_SEED)) for seed in seeds])
    told, done = [[] for _ in seeds], np.zeros(len(seeds), bool)
    for _ in range(steps):
        for i in np.flatnonzero(~done):
            told[i].append((seen["pixels"]["main"][i].copy(), seen["pixels"]["wrist"][i].copy()))
        seen, _, terminated, truncated, info = env.step(actions)
        for i in np.flatnonzero(~done):
            told[i].append((bool(info["is_success"][i]), int(info["simulation_steps"][i])))
        done |= terminated | truncated
    assert done.all()
    return told


def assert_same(ours: list[tuple], theirs: list[tuple]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


SEEDS = [FIRST_SEED, FIRST_SEED + 2, FIRST_SEED + 3]  # over after 8 steps, never, after 9


@pytest.fixture(scope="module")
def alone(simulator):
    """The episodes of `SEEDS`, each with the only simulator there is."""
    (suite,) = make().create_envs(n_envs=1).values()
    told = [roll(suite[0], [seed], 15)[0] for seed in SEEDS]
    suite[0].close()
    assert [len(episode) // 2 for episode in told] == [8, 15, 9]
    return told


@pytest.mark.sim
@pytest.mark.parametrize("use_async", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_an_environment_shows_does_not_depend_on_the_others(alone, use_async):
    (suite,) = make().create_envs(n_envs=3, use_async_envs=use_async).values()
    for _ in range(2):  # a second batch of episodes begins where the first stopped
        for ours, theirs in zip(roll(suite[0], SEEDS, 15), alone, strict=True):
            assert_same(ours, theirs)
    suite[0].close()


# ---------------------------------------------------------------------- LeRobot's commands


@pytest.fixture
def episodes(monkeypatch) -> dict[int, dict]:
    """What happened in the environments of this process: seed -> steps, simulation steps, success."""
    told: dict[int, dict] = {}
    reset, step = MetaWorldEnv.reset, MetaWorldEnv.step

    def noted_reset(self, *, seed=None, options=None):
        self.told = told.setdefault(seed, {"steps": 0})
        return reset(self, seed=seed, options=options)

    def noted_step(self, action):
        answer = step(self, action)
        self.told["steps"] += 1
        self.told |= {"success": answer[-1]["is_success"], "simulation_steps": answer[-1]["simulation_steps"]}
        return answer

    monkeypatch.setattr(MetaWorldEnv, "reset", noted_reset)
    monkeypatch.setattr(MetaWorldEnv, "step", noted_step)
    return told


@pytest.fixture
def folder(tmp_path):
    """A policy that pushes; what it sees decides how."""
    torch.manual_seed(2)
    robot = {"action_dim": 4, "binary_action_indices": (), "state_dim": 4, "binary_state_indices": ()}
    window = {"history_length": 2, "future_targets": "lookahead", "fps": 20}  # as the quickstart's
    sees = {"initializer_range": 0.3, "embedding_initializer_range": 0.02}
    config = tiny_config(**robot, **window, **sees)
    # An untrained model acts around the mean.
    acts = {"mean": PUSH.tolist(), "std": [0.4, 0.4, 0.4, 0.0], "min": [-1.0] * 4, "max": [1.0] * 4}
    is_at = {"mean": [0.0, 0.6, 0.2, 0.5], "std": [0.1] * 4, "min": [-1.0] * 4, "max": [1.0] * 4}
    folder = tmp_path / "model"
    ForesightForActionPrediction(config).save_pretrained(folder)
    tiny_processor(config, action_stats=acts, state_stats=is_at).save_pretrained(folder)
    write_lerobot_files(folder)
    return folder


@pytest.mark.sim
@pytest.mark.slow
def test_a_task_does_not_depend_on_those_before_it(simulator, folder, tmp_path, episodes, monkeypatch):
    seen = []
    step = MetaWorldEnv.step

    def noted(self, action):
        seen.append((self.task, np.array(action)))
        return step(self, action)

    monkeypatch.setattr(MetaWorldEnv, "step", noted)
    options = ["--env.type=foresight_metaworld", f"--env.image_size={SIDE}", "--env.episode_length=20"]
    options += [f"--seed={FIRST_SEED}", "--eval.n_episodes=2", "--eval.batch_size=2"]
    options += ["--eval.use_async_envs=false"]
    info = lerobot_eval(folder, tmp_path / "both", *options, f"--env.task=reach-v3,{TASK}")
    together = [action for task, action in seen if task == TASK]
    assert [task["task_group"].split("_")[0] for task in info["per_task"]] == ["reach-v3", TASK]
    seen.clear()
    lerobot_eval(folder, tmp_path / "alone", *options, f"--env.task={TASK}")
    assert len(together) == len(seen) == 2 * 5 and all(task == TASK for task, _ in seen)
    assert np.array_equal(together, [action for _, action in seen])
    assert not np.array_equal(together[0], together[1])


@pytest.mark.sim
def test_lerobot_eval_gives_what_training_evaluate_gives(simulator, folder, tmp_path, episodes):
    results = tmp_path / "eval.json"
    command = f"--checkpoint {folder} --tasks {TASK} --episodes 4 --seed {FIRST_SEED} --num-envs 2 "
    command += f"--image-size {SIDE} --max-steps {MAX_STEPS} --device cpu --output {results}"
    assert evaluate.main(command.split()) == 0
    expected = json.loads(results.read_text())["episodes"]
    assert {episode["success"] for episode in expected} == {True, False}  # or little is compared

    info = lerobot_eval(
        folder,
        tmp_path / "evaluation",
        "--env.type=foresight_metaworld",
        f"--env.task={TASK}",
        f"--env.image_size={SIDE}",
        f"--env.episode_length={MAX_STEPS}",
        f"--seed={FIRST_SEED}",
        "--eval.n_episodes=4",
        "--eval.batch_size=2",
        "--eval.use_async_envs=false",
    )
    (task,) = info["per_task"]
    assert task["task_group"] == f"{TASK}_fast_{SIDE}px_20fps"
    assert task["metrics"]["successes"] == [episode["success"] for episode in expected]
    assert info["overall"]["n_episodes"] == 4
    for episode in expected:
        names = ("steps", "simulation_steps", "success")
        assert episodes[episode["seed"]] == {name: episode[name] for name in names}
    assert sorted(episodes) == [episode["seed"] for episode in expected]


@pytest.mark.sim
@pytest.mark.parametrize("has_kernels", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_lerobot_train_evaluates_the_policy_while_it_trains(
    simulated_dataset, tmp_path, monkeypatch, episodes, has_kernels
):
    # LeRobot evaluates in the precision of training.
    monkeypatch.setattr(
        "lerobot_policy_foresight.modeling_foresight.has_bfloat16", lambda device: has_kernels
    )
    lerobot_train(
        *run_options(simulated_dataset.root, tmp_path / "run"),
        "--policy.dtype=bfloat16",
        *policy_options(small_model(history_length=2, future_shift=1)),
        "--env.type=foresight_metaworld",
        "--env.task=drawer-open-v3",
        "--env.episode_length=8",
        "--env_eval_freq=2",
        "--eval.n_episodes=1",
        "--eval.batch_size=1",
        f"--seed={FIRST_SEED}",
    )
    assert episodes == {FIRST_SEED: {"steps": 2, "success": False, "simulation_steps": 8}}
