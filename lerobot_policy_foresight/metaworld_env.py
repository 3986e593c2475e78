# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""The environment `foresight_metaworld`: MetaWorld for LeRobot's commands, as in our demonstrations.

lerobot-eval --policy.path=outputs/quickstart/model --env.type=foresight_metaworld --env.task=drawer-open-v3

It has the tasks, instructions, main camera, state and success rule of LeRobot's own `metaworld`, and adds a
wrist camera, a control rate, fast rendering, depth and intrinsics. It runs the simulator of
`training/evaluate.py`: equal starts and actions give equal pictures.
"""

import functools
import logging
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from datasets_scripts.command_line import split_names

# The simulator is imported where it is used: importing it chooses MuJoCo's renderer, and LeRobot imports this
# module for every command, even with another environment.

__all__ = ["ForesightMetaWorldConfig", "MetaWorldEnv"]

logger = logging.getLogger(__name__)


@EnvConfig.register_subclass("foresight_metaworld")
@dataclass
class ForesightMetaWorldConfig(EnvConfig):
    """Options of `--env.type=foresight_metaworld`; the defaults are those of the quickstart's demonstrations.

    Args:
        task (`str`): Comma-separated tasks (`drawer-open-v3`) or groups (`easy`, `medium`, `hard`,
            `very_hard`, `all`).
        fps (`int`): Actions per second, as in the training data; each is held for 80 / `fps` steps.
        episode_length (`int`): Simulation steps (80 per second) after which an episode has failed, at most
            MetaWorld's 500.
        cameras (`str`): Comma-separated, of `main`, `wrist`, `behind` and `top`.
        image_size (`int`): Side of the square pictures in pixels.
        quality (`str`): `fast` renders without multisampling, shadows and reflections, about ten times faster
            in software; `default` is MuJoCo's and LeRobot's.
        depth (`bool`): Add depth and intrinsics of every camera, see [`MetaWorldEnv`].

    Raises:
        ValueError: If an option is unknown or out of range; names it and the remedy.
    """

    task: str = "drawer-open-v3"
    fps: int = 20
    episode_length: int = 500
    cameras: str = "main,wrist"
    image_size: int = 96
    quality: str = "fast"
    depth: bool = False

    def __post_init__(self):
        from datasets_scripts.simulation import metaworld

        metaworld.resolve_tasks(self.task or "")
        metaworld.check_image_size(self.image_size)
        hertz, limit = metaworld.SIMULATION_HZ, metaworld.MAX_STEPS
        if self.fps < 1 or hertz % self.fps:
            rates = ", ".join(str(rate) for rate in range(hertz, 0, -1) if hertz % rate == 0)
            raise ValueError(
                f"env.fps is {self.fps}, which does not divide MetaWorld's {hertz} simulation steps per "
                f"second; choose one of {rates}"
            )
        if not 1 <= self.episode_length <= limit:
            raise ValueError(
                f"env.episode_length is {self.episode_length} simulation steps; it must be 1 to {limit}, "
                "MetaWorld's limit"
            )
        if self.quality not in metaworld.QUALITIES:
            raise ValueError(f"env.quality is {self.quality!r}; choose from {', '.join(metaworld.QUALITIES)}")
        if self.max_parallel_tasks != 1:
            raise ValueError(
                f"env.max_parallel_tasks is {self.max_parallel_tasks}, but parallel tasks would share one "
                "policy and its memory: run episodes side by side with --eval.batch_size instead"
            )
        # The names of a recording of the evaluation (--eval.recording=true).
        shape = (self.image_size, self.image_size, 3)
        self.features = {ACTION: PolicyFeature(FeatureType.ACTION, (metaworld.ACTION_DIM,))}
        for camera in metaworld.check_cameras(split_names(self.cameras), metaworld.CAMERAS):
            self.features[f"{OBS_IMAGES}.{camera}"] = PolicyFeature(FeatureType.VISUAL, shape)
        self.features["agent_pos"] = PolicyFeature(FeatureType.STATE, (metaworld.STATE_DIM,))
        self.features_map = {key: key for key in self.features} | {"agent_pos": OBS_STATE}

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Arguments of [`MetaWorldEnv`] except the task."""
        names = ("fps", "episode_length", "image_size", "quality", "depth")
        return {"cameras": split_names(self.cameras), **{name: getattr(self, name) for name in names}}

    def create_envs(
        self, n_envs: int, use_async_envs: bool = False
    ) -> dict[str, dict[int, gym.vector.VectorEnv]]:
        """Suite -> number of the task -> `n_envs` environments side by side.

        A suite is a task or group of the `task` option. Its name holds the settings, because LeRobot writes
        nothing else about an environment into `eval_info.json`. With `use_async_envs` several environments
        run in separate processes; a single one runs in this process.
        """
        from lerobot.envs.utils import _LazyAsyncVectorEnv, freeze_after_episode_end

        from datasets_scripts.simulation.metaworld import resolve_tasks

        def make_vector_env(task: str) -> gym.vector.VectorEnv:
            factories = [functools.partial(MetaWorldEnv, task, **self.gym_kwargs)] * n_envs
            if use_async_envs and n_envs > 1:
                return _LazyAsyncVectorEnv(factories)
            # Finished episodes wait for the others.
            return gym.vector.SyncVectorEnv([freeze_after_episode_end(make) for make in factories])

        logger.info(
            f"MetaWorld: {self.cameras} at {self.image_size} px, {self.quality} rendering, {self.fps} "
            f"actions a second, {self.episode_length} simulation steps at most"
        )
        settings = f"{self.quality}_{self.image_size}px_{self.fps}fps"
        return {
            f"{group}_{settings}": {i: make_vector_env(task) for i, task in enumerate(resolve_tasks(group))}
            for group in split_names(self.task)
        }


