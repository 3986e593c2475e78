# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""MetaWorld for LeRobot's commands, seen as this project's demonstrations see it (`foresight_metaworld`).

lerobot-eval --policy.path=outputs/quickstart/model --env.type=foresight_metaworld --env.task=drawer-open-v3

LeRobot's own `metaworld` has one camera and acts at every simulation step. This one has the tasks, the
instructions, the main camera, the state and the rule of success of that one, and besides a wrist camera, a
rate of control, fast rendering, depth and intrinsics. It is the simulator that `training/evaluate.py` runs:
the same start, shown the same actions, gives the same pictures.
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

# The simulator is imported where it is used: it chooses MuJoCo's renderer, and LeRobot imports this module
# for every command, also for those with another environment.


__all__ = ["ForesightMetaWorldConfig", "MetaWorldEnv"]

logger = logging.getLogger(__name__)


@EnvConfig.register_subclass("foresight_metaworld")
@dataclass
class ForesightMetaWorldConfig(EnvConfig):
    """Options of `--env.type=foresight_metaworld`; the defaults are those of the quickstart's demonstrations.

    Args:
        task (`str`): Comma-separated tasks (`drawer-open-v3`) or groups (`easy`, `medium`, `hard`,
            `very_hard`, `all`).
        fps (`int`): Actions per second, each held for 80 / `fps` simulation steps. Give that of the data the
            policy was trained on.
        episode_length (`int`): Simulation steps (80 a second) after which an episode has failed; MetaWorld's
            limit is 500.
        cameras (`str`): Comma-separated, of `main`, `wrist`, `behind` and `top`.
        image_size (`int`): Side of the square pictures in pixels.
        quality (`str`): `fast` renders without multisampling, shadows and reflections, some ten times faster
            in software; `default` is MuJoCo's and LeRobot's.
        depth (`bool`): Also give depth and intrinsics of every camera, see [`MetaWorldEnv`].

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
        from datasets_scripts.simulation.metaworld import (
            ACTION_DIM,
            MAX_STEPS,
            QUALITIES,
            SIMULATION_HZ,
            STATE_DIM,
            check_cameras,
            check_image_size,
            resolve_tasks,
        )

        resolve_tasks(self.task or "")
        check_image_size(self.image_size)
        if self.fps < 1 or SIMULATION_HZ % self.fps:
            rates = [rate for rate in range(SIMULATION_HZ, 0, -1) if SIMULATION_HZ % rate == 0]
            raise ValueError(
                f"env.fps is {self.fps}, which does not divide MetaWorld's {SIMULATION_HZ} simulation steps "
                f"a second; choose one of {', '.join(map(str, rates))}"
            )
        if not 1 <= self.episode_length <= MAX_STEPS:
            raise ValueError(
                f"env.episode_length is {self.episode_length} simulation steps; it must be 1 to {MAX_STEPS}, "
                "MetaWorld's limit"
            )
        if self.quality not in QUALITIES:
            raise ValueError(f"env.quality is {self.quality!r}; choose from {', '.join(QUALITIES)}")
        if self.max_parallel_tasks != 1:
            raise ValueError(
                f"env.max_parallel_tasks is {self.max_parallel_tasks}, but parallel tasks would share one "
                "policy and mix what it remembers: run episodes side by side with --eval.batch_size instead"
            )
        # Named as a recording of the evaluation shall name them (--eval.recording=true).
        shape = (self.image_size, self.image_size, 3)
        self.features = {ACTION: PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))}
        for camera in check_cameras(self._camera_names):
            self.features[f"{OBS_IMAGES}.{camera}"] = PolicyFeature(FeatureType.VISUAL, shape)
        self.features["agent_pos"] = PolicyFeature(FeatureType.STATE, (STATE_DIM,))
        self.features_map = {key: key for key in self.features} | {"agent_pos": OBS_STATE}

    @property
    def _camera_names(self) -> list[str]:
        return [name.strip() for name in self.cameras.split(",") if name.strip()]

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Arguments of [`MetaWorldEnv`] besides the task."""
        names = ("fps", "episode_length", "image_size", "quality", "depth")
        return {"cameras": self._camera_names, **{name: getattr(self, name) for name in names}}

    def create_envs(
        self, n_envs: int, use_async_envs: bool = False
    ) -> dict[str, dict[int, gym.vector.VectorEnv]]:
        """Environments as LeRobot wants them: suite -> number of the task -> `n_envs` side by side.

        A suite is a task or group of the `task` option. Its name carries the settings, because it is all of
        an environment that LeRobot writes into `eval_info.json`.

        Args:
            n_envs (`int`): Episodes that run side by side.
            use_async_envs (`bool`): Several in processes of their own; else, and for one, in this process.
        """
        from lerobot.envs.utils import _LazyAsyncVectorEnv, freeze_after_episode_end

        from datasets_scripts.simulation.metaworld import resolve_tasks

        def side_by_side(task: str) -> gym.vector.VectorEnv:
            factories = [functools.partial(MetaWorldEnv, task, **self.gym_kwargs)] * n_envs
            if use_async_envs and n_envs > 1:
                return _LazyAsyncVectorEnv(factories)
            # Episodes that are over wait for the others.
            return gym.vector.SyncVectorEnv([freeze_after_episode_end(make) for make in factories])

        logger.info(
            f"MetaWorld: {self.cameras} at {self.image_size} px, {self.quality} rendering, {self.fps} "
            f"actions a second, {self.episode_length} simulation steps at most"
        )
        settings = f"{self.quality}_{self.image_size}px_{self.fps}fps"
        groups = [name.strip() for name in self.task.split(",") if name.strip()]
        return {
            f"{group}_{settings}": {i: side_by_side(task) for i, task in enumerate(resolve_tasks(group))}
            for group in groups
        }


