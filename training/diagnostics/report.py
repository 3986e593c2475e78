"""All diagnostics of a policy: what to measure, the results, and a few lines for people."""

# No import of PyTorch at the top: every simulator process imports the command, which imports this file.
from collections.abc import Sequence

from training.diagnostics.benchmarks import DiagnosticOptions
from training.diagnostics.closed_loop import PLAIN, list_conditions, measure_conditions
from training.evaluation.simulated.success import describe_checkpoint, open_policy, refuse_data_for_exported
from training.run_record import describe_run

__all__ = ["format_diagnostics", "measure_diagnostics"]


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
    refuse_data_for_exported(options)
    benchmark = options.benchmark()
    evaluation, recorded = benchmark.options, {}
    partners = options.other_tasks(benchmark.tasks)
    with open_policy(evaluation, benchmark.check_policy) as (model, processor):
        config = model.config.for_robot(processor.embodiment)
        found = list_conditions(config, benchmark.tasks, options.other_task_conditions(partners))
        conditions, skipped = _choose_conditions(found[0], options.only), found[1]
        checkpoint, folder = describe_checkpoint(options, config), options.output.with_suffix("")
        if options.dataset:
            weights = checkpoint["weights_sha256"]
            figures = _measure_demonstrations(options, model, processor, weights)
            recorded["demonstrations"] = figures
        settings = benchmark.choose_settings(config, config.image_size)
        tried = measure_conditions(benchmark, model, processor, conditions, folder)
    return {
        "version": 1,
        "benchmark": benchmark.name,
        "checkpoint": checkpoint,
        "seeds": {"first": evaluation.seeds[0], "last": evaluation.seeds[-1]},
        "settings": {**settings, "chunk_size": config.chunk_size},
        "closed_loop": tried,
        "scene_partners": partners,
        "skipped": skipped,
        **recorded,
        **describe_run("training/diagnose.py", list(arguments) if arguments is not None else None),
    }


def _measure_demonstrations(options: DiagnosticOptions, model, processor, weights) -> dict:
    """Figures of the demonstrations of the options, kept in a file."""
    from training.diagnostics.demonstrations import measure_once, open_demonstrations

    windows, origin = open_demonstrations(
        options.checkpoint,
        model.config,
        options.dataset,
        cameras=options.cameras,
        embodiment=processor.embodiment,
    )
    replaced = options.other_instructions(windows.datasets[0].rows.tasks)
    kept = options.output.with_suffix("") / "demonstrations.json"
    return {"origin": origin, **measure_once(model, processor, windows, replaced, weights, kept)}


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