class MetaWorldEnv(gym.Env):
    """One MetaWorld task as a Gymnasium environment.

    An observation has `pixels`: camera -> uint8 RGB `(H, W, 3)`; `agent_pos`: float32 `(4,)`, hand position
    in meters and gripper opening in [0, 1]. With `depth` also `depth.<camera>`: float32 `(1, H, W)` meters
    along the optical axis, above 100 where there is nothing; and `intrinsics.<camera>`: float32 `(3, 3)` in
    pixels, the center of the first one at 0.5. LeRobot renames them to `observation.images.<camera>`,
    `observation.state`, `observation.depth.<camera>` and `observation.intrinsics.<camera>`.

    An action is float32 `(4,)`: displacement of the hand and gripper command, clipped to [-1, 1]. The reward
    is 1 at success, which ends the episode, and 0 before. `info` has `is_success` and `simulation_steps`.

    The arguments are those of [`ForesightMetaWorldConfig`], with one task. The simulator starts at the first
    reset, in the process that uses it; a `RuntimeError` there says what to install.
    """

    def __init__(
        self,
        task: str,
        cameras: list[str],
        image_size: int = 96,
        quality: str = "fast",
        depth: bool = False,
        fps: int = 20,
        episode_length: int = 500,
    ):
        from datasets_scripts.simulation import metaworld

        self.task, self.task_description = task, metaworld.task_descriptions()[task]
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": fps}
        self.render_mode = "rgb_array"
        self._cameras, self._image_size, self._quality, self._depth = cameras, image_size, quality, depth
        self._stride = metaworld.SIMULATION_HZ // fps
        self._max_episode_steps = max(1, episode_length // self._stride)  # LeRobot asks for it
        self._sim = None
        self._seen: dict[str, np.ndarray] = {}
        self._steps = 0

        side, box = image_size, gym.spaces.Box
        parts = {
            "pixels": gym.spaces.Dict({camera: box(0, 255, (side, side, 3), np.uint8) for camera in cameras}),
            "agent_pos": box(-10.0, 10.0, (metaworld.STATE_DIM,), np.float32),
        }
        for camera in cameras if depth else ():
            parts[f"depth.{camera}"] = box(0.0, 1000.0, (1, side, side), np.float32)
            parts[f"intrinsics.{camera}"] = box(0.0, 100.0 * side, (3, 3), np.float32)
        self.observation_space = gym.spaces.Dict(parts)
        self.action_space = box(-1.0, 1.0, (metaworld.ACTION_DIM,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """Starts an episode: the same start for the same seed, a random one without a seed."""
        super().reset(seed=seed)
        if self._sim is None:
            from datasets_scripts.simulation.metaworld import MetaWorldSim

            self._sim = MetaWorldSim(self.task, self._cameras, self._image_size, self._quality)
        self._sim.reset(int(self.np_random.integers(2**31)) if seed is None else seed)
        self._steps = 0
        return self._observe(), self._info(False)

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """Holds an action for the simulation steps of one control step, or until success."""
        if self._sim is None:
            raise gym.error.ResetNeeded("call reset before step")
        success = self._sim.step(action, self._stride, stop_on_success=True)
        self._steps += 1
        truncated = not success and self._steps >= self._max_episode_steps
        return self._observe(), float(success), success, truncated, self._info(success)

    def render(self) -> np.ndarray:
        """The newest pictures of all cameras, side by side: uint8 `(H, cameras * W, 3)`."""
        return np.concatenate(list(self._seen.values()), axis=1)

    def close(self) -> None:
        """Ends the simulator; a reset starts another."""
        if self._sim is not None:
            self._sim.close()
            self._sim = None

    def _observe(self) -> dict:
        seen = self._sim.observe()
        self._seen = seen["images"]
        observation = {"pixels": seen["images"], "agent_pos": seen["state"]}
        for camera in self._cameras if self._depth else ():
            lens = self._sim.intrinsics(camera)
            observation[f"depth.{camera}"] = self._sim.render_depth(camera)[None]
            observation[f"intrinsics.{camera}"] = np.array(
                [[lens["fx"], 0, lens["cx"]], [0, lens["fy"], lens["cy"]], [0, 0, 1]], np.float32
            )
        return observation

    def _info(self, success: bool) -> dict:
        from datasets_scripts.simulation.metaworld import MAX_STEPS

        return {"is_success": success, "simulation_steps": MAX_STEPS - self._sim.steps_left}
