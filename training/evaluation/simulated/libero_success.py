"""Success of a checkpoint in LIBERO's own simulator, by suite, as Table II of the paper."""

# No import of PyTorch at the top: every simulator process imports the command, which imports this file.
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from datasets_scripts.simulation.libero import (
    FORMS,
    LIBERO_ACTION_DIM,
    LIBERO_HZ,
    SETTLING_STEPS,
    LiberoSim,
    choose_form,
)
from datasets_scripts.simulation.libero_files import SUITES, libero_partners, resolve_libero_tasks
from datasets_scripts.storage.atomic import read_json
from training.evaluation.simulated.options import EvaluationOptions, option
from training.evaluation.simulated.success import format_rates, measure

__all__ = ["LiberoOptions", "format_libero", "measure_libero", "suite_table"]


SUITE_TASKS = 10


@dataclasses.dataclass
class LiberoOptions(EvaluationOptions):
    """What to measure in LIBERO, and how.

    Raises:
        ValueError: If a value makes no sense; names it.
    """

    suite: str = option(f"comma-separated suites, of {', '.join(SUITES)}")
    _: dataclasses.KW_ONLY
    tasks: list[int] | None = option("only these tasks of every suite, 0 to 9", None)
    episodes: int = option("episodes per task, from its first initial state on (default: %(default)s)", 50)
    seed: int = option("seed of the first episode; the others follow (default: %(default)s, LeRobot's)", 1000)
    max_steps: int | None = option(
        "steps until an episode has failed (default: LeRobot's for the suite)", None
    )
    form: str | None = option(
        "data that a policy without state, with views main and wrist, was trained on: converted "
        "(convert_libero.py) or lerobot (lerobot/libero)",
        None,
        choices=list(FORMS),
    )
    other_task: str | None = option(
        "give the instruction of another task whose things are in the scene too, and count what it names, or "
        "what the scene is for: a policy that does what it is told solves the named task alone",
        None,
        choices=["named", "scene"],
    )
    others: list[Path] | None = option("results of other suites, for the table that is printed", None)


def measure_libero(options: LiberoOptions, arguments: Sequence[str] | None = None) -> dict:
    """Success in LIBERO; [`measure`] explains arguments, result and errors.

    The result has `suites` too, success rates of all their episodes, and `table`.
    """
    others = [_read_other(path) for path in options.others or ()]  # before hours of work
    results = measure(Libero(options), arguments)
    if not options.other_task:
        results["table"] = suite_table([results, *others])
    return results


def format_libero(results: dict) -> str:
    """A line for people per task and suite, and the table."""
    lines = format_rates({**results["tasks"], **results["suites"], "all": results["mean"]})
    return "\n".join([*lines, "", results["table"]] if "table" in results else lines)


def suite_table(results: Sequence[Mapping]) -> str:
    """Success in percent in the form of the paper's Table II, as Markdown; `-` for what was not measured.

    A line below names the suites of which only some tasks were tried.

    Args:
        results (`Sequence[Mapping]`): Of [`measure_libero`]; the first one that has a suite counts.
    """
    rates, partial = {}, []
    for result in results:
        for suite in result["suites"].keys() - rates.keys():
            rates[suite] = 100 * result["suites"][suite]["success_rate"]
            tried = sum(_suite_of(task) == suite for task in result["tasks"])
            partial += [f"{suite}: {tried} of its {SUITE_TASKS} tasks"] if tried < SUITE_TASKS else []
    cells = [f"{rates[suite]:.1f}" if suite in rates else "-" for suite in SUITES]
    mean = f"{sum(rates.values()) / len(SUITES):.1f}" if len(rates) == len(SUITES) else "-"
    rows = [[suite.title for suite in SUITES.values()] + ["Avg. SR"], ["---"] * 5, [*cells, mean]]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, *([f"Not whole: {', '.join(sorted(partial))}"] if partial else [])])


def _read_other(path: Path) -> dict:
    results = read_json(path)
    try:
        suite_table([results])
        change = results["settings"].get("change")
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"--others: {path} holds no results of LIBERO") from None
    if change:
        raise ValueError(f"--others: {path} was measured with a change ({change}), so it is not in the table")
    return results


