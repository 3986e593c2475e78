"""Results of finished cells: success, paired differences, validation losses, gains and motion in depth."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from datasets_scripts.command_line import list_some
from experiments.cells import measure_shares, run_config
from experiments.plans import Cell, Plan
from modeling_foresight.configuration_foresight import ForesightConfig
from training.diagnostics.intervals import paired_difference, rank_correlation, success_rate
from training.run_record import describe_run

__all__ = [
    "build_results",
    "compare",
    "describe_rows",
    "format_results",
    "markdown_table",
    "outcomes_of",
    "pool_demonstrations",
    "require_all",
]

BENCHMARK_TITLES = {
    "metaworld": "MetaWorld",
    "libero": "LIBERO, trained on scripted demonstrations: not the standard protocol",
}


def require_all(plan: Plan, rows: Mapping[Cell, dict]) -> None:
    """Raises a `ValueError` that names the unfinished cells, if there are any."""
    missing = [cell.name for cell in plan.cells() if cell not in rows]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(plan.cells())} cells are not finished: {list_some(missing, most=8)}. "
            "The same command without --tables continues; a copy of the plan with fewer seeds or budgets "
            "gives tables earlier"
        )


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


def describe_rows(plan: Plan, rows: Mapping[Cell, dict]) -> dict:
    """What the figures were measured with, by all machines; `hours` are of training and evaluation."""
    of_rows = [rows[cell] for cell in plan.cells()]
    # One for each seed, whichever cells start from it; `hours` do not count them.
    pretraining_s = {r["seed"]: r["pretraining"]["train_seconds"] for r in of_rows if r.get("pretraining")}

    def distinct(name: str) -> list:
        values = [row[name] for row in of_rows]
        return [value for i, value in enumerate(values) if value not in values[:i]]

    several = {name: distinct(name) for name in ("command", "versions", "hardware")}
    return {
        **describe_run(),
        **{name: values[0] if len(values) == 1 else values for name, values in several.items()},
        "commit": ", ".join(sorted(map(str, distinct("commit")))),
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
            tables[budget]["pooled"] = compare(plan, pool_demonstrations(plan, rows, budget))
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
    pooled = pool_demonstrations(plan, rows, plan.budgets[0])
    results |= success_rate(pooled[plan.reference])
    results["success_by_task"] = {
        task: {v: success_rate(pooled[v][:, [number]]) for v in plan.variants}
        for number, task in enumerate(plan.tasks)
    }
    training = {
        budget: {str(n): training_times(plan, rows, budget, n) for n in plan.demonstrations}
        for budget in plan.budgets
    }
    results |= {"success": tables, "validation_losses": losses, "training": training}
    shares = measure_shares(plan, folder)
    results["depth_motion"] = {b: relate_to_depth(plan, rows, b, shares) for b in plan.budgets}
    return results | describe_rows(plan, rows)


def pool_demonstrations(
    plan: Plan, rows: Mapping[Cell, dict], budget: str, tasks: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Outcomes `(S, T, E, N)` of each variant; all numbers of demonstrations meet the same starts."""
    return {
        v: np.stack([outcomes_of(plan, rows, v, budget, n, tasks) for n in plan.demonstrations], -1)
        for v in plan.variants
    }


def compare(plan: Plan, outcomes: Mapping[str, np.ndarray]) -> dict:
    """Success of every variant, and the difference of every two of them."""
    names = [plan.reference, *(name for name in outcomes if name != plan.reference)]
    return {
        "variants": {name: success_rate(outcomes[name]) for name in outcomes},
        "differences": [
            {"first": a, "second": b, **paired_difference(outcomes[a], outcomes[b])}
            for a, b in itertools.combinations(names, 2)
        ],
    }


def compare_losses(plan: Plan, rows: Mapping[Cell, dict], budget: str, demonstrations: int) -> dict:
    """Validation losses of the action and of `plan.losses` (Table III), by variant and loss.

    Returns:
        `dict`: `mean` over training seeds and policies, and `values` of each. Where the reference has the
        same loss, `difference`: the variant's minus the reference's, paired by seed and policy, `mean` and
        Student's 95 % interval `ci95` (`None` for a single pair). `flow` of two forms (absolute,
        displacement, 2D) and `future` or `depth` of two forms are different losses.
    """
    fields = {variant: run_config(plan, variant).model for variant in plan.variants}
    table: dict[str, dict] = {}
    for variant in dict.fromkeys([plan.reference, *plan.variants]):
        of_variant = rows_of(plan, rows, variant, budget, demonstrations)
        found = [row["validation"].get("losses", {}) for row in of_variant]
        table[variant] = {}
        for name in ("action", *plan.losses):
            if name not in found[0]:
                continue
            values = [losses[name] for losses in found]
            table[variant][name] = entry = {"mean": float(np.mean(values)), "values": values}
            forms = [loss_form(fields[one], name) for one in (variant, plan.reference)]
            if variant != plan.reference and forms[0] == forms[1]:
                differences = np.subtract(values, table[plan.reference][name]["values"])
                entry["difference"] = mean_of_pairs(differences)
    return {variant: table[variant] for variant in plan.variants}


