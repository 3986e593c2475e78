"""Arms of robosuite that lift and stack cubes: video of other robots than MetaWorld's, for pretraining.

A task names robot and scene: `panda-lift`, `iiwa-stack`.
Positions are in meters in the world frame. Actions are those of robosuite's controller OSC_POSITION: three
numbers in [-1, 1], 5 cm at full scale, and the gripper, 1 closed, -1 open; 50 of them a second.
"""

import dataclasses
import functools
import logging
import types

import numpy as np

from datasets_scripts.command_line import split_names
from datasets_scripts.extras import install_advice
from datasets_scripts.simulation.rendering import (
    RenderedScene,
    check_image_size,
    choose_renderer,
    rendering_advice,
)

__all__ = ["ARM_CAMERAS", "ARM_HZ", "ARM_MAX_STEPS", "RobosuiteSim", "resolve_arm_tasks"]

choose_renderer()

ARM_HZ = 50  # control steps per second
ARM_MAX_STEPS = 500
ARM_CAMERAS = {"agent": "agentview", "front": "frontview", "side": "sideview"}
# Degrees, narrower than robosuite's: less wall, larger cubes.
FIELDS_OF_VIEW = {"frontview": 24, "sideview": 32}
# The expert fails with UR5e and Kinova3, whose fingers do not hold the cubes.
ROBOTS = {"panda": "Panda", "iiwa": "IIWA"}
FULL_SCALE_M = 0.05  # of OSC_POSITION
ABOVE_M, CLOSE_M = 0.1, 0.012
GRASPING, GRASP_STEPS = 2, 40  # the expert's phase, and control steps that a gripper takes to close
COLLISION_GROUP = 0  # of geoms; robosuite draws those of group 1


@dataclasses.dataclass(frozen=True)
class Scene:
    """A scene of robosuite: its class, its instruction, and the observations of what is moved where."""

    environment: str
    instruction: str
    moved: str
    target: str | None = None


ARM_SCENES = {
    "lift": Scene("Lift", "Lift the red cube", "cube_pos"),
    "stack": Scene("Stack", "Stack the red cube on the green cube", "cubeA_pos", "cubeB_pos"),
}


def resolve_arm_tasks(names: str) -> list[str]:
    """Tasks of one robot, each once, of comma-separated ones.

    Raises:
        ValueError: If one is unknown, or of another robot than the first, whose dataset it would share.
    """
    known = [f"{robot}-{scene}" for robot in ROBOTS for scene in ARM_SCENES]
    tasks = list(dict.fromkeys(split_names(names)))
    if wrong := [task for task in tasks if task not in known] or ([] if tasks else [names]):
        raise ValueError(f"unknown robosuite task '{wrong[0]}'; there are {', '.join(known)}")
    if len({task.partition("-")[0] for task in tasks}) > 1:
        raise ValueError(f"tasks are {', '.join(tasks)}: record each robot as a dataset of its own")
    return tasks


@functools.cache
def _import_robosuite() -> types.SimpleNamespace:
    """Import robosuite; raises a `RuntimeError` that says what to install."""
    logging.disable(logging.WARNING)  # robosuite suggests a private settings file
    try:
        import robosuite
        from robosuite.controllers import load_controller_config
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"robosuite is not installed ({error}); run `{install_advice('libero')}`"
        ) from error
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise RuntimeError(rendering_advice(error)) from error
    finally:
        logging.disable(logging.NOTSET)
    return types.SimpleNamespace(make=robosuite.make, load_controller=load_controller_config)


