"""Draw by how much one policy solves each task more often than another (the paper's Fig. 4)."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets_scripts.command_line import entry_point
from datasets_scripts.inspection.drawing import new_figure
from datasets_scripts.storage.atomic import read_json, write_whole_file
from datasets_scripts.storage.settings_changes import flatten, name_changes
from training.diagnostics.intervals import Z_95

EXAMPLE = """example:
  python -m experiments.task_gains 2d_foresight.json 3d_foresight.json --output gains.png"""
BETTER, WORSE = "tab:green", "tab:red"
FORMATS = (".png", ".pdf", ".svg")
COUNTS = {"success_rate", "successes", "episodes"}  # of a task
# Datasets and generators of goals are compared by their content.
ONLY_NAMES = ("goal_dataset/name", "goal_generator/name")


def success_gains(base: Mapping, other: Mapping) -> list[dict]:
    """Gains of `other` over `base`, two results of `training/evaluate.py`, the largest first.

    Returns:
        `list[dict]`: By task: `task`, both success rates as `base` and `other`, numbers of tries as `tries`,
        `gain`, and its 95 % interval `ci95`, that of Agresti and Caffo (2000) for independent tries. All are
        fractions.

    Raises:
        ValueError: If the results cannot be compared; names the reason.
    """
    if base["benchmark"] != other["benchmark"]:
        raise ValueError(
            f"the results are of different benchmarks: {base['benchmark']} and {other['benchmark']}"
        )
    one, two = (
        {name: value for name, value in flatten(results["settings"]).items() if name not in ONLY_NAMES}
        for results in (base, other)
    )
    if changed := name_changes(one, two):
        raise ValueError(f"the results have different settings (the first there, the second here): {changed}")
    rows = []
    # A chain ends at its first failure, so that a late task may never be tried.
    for task in base["tasks"].keys() & other["tasks"].keys():
        pair = [results["tasks"][task] for results in (base, other)]
        rates, tries = [f["success_rate"] for f in pair], [f["episodes"] for f in pair]
        smoothed = [(f["successes"] + 1) / (f["episodes"] + 2) for f in pair]
        variance = sum(p * (1 - p) / (n + 2) for p, n in zip(smoothed, tries, strict=True))
        middle, reach = smoothed[1] - smoothed[0], Z_95 * variance**0.5
        rows.append(
            {
                "task": task,
                "base": rates[0],
                "other": rates[1],
                "tries": tries,
                "gain": rates[1] - rates[0],
                "ci95": [middle - reach, middle + reach],
            }
        )
    if not rows:
        raise ValueError("the results have no task in common")
    return sorted(rows, key=lambda row: (-row["gain"], row["task"]))


def read_results(path: Path) -> dict:
    """What `training/evaluate.py` wrote; raises a `ValueError` that names a file of something else."""
    found = read_json(path, "measure it again")
    tasks = found.get("tasks")
    fits = isinstance(tasks, dict) and all(isinstance(t, dict) and t.keys() >= COUNTS for t in tasks.values())
    if not fits or not isinstance(found.get("settings"), dict) or "benchmark" not in found:
        raise ValueError(f"{path} has no success rates by task: give what training/evaluate.py wrote")
    return found


def format_gains(rows: Sequence[Mapping]) -> str:
    """A line for people per task."""
    return "\n".join(
        f"{row['task']}: {100 * row['gain']:+.1f} points ({100 * row['ci95'][0]:+.1f} to "
        f"{100 * row['ci95'][1]:+.1f}), {row['base']:.1%} of {row['tries'][0]} tries to "
        f"{row['other']:.1%} of {row['tries'][1]}"
        for row in rows
    )


def draw_gains(rows: Sequence[Mapping], labels: tuple[str, str]):
    """A figure with a bar per task in points, the largest gain at the top, and 95 % intervals as lines."""
    figure = new_figure(7.0, 1.1 + 0.22 * len(rows), layout="constrained")
    axis, places = figure.subplots(), range(len(rows))
    axis.barh(
        places,
        [100 * row["gain"] for row in rows],
        color=[BETTER if row["gain"] >= 0 else WORSE for row in rows],
    )
    axis.hlines(
        places, *zip(*([100 * end for end in row["ci95"]] for row in rows), strict=True), color="0.3", lw=1
    )
    axis.set_yticks(places, [row["task"].replace("_", " ") for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.axvline(0, color="black", lw=0.8)
    axis.set_xlabel(f"success of {labels[1]} minus that of {labels[0]}, percentage points")
    return figure


@entry_point()
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; returns the exit code."""
    style, told = argparse.RawDescriptionHelpFormatter, f"{', '.join(FORMATS)} (default: %(default)s)"
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE, formatter_class=style)
    parser.add_argument("base", type=Path, help="results of training/evaluate.py")
    parser.add_argument("other", type=Path, help="results of the policy that may be better")
    parser.add_argument("--output", type=Path, default=Path("task_gains.png"), help=told)
    args = parser.parse_args(arguments)
    if args.output.suffix not in FORMATS:
        raise ValueError(f"--output is {args.output}; its name must end in {', '.join(FORMATS)}")
    rows = success_gains(read_results(args.base), read_results(args.other))
    figure = draw_gains(rows, (args.base.stem, args.other.stem))
    with write_whole_file(args.output) as temporary:
        figure.savefig(temporary, dpi=150, format=args.output.suffix[1:])
    print(f"{format_gains(rows)}\npicture: {args.output}")


if __name__ == "__main__":
    sys.exit(main())
