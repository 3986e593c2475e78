"""The tables of a model card, from the files of the measuring scripts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from datasets_scripts.inspection.dataset_card import label_licences

__all__ = [
    "closed_loop_rows",
    "describe_conditions",
    "foresight_rows",
    "format_number",
    "join_words",
    "latency_rows",
    "training_rows",
]

NONE = "–"  # where there is no such predictor; an empty cell would be a missing figure


def closed_loop_rows(
    evaluation: Mapping, instructions: Mapping[str, str], seeds: Sequence[Mapping] = ()
) -> list[dict]:
    """A row per task, and one for all of them if there are several.

    Args:
        evaluation (`Mapping`): What `training/evaluate.py` wrote.
        instructions (`Mapping`): Task -> wording.
        seeds (`Sequence[Mapping]`): Evaluations of the same training with other seeds.
    """
    rows = []
    for task in [*evaluation["tasks"], *(["all"] if len(evaluation["tasks"]) > 1 else [])]:
        figures, *others = (_of_task(run, task) for run in (evaluation, *seeds))
        row = {
            "task": task,
            "instruction": instructions.get(task, NONE),
            "rate": _percent(figures),
            "episodes": f"{figures['successes']} of {figures['episodes']}",
            "interval": _interval(figures),
        }
        row["others"] = [
            f"{_percent(f)} ({f['successes']} of {f['episodes']}; {_interval(f)})" for f in others
        ]
        rows.append(row)
    return rows


def _of_task(evaluation: Mapping, task: str) -> Mapping:
    return evaluation["mean"] if task == "all" else evaluation["tasks"][task]


def _percent(figures: Mapping) -> str:
    return f"{100 * figures['success_rate']:.4g} %"


def _interval(figures: Mapping) -> str:
    return "{:.1f} to {:.1f} %".format(*(100 * bound for bound in figures["ci95"]))


def foresight_rows(validation: Mapping, action_unit: str) -> list[dict]:
    """Errors of the model and of trivial predictors, one row per prediction; `value` is the model's."""
    rows = []

    def add(what: str, unit: str, group: Mapping, metric: str, copy: str, factor: float = 1.0) -> None:
        values = {
            who: group[who][metric] * factor
            for who in ("model", "mean", copy)
            if metric in group.get(who, {})
        }
        if "model" not in values:
            return
        others = [value for who, value in values.items() if who != "model"]
        mean, copied = (format_number(values[who]) if who in values else NONE for who in ("mean", copy))
        best = not others or values["model"] < min(others)
        row = {"what": what, "unit": unit, "mean": mean, "still": copied, "best": best}
        text = format_number(values["model"])
        rows.append({**row, "value": values["model"], "model": f"**{text}**" if best else text})

    patch = "squared, per-patch normalised"
    for section, name in {
        "depth": "depth",
        "future_rgb": "future image",
        "future_depth": "future depth",
    }.items():
        for view, group in validation.get(section, {}).items():
            add(f"{name}, {view}", patch, group, "mse", "current")
    for name, group in validation.get("flow", {}).items():
        what = "flow, all points" if name == "all" else "flow, moving points"
        add(f"{what}: x", "pixels", group, "x_px", "stay_put")
        add(f"{what}: y", "pixels", group, "y_px", "stay_put")
        add(f"{what}: x and y", "pixels, distance", group, "xy_px", "stay_put")
        add(f"{what}: z", "mm", group, "z_m", "stay_put", 1000)
    for name, what in {"first": "next action", "chunk": "all actions of a chunk"}.items():
        if name in validation.get("actions", {}):
            add(what, f"absolute, {action_unit}, mean", validation["actions"][name], "l1_mean", "")
    if "progress" in validation:
        add("progress", "absolute, 0 to 1", validation["progress"]["all"], "mae", "")
    return rows


def latency_rows(latency: Mapping) -> list[dict]:
    """A row per measurement of `evaluation/latency.json`."""
    return [
        {
            "hardware": f"{row['hardware']}, {row['threads']} of {row['cores']} cores"
            if row["device"] == "cpu"
            else row["hardware"],
            "precision": row["dtype"],
            "median": f"{format_number(row['median_ms'])} ms",
            "p90": f"{format_number(row['p90_ms'])} ms",
            "count": row["count"],
            "date": row["date"][:10],
        }
        for row in latency["measurements"]
    ]


def training_rows(summary: Mapping) -> list[tuple[str, str]]:
    """Data, labels and the run, as pairs of name and value."""
    rows = []
    for dataset in summary["datasets"]:
        held_out = len(dataset["validation_episodes"])
        rows.append(
            (
                f"data: `{dataset['name']}`",
                f"{dataset['train_episodes']} episodes ({dataset['train_windows']:,} windows) for training, "
                f"{held_out} held out; {format_number(dataset['fps'])} frames a second",
            )
        )
        for camera, labels in dataset.get("labels", {}).items():
            sources = [_describe_label(kind, labels[kind]) for kind in ("depth", "tracks") if kind in labels]
            if sources:
                rows.append((f"labels: {camera} camera", "; ".join(sources)))
    rows += [
        ("objectives", ", ".join(summary["objectives"])),
        ("parameters", f"{summary['parameters']:,}, of which {summary['trained_parameters']:,} trained"),
        ("steps", f"{summary['steps']:,}"),
        ("time", f"{summary['train_seconds'] / 60:.1f} minutes"),
        (
            "precision",
            "float32" if summary["mixed_precision"] == "no" else f"{summary['mixed_precision']} autocast",
        ),
        ("processes", f"{summary['processes']} x {summary['device']}"),
        ("seed", str(summary["seed"])),
    ]
    if "lora" in summary:
        rows.append(("LoRA rank", str(summary["lora"]["r"])))
    return rows


def _describe_label(kind: str, label: Mapping[str, Any]) -> str:
    models = [f"{name}, {licence}" for name, licence in sorted(set(label_licences(label)))]
    return f"{kind}: {label['source']}" + (f" ({'; '.join(models)})" if models else "")


def describe_conditions(run: Mapping) -> str:
    """Hardware, versions, commit and date of a measurement in one sentence."""
    hardware, versions = run["hardware"], run["versions"]
    machine = [hardware["gpu"]] if "gpu" in hardware else []
    machine.append(
        f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['torch_threads']} used by PyTorch"
    )
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items())
    commit = f", commit `{run['commit']}`" if run.get("commit") else ""
    return f"On {'; '.join(machine)}; {libraries}{commit}; {run['date']}."


def format_number(value: float) -> str:
    """Three significant digits without an exponent for everyday sizes."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if float(value).is_integer() and "." in text else text


def join_words(parts: Sequence[str], noun: str = "") -> str:
    """`a, b and c`, followed by a noun in singular or plural."""
    text = ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + "".join(parts[-1:])
    return f"{text} {noun}{'s' if len(parts) > 1 else ''}" if noun else text
