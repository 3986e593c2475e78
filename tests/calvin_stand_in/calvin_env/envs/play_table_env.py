"""The environment: `reset`, `step`, `get_obs`, `get_info`."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
from hydra.utils import instantiate
from omegaconf import OmegaConf


class PlayTableSimEnv:
    def __init__(self, cameras, show_gui, use_vr, use_scene_info, use_egl=False):
        if use_egl:
            raise SystemExit  # as without a GPU
        assert not show_gui and not use_vr and use_scene_info
        self.cameras = cameras
        self.robot = SimpleNamespace(gripper_action=1)
        self.actions = []

    def reset(self, robot_obs=None, scene_obs=None):
        self.pose, (self.slider, self.drawer), self.led = robot_obs[:6].copy(), scene_obs[:2], scene_obs[5]
        self.steps = 0
        return self.get_obs()

    def get_obs(self):
        """Pictures show the number of steps."""
        sizes = {name: (camera["height"], camera["width"], 3) for name, camera in self.cameras.items()}
        rgb_obs = {f"rgb_{name}": np.full(size, self.steps % 256, np.uint8) for name, size in sizes.items()}
        depth_obs = {f"depth_{name}": np.ones(size[:2], np.float32) for name, size in sizes.items()}
        robot_obs = np.array([*self.pose, 0.08, *np.zeros(7), self.robot.gripper_action])
        return {"rgb_obs": rgb_obs, "depth_obs": depth_obs, "robot_obs": robot_obs, "scene_obs": np.zeros(24)}

    def get_info(self):
        doors = {
            "base__slide": {"current_state": self.slider},
            "base__drawer": {"current_state": self.drawer},
        }
        lights = {"led": {"logical_state": self.led}}
        return {"robot_info": {"uid": 0}, "scene_info": {"doors": doors, "lights": lights}}

    def step(self, action):
        assert isinstance(action, np.ndarray) and action.shape == (7,)
        assert action[6] in (-1, 1)
        self.actions.append(action)
        self.pose += action[:6] * ([0.02] * 3 + [0.05] * 3)
        self.robot.gripper_action = action[6]
        self.drawer, self.slider, self.led = self.drawer + 0.05, self.slider + 0.02, 1
        self.steps += 1
        return self.get_obs(), 0, False, self.get_info()


def get_env(dataset_path, obs_space=None, show_gui=True, **kwargs):
    config = OmegaConf.load(Path(dataset_path) / ".hydra" / "merged_config.yaml")
    cameras = config["env"]["cameras"]
    if obs_space is not None:
        keep = {key.split("_")[1] for key in obs_space["rgb_obs"] + obs_space["depth_obs"]}
        config["env"]["cameras"] = {name: camera for name, camera in cameras.items() if name in keep}
    return instantiate(config["env"], show_gui=show_gui, use_vr=False, use_scene_info=True)
