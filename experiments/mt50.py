"""MetaWorld MT50: one policy with language for 50 tasks in LeRobot's protocol, beside the scripted experts.

LeRobot's protocol: its instructions, success at any of at most 500 simulation steps, its groups easy, medium,
hard and very hard, the mean over tasks. Two tasks share an instruction ("Push the puck to a goal": push-v3
and push-back-v3). The wording is kept, and the policy must tell them apart by what it sees: one puck starts
between the hand and its goal, the other one beyond its goal. The results name them in `shared_instructions`.
"""

# No import of PyTorch at the top: every simulator process imports the command again.
import sys
from collections import defaultdict
from pathlib import Path

from experiments.driver import build_parser, results_places, run_command

EXAMPLE = """example:
  python -m experiments.mt50 --experts
  python -m experiments.mt50 --plan experiments/plans/mt50.yaml"""
PUBLISHED_DEMONSTRATIONS = 50  # per task, of lerobot/metaworld_mt50
EXPERT_STARTS = 20  # per task; the first ones are those of the policies


def check_one_row(plan) -> None:
    """Refuses plans of another benchmark, or that hold more than one row of it."""
    if plan.simulator != "metaworld":
        raise ValueError(f"MT50 is of metaworld, and the plan of {plan.simulator}")
    if len(plan.demonstrations) > 1 or len(plan.variants) > 1 or plan.budgets != ["steps"]:
        raise ValueError("MT50 is one row: give one of variants, one of demonstrations, and budgets [steps]")


def run_experts(plan, folder: Path, only_read: bool = False) -> dict[str, dict]:
    """Outcomes of the experts from the starts that policies are tried from, and further ones."""
    from experiments.experts import measure_experts

    starts = range(plan.first_start, plan.first_start + EXPERT_STARTS)
    return measure_experts(plan.tried(), starts, folder / "experts", only_read=only_read)


def build_mt50(plan, folder: Path, only_read: bool) -> dict:
    """All figures of the benchmark, ready for JSON; raises a `ValueError` if a cell is not finished."""
    import numpy as np

    from datasets_scripts.simulation.metaworld import resolve_tasks, task_descriptions
    from experiments.cells import read_rows
    from experiments.tables import describe_rows, outcomes_of, require_all
    from training.diagnostics.intervals import success_rate

    rows = read_rows(plan, folder)
    require_all(plan, rows)
    count = plan.demonstrations[0]
    outcomes = outcomes_of(plan, rows, plan.reference, "steps", count)  # (S, T, E)
    experts = run_experts(plan, folder, only_read)
    ceiling = {
        name: np.array([[experts[task][name] for task in plan.tasks]]) for name in ("noisy", "clean")
    }  # (1, T, E)

    def figures(tasks: list[str]) -> dict:
        chosen = [plan.tasks.index(task) for task in tasks]
        found = success_rate(outcomes[:, chosen]) | {"tasks": len(tasks)}
        return found | {f"experts_{name}": float(runs[:, chosen].mean()) for name, runs in ceiling.items()}

    groups = {name: resolve_tasks(name) for name in ("easy", "medium", "hard", "very_hard")}
    groups = {name: [task for task in tasks if task in plan.tasks] for name, tasks in groups.items()}
    by_instruction = defaultdict(list)
    for task in plan.tasks:
        by_instruction[task_descriptions()[task]].append(task)
    enough = count > PUBLISHED_DEMONSTRATIONS
    return {
        "version": 1,
        "benchmark": "MetaWorld MT50" if len(plan.tasks) == 50 else f"MetaWorld, {len(plan.tasks)} tasks",
        **figures(plan.tasks),
        "row": "more scripted demonstrations than lerobot/metaworld_mt50" if enough else "at most 50 a task",
        "demonstrations_per_task": count,
        "groups": {name: figures(tasks) for name, tasks in groups.items() if tasks},
        "tasks": {task: figures([task]) for task in plan.tasks},
        "shared_instructions": {text: tasks for text, tasks in by_instruction.items() if len(tasks) > 1},
        "experts": {name: success_rate(runs) for name, runs in ceiling.items()},
        "parameters": next(iter(rows.values()))["parameters"],
        "steps": plan.steps,
        "recording": plan.recordings()[count].to_dict(),
        **describe_rows(plan, rows),
    }


def format_mt50(results: dict) -> str:
    """The benchmark as Markdown: groups, then tasks."""
    from experiments.tables import markdown_table

    def line(name: str, figures: dict) -> list[str]:
        low, high = (100 * bound for bound in figures["ci95"])
        row = [name, f"{figures['successes']}/{figures['episodes']}", f"{100 * figures['success_rate']:.1f}"]
        row += [f"{low:.1f} to {high:.1f}"]
        return row + [f"{100 * figures[f'experts_{kind}']:.0f}" for kind in ("noisy", "clean")]

    header = ["", "solved", "%", "95 % interval", "experts with noise, %", "experts, %"]
    groups = [line("all", results), *(line(name, one) for name, one in results["groups"].items())]
    tasks = [line(name, one) for name, one in results["tasks"].items()]
    return f"{markdown_table(header, groups)}\n\n{markdown_table(header, tasks)}\n"


def write_mt50(plan, folder: Path, results_file: Path, only_read: bool) -> None:
    """Writes the results as JSON, and as Markdown beside the cells; prints the latter."""
    from datasets_scripts.storage.atomic import write_json, write_whole_file

    results = build_mt50(plan, folder, only_read)
    write_json(results_file, results)
    text = format_mt50(results)
    with write_whole_file(folder / "tables.md") as temporary:
        temporary.write_text(text)
    print(f"{text}\nresults: {results_file}, tables: {folder / 'tables.md'}")


def print_experts(plan, folder: Path) -> None:
    """Measures the experts and prints a line per task."""
    found = run_experts(plan, folder)
    for task, runs in found.items():
        print(f"{task}: with noise {sum(runs['noisy'])}/{len(runs['noisy'])}, without {sum(runs['clean'])}")
    for name in ("noisy", "clean"):
        rates = [sum(runs[name]) / len(runs[name]) for runs in found.values()]
        print(f"mean of {len(rates)} tasks, {name}: {sum(rates) / len(rates):.1%}")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = build_parser("mt50", __doc__, EXAMPLE)
    parser.add_argument("--experts", action="store_true", help="measure the scripted experts only")
    args = parser.parse_args(arguments)
    folder, results_file = results_places(args, "mt50")

    def finish(plan) -> None:
        if args.experts:
            print_experts(plan, folder)
        else:
            write_mt50(plan, folder, results_file, only_read=args.tables)

    run = not (args.tables or args.experts)
    return run_command("experiments.mt50", args, folder, run, finish, check_one_row)


if __name__ == "__main__":
    sys.exit(main())
