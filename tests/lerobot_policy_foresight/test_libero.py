"""LIBERO: LeRobot's own environment, pipeline and command, with a stand-in for the simulator."""

import json
import sys
import types

import numpy as np
import pytest
import torch

from lerobot_policy_foresight.lerobot_files import write_lerobot_files
from modeling_foresight import ForesightForActionPrediction, ForesightStream
from tests.lerobot_policy_foresight.miniature import (
    lerobot_eval,
    lerobot_train,
    policy_options,
    run_options,
    small_model,
)
from tests.synthetic import make_dataset
from tests.tiny import tiny_config, tiny_processor
from training import evaluate

SIDE = 48
SETTLING_STEPS = 10  # in which LeRobot's environment does nothing, after a reset
STEPS_TO_SUCCESS = 3
INSTRUCTION = "push the red cube to the left"


def picture(camera: int, steps: int) -> np.ndarray:
    """What a camera of the stand-in gives, as robosuite does: turned by 180 degrees."""
    upright = np.zeros((SIDE, SIDE, 3), np.uint8)
    upright[:8, :16] = 200 + camera
    upright[..., 2] = steps
    return upright[::-1, ::-1]


class StandIn:
    """As much of `libero.libero.envs.OffScreenRenderEnv` as LeRobot's environment asks for."""

    def __init__(self, bddl_file_name, camera_heights, camera_widths, control_freq, hard_reset):
        assert (camera_heights, camera_widths, control_freq) == (SIDE, SIDE, 20)
        arm = types.SimpleNamespace(ee_ori_mat=np.eye(3), use_delta=False)
        self.robots, self.env, self.steps = [types.SimpleNamespace(controller=arm)], self, 0

    def seed(self, seed):
        pass

    def reset(self):
        self.steps = -SETTLING_STEPS
        return self._get_observations()

    def step(self, action):
        assert np.shape(action) == (7,)
        self.steps += 1
        return self._get_observations(), float(self.check_success()), self.check_success(), {}

    def check_success(self):
        return self.steps >= STEPS_TO_SUCCESS

    def close(self):
        pass

    def _get_observations(self):
        half = np.sqrt(0.5)
        return {
            "agentview_image": picture(0, max(0, self.steps)),
            "robot0_eye_in_hand_image": picture(1, max(0, self.steps)),
            "robot0_eef_pos": np.array([0.1, 0.2, 0.9]),
            "robot0_eef_quat": np.array([half, 0.0, 0.0, half]),  # x, y, z, w: a quarter turn about x
            "robot0_gripper_qpos": np.array([0.03, -0.04]),
            "robot0_gripper_qvel": np.zeros(2),
            "robot0_joint_pos": np.zeros(7),
            "robot0_joint_vel": np.zeros(7),
        }


@pytest.fixture
def libero(monkeypatch):
    """Packages that LeRobot imports for LIBERO, with one suite of one task."""
    task = types.SimpleNamespace(name="push", language=INSTRUCTION, problem_folder="", bddl_file="push.bddl")
    suite = types.SimpleNamespace(tasks=[task], get_task=[task].__getitem__)
    inner = types.ModuleType("libero.libero")
    inner.benchmark = types.SimpleNamespace(get_benchmark_dict=lambda: {"libero_spatial": lambda: suite})
    inner.get_libero_path = lambda kind: kind
    envs = types.ModuleType("libero.libero.envs")
    envs.OffScreenRenderEnv = StandIn
    for module in (types.ModuleType("libero"), inner, envs):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "lerobot.envs.libero", raising=False)
    yield
    sys.modules.pop("lerobot.envs.libero", None)


@pytest.fixture
def shown(monkeypatch) -> list[tuple[dict, torch.Tensor]]:
    """Images and states that reach the policy's stream."""
    told = []
    step_chunk = ForesightStream.step_chunk

    def noted(self, images, state=None, *args, **kwargs):
        told.append((images, state))
        return step_chunk(self, images, state, *args, **kwargs)

    monkeypatch.setattr(ForesightStream, "step_chunk", noted)
    return told


def evaluate_in_libero(folder, output, *options: str) -> dict:
    return lerobot_eval(
        folder,
        output,
        "--env.type=libero",
        "--env.task=libero_spatial",
        "--env.init_states=false",  # assets
        f"--env.observation_height={SIDE}",
        f"--env.observation_width={SIDE}",
        "--eval.n_episodes=2",
        "--eval.batch_size=2",
        "--eval.use_async_envs=false",
        *options,
    )


def check_shown(shown: list, main: str, wrist: str) -> None:
    """The policy saw both cameras upright, and the 8 numbers of LIBERO's datasets."""
    assert len(shown) == STEPS_TO_SUCCESS
    for steps, (images, state) in enumerate(shown):
        assert set(images) == {main, wrist}
        for camera, view in enumerate((main, wrist)):
            upright = torch.from_numpy(picture(camera, steps)[::-1, ::-1].copy()).permute(2, 0, 1)
            assert images[view].shape == (2, 3, SIDE, SIDE)
            assert all(torch.equal(image, upright) for image in images[view])
        expected = torch.tensor([0.1, 0.2, 0.9, np.pi / 2, 0, 0, 0.03, -0.04])
        torch.testing.assert_close(state, expected.expand(2, 8), atol=1e-5, rtol=0)


