"""CALVIN's simulator and task oracle as a process that answers requests.

    python datasets_scripts/simulation/calvin.py task_D_D FILE_DESCRIPTOR

It runs in the Python that CALVIN is installed in, which may be as old as 3.8 and have another numpy: this
file imports nothing of the project, and requests and answers hold plain values and bytes.

| request | answer |
| --- | --- |
| none, at the start | versions |
| `("chains", n)` | the protocol's n chains: state of the scene, five tasks |
| `("reset", state, task)` | an observation of the neutral robot in a scene of this state |
| `("follow", task)` | an observation: the task is the next one, and the scene stays |
| `("step", action)` | an observation after one relative action, 1/30 s |

An error is an answer too. As in `calvin_agent/evaluation/evaluate_policy.py`, a task is solved once the
oracle finds its change between the scene when the task began and the scene after any step.
"""

from __future__ import annotations  # Python 3.8 does not know list[float]

import contextlib
import platform
import signal
import sys
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

SHOWN_CAMERAS = ("static", "gripper")
INSTALL = (
    "install CALVIN (git clone --recurse-submodules https://github.com/mees/calvin; cd calvin; "
    "sh install.sh), and name its Python with --calvin_python"
)


class CalvinSimulator:
    """One environment of CALVIN, and the task that it is at.

    Args:
        folder (`str`): Unpacked archive; its validation split describes the environment.

    Raises:
        RuntimeError: If a package is missing, the renderer does not start, or the wording has another form.
    """

    def __init__(self, folder: str):
        try:
            import calvin_agent
            from calvin_agent.evaluation.multistep_sequences import get_sequences
            from calvin_agent.evaluation.utils import get_env_state_for_initial_condition
            from calvin_env.envs.play_table_env import get_env
            from hydra.utils import instantiate
            from omegaconf import OmegaConf
        except ImportError as error:
            raise RuntimeError(f"{sys.executable} cannot import CALVIN ({error}): {INSTALL}") from error
        self._get_sequences, self._get_state = get_sequences, get_env_state_for_initial_condition
        settings = Path(calvin_agent.__file__).parents[1] / "conf"
        tasks = settings / "callbacks" / "rollout" / "tasks" / "new_playtable_tasks.yaml"
        self._oracle = instantiate(OmegaConf.load(tasks))
        wording = settings / "annotations" / "new_playtable_validation.yaml"
        self._wording = OmegaConf.to_container(OmegaConf.load(wording))
        for task, texts in self._wording.items():
            if not (isinstance(texts, list) and texts and isinstance(texts[0], str)):
                raise RuntimeError(f"{wording} words {task} as {texts!r}; expected a list of instructions")
        # Without the tactile camera of the archives, which no policy of ours sees.
        seen = {"rgb_obs": [f"rgb_{camera}" for camera in SHOWN_CAMERAS], "depth_obs": []}
        try:
            self._env = get_env(Path(folder) / "validation", obs_space=seen, show_gui=False)
        except SystemExit:  # calvin_env's, where PyBullet finds no EGL
            raise RuntimeError(
                "PyBullet's EGL renderer does not start; set use_egl: false in "
                f"{folder}/validation/.hydra/merged_config.yaml to render on the CPU"
            ) from None

    def answer(self, request: tuple):
        """The answer to one request."""
        kind, *details = request
        if kind == "chains":
            return [(state, list(tasks)) for state, tasks in self._get_sequences(*details)]
        if kind == "step":
            return self._step(*details)
        if kind == "reset":
            state, task = details
            robot_obs, scene_obs = self._get_state(state)
            # Robot.reset keeps the last command of the chain before, which is part of the observation.
            self._env.robot.gripper_action = int(robot_obs[14])
            self._env.reset(robot_obs=robot_obs, scene_obs=scene_obs)
            self._steps = 0
        else:
            (task,) = details
        self._task = task
        self._start = self._env.get_info()
        return self._observe(self._env.get_obs(), success=False)

    def _step(self, action: list[float]) -> dict:
        """Acts with six relative numbers, 1 for 2 cm or 0.05 rad, and a gripper that is open above 0."""
        observation, _, _, info = self._env.step(
            np.array([*action[:6], 1 if action[6] > 0 else -1], dtype=float)
        )
        self._steps += 1
        solved = self._oracle.get_task_info_for_set(self._start, info, {self._task})
        return self._observe(observation, success=len(solved) > 0)

    def _observe(self, observation: dict, success: bool) -> dict:
        """What CALVIN shows, in its own shapes and types; `CalvinPool.receive` checks them."""
        images = {}
        for camera in SHOWN_CAMERAS:
            pixels = np.asarray(observation["rgb_obs"][f"rgb_{camera}"])
            images[camera] = (pixels.tobytes(), pixels.shape, str(pixels.dtype))
        return {
            "images": images,
            "robot_obs": np.asarray(observation["robot_obs"], dtype=float).tolist(),
            "success": success,
            "instruction": self._wording[self._task][0],
            "simulation_steps": self._steps,
        }


def describe_versions() -> dict[str, str]:
    """Versions of this Python and of PyBullet."""
    found = {"calvin_python": platform.python_version()}
    with contextlib.suppress(PackageNotFoundError):
        found["pybullet"] = version("pybullet")
    return found


def answer_request(simulator: CalvinSimulator, request: tuple):
    """The answer to one request, which is an error if the simulator fails."""
    try:
        return simulator.answer(request)
    except Exception as error:  # of PyBullet, hydra, calvin_env: types that the other Python may lack
        return RuntimeError(f"CALVIN's simulator failed at {request[0]}: {error!r}")


def serve_requests(connection: Connection, folder: str) -> None:
    """Answers requests until the other end closes the connection, or the simulator does not start."""
    try:
        simulator = CalvinSimulator(folder)
        connection.send(describe_versions())
    except Exception as error:
        connection.send(RuntimeError(str(error) or repr(error)))
        return
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            connection.send(answer_request(simulator, connection.recv()))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    serve_requests(Connection(int(sys.argv[2])), sys.argv[1])
