"""Results of finished cells: success, paired differences, validation losses, gains and motion in depth."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.cells import data_folder
from experiments.depth_motion import depth_shares
from experiments.plans import Cell, Plan
from training.diagnostics.intervals import bootstrap_mean, paired_difference, rank_correlation
from training.evaluation.metric_loader import load_metric
from training.run_facts import describe_run

__all__ = [
    "build_results",
    "compare",
    "describe_rows",
    "format_results",
    "markdown_table",
    "outcomes_of",
    "require_all",
    "success_figures",
]


BENCHMARK_TITLES = {
    "metaworld": "MetaWorld",
    "libero": "LIBERO, trained on scripted demonstrations: not the standard protocol",
}


def require_all(plan: Plan, rows: Mapping[Cell, dict]) -> None:
    """Raises a `ValueError` that names the unfinished cells, if there are any."""
    missing = [cell.name for cell in plan.cells() if cell not in rows]
    if missing:
        shown = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise ValueError(f"{len(missing)} of {len(plan.cells())} cells are not finished: {shown}")


def outcomes_of(
    plan: Plan,
    rows: Mapping[Cell, dict],
    variant: str,
    budget: str,
    demonstrations: int,
    tasks: Sequence[str] | None = None,
) -> np.ndarray:
    """Outcomes `(S, T, E)` of a variant: training seeds, tasks (by default all of the plan), starts."""
    found = []
    for seed in plan.seeds:
        success: dict[str, list[int]] = {}
        for group in plan.task_groups():
            success |= rows[plan.cell(variant, budget, demonstrations, seed, group)]["success"]
        found.append([success[task] for task in tasks or plan.tasks])
    return np.array(found)


def success_figures(outcomes: np.ndarray) -> dict:
    """Rate over all trials with the bootstrap's interval, and Wilson's, which takes trials as independent."""
    wilson = load_metric("success_rate").compute(predictions=outcomes.astype(int).ravel().tolist())
    figures = {"success_rate": float(outcomes.mean()), "ci95": bootstrap_mean(outcomes)["ci95"]}
    figures["wilson95"] = [round(bound, 4) for bound in wilson["interval"]]
    return figures | {"successes": int(outcomes.sum()), "episodes": outcomes.size}


def describe_rows(plan: Plan, rows: Mapping[Cell, dict]) -> dict:
    """What the figures were measured with."""
    of_rows = [rows[cell] for cell in plan.cells()]
    # One for each seed, whichever cells start from it; `hours` do not count them.
    pretraining_s = {r["seed"]: r["pretraining"]["train_seconds"] for r in of_rows if r.get("pretraining")}
    return {
        **describe_run(),
        "commit": ", ".join(sorted({str(row["commit"]) for row in of_rows})),
        "hardware": of_rows[0]["hardware"],
        "seeds": {
            "training": plan.seeds,
            "first_start": plan.first_start,
            "last_start": plan.first_start + plan.episodes - 1,
            "demonstrations": plan.recordings()[plan.demonstrations[0]].seed,
        },
        "hours": round(sum(row["hours"] for row in of_rows), 2),
        **({"pretraining_hours": round(sum(pretraining_s.values()) / 3600, 2)} if pretraining_s else {}),
        "cells": len(of_rows),
    }


def build_results(plan: Plan, rows: Mapping[Cell, dict], folder: Path) -> dict:
    """All tables of an ablation, ready for JSON.

    Raises:
        ValueError: If a cell is not finished.
    """
    require_all(plan, rows)
    tables = {}
    for budget in plan.budgets:
        for n in plan.demonstrations:
            outcomes = {v: outcomes_of(plan, rows, v, budget, n) for v in plan.variants}
            tables.setdefault(budget, {})[str(n)] = compare(plan, outcomes)
        if len(plan.demonstrations) > 1:
            # A task with few and the same task with many demonstrations are two tasks for the bootstrap.
            tables[budget]["pooled"] = compare(plan, pool_demonstrations(plan, rows, budget, axis=1))
    losses = {
        budget: {str(n): compare_losses(plan, rows, budget, n) for n in plan.demonstrations}
        for budget in plan.budgets
    }
    results = {
        "version": 1,
        "benchmark": BENCHMARK_TITLES[plan.simulator],
        "tasks": plan.tasks,
        "steps": plan.steps,
        "reference": plan.reference,
    }
    # As in other results files: the reference's mean over tasks, and every task, from all demonstrations.
    pooled = pool_demonstrations(plan, rows, plan.budgets[0], axis=2)
    results |= success_figures(pooled[plan.reference])
    results["success_by_task"] = {
        task: {v: success_figures(pooled[v][:, [number]]) for v in plan.variants}
        for number, task in enumerate(plan.tasks)
    }
    results |= {"success": tables, "validation_losses": losses}
    shares = find_shares(plan, folder)
    results["depth_motion"] = {b: relate_to_depth(plan, rows, b, shares) for b in plan.budgets}
    return results | describe_rows(plan, rows)


def pool_demonstrations(plan: Plan, rows: Mapping[Cell, dict], budget: str, axis: int) -> dict:
    """Outcomes `(S, T, E)` of each variant, those of all numbers of demonstrations joined along an axis."""
    return {
        v: np.concatenate([outcomes_of(plan, rows, v, budget, n) for n in plan.demonstrations], axis)
        for v in plan.variants
    }


def compare(plan: Plan, outcomes: Mapping[str, np.ndarray]) -> dict:
    """Success of every variant, and the difference of every two of them."""
    names = [plan.reference, *(name for name in outcomes if name != plan.reference)]
    return {
        "variants": {name: success_figures(outcomes[name]) for name in outcomes},
        "differences": [
            {"first": a, "second": b, **paired_difference(outcomes[a], outcomes[b])}
            for a, b in itertools.combinations(names, 2)
        ],
    }


def compare_losses(plan: Plan, rows: Mapping[Cell, dict], budget: str, demonstrations: int) -> dict:
    """Validation losses of each variant (Table III): mean over training seeds and policies, and each of them.

    `flow` of two forms (absolute, displacement, 2D) and `future` with and without depth are different
    losses: only variants of one form can be compared.
    """
    table: dict[str, dict] = {}
    for variant in plan.variants:
        cells = (
            plan.cell(variant, budget, demonstrations, seed, tasks)
            for seed in plan.seeds
            for tasks in plan.task_groups()
        )
        found = [rows[cell]["validation"].get("losses", {}) for cell in cells]
        table[variant] = {}
        for name in found[0]:
            if name != "total":
                values = [losses[name] for losses in found]
                table[variant][name] = {"mean": float(np.mean(values)), "values": values}
    return table


def find_shares(plan: Plan, folder: Path) -> dict[str, float]:
    """Share of motion in depth of each task, from its demonstrations."""
    n, shares = max(plan.demonstrations), {}
    recording = plan.recordings()[n]
    for tasks in plan.task_groups():
        shares |= depth_shares(data_folder(plan, folder, n, tasks), recording.cameras[0], flow_length=6)
    return shares


def relate_to_depth(plan: Plan, rows: Mapping[Cell, dict], budget: str, shares: Mapping[str, float]) -> dict:
    """Success of 3D Foresight minus others' per task, against the share of motion in depth (Fig. 4)."""
    pooled = pool_demonstrations(plan, rows, budget, axis=2)
    rates = {variant: outcomes.mean(axis=(0, 2)) for variant, outcomes in pooled.items()}  # (T,)
    increments = {}
    for ours, theirs in itertools.permutations(plan.variants, 2):
        if ours.startswith("foresight_3d") and not theirs.startswith("foresight_3d"):
            gains = [round(float(gain), 4) for gain in rates[ours] - rates[theirs]]
            increments[f"{ours} - {theirs}"] = {
                "gain": dict(zip(plan.tasks, gains, strict=True)),
                "rank_correlation": rank_correlation([shares[task] for task in plan.tasks], gains),
            }
    success = {v: dict(zip(plan.tasks, np.round(rates[v], 4).tolist(), strict=True)) for v in rates}
    return {"share_in_depth": dict(shares), "success": success, "increments": increments}


