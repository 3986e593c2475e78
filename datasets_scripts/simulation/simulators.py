"""What demonstrations are recorded in: MetaWorld, LIBERO, and scenes of robosuite."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from datasets_scripts.simulation.libero import CONVERTED_ACTION, CONVERTED_STATE, LIBERO_HZ, LiberoSim
from datasets_scripts.simulation.libero_files import SUITES, resolve_libero_names
from datasets_scripts.simulation.metaworld import (
    CAMERAS,
    MAX_STEPS,
    SIMULATION_HZ,
    MetaWorldSim,
    resolve_tasks,
)
from datasets_scripts.simulation.recording import Recording
from datasets_scripts.simulation.robosuite_arms import (
    ARM_CAMERAS,
    ARM_HZ,
    ARM_MAX_STEPS,
    RobosuiteSim,
    resolve_arm_tasks,
)

__all__ = ["SIMULATORS", "LiberoRecording", "MetaWorldRecording", "RobosuiteRecording"]

EXPERT_SUITES = ("libero_object", "libero_spatial")  # whose tasks are to put one object in or on another


@dataclass(frozen=True)
class MetaWorldRecording(Recording):
    """Demonstrations of MetaWorld's own experts, see `Recording`.

    Attributes:
        quality (`str`): Rendering quality, `fast` or `default`.
    """

    quality: str = "fast"

    views: ClassVar[Collection[str]] = CAMERAS
    hz: ClassVar[int] = SIMULATION_HZ
    step_limit: ClassVar[int] = MAX_STEPS
    robot_type: ClassVar[str] = "sawyer"
    state_names: ClassVar[Sequence[str]] = ("hand_x", "hand_y", "hand_z", "gripper_opening")
    action_names: ClassVar[Sequence[str]] = ("delta_x", "delta_y", "delta_z", "gripper_effort")
    packages: ClassVar[Sequence[str]] = ("metaworld", "mujoco", "lerobot")

    @staticmethod
    def resolve_tasks(names: str) -> list[str]:
        """Tasks of comma-separated tasks and groups."""
        return resolve_tasks(names)

    def open_simulator(self, task: str) -> MetaWorldSim:
        """The simulator of a task."""
        return MetaWorldSim(task, self.cameras, self.image_size, self.quality)


@dataclass(frozen=True)
class LiberoRecording(Recording):
    """Demonstrations of our experts in LIBERO, in the form `converted`, see `Recording`.

    They start from other places than the suites' initial states, from which policies are evaluated.
    """

    image_size: int = 128
    stride: int = 1
    max_steps: int = 280

    views: ClassVar[Collection[str]] = ("main", "wrist")
    hz: ClassVar[int] = LIBERO_HZ
    step_limit: ClassVar[int] = max(SUITES[suite].max_steps for suite in EXPERT_SUITES)
    robot_type: ClassVar[str] = "panda"
    state_names: ClassVar[Sequence[str]] = CONVERTED_STATE
    action_names: ClassVar[Sequence[str]] = CONVERTED_ACTION
    packages: ClassVar[Sequence[str]] = ("hf-libero", "robosuite", "mujoco", "lerobot")

    @staticmethod
    def resolve_tasks(names: str) -> list[str]:
        """Tasks of comma-separated suites (`libero_object`) and tasks (`libero_object/3`)."""
        tasks = resolve_libero_names(names)
        for task in tasks:
            if (suite := task.partition("/")[0]) not in EXPERT_SUITES:
                raise ValueError(
                    f"{suite} has no scripted expert; there is one for {' and '.join(EXPERT_SUITES)}"
                )
        return tasks

    def open_simulator(self, task: str) -> LiberoSim:
        """The simulator of a task."""
        return LiberoSim(task, self.cameras, self.image_size, first_seed=None)


@dataclass(frozen=True)
class RobosuiteRecording(Recording):
    """Demonstrations of our expert with an arm of robosuite, as video to pretrain on, see `Recording`."""

    stride: int = 5
    cameras: tuple[str, ...] = ("agent",)

    views: ClassVar[Collection[str]] = ARM_CAMERAS
    hz: ClassVar[int] = ARM_HZ
    step_limit: ClassVar[int] = ARM_MAX_STEPS
    state_names: ClassVar[Sequence[str]] = ("hand_x", "hand_y", "hand_z", "finger_joint")
    action_names: ClassVar[Sequence[str]] = ("delta_x", "delta_y", "delta_z", "gripper_closes")
    packages: ClassVar[Sequence[str]] = ("robosuite", "mujoco", "lerobot")

    @property
    def robot_type(self) -> str:
        """The robot that all tasks have."""
        return self.tasks[0].partition("-")[0]

    @staticmethod
    def resolve_tasks(names: str) -> list[str]:
        """Tasks of comma-separated names, all of one robot."""
        return resolve_arm_tasks(names)

    def open_simulator(self, task: str) -> RobosuiteSim:
        """The simulator of a task."""
        return RobosuiteSim(task, self.image_size)


SIMULATORS: dict[str, type[Recording]] = {
    "metaworld": MetaWorldRecording,
    "libero": LiberoRecording,
    "robosuite": RobosuiteRecording,
}
