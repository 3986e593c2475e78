"""MetaWorld with a fast renderer, exact geometry, and LeRobot's tasks.

Demonstrations and evaluations both use it, so that a policy sees the images it was trained on. Instructions,
the main camera and the state are those of LeRobot's MetaWorld environment (`lerobot/envs/metaworld.py`); the
wrist camera, depth, segmentation and camera poses are added here.
"""

import difflib
import functools
import importlib.resources
import json
import types
import warnings
from collections.abc import Sequence

import numpy as np

from datasets_scripts.command_line import split_names
from datasets_scripts.extras import install_advice
from datasets_scripts.simulation.perturbation import Perturbation, displaced_starts
from datasets_scripts.simulation.rendering import (
    RenderedScene,
    check_cameras,
    check_image_size,
    choose_renderer,
    rendering_advice,
)

choose_renderer()

SIMULATION_HZ = 80  # MetaWorld's control rate
MAX_STEPS = 500  # MetaWorld's limit
ACTION_DIM = 4
STATE_DIM = 4

# Our camera names -> cameras of the MuJoCo model.
CAMERAS = {"main": "corner2", "wrist": "gripperPOV", "behind": "behindGripper", "top": "topview"}
# LeRobot moves MetaWorld's corner camera closer and turns its upside-down image by 180 degrees.
MAIN_CAMERA_POSITION = (0.75, 0.075, 0.7)
UPSIDE_DOWN = ("main",)

# Their random vector moves the goal only.
FIXED_OBJECTS = ("plate-slide-v3", "plate-slide-side-v3", "plate-slide-back-v3", "plate-slide-back-side-v3")

# Tasks with the same objects: those of one line share a model of MuJoCo's; reach, push and pick-place only
# look alike. Their objects may start otherwise: a drawer that is to be opened is closed.
SHARED_SCENES = (
    ("assembly-v3", "disassemble-v3"),
    ("coffee-button-v3", "coffee-pull-v3", "coffee-push-v3"),
    ("door-open-v3", "door-close-v3"),
    ("door-lock-v3", "door-unlock-v3"),
    ("drawer-open-v3", "drawer-close-v3"),
    ("faucet-open-v3", "faucet-close-v3"),
    ("hand-insert-v3", "sweep-into-v3"),
    ("handle-press-v3", "handle-pull-v3"),
    ("handle-press-side-v3", "handle-pull-side-v3"),
    ("plate-slide-v3", "plate-slide-back-v3"),
    ("plate-slide-side-v3", "plate-slide-back-side-v3"),
    ("reach-v3", "push-v3", "pick-place-v3"),
    ("stick-push-v3", "stick-pull-v3"),
    ("window-open-v3", "window-close-v3"),
)

QUALITIES = ("fast", "default")


def task_descriptions() -> dict[str, str]:
    """Instruction of each MetaWorld task in LeRobot's wording, for example `Open a drawer`."""
    return _load_tasks()["TASK_DESCRIPTIONS"]


def resolve_tasks(names: str) -> list[str]:
    """Tasks, each once, of comma-separated tasks (`drawer-open-v3`) and groups (`easy`, `very_hard`, `all`).

    Raises:
        ValueError: If a name is unknown (with the closest known names) or none is given.
    """
    groups = {**_load_tasks()["DIFFICULTY_TO_TASKS"], "all": sorted(task_descriptions())}
    tasks: list[str] = []
    for name in split_names(names):
        if name in groups:
            tasks += groups[name]
        elif name in task_descriptions():
            tasks.append(name)
        else:
            close = difflib.get_close_matches(name, [*task_descriptions(), *groups], n=3, cutoff=0.4)
            hint = f"did you mean {', '.join(close)}?" if close else "tasks look like drawer-open-v3"
            raise ValueError(f"unknown MetaWorld task '{name}'; {hint} (groups: {', '.join(groups)})")
    if not tasks:
        raise ValueError("no task given; name one, drawer-open-v3 for example, or a group such as easy")
    return list(dict.fromkeys(tasks))


def scene_partners(tasks: Sequence[str]) -> dict[str, str]:
    """Another of these tasks with the same objects, the next one of its line in `SHARED_SCENES`, by task.

    Tasks that have none are left out.
    """
    partners = {}
    for scene in SHARED_SCENES:
        known = [task for task in scene if task in tasks]
        if len(known) > 1:
            partners |= dict(zip(known, known[1:] + known[:1], strict=True))
    return {task: partners[task] for task in tasks if task in partners}


@functools.cache
def _load_tasks() -> dict:
    """LeRobot's task table, read as a file because importing its environment takes seconds."""
    return json.loads((importlib.resources.files("lerobot") / "envs/metaworld_config.json").read_text())