def format_results(results: Mapping) -> str:
    """The tables as Markdown."""
    by_task = results["success_by_task"]
    solved = [
        [task, *(f"{one['successes']}/{one['episodes']}" for one in of_variants.values())]
        for task, of_variants in by_task.items()
    ]
    names = next(iter(by_task.values()))
    parts = [f"**Success by task**\n\n{markdown_table(['task', *names], solved)}"]
    for budget, tables in results["success"].items():
        title = "equal steps" if budget == "steps" else "equal processor time"
        for n, table in tables.items():
            what = "all demonstrations pooled" if n == "pooled" else f"{n} demonstrations a task"
            parts.append(
                f"**Success, {title}, {what}**\n\n{format_success_table(table, results['reference'])}"
            )
        for n, losses in results["validation_losses"][budget].items():
            parts.append(
                f"**Validation losses, {title}, {n} demonstrations a task**\n\n{format_losses(losses)}"
            )
        if results["depth_motion"][budget]["increments"]:
            parts.append(f"**Motion in depth, {title}**\n\n{format_depth(results['depth_motion'][budget])}")
    return "\n\n".join(parts) + "\n"


def format_success_table(table: Mapping, reference: str) -> str:
    """A row per variant: its success, and how far the reference is ahead of it."""
    ahead = {one["second"]: one for one in table["differences"] if one["first"] == reference}
    lines = []
    for name, figures in table["variants"].items():
        low, high = (100 * bound for bound in figures["ci95"])
        row = [name, f"{figures['successes']}/{figures['episodes']}", f"{100 * figures['success_rate']:.1f}"]
        row.append(f"{low:.1f} to {high:.1f}")
        if one := ahead.get(name):
            low, high = (100 * bound for bound in one["ci95"])
            row += [
                f"{100 * one['mean']:+.1f}",
                f"{low:+.1f} to {high:+.1f}",
                f"{one['won']} / {one['lost']}",
            ]
        lines.append(row + ["-"] * (7 - len(row)))
    header = ["variant", "solved", "%", "95 % interval", f"{reference} minus it, points", "95 % interval"]
    return markdown_table([*header, "only one solved: it / this"], lines)


def format_losses(losses: Mapping) -> str:
    """A row per variant, a column per loss."""
    names = list(dict.fromkeys(name for of_variant in losses.values() for name in of_variant))
    lines = [
        [variant, *(f"{known[name]['mean']:.4g}" if name in known else "-" for name in names)]
        for variant, known in losses.items()
    ]
    return markdown_table(["variant", *names], lines)


def format_depth(depth: Mapping) -> str:
    """A row per task, by its share of motion in depth; the last row has the rank correlations."""
    shares, increments = depth["share_in_depth"], depth["increments"]
    lines = [
        [task, f"{shares[task]:.2f}", *(f"{100 * one['gain'][task]:+.1f}" for one in increments.values())]
        for task in sorted(shares, key=shares.get)
    ]
    ranks = [one["rank_correlation"] for one in increments.values()]
    lines.append(["rank correlation", "", *("-" if rank is None else f"{rank:+.2f}" for rank in ranks)])
    return markdown_table(["task", "share in depth", *(f"{name}, points" for name in increments)], lines)


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Rows of text as a Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