class RobosuiteSim(RenderedScene):
    """One robot in one scene, with a scripted expert. Close it when done.

    Args:
        task (`str`): Robot and scene, see `resolve_arm_tasks`.
        image_size (`int`): Side of the square images in pixels.

    Raises:
        ValueError: If the size is too small.
        RuntimeError: If robosuite or its rendering library is missing.
    """

    def __init__(self, task: str, image_size: int = 96):
        check_image_size(image_size)
        suite = _import_robosuite()
        self.task = task
        robot, _, scene = task.partition("-")
        self.scene = ARM_SCENES[scene]
        self._env = suite.make(
            self.scene.environment,
            robots=ROBOTS[robot],
            controller_configs=suite.load_controller(default_controller="OSC_POSITION"),
            has_renderer=False,
            has_offscreen_renderer=False,
            use_camera_obs=False,
            control_freq=ARM_HZ,
            ignore_done=True,
            hard_reset=False,  # a new model for every episode takes seconds and changes only sizes of cubes
        )
        # robosuite wraps MuJoCo's structures and has no other way to them.
        model, data = self._env.sim.model._model, self._env.sim.data._data
        for camera, degrees in FIELDS_OF_VIEW.items():
            model.camera(camera).fovy = degrees
        model.light_castshadow[:] = 0
        model.mat_reflectance[:] = 0
        super().__init__(model, data, ARM_CAMERAS, image_size, hidden_groups=(COLLISION_GROUP,))
        self._seen: dict[str, np.ndarray] = {}
        self._phase = self._grasped_for = self.steps_taken = 0

    @property
    def task_description(self) -> str:
        """The instruction."""
        return self.scene.instruction

    @property
    def steps_left(self) -> int:
        """Control steps until the limit."""
        return ARM_MAX_STEPS - self.steps_taken

    def reset(self, seed: int) -> None:
        """Start an episode; the same seed gives the same start."""
        np.random.seed(seed)  # what robosuite draws from
        gripper = self._env.robots[0].gripper
        gripper.current_action = np.zeros(gripper.dof)  # the only thing that a reset keeps
        self._seen = self._env.reset()
        self._phase = self._grasped_for = self.steps_taken = 0

    def state(self) -> np.ndarray:
        """Gripper position (x, y, z) and the first joint of its fingers: `(4,)` float32."""
        fingers = self._seen["robot0_gripper_qpos"]
        return np.append(self._seen["robot0_eef_pos"], fingers[0]).astype(np.float32)

    def step(self, action: np.ndarray, repeat: int = 1) -> bool:
        """Hold an action `(4,)` for `repeat` control steps; returns whether one of them was successful."""
        success = False
        for _ in range(min(repeat, self.steps_left)):
            self._seen, reward, *_ = self._env.step(action)
            self.steps_taken += 1
            self._grasped_for += self._phase == GRASPING
            success = success or reward > 0  # rewards are sparse
        return success

    def expert_action(self) -> np.ndarray:
        """Action of the scripted expert now: `(4,)` float32 in [-1, 1]."""
        hand, up = self._seen["robot0_eef_pos"], np.array([0, 0, ABOVE_M])
        moved = self._seen[self.scene.moved]
        target = moved if self.scene.target is None else self._seen[self.scene.target] + up / 2
        # Where the hand goes, and whether it holds something, phase by phase. The table is 0.8 m high.
        phases = [(moved + up, -1), (moved, -1), (moved, 1), (hand * (1, 1, 0) + (0, 0, 1.1), 1)]
        if self.scene.target is not None:
            phases[3:] = [
                (moved * (1, 1, 0) + (0, 0, 1.0), 1),
                (target + up, 1),
                (target, 1),
                (target + up, -1),
            ]
        goal, gripper = phases[self._phase]
        arrived = np.linalg.norm(goal - hand) < CLOSE_M
        if (arrived and self._phase != GRASPING) or self._grasped_for >= GRASP_STEPS:
            self._phase, self._grasped_for = min(self._phase + 1, len(phases) - 1), 0
        return np.append(np.clip((goal - hand) / FULL_SCALE_M, -1, 1), gripper).astype(np.float32)

    def close(self) -> None:
        """Free the renderer and the simulation."""
        super().close()
        self._env.close()
