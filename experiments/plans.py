"""A plan: which policies are trained on what and tried how; its cells, one training and evaluation each."""

import dataclasses
import itertools
from pathlib import Path

import draccus
import yaml
from draccus.utils import ParsingError

from datasets_scripts.simulation.recording import Recording
from datasets_scripts.simulation.simulators import SIMULATORS
from training.config_reading import check_fields

__all__ = ["Cell", "Plan", "load_plan"]

STEPS, TIME = "steps", "time"  # budgets
TRIED_IN = ("metaworld", "libero")  # simulators that policies are tried in; others only record


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training with its evaluation.

    Attributes:
        variant (`str`): Name in `Plan.variants`.
        budget (`str`): `steps`, or `time` for as many steps as the reference's processor time allows.
        demonstrations (`int`): Per task.
        seed (`int`): Of the training.
        tasks (`tuple[str, ...]`): What the policy is trained on and tried at.
    """

    variant: str
    budget: str
    demonstrations: int
    seed: int
    tasks: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of its folder and of its row."""
        task = f"-{self.tasks[0].replace('/', '-')}" if len(self.tasks) == 1 else ""
        return f"{self.variant}-{self.budget}-{self.demonstrations}demos-seed{self.seed}{task}"


@dataclasses.dataclass
class Plan:
    """What is measured, and with what.

    `variants`, `seeds`, `demonstrations`, `budgets` and `losses` may grow later: they only say which cells
    and tables there are. Everything else decides what is in a cell.

    Args:
        tasks (`list[str]`): Tasks of the simulator, or groups of them (`easy`, `all`, `libero_object`).
        variants (`dict`): Name -> fields of `ForesightConfig` that differ from `config`. The name of a
            preset, or `action_only`, brings its objectives and forms of depth and flow; further fields
            override them.
        simulator (`str`): `metaworld` or `libero`.
        config (`str`): Training config of all cells.
        overrides (`dict`): Settings of `config` that differ, by dotted name, as on the command line.
        steps (`int`): Training steps.
        demonstrations (`list[int]`): Per task; each number is a column of the tables.
        seeds (`list[int]`): Of training; demonstrations are the same for all of them.
        policies (`str`): `joint`, one policy that reads which task to do, or `per_task`.
        budgets (`list[str]`): `steps`: every variant takes `steps`. `time`: every variant takes as much
            processor time as `reference` needs for `steps`.
        pretraining (`str`, *optional*): Training config of what the variants in `pretrained` start from: one
            model for each training seed, trained with that seed.
        pretrained (`list[str]`): Variants that start from it; their architecture is that of `config`.
        pretraining_overrides (`dict`): Settings of `pretraining` that differ, by dotted name.
        reference (`str`): The variant whose time counts, and that the tables compare with the others.
        clock_steps (`int`): Steps of each of the short trainings that measure the time of a step.
        recording (`dict`): Fields of the simulator's `Recording` that differ from its defaults.
        episodes (`int`): Per task and cell.
        max_steps (`int`): Simulation steps after which an episode has failed; by default LeRobot's limit.
        first_start (`int`): Seed of the first start; the others follow. All cells have the same starts. In
            LIBERO the first one is the suite's first initial state.
        losses (`list[str]`): Objectives whose validation losses are compared.
    """

    tasks: list[str]
    variants: dict[str, dict]
    simulator: str = "metaworld"
    config: str = "training/configs/quickstart.yaml"
    overrides: dict = dataclasses.field(default_factory=dict)
    steps: int = 1500
    demonstrations: list[int] = dataclasses.field(default_factory=lambda: [25])
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0])
    policies: str = "joint"
    budgets: list[str] = dataclasses.field(default_factory=lambda: [STEPS])
    pretraining: str | None = None
    pretrained: list[str] = dataclasses.field(default_factory=list)
    pretraining_overrides: dict = dataclasses.field(default_factory=dict)
    reference: str = "foresight_3d"
    clock_steps: int = 30
    recording: dict = dataclasses.field(default_factory=dict)
    episodes: int = 10
    max_steps: int | None = None
    first_start: int = 10000
    losses: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        if self.simulator not in TRIED_IN:
            raise ValueError(f"simulator is {self.simulator!r}; use {' or '.join(TRIED_IN)}")
        kind = SIMULATORS[self.simulator]
        self.tasks = kind.resolve_tasks(",".join(self.tasks))
        self.max_steps = self.max_steps or kind.step_limit
        for name in ("variants", "demonstrations", "seeds", "budgets"):
            values = list(getattr(self, name))
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} is {values}; name at least one, each of them once")
        for name in ("steps", "episodes", "clock_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if min(self.demonstrations) < 2:
            raise ValueError(f"demonstrations is {self.demonstrations}; one more is held out: at least 2")
        if min(*self.seeds, self.first_start, 0) < 0:
            raise ValueError(f"seeds {self.seeds} and first_start {self.first_start} cannot be negative")
        if self.policies not in ("joint", "per_task"):
            raise ValueError(f"policies is {self.policies!r}; use joint or per_task")
        if unknown := set(self.budgets) - {STEPS, TIME}:
            raise ValueError(f"budgets has {sorted(unknown)}; use {STEPS} and {TIME}")
        if self.reference not in self.variants:
            raise ValueError(f"reference is {self.reference!r}, which is not among the variants")
        if bool(self.pretraining) != bool(self.pretrained) or set(self.pretrained) - self.variants.keys():
            raise ValueError(
                f"pretraining is {self.pretraining} and pretrained is {self.pretrained}; give the config of "
                "a training and the variants that start from it, or neither"
            )
        known = {field.name for field in dataclasses.fields(kind)} - {"tasks", "episodes"}
        if unknown := self.recording.keys() - known:
            raise ValueError(f"recording.{min(unknown)} is unknown; known are {', '.join(sorted(known))}")
        self.recordings()

    def recordings(self) -> dict[int, Recording]:
        """What is simulated, for each number of demonstrations."""
        fields = self.recording | {"cameras": tuple(self.recording.get("cameras", ("main", "wrist")))}
        kind, tasks = SIMULATORS[self.simulator], tuple(self.tasks)
        return {n: kind(tasks=tasks, episodes=n, **fields) for n in self.demonstrations}

    def tried(self) -> Recording:
        """How policies are tried, for the experts beside them: the recording with the plan's step limit."""
        return dataclasses.replace(self.recordings()[max(self.demonstrations)], max_steps=self.max_steps)

    def task_groups(self) -> list[tuple[str, ...]]:
        """The tasks of each policy."""
        return [tuple(self.tasks)] if self.policies == "joint" else [(task,) for task in self.tasks]

    def cell(self, variant: str, budget: str, demonstrations: int, seed: int, tasks: tuple[str, ...]) -> Cell:
        """One of the cells; the reference takes as many steps under both budgets, so it is trained once."""
        return Cell(variant, STEPS if variant == self.reference else budget, demonstrations, seed, tasks)

    def cells(self) -> list[Cell]:
        """All cells, each once; seed by seed, so that an unfinished plan compares all variants."""
        order = itertools.product(
            self.seeds, self.budgets, self.demonstrations, self.task_groups(), self.variants
        )
        cells = (self.cell(variant, budget, n, seed, tasks) for seed, budget, n, tasks, variant in order)
        return list(dict.fromkeys(cells))


def load_plan(path: Path) -> Plan:
    """Reads a plan from YAML.

    Raises:
        ValueError: If it cannot be read or a setting makes no sense; names the file and the field.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it holds no settings by name")
        if isinstance(values.get("variants"), dict):  # `foresight_3d:` alone is a variant without changes
            values["variants"] = {str(name): fields or {} for name, fields in values["variants"].items()}
        check_fields(Plan, values, "plan.")
        return draccus.decode(Plan, values)
    except FileNotFoundError:
        known = ", ".join(sorted(file.name for file in (Path(__file__).parent / "plans").glob("*.yaml")))
        raise ValueError(f"plan {path} does not exist; experiments/plans has {known}") from None
    except ParsingError as error:
        raise ValueError(f"plan {path}: {' '.join(str(error.__cause__ or error).split())}") from None
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"plan {path}: {' '.join(str(error).split())}") from None