class MetaWorldEnv(gym.Env):
    """One MetaWorld task as a Gymnasium environment.

    An observation has `pixels`: camera -> uint8 RGB `(H, W, 3)`; `agent_pos`: float32 `(4,)`, hand position
    in metres and gripper opening in [0, 1]. With `depth` also `depth.<camera>`: float32 `(1, H, W)` metres
    along the optical axis, beyond 100 where there is nothing; and `intrinsics.<camera>`: float32 `(3, 3)` in
    pixels, the centre of the first one at 0.5. LeRobot makes `observation.images.<camera>`,
    `observation.state`, `observation.depth.<camera>` and `observation.intrinsics.<camera>` of them.

    An action is float32 `(4,)`: displacement of the hand and gripper command, clipped to [-1, 1]. The reward
    is 1 at success, which ends the episode, and 0 before. `info` has `is_success` and `simulation_steps`.

    The simulator starts at the first reset, so that it does in the process that uses it.

    Args:
        task (`str`): Task name.
        cameras (`list[str]`), image_size (`int`), quality (`str`), depth (`bool`), fps (`int`),
            episode_length (`int`): See [`ForesightMetaWorldConfig`].

    Raises:
        RuntimeError: At the first reset, if the simulator is missing or cannot render; says what to install.
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
        from datasets_scripts.simulation.metaworld import (
            ACTION_DIM,
            SIMULATION_HZ,
            STATE_DIM,
            task_descriptions,
        )

        self.task, self.task_description = task, task_descriptions()[task]
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": fps}
        self.render_mode = "rgb_array"
        self._cameras, self._image_size, self._quality, self._depth = cameras, image_size, quality, depth
        self._stride = SIMULATION_HZ // fps
        self._max_episode_steps = max(1, episode_length // self._stride)  # LeRobot asks for it
        self._sim = None
        self._seen: dict[str, np.ndarray] = {}
        self._steps = 0

        side, box = image_size, gym.spaces.Box
        parts = {
            "pixels": gym.spaces.Dict({camera: box(0, 255, (side, side, 3), np.uint8) for camera in cameras}),
            "agent_pos": box(-10.0, 10.0, (STATE_DIM,), np.float32),
        }
        if depth:
            for camera in cameras:
                parts[f"depth.{camera}"] = box(0.0, 1000.0, (1, side, side), np.float32)
                parts[f"intrinsics.{camera}"] = box(0.0, 100.0 * side, (3, 3), np.float32)
        self.observation_space = gym.spaces.Dict(parts)
        self.action_space = box(-1.0, 1.0, (ACTION_DIM,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """Starts an episode; the same seed gives the same start, and without one it is random."""
        super().reset(seed=seed)
        if self._sim is None:
            from datasets_scripts.simulation.metaworld import MetaWorldSim

            self._sim = MetaWorldSim(self.task, self._cameras, self._image_size, self._quality)
        self._sim.reset(int(self.np_random.integers(2**31)) if seed is None else seed)
        self._steps = 0
        return self._observe(), self._info(False)

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """Holds an action for the simulation steps of one control step, or until success.

        Raises:
            ValueError: If the action has another shape or is not finite.
        """
        if self._sim is None:
            raise gym.error.ResetNeeded("call reset before step")
        success = self._sim.step(action, self._stride, stop_on_success=True)
        self._steps += 1
        truncated = not success and self._steps >= self._max_episode_steps
        return self._observe(), float(success), success, truncated, self._info(success)

    def render(self) -> np.ndarray:
        """The newest pictures of all cameras side by side: `(H, cameras * W, 3)` uint8."""
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
        if self._depth:
            for camera in self._cameras:
                lens = self._sim.intrinsics(camera)
                observation[f"depth.{camera}"] = self._sim.render_depth(camera)[None]
                observation[f"intrinsics.{camera}"] = np.array(
                    [[lens["fx"], 0, lens["cx"]], [0, lens["fy"], lens["cy"]], [0, 0, 1]], np.float32
                )
        return observation

    def _info(self, success: bool) -> dict:
        from datasets_scripts.simulation.metaworld import MAX_STEPS

        return {"is_success": success, "simulation_steps": MAX_STEPS - self._sim.steps_left}
