"""All diagnostics of a policy: what to measure, the results, and a few lines for people."""

# No import of PyTorch at the top: every simulator process imports the command, which imports this file.
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from datasets_scripts.simulation.metaworld import scene_partners
from training.diagnostics.closed_loop import PLAIN, list_conditions, measure_conditions
from training.evaluation.metaworld_success import MAX_STEPS, MetaWorld, SuccessOptions
from training.evaluation.success import GoalOptions, count_cores, describe_checkpoint, open_policy, option
from training.run_facts import describe_run

__all__ = ["DiagnosticOptions", "format_diagnostics", "measure_diagnostics"]


@dataclasses.dataclass
class DiagnosticOptions(GoalOptions):
    """What to measure; `diagnose.py` has a flag for every field and explains it.

    Raises:
        ValueError: If a value makes no sense; names it.
    """

    checkpoint: str = option("folder of a trained model, or Hub id")
    tasks: str = option("comma-separated MetaWorld tasks, or easy, medium, hard, very_hard, all")
    _: dataclasses.KW_ONLY
    dataset: str | None = option(
        "demonstrations for errors by task, calibration and causality: of data of the training the held-out "
        "episodes count, of other data all",
        None,
    )
    episodes: int = option("starts per task (default: %(default)s)", 5)
    seed: int = option("start of the first episode; the others follow (default: %(default)s)", 10000)
    max_steps: int = option(f"simulation steps until an episode has failed (default: {MAX_STEPS})", MAX_STEPS)
    only: list[str] | None = option("conditions to try, beside the unchanged policy (default: all)", None)
    output: Path = option(
        "results (default: %(default)s); each condition is kept in the folder of that name without .json",
        Path("diagnostics.json"),
    )
    num_envs: int = option("simulators side by side (default: one per core, %(default)s here)", count_cores)
    revision: str | None = option("commit, branch or tag of a Hub id", None)
    embodiment: str | None = option("name of the robot, of a checkpoint for several", None)
    threads: int | None = option("threads of PyTorch (default: 1 for a small model)", None)
    device: str | None = option("default: cuda if there is one, otherwise cpu", None)

    def __post_init__(self):
        if self.output.suffix != ".json":
            raise ValueError(f"--output is {self.output}; its name must end in .json")
        self.success_options()  # checks the other values

    def success_options(self) -> SuccessOptions:
        """Options of the evaluation that all conditions share."""
        names = {field.name for field in dataclasses.fields(self)} - {"dataset", "only", "output"}
        return SuccessOptions(**{name: getattr(self, name) for name in names}, output=self.output)


def measure_diagnostics(options: DiagnosticOptions, arguments: Sequence[str] | None = None) -> dict:
    """Everything of the options; what an interrupted run has measured is not measured again.

    Args:
        options (`DiagnosticOptions`): What to measure.
        arguments (`Sequence[str]`, *optional*): Arguments of `training/diagnose.py` for the recorded command.

    Returns:
        `dict`: What goes into the JSON file: `closed_loop` of [`measure_conditions`], `scene_partners` (task
        -> task whose instruction was given instead), `skipped` (condition -> why), `demonstrations` of
        `measure_demonstrations` with a dataset, `checkpoint`, `seeds`, `settings`, and what `describe_run`
        gives.

    Raises:
        ValueError: If checkpoint, tasks, conditions and dataset do not fit together; names the remedy.
        RuntimeError: If the simulator is missing or fails.
    """
    success = options.success_options()
    benchmark = MetaWorld(success)
    with open_policy(success, benchmark.check_policy) as (model, processor):
        config = model.config.for_robot(processor.embodiment)
        conditions, skipped = list_conditions(config, benchmark.tasks)
        conditions = _choose_conditions(conditions, options.only)
        checkpoint, folder = describe_checkpoint(options, config), options.output.with_suffix("")
        recorded = {}
        if options.dataset:
            from training.diagnostics import demonstrations

            windows = demonstrations.open_demonstrations(options.checkpoint, config, options.dataset)
            kept, weights = folder / "demonstrations.json", checkpoint["weights_sha256"]
            figures = demonstrations.measure_once(model, processor, windows, weights, kept)
            recorded["demonstrations"] = figures
        results = {
            "version": 1,
            "benchmark": benchmark.name,
            "checkpoint": checkpoint,
            "seeds": {"first": success.seeds[0], "last": success.seeds[-1]},
            "settings": {"max_simulation_steps": options.max_steps, "chunk_size": config.chunk_size},
        }
    return {
        **results,
        "closed_loop": measure_conditions(success, conditions, folder),
        "scene_partners": scene_partners(benchmark.tasks),
        "skipped": skipped,
        **recorded,
        **describe_run("training/diagnose.py", list(arguments) if arguments is not None else None),
    }


def _choose_conditions(conditions: dict, only: Sequence[str] | None) -> dict:
    """The unchanged policy and those of the user; all by default."""
    if unknown := [name for name in only or () if name not in conditions]:
        raise ValueError(
            f"--only has {', '.join(unknown)}, which cannot be tried with this policy and these tasks; "
            f"choose from {', '.join(name for name in conditions if name != PLAIN)}"
        )
    return {name: one for name, one in conditions.items() if not only or name in (PLAIN, *only)}


def format_diagnostics(results: dict) -> str:
    """A line for people per figure."""
    lines = []
    for name, figures in results["closed_loop"].items():
        line = f"{name}: {figures['successes']}/{figures['episodes']} = {figures['success_rate']:.1%}"
        if difference := figures.get("difference"):
            low, high = (100 * bound for bound in difference["ci95"])
            line += f", {100 * difference['mean']:+.1f} points (95 % interval {low:+.1f} to {high:+.1f})"
        lines.append(line)
    lines += [f"{name}: not measured, {why}" for name, why in results["skipped"].items()]
    if recorded := results.get("demonstrations"):
        if progress := recorded.get("progress"):
            lines.append(f"progress: error {progress['mae']:.3f}, calibration error {progress['ece']:.3f}")
        if named := recorded.get("instruction"):
            lines.append("next action, L1: " + ", ".join(f"{k} {v:.4g}" for k, v in named.items()))
        lines.append("largest change of an action: " + str(recorded["causality"]))
    return "\n".join(lines)
