"""Success of the policies of an ablation in changed scenes, against the unchanged ones, from the same starts.

The main camera moved by 2 and 5 cm, objects displaced in depth, and a table of another color
(`datasets_scripts/simulation/perturbation.py`). The policies are those of finished cells; their folder gets
`robustness/SCENES/CELL.json`, one file per policy, which is never measured again. Running the same command
again resumes what was interrupted.
"""

# No import of PyTorch at the top: every simulator process imports the command again.
import dataclasses
import sys
from pathlib import Path

from datasets_scripts.simulation.metaworld import FIXED_OBJECTS
from datasets_scripts.simulation.perturbation import Perturbation
from experiments.driver import build_parser, results_places, run_command

EXAMPLE = """example:
  python -m experiments.robustness --plan experiments/plans/ablation.yaml --workers 2
  python -m experiments.robustness --plan experiments/plans/pilot.yaml --variants action_only"""
PLAIN_SCENES = "unchanged"
SCENES = {
    PLAIN_SCENES: Perturbation(),
    "camera_2cm": Perturbation(camera_shift_m=0.02),
    "camera_5cm": Perturbation(camera_shift_m=0.05),
    # On the far side, the arm does not reach the puck of push-back.
    "objects_2cm_nearer": Perturbation(object_shift_m=-0.02),
    "objects_5cm_nearer": Perturbation(object_shift_m=-0.05),
    "table_color": Perturbation(table_color=(0.3, 0.6, 1.0)),  # dark blue instead of brown
}
COMPARED = ("foresight_3d_displacement", "foresight_2d", "action_only")


def choose_cells(plan, variants: list[str], demonstrations: list[int] | None):
    """The plan with some of its variants and numbers of demonstrations, and equal steps.

    Raises:
        ValueError: If the plan does not have one of them.
    """
    if plan.simulator != "metaworld":
        raise ValueError(f"scenes are changed in metaworld, and the plan is of {plan.simulator}")
    demonstrations = demonstrations or [max(plan.demonstrations)]
    for name, wanted, known in (
        ("variants", variants, list(plan.variants)),
        ("demonstrations", demonstrations, plan.demonstrations),
    ):
        if missing := [str(one) for one in wanted if one not in known]:
            raise ValueError(
                f"--{name} has {', '.join(missing)}, which the plan does not: choose from "
                f"{', '.join(map(str, known))}"
            )
    names = dict.fromkeys([plan.reference, *variants])
    chosen = {name: plan.variants[name] for name in names}
    return dataclasses.replace(
        plan, variants=chosen, demonstrations=demonstrations, budgets=["steps"], losses=[]
    )


def tasks_of(plan, scenes: str) -> list[str]:
    """The tasks that can be tried in these scenes."""
    fixed = FIXED_OBJECTS if SCENES[scenes].object_shift_m else ()
    tasks = [task for task in plan.tasks if task not in fixed]
    if not tasks:
        raise ValueError(f"the objects of {', '.join(plan.tasks)} cannot be displaced: choose another plan")
    return tasks


def list_trials(plan, folder: Path) -> dict[tuple, Path]:
    """The file of each kind of changed scenes and each cell that has tasks in them."""
    return {
        (scenes, cell): folder / "robustness" / scenes / f"{cell.name}.json"
        for cell in plan.cells()
        for scenes in SCENES
        if scenes != PLAIN_SCENES and set(cell.tasks) & set(tasks_of(plan, scenes))
    }


def try_cells(plan, folder: Path, workers: int, only_read: bool) -> dict[tuple, dict]:
    """What every policy did in every kind of changed scenes, by scenes and cell.

    Raises:
        ValueError: If results are missing although nothing may be run, or were measured otherwise.
    """
    from experiments.cells import try_policy

    places = list_trials(plan, folder)
    missing = {key: path for key, path in places.items() if not path.exists()}
    if only_read and missing:
        first = next(iter(missing.values())).relative_to(folder)
        raise ValueError(f"{len(missing)} of {len(places)} results are missing, the first is {first}")
    tried = {}
    for (scenes, cell), path in places.items():
        home = folder / "cells" / cell.name
        tasks = ",".join(task for task in tasks_of(plan, scenes) if task in cell.tasks)
        changes = dataclasses.asdict(SCENES[scenes])
        tried[scenes, cell] = outcome = try_policy(plan, home, tasks, path, num_envs=workers, **changes)
        check_outcome(outcome, path, SCENES[scenes], home)
        if (scenes, cell) in missing:
            solved = f"{outcome['mean']['successes']}/{outcome['mean']['episodes']} solved"
            print(f"[{len(tried)}/{len(places)}] {scenes} {cell.name}: {solved}", flush=True)
    return tried


def check_outcome(outcome: dict, path: Path, perturbation: Perturbation, home: Path) -> None:
    """Refuses results of other scenes, starts, settings or weights than those of the finished cell."""
    from datasets_scripts.storage.atomic import read_json

    def described(one: dict) -> dict:
        return {
            **{f"seeds.{name}": one["seeds"][name] for name in ("first", "last")},
            **{f"settings.{name}": value for name, value in one["settings"].items()},
            "weights": one["checkpoint"]["weights_sha256"],
        }

    expected = described(read_json(home / "eval.json"))
    if changes := perturbation.changes():
        expected["settings.perturbation"] = changes
    here = described(outcome)
    for name in sorted(expected.keys() | here.keys()):
        if expected.get(name) != here.get(name):
            raise ValueError(
                f"{path} was measured with {name} {here.get(name)}, not {expected.get(name)}: bring that "
                "back, or move the file away"
            )