@functools.cache
def _import_simulator() -> types.SimpleNamespace:
    """Import MuJoCo and MetaWorld.

    Raises:
        RuntimeError: If a package or the rendering library is missing; says what to install.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import mujoco
            from metaworld.env_dict import ALL_V3_ENVIRONMENTS
            from metaworld.policies import ENV_POLICY_MAP

            mujoco.Renderer  # noqa: B018 - the rendering library is loaded with it
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        missing = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
        if missing.split(".")[0] in ("mujoco", "metaworld", "gymnasium"):
            raise RuntimeError(
                f"the simulator is not installed ({error}); run `{install_advice('sim')}`"
            ) from error
        raise RuntimeError(rendering_advice(error)) from error
    return types.SimpleNamespace(mujoco=mujoco, environments=ALL_V3_ENVIRONMENTS, policies=ENV_POLICY_MAP)


class MetaWorldSim(RenderedScene):
    """One MetaWorld task with rendered cameras, exact geometry and a scripted expert.

    Several may live in one process if they are used from one thread; close them when done.

    Args:
        task (`str`): Task name, for example `drawer-open-v3`.
        cameras (`Sequence[str]`): Cameras that `observe` renders, names of `CAMERAS`.
        image_size (`int`): Side of the square images in pixels.
        quality (`str`): `fast` renders without shadows, reflections and multisampling, some ten times faster
            in software; `default` is MuJoCo's and LeRobot's.
        perturbation (`Perturbation`): How the scenes differ from MetaWorld's; by default they do not.

    Raises:
        ValueError: If task, camera, size or quality is unknown, or the task's object cannot be displaced.
        RuntimeError: If the simulator or its rendering library is missing.
    """

    def __init__(
        self,
        task: str,
        cameras: Sequence[str] = ("main", "wrist"),
        image_size: int = 96,
        quality: str = "fast",
        perturbation: Perturbation = Perturbation(),  # noqa: B008 - frozen
    ):
        (self.task,) = resolve_tasks(task)
        self.cameras = check_cameras(cameras, CAMERAS)
        if quality not in QUALITIES:
            raise ValueError(f"unknown quality '{quality}'; choose from {', '.join(QUALITIES)}")
        check_image_size(image_size)
        simulator = _import_simulator()
        self.perturbation = perturbation
        environment = simulator.environments[self.task]
        if perturbation.object_shift_m:
            if self.task in FIXED_OBJECTS:
                raise ValueError(
                    f"the plate of {self.task} always starts at one place and cannot be displaced: leave out "
                    f"{', '.join(FIXED_OBJECTS)}"
                )
            environment = displaced_starts(environment)
        self._env = environment()
        # As set_task in MetaWorld's multi-task benchmark: the expert reads goals from the observation.
        self._env._partially_observable = False
        self._env.__dict__.pop("sawyer_observation_space", None)  # cached with hidden goals
        self._env._set_task_called = True
        # Without these two, every reset repeats one start, whatever the seed.
        self._env._freeze_rand_vec = False
        self._env.seeded_rand_vec = True
        self._make_expert = simulator.policies[self.task]
        self._expert = self._make_expert()
        self._observation = np.zeros(39)
        self.steps_taken = 0
        model = self._env.model
        if perturbation.table_color is not None:
            table = model.geom_bodyid == model.body("tablelink").id
            model.geom_rgba[table] = (*perturbation.table_color, 1.0)
        if quality == "fast":
            model.vis.quality.offsamples = 0
            model.vis.quality.shadowsize = 0
            model.light_castshadow[:] = 0
            model.mat_reflectance[:] = 0
        super().__init__(model, self._env.data, CAMERAS, image_size, upside_down=UPSIDE_DOWN)
        self._main_axes = model.camera(CAMERAS["main"]).mat0.reshape(3, 3) @ self._image_axes("main")
        self._env.displacement = perturbation.object_displacement(self._main_axes)

    @property
    def task_description(self) -> str:
        """Instruction in LeRobot's wording."""
        return task_descriptions()[self.task]

    @property
    def steps_left(self) -> int:
        """Simulation steps until MetaWorld's own limit of 500."""
        return MAX_STEPS - self.steps_taken

    def reset(self, seed: int) -> None:
        """Start an episode; the same non-negative seed gives the same start, whatever happened before."""
        shift = self.perturbation.camera_shift(seed, self._main_axes)
        self._env.model.camera(CAMERAS["main"]).pos = MAIN_CAMERA_POSITION + shift
        self._env.seed(int(seed))  # the seed argument of MetaWorld's reset is ignored
        self._observation, _ = self._env.reset()
        # Reset draws twice and leaves the goal marker at the first draw.
        self._mujoco.mj_kinematics(self._env.model, self._env.data)
        self._mujoco.mj_camlight(self._env.model, self._env.data)
        self._expert = self._make_expert()
        self.steps_taken = 0

    def observe(self) -> dict:
        """What a policy sees now: `images`, `(H, W, 3)` uint8 RGB by camera, and `state`."""
        images = {camera: self.render_rgb(camera) for camera in self.cameras}
        return {"images": images, "state": self.state()}

    def state(self) -> np.ndarray:
        """Hand position (x, y, z in meters) and gripper opening in [0, 1]: `(4,)` float32 (`agent_pos`)."""
        return self._observation[:STATE_DIM].astype(np.float32)

    def step(self, action: np.ndarray, repeat: int = 1, stop_on_success: bool = False) -> bool:
        """Hold an action `(4,)`, clipped to [-1, 1], for `repeat` simulation steps or those left.

        Args:
            action (`np.ndarray`): Hand displacement and gripper command; another shape or values that are not
                finite raise a `ValueError`.
            repeat (`int`): Simulation steps, 80 per second.
            stop_on_success (`bool`): Return at the first successful step.

        Returns:
            `bool`: Whether any of the steps was successful.
        """
        action = np.asarray(action, np.float64)
        if action.shape != (ACTION_DIM,) or not np.isfinite(action).all():
            raise ValueError(f"action must be {ACTION_DIM} finite numbers; got {action}")
        action = np.clip(action, -1.0, 1.0)
        success = False
        for _ in range(min(repeat, self.steps_left)):
            self._observation, _, _, _, info = self._env.step(action)
            self.steps_taken += 1
            success = success or bool(info["success"])
            if success and stop_on_success:
                break
        return success

    def expert_action(self) -> np.ndarray:
        """Action of MetaWorld's scripted expert now: `(4,)` float32 in [-1, 1]."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experts exceed 1 and rely on clipping
            action = self._expert.get_action(self._observation)
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    def close(self) -> None:
        """Free the renderer and the simulation."""
        super().close()
        self._env.close()
