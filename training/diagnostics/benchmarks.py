"""The benchmarks in which a policy is diagnosed: their options, and which scenes allow another task."""

# No import of PyTorch at the top: every simulator process imports the command, which imports this file.
import abc
import dataclasses
import functools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import ClassVar

from datasets_scripts.simulation.libero import FORMS
from datasets_scripts.simulation.libero_files import (
    SUITES,
    libero_instruction,
    libero_partners,
    resolve_libero_tasks,
)
from datasets_scripts.simulation.metaworld import scene_partners, task_descriptions
from training.diagnostics.closed_loop import Condition
from training.diagnostics.stream_changes import OtherInstruction
from training.evaluation.simulated.libero_success import Libero, LiberoOptions
from training.evaluation.simulated.metaworld_success import MAX_STEPS, MetaWorld, MetaWorldOptions
from training.evaluation.simulated.options import EvaluationOptions, PolicyOptions, option
from training.evaluation.simulated.success import Benchmark

__all__ = ["DiagnosticOptions", "LiberoDiagnostics", "MetaWorldDiagnostics"]


@dataclasses.dataclass
class DiagnosticOptions(PolicyOptions, abc.ABC):
    """What every benchmark asks; `diagnose.py` has a flag for every field and explains it.

    Raises:
        ValueError: If a value makes no sense; names it.
    """

    evaluation: ClassVar[tuple[type[EvaluationOptions], type[Benchmark]]]

    _: dataclasses.KW_ONLY
    dataset: str | None = option(
        "demonstrations for errors by task, calibration and causality: of data of the training the held-out "
        "episodes count, of other data all",
        None,
    )
    cameras: str = option(
        "cameras of a --dataset with other names, such as main=front,wrist=none (default: by name and order)",
        "",
    )
    episodes: int = option("starts per task (default: %(default)s)", 5)
    only: list[str] | None = option("conditions to try, beside the unchanged policy (default: all)", None)
    output: Path = option(
        "results (default: %(default)s); each condition is kept in the folder of that name without .json",
        Path("diagnostics.json"),
    )

    def __post_init__(self):
        if self.output.suffix != ".json":
            raise ValueError(f"--output is {self.output}; its name must end in .json")
        self.benchmark()  # checks the other values

    def benchmark(self) -> Benchmark:
        """The evaluation that all conditions share."""
        options, benchmark = self.evaluation
        names = {field.name for field in dataclasses.fields(self)} - {"dataset", "cameras", "only", "output"}
        return benchmark(options(**{name: getattr(self, name) for name in names}, output=self.output))

    @abc.abstractmethod
    def other_tasks(self, tasks: Sequence[str]) -> dict[str, str]:
        """Another task whose instruction can be given in the scene of a task, by task."""

    @abc.abstractmethod
    def other_task_conditions(self, partners: dict[str, str]) -> list[Condition]:
        """How [`other_tasks`] are tried."""

    @abc.abstractmethod
    def other_instructions(self, known: Collection[str]) -> dict[str, str]:
        """Another instruction whose task the scene allows, by instruction, of those in `known`."""


@dataclasses.dataclass
class MetaWorldDiagnostics(DiagnosticOptions):
    """Diagnostics in MetaWorld, where the objects of another task often start otherwise.

    With another instruction, success is still that of the task whose start it is.
    """

    evaluation = MetaWorldOptions, MetaWorld

    tasks: str = option("comma-separated MetaWorld tasks, or easy, medium, hard, very_hard, all")
    _: dataclasses.KW_ONLY
    seed: int = option("start of the first episode; the others follow (default: %(default)s)", 10000)
    max_steps: int = option(f"simulation steps until an episode has failed (default: {MAX_STEPS})", MAX_STEPS)

    def other_tasks(self, tasks: Sequence[str]) -> dict[str, str]:
        """Another one of these tasks with the same objects."""
        return scene_partners(tasks)

    def other_task_conditions(self, partners: dict[str, str]) -> list[Condition]:
        """The other instruction."""
        if not partners:
            return []
        texts = task_descriptions()
        replaced = {texts[task]: texts[other] for task, other in partners.items()}
        wrap = functools.partial(OtherInstruction, replaced=replaced)
        return [Condition("other_instruction", tuple(partners), wrap, {"tasks": ",".join(partners)})]

    def other_instructions(self, known: Collection[str]) -> dict[str, str]:
        """That of another task of the demonstrations with the same objects."""
        texts = task_descriptions()
        tasks = [task for task, text in texts.items() if text in known]
        return {texts[task]: texts[other] for task, other in reversed(scene_partners(tasks).items())}


@dataclasses.dataclass
class LiberoDiagnostics(DiagnosticOptions):
    """Diagnostics in LIBERO, where both tasks are judged: that of the scene, and the one that is named."""

    evaluation = LiberoOptions, Libero

    suite: str = option(f"comma-separated suites, of {', '.join(SUITES)}")
    _: dataclasses.KW_ONLY
    tasks: list[int] | None = option("only these tasks of every suite, 0 to 9", None)
    seed: int = option("seed of the first episode; the others follow (default: %(default)s)", 1000)
    max_steps: int | None = option(
        "steps until an episode has failed (default: LeRobot's for the suite)", None
    )
    form: str | None = option(
        "data that a policy without state, with views main and wrist, was trained on",
        None,
        choices=list(FORMS),
    )

    def other_tasks(self, tasks: Sequence[str]) -> dict[str, str]:
        """Another task of the suite that is about things in the scene."""
        return libero_partners(tasks)

    def other_task_conditions(self, partners: dict[str, str]) -> list[Condition]:
        """The other instruction, judged by the scene's goal, then by the goal of the named task."""
        judged = {"other_instruction": "scene", "named_task": "named"} if partners else {}
        return [
            Condition(name, tuple(partners), options={"other_task": goal}) for name, goal in judged.items()
        ]

    def other_instructions(self, known: Collection[str]) -> dict[str, str]:
        """That of another task of the suite."""
        partners = libero_partners(resolve_libero_tasks(self.suite))
        texts = {libero_instruction(task): libero_instruction(other) for task, other in partners.items()}
        return {text: other for text, other in texts.items() if text in known}
