"""The rows of a card on what the policy depends on, from what `training/diagnose.py` wrote."""

from collections.abc import Mapping, Sequence
from statistics import median

from hub_cards.cards.error_tables import NONE, format_number

__all__ = ["build_condition_rows", "build_demonstration_rows", "describe_limit"]

CONDITION_TEXTS = {
    "plain": "nothing",
    "frozen_camera": "images stay those of the first step",
    "swapped_views": "every view shows the next camera",
    "other_instruction": "instruction of another task with the same objects",
    "named_task": "the same, and success is that of the named task",
}
HIGHEST = 3  # tasks that are named


def build_condition_rows(diagnostics: Mapping) -> list[dict]:
    """A row per condition: `what` was changed, `figures` as in an evaluation, `difference` in points."""
    rows = []
    for name, figures in diagnostics["closed_loop"].items():
        kind, _, number = name.rpartition("_")
        texts = {
            "history": f"memory of {number} frame{'s' * (number != '1')}",
            "execute": f"{number} actions executed per plan",
        }
        what = CONDITION_TEXTS.get(name) or texts[kind]
        row = {
            "what": what,
            "figures": figures,
            "tasks": len(figures["tasks"]),
            "difference": NONE,
            "unchanged": NONE,
        }
        if name != "plain":
            difference = figures["difference"]
            low, high = (100 * bound for bound in difference["ci95"])
            row["difference"] = f"{100 * difference['mean']:+.1f} ({low:+.1f} to {high:+.1f})"
            row["unchanged"] = f"{figures['plain_successes']} of {figures['episodes']}"
        rows.append(row)
    return rows


def describe_limit(diagnostics: Mapping) -> str:
    """After how many steps an episode has failed, for example `240 simulation steps`."""
    settings = diagnostics["settings"]
    if "max_simulation_steps" in settings:
        return f"{settings['max_simulation_steps']} simulation steps"
    return " and ".join(f"{steps} steps ({suite})" for suite, steps in settings["max_steps"].items())


def build_demonstration_rows(diagnostics: Mapping, action_unit: str) -> list[tuple[str, str]]:
    """What was measured and the figure, of demonstrations that the policy was not trained on."""
    found = diagnostics.get("demonstrations")
    if not found:
        return []
    rows = []
    if progress := found.get("progress"):
        rows += [
            ("progress, mean absolute error", format_number(progress["mae"])),
            ("progress, expected calibration error in ten bins", format_number(progress["ece"])),
        ]
    errors = {task: one["next_action_l1"] for task, one in found["tasks"].items() if "next_action_l1" in one}
    if errors:
        highest = sorted(errors, key=errors.get, reverse=True)[:HIGHEST]
        named = "; ".join(f"{format_number(errors[task])} ({task})" for task in highest)
        error = f"next action, absolute, {action_unit}, mean of a task"
        rows += [(f"{error}: median task", format_number(median(errors.values())))]
        rows += [(f"{error}: highest", named)] if len(errors) > 1 else []
    if named := found.get("instruction"):
        change, other, own = (format_number(named[f"{name}_l1"]) for name in ("change", "other", "named"))
        what = "change of the next action when another task with the same objects is named"
        rows.append((what, f"{change}; its error {other} instead of {own} ({named['windows']} windows)"))
    return rows + _causality_rows(found["causality"])


def _causality_rows(causality: Mapping) -> Sequence[tuple[str, str]]:
    texts = {
        "later_frames": "largest change of an action by noise in all frames after it",
        "labels": "largest change of an action by noise in depth, tracks, future images and actions",
        "stream": "largest distance of an action between a whole window and the stream that controls",
    }
    return [(text, f"{causality[name]:.2g}") for name, text in texts.items() if causality[name] is not None]