def test_a_policy_trained_on_liberos_columns_acts_in_libero(libero, shown, tmp_path):
    make_dataset(
        tmp_path / "dataset",
        cameras={"image": (SIDE, SIDE), "image2": (SIDE, SIDE)},
        frames=[9, 11],
        state_dim=8,
        action_dim=7,
        fps=10,
        depth=False,
        tracks=False,
        use_videos=False,
    )
    with pytest.warns(UserWarning, match="Objectives without targets are not trained: depth .* flow"):
        lerobot_train(
            *run_options(tmp_path / "dataset", tmp_path / "run"),
            *policy_options(small_model(history_length=2, future_shift=1)),
        )
    folder = tmp_path / "run" / "checkpoints" / "last" / "pretrained_model"
    info = evaluate_in_libero(folder, tmp_path / "evaluation")
    assert info["per_group"]["libero_spatial"]["pc_success"] == 100
    check_shown(shown, "image", "image2")


@pytest.mark.parametrize("option", ["--policy.cameras", "--rename_map"])
def test_a_policy_with_views_of_other_names_acts_in_libero(libero, shown, tmp_path, option):
    """One that `training/train.py` trained with views `main` and `wrist`."""
    config = tiny_config(action_dim=7, binary_action_indices=(6,), state_dim=8, binary_state_indices=())
    moves = {"mean": [0.1] * 7, "std": [0.5] * 7, "min": [-1.0] * 7, "max": [1.0] * 7}
    is_at = {"mean": [0.1] * 8, "std": [0.5] * 8, "min": [-1.0] * 8, "max": [1.0] * 8}
    ForesightForActionPrediction(config).save_pretrained(tmp_path / "model")
    tiny_processor(config, action_stats=moves, state_stats=is_at).save_pretrained(tmp_path / "model")
    write_lerobot_files(tmp_path / "model")
    views = {"main": "observation.images.image", "wrist": "observation.images.image2"}
    if option == "--rename_map":
        views = {key: f"observation.images.{view}" for view, key in views.items()}
    info = evaluate_in_libero(tmp_path / "model", tmp_path / "evaluation", f"{option}={json.dumps(views)}")
    assert info["per_group"]["libero_spatial"]["pc_success"] == 100
    check_shown(shown, "main", "wrist")


@pytest.mark.slow
def test_lerobot_eval_and_training_evaluate_agree_in_liberos_own_simulator(
    libero_simulator, tmp_path, monkeypatch
):
    config = tiny_config(
        views=("image", "image2"),
        action_dim=7,
        binary_action_indices=(6,),
        state_dim=8,
        binary_state_indices=(),
    )
    statistics = {"mean": [0.1] * 8, "std": [0.5] * 8, "min": [-1.0] * 8, "max": [1.0] * 8}
    moves = {name: values[:7] for name, values in statistics.items()}
    ForesightForActionPrediction(config).save_pretrained(tmp_path / "model")
    processor = tiny_processor(config, action_stats=moves, state_stats=statistics)
    processor.save_pretrained(tmp_path / "model")
    write_lerobot_files(tmp_path / "model")
    seen = []
    step_chunk = ForesightStream.step_chunk

    def noted(self, images, state=None, *args, **kwargs):
        chunk = step_chunk(self, images, state, *args, **kwargs)
        pictures = [images[view][0] for view in config.views]
        if isinstance(pictures[0], torch.Tensor):  # LeRobot's: channels first
            pictures = [picture.permute(1, 2, 0).numpy() for picture in pictures]
        seen.append((pictures, np.asarray(state[0]), chunk[0, 0].numpy()))
        return chunk

    monkeypatch.setattr(ForesightStream, "step_chunk", noted)
    arguments = f"--benchmark libero --checkpoint {tmp_path / 'model'} --suite libero_10 --tasks 3"
    arguments += f" --episodes 2 --seed 7 --max-steps 5 --image-size {SIDE} --num-envs 1 --device cpu"
    assert evaluate.main([*arguments.split(), "--output", str(tmp_path / "eval.json")]) == 0
    ours, seen[:] = seen[:], []
    info = lerobot_eval(
        tmp_path / "model",
        tmp_path / "evaluation",
        "--env.type=libero",
        "--env.task=libero_10",
        "--env.task_ids=[3]",  # with a drawer, whose opening is drawn before the cabinet's place
        "--env.episode_length=5",
        f"--env.observation_height={SIDE}",
        f"--env.observation_width={SIDE}",
        "--seed=7",
        "--eval.n_episodes=2",
        "--eval.batch_size=1",
        "--eval.use_async_envs=false",
    )
    episodes = json.loads((tmp_path / "eval.json").read_text())["episodes"]
    assert info["per_task"][0]["metrics"]["successes"] == [episode["success"] for episode in episodes]
    assert len(ours) == len(seen) == 10
    for number, (our, their) in enumerate(zip(ours, seen, strict=True)):
        differences = [np.abs(a.astype(int) - b) for a, b in zip(our[0], their[0], strict=True)]
        assert number % 5 or not any(map(np.any, differences)), "a start"
        # Actions differ in their last bits, and that may show.
        assert max(map(np.mean, differences)) < 0.1, f"image {number}"
        assert np.abs(our[1] - their[1]).max() < 1e-5
        assert np.abs(our[2] - their[2]).max() < 1e-5
    assert (ours[0][0][0] != ours[5][0][0]).any(), "two starts"
