"""Prediction errors of a model beside those of trivial predictors, and how a card words numbers and lists."""

import math
from collections.abc import Mapping, Sequence

__all__ = ["build_error_rows", "format_number", "join_words"]

NONE = "–"  # where there is no such predictor; an empty cell would be a missing figure
PATCHES = {"depth": "depth", "future_rgb": "future image", "future_depth": "future depth"}
FLOW = {
    "x_px": ("x", "pixels"),
    "y_px": ("y", "pixels"),
    "xy_px": ("x and y", "pixels, distance"),
    "z_m": ("z", "mm"),
    "start_z_m": ("z at the start", "mm"),
    "displacement_x_px": ("displacement in x", "pixels"),
    "displacement_y_px": ("displacement in y", "pixels"),
    "displacement_z_m": ("displacement in z", "mm"),
}


def build_error_rows(validation: Mapping, action_unit: str) -> list[dict]:
    """Errors of the model and of trivial predictors, one row per prediction; `value` is the model's."""
    rows = []

    def add(what: str, unit: str, group: Mapping, metric: str, copy: str = "") -> None:
        factor = 1000 if unit == "mm" else 1
        model, *others = (
            factor * group[who][metric] if metric in group.get(who, {}) else None
            for who in ("model", "mean", copy)
        )
        if model is None:
            return
        best = all(model < other for other in others if other is not None)
        mean, still = (NONE if other is None else format_number(other) for other in others)
        row = {"what": what, "unit": unit, "value": model, "model": format_number(model)}
        rows.append({**row, "mean": mean, "still": still, "best": best})

    for section, name in PATCHES.items():
        for view, group in validation.get(section, {}).items():
            add(f"{name}, {view}", "squared, per-patch normalized", group, "mse", "current")
    for section, name in {"metric_depth": "depth", "metric_future_depth": "future depth"}.items():
        for view, group in validation.get(section, {}).items():
            add(f"{name} in meters, {view}", "absolute, share of the depth", group, "abs_rel")
    for name, group in validation.get("flow", {}).items():
        if name == "still":  # nothing to foresee
            continue
        for metric, (axes, unit) in FLOW.items():
            if metric == "z_m" and "start_z_m" in group.get("model", {}):
                continue  # "stays put" is told the depth at the start, which the model must see
            add(f"flow, {name} points: {axes}", unit, group, metric, "stay_put")
    for name, group in sorted(validation.get("actions", {}).items(), reverse=True):
        which, _, robot = name.partition("/")  # of several robots
        what = {"first": "next action", "chunk": "all actions of a chunk"}[which]
        add(what + (f", {robot}" if robot else ""), f"absolute, {action_unit}, mean", group, "l1_mean")
    add("progress", "absolute, 0 to 1", validation.get("progress", {}).get("all", {}), "mae")
    return rows


def format_number(value: float) -> str:
    """Three significant digits without an exponent for everyday sizes."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if float(value).is_integer() and "." in text else text


def join_words(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + "".join(parts[-1:])