class Libero:
    """The benchmark, see `success.Benchmark`."""

    name = "LIBERO"

    def __init__(self, options: LiberoOptions):
        self.options = options
        self.tasks = resolve_libero_tasks(options.suite, options.tasks)
        self.partners = libero_partners(self.tasks) if options.other_task else {}
        if options.other_task:
            self.tasks = [task for task in self.tasks if task in self.partners]
            if not self.tasks:
                raise ValueError(
                    f"--other-task: no scene of {options.suite} has what another of its tasks is about; use "
                    "libero_object or libero_goal"
                )

    def check_policy(self, config) -> None:
        """Raise a `ValueError` for a policy that does not fit LIBERO's robot, cameras and rate."""
        form = self.choose_form(config)
        if config.action_dim != LIBERO_ACTION_DIM:
            raise ValueError(
                f"the checkpoint has action_dim {config.action_dim}, LIBERO's robot {LIBERO_ACTION_DIM}"
            )
        if config.action_codec != "recorded":
            raise ValueError(
                f"the checkpoint's actions are {config.action_codec!r}, which gives commands for CALVIN's "
                "robot, and LIBERO's have other units: train on recorded actions (action_codec: recorded)"
            )
        # Copies of lerobot/libero declare 10 frames a second and hold 20.
        if config.fps not in (None, LIBERO_HZ, *([10] if form == "lerobot" else [])):
            raise ValueError(
                f"the checkpoint acts at {config.fps} steps a second, LIBERO's robot at {LIBERO_HZ}: "
                "finetune it without a frame stride"
            )

    def choose_form(self, config) -> str:
        """The form of data that the policy was trained on."""
        return choose_form(config.views, config.state_dim, self.options.form)

    def check_starts(self, demonstrations: Sequence[Path]) -> dict:
        """Nothing: demonstrations start elsewhere than the suites' initial states."""
        return {}

    def choose_settings(self, config, image_size: int) -> dict:
        """How the loop runs."""
        limits = {suite: SUITES[suite].max_steps for suite in dict.fromkeys(map(_suite_of, self.tasks))}
        judged = self.options.other_task
        return {
            **({"change": f"other_task_{judged}", "named_tasks": self.partners} if judged else {}),
            "control_hz": LIBERO_HZ,
            "stride": 1,
            "max_steps": {suite: self.options.max_steps or limit for suite, limit in limits.items()},
            "settling_steps": SETTLING_STEPS,
            "initial_states": "episode k of a task: initial state k of the suite, seed first + k",
            "form": self.choose_form(config),
            "success": "LIBERO's goal after any step",
        }

    def summarize(self, rate: Callable[[Sequence[str]], dict]) -> dict:
        """Success by suite."""
        suites = dict.fromkeys(map(_suite_of, self.tasks))
        return {"suites": {name: rate([t for t in self.tasks if _suite_of(t) == name]) for name in suites}}

    def step_limits(self, settings: Mapping) -> dict[str, int]:
        """Control steps after which an episode has failed, by task."""
        return {task: settings["max_steps"][_suite_of(task)] for task in self.tasks}

    def make_simulator(self, config, settings: Mapping) -> functools.partial:
        """Gives the simulator of a task."""
        return functools.partial(
            make_libero,
            cameras=tuple(config.views),
            image_size=settings["image_size"],
            form=settings["form"],
            first_seed=self.options.seed,
            partners=self.partners,
            judge_named=self.options.other_task == "named",
        )

    def use_film(self, episodes: Sequence, config, facts: Mapping) -> None:
        """Nothing beside the video."""


def make_libero(task: str, partners: Mapping[str, str], judge_named: bool, **options) -> LiberoSim:
    """The simulator of a task; with a partner, it has that one's instruction, and its goal if wanted."""
    partner = partners.get(task)
    return LiberoSim(task, told=partner, judged=partner if judge_named else None, **options)


def _suite_of(task: str) -> str:
    return task.partition("/")[0]