def rows_of(
    plan: Plan, rows: Mapping[Cell, dict], variant: str, budget: str, demonstrations: int
) -> list[dict]:
    """Rows of a variant, in the order of seeds and policies."""
    groups = itertools.product(plan.seeds, plan.task_groups())
    return [rows[plan.cell(variant, budget, demonstrations, seed, tasks)] for seed, tasks in groups]


def loss_form(fields: Mapping, name: str) -> tuple:
    """What a loss measures, by the fields of a model's config: equal ones of two variants can be compared."""
    parts = [part for part in fields["objectives"] if part == name or part.startswith(f"{name}_")]
    form = {"flow": "flow_form", "depth": "depth_form", "future": "depth_form"}.get(name)
    return parts, form and fields.get(form, getattr(ForesightConfig, form))


def mean_of_pairs(differences: np.ndarray) -> dict:
    """Mean of differences, with Student's 95 % interval."""
    mean, bounds = float(differences.mean()), None
    if len(differences) > 1:
        error = differences.std(ddof=1) / len(differences) ** 0.5
        reach = float(stats.t.ppf(0.975, len(differences) - 1) * error)
        bounds = [mean - reach, mean + reach]
    return {"mean": mean, "ci95": bounds}


def training_times(
    plan: Plan, rows: Mapping[Cell, dict], budget: str, demonstrations: int
) -> dict[str, dict]:
    """Steps of each variant, and the processor time that they took in each training.

    A machine that other programs use slows steps down, and not those of all variants alike: this says how
    equal the time was in the end.
    """
    found = {}
    for variant in plan.variants:
        of_variant = rows_of(plan, rows, variant, budget, demonstrations)
        minutes = [row["steps"] * row["step_cpu_s"] / 60 for row in of_variant]
        found[variant] = {"steps": of_variant[0]["steps"], "cpu_minutes": [round(m, 2) for m in minutes]}
    return found


def relate_to_depth(plan: Plan, rows: Mapping[Cell, dict], budget: str, shares: Mapping[str, float]) -> dict:
    """Success of 3D Foresight minus others' per task, against the share of motion in depth (Fig. 4)."""
    pooled = pool_demonstrations(plan, rows, budget)
    rates = {variant: outcomes.mean(axis=(0, 2, 3)) for variant, outcomes in pooled.items()}  # (T,)
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
    if len(results["seeds"]["training"]) == 1:
        parts.append(
            "One training seed: the intervals of success know the chance of starts, not that of training."
        )
    for budget, tables in results["success"].items():
        title = "equal steps" if budget == "steps" else "equal processor time"
        for n, table in tables.items():
            what = "all demonstrations pooled" if n == "pooled" else f"{n} demonstrations a task"
            parts.append(
                f"**Success, {title}, {what}**\n\n{format_success_table(table, results['reference'])}"
            )
        for n, losses in results["validation_losses"][budget].items():
            parts.append(
                f"**Validation losses, {title}, {n} demonstrations a task**\n\n"
                f"{format_losses(losses, results['reference'])}"
            )
        for n, training in results["training"][budget].items():
            parts.append(f"**Training, {title}, {n} demonstrations a task**\n\n{format_training(training)}")
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
    return markdown_table([*header, f"only {reference} solved / only it"], lines)


def format_losses(losses: Mapping, reference: str) -> str:
    """A row per variant, two columns per loss: its mean, and how far it is above the reference's."""
    names = list(dict.fromkeys(name for of_variant in losses.values() for name in of_variant))

    def cells(entry: Mapping | None) -> list[str]:
        if entry is None:
            return ["-", "-"]
        difference, text = entry.get("difference"), "-"
        if difference:
            text = f"{difference['mean']:+.2g}"
            if difference["ci95"]:
                text += " ({:+.2g} to {:+.2g})".format(*difference["ci95"])
        return [f"{entry['mean']:.4g}", text]

    header = ["variant", *itertools.chain(*([name, f"minus {reference}'s"] for name in names))]
    lines = [
        [v, *itertools.chain(*(cells(known.get(name)) for name in names))] for v, known in losses.items()
    ]
    return markdown_table(header, lines)


def format_training(training: Mapping) -> str:
    """A row per variant: its steps, and the processor time of its trainings."""
    lines = [
        [
            name,
            str(one["steps"]),
            f"{np.mean(one['cpu_minutes']):.1f}",
            f"{min(one['cpu_minutes']):.1f} to {max(one['cpu_minutes']):.1f}",
        ]
        for name, one in training.items()
    ]
    return markdown_table(["variant", "steps", "processor time, minutes", "of single trainings"], lines)


def format_depth(depth: Mapping) -> str:
    """A row per pair of variants: by how many points the first is ahead in each task, and the correlation."""
    shares = depth["share_in_depth"]
    tasks = sorted(shares, key=shares.get)
    lines = [["share in depth", *(f"{shares[task]:.2f}" for task in tasks), ""]]
    for name, one in depth["increments"].items():
        rank = one["rank_correlation"]
        gains = [f"{100 * one['gain'][task]:+.0f}" for task in tasks]
        lines.append([f"{name}, points", *gains, "-" if rank is None else f"{rank:+.2f}"])
    return markdown_table(["", *tasks, "rank correlation"], lines)


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Rows of text as a Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