def measure_ceilings(plan, folder: Path, only_read: bool) -> dict[str, dict]:
    """Success of the scripted experts in the scenes that matter to them: they see nothing, but must reach."""
    from experiments.experts import measure_experts

    starts = range(plan.first_start, plan.first_start + plan.episodes)
    ceilings = {}
    for scenes, perturbation in SCENES.items():
        if scenes == PLAIN_SCENES or perturbation.object_shift_m:
            tried = dataclasses.replace(plan.tried(), tasks=tuple(tasks_of(plan, scenes)))
            place = folder / "robustness" / "experts" / scenes
            ceilings[scenes] = measure_experts(tried, starts, place, perturbation, only_read)
    return ceilings


def build_robustness(plan, rows: dict, tried: dict[tuple, dict], ceilings: dict[str, dict]) -> dict:
    """All figures, ready for JSON: success and what was lost, of each variant and between every two."""
    import numpy as np

    from experiments.tables import compare, describe_rows, pool_demonstrations
    from training.diagnostics.intervals import mean_difference, paired_difference
    from training.evaluation.simulated.success import outcomes_by_task

    tables = {}
    for scenes, perturbation in SCENES.items():
        tasks = tasks_of(plan, scenes)
        before = after = pool_demonstrations(plan, rows, "steps", tasks)
        if scenes != PLAIN_SCENES:
            found = {cell: outcomes_by_task(tried.get((scenes, cell), {})) for cell in rows}
            changed = {cell: {"success": success} for cell, success in found.items()}
            after = pool_demonstrations(plan, changed, "steps", tasks)
        table = {"changes": perturbation.changes(), "tasks": tasks, **compare(plan, after)}
        if scenes != PLAIN_SCENES:
            for variant, figures in table["variants"].items():
                figures["loss"] = paired_difference(before[variant], after[variant])
            for pair in table["differences"]:
                lost = [before[pair[name]] - after[pair[name]] for name in ("first", "second")]
                pair["loss"] = mean_difference(lost[0] - lost[1])
        if scenes in ceilings:
            experts = ceilings[scenes]
            table["experts"] = {
                name: float(np.mean([experts[task][name] for task in tasks])) for name in ("noisy", "clean")
            }
            table["experts"]["tasks"] = {task: experts[task] for task in tasks}
        tables[scenes] = table
    return {
        "version": 1,
        "benchmark": "MetaWorld",
        "reference": plan.reference,
        "demonstrations": plan.demonstrations,
        "scenes": tables,
        **describe_rows(plan, rows),
        "hours": round(sum(one["timing"]["wall_s"] for one in tried.values()) / 3600, 2),
        "tried_with_commit": ", ".join(sorted({str(one["commit"]) for one in tried.values()})),
    }


def format_robustness(results: dict) -> str:
    """Success of each variant in each kind of scenes, and the differences of every two, as Markdown."""
    from experiments.tables import markdown_table

    def points(figures: dict | None, sign: str = "+") -> list[str]:
        if figures is None:
            return ["-", "-"]
        low, high = (100 * bound for bound in figures["ci95"])
        mean = 100 * figures.get("mean", figures.get("success_rate"))
        return [f"{mean:{sign}.1f}", f"{low:{sign}.1f} to {high:{sign}.1f}"]

    variants, pairs = [], []
    for scenes, table in results["scenes"].items():
        for name, figures in table["variants"].items():
            solved = f"{figures['successes']}/{figures['episodes']}"
            variants.append([scenes, name, solved, *points(figures, ""), *points(figures.get("loss"))])
        if experts := table.get("experts"):
            share = f"{100 * experts['noisy']:.1f}"
            variants.append([scenes, "experts with noise", "-", share, "-", "-", "-"])
        for pair in table["differences"]:
            name = f"{pair['first']} - {pair['second']}"
            pairs.append([scenes, name, *points(pair), *points(pair.get("loss"))])
    interval = "95 % interval"
    first = ["scenes", "variant", "solved", "%", interval, "lost against unchanged, points", interval]
    second = ["scenes", "difference", "success, points", interval, "lost, points", interval]
    tables = [markdown_table(first, variants), *([markdown_table(second, pairs)] if pairs else [])]
    return "\n\n".join(tables) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = build_parser("robustness", __doc__, EXAMPLE, plan="ablation", workers="simulators")
    add = parser.add_argument
    add(
        "--variants",
        nargs="+",
        default=COMPARED,
        help="variants to compare with the reference (default: %(default)s)",
    )
    add(
        "--demonstrations",
        nargs="+",
        type=int,
        help="numbers of demonstrations, of the plan's (default: the largest)",
    )
    args = parser.parse_args(arguments)
    folder, _ = results_places(args, "ablation")
    results_file = args.results or folder / "robustness" / "results.json"

    def finish(plan) -> None:
        from datasets_scripts.storage.atomic import write_json, write_whole_file
        from experiments.cells import read_rows
        from experiments.tables import require_all

        chosen = choose_cells(plan, args.variants, args.demonstrations)
        rows = read_rows(chosen, folder)
        require_all(chosen, rows)
        ceilings = measure_ceilings(chosen, folder, only_read=args.tables)
        tried = try_cells(chosen, folder, args.workers, only_read=args.tables)
        results = build_robustness(chosen, rows, tried, ceilings)
        write_json(results_file, results)
        text = format_robustness(results)
        with write_whole_file(folder / "robustness" / "tables.md") as temporary:
            temporary.write_text(text)
        print(f"{text}\nresults: {results_file}, tables: {folder / 'robustness' / 'tables.md'}")

    return run_command("experiments.robustness", args, folder, run=False, finish=finish, needs_results=True)


if __name__ == "__main__":
    sys.exit(main())
