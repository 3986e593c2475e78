"""Figures of predictions: one row per moment, truth and prediction side by side."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datasets_scripts.inspection.drawing import add_depth_scale, draw_depth, draw_flow, new_figure
from datasets_scripts.storage.even_spread import spread_evenly
from modeling_foresight import ForesightConfig
from training.evaluation.predictions import Moment, depth_limits, predict_windows
from training.windows import ForesightWindows

__all__ = ["draw_episode", "draw_moments", "explain_figure", "last_window", "to_pixels"]


def draw_episode(model, processor, windows: ForesightWindows, view: str, count: int, kind: str):
    """A figure of `count` moments of an episode, recorded beside predicted, with its title and moments.

    Args:
        model, processor: The policy, in evaluation mode.
        windows (`ForesightWindows`): Windows of one episode, with lookahead frames.
        view (`str`): The camera.
        count (`int`): Rows, evenly spread over the episode.
        kind (`str`): What the title calls the episode.
    """
    config = model.config
    chosen = spread_evenly(last_window(windows, config) + 1, count)
    moments = [p.views[view] for p in predict_windows(model, processor, windows, chosen, [view])]
    name = Path(windows.rows.name).name
    title = f"{kind} {windows.episodes[0]} of {name}: “{windows[0]['task']}”, {view} camera"
    caption = explain_figure(config, windows.rows.fps / windows.config.frame_stride)
    return draw_moments(moments, title, caption), title, moments


def last_window(windows: ForesightWindows, config: ForesightConfig) -> int:
    """The last window of an episode whose future was recorded: `future_shift` steps before its end."""
    frames = config.future_shift * windows.config.frame_stride if config.has("future") else 1
    return max(0, len(windows) - frames)


def draw_moments(
    moments: Sequence[Moment], title: str, caption: str, depth_limits_m: tuple[float, float] | None = None
):
    """A figure with one row per moment; objectives that are off have no columns.

    The colors of depth cover `depth_limits_m`, by default the range of the moments' true depth. No window is
    opened.
    """
    first = moments[0]
    flow_label = "2D flow" if first.flow is not None and first.flow[1].points.shape[-1] == 2 else "3D flow"
    labels = {"depth": "depth", "future_rgb": "future image", "future_depth": "future depth"}
    columns: list[tuple[str, str, int]] = [("camera", "camera", 0)]
    for name, label in {**labels, "flow": flow_label}.items():
        if getattr(first, name) is not None:
            columns += [(name, f"{label}\n{which}", i) for i, which in enumerate(("recorded", "predicted"))]
    limits = depth_limits_m or depth_limits(moments)
    caption = "\n".join(textwrap.wrap(caption, 24 * len(columns)))
    bottom = 0.35 + 0.16 * (caption.count("\n") + 1)
    height = 1.55 * len(moments) + 0.85 + bottom
    figure = new_figure(1.5 * len(columns) + 1.0, height)
    axes = figure.subplots(len(moments), len(columns), squeeze=False)
    figure.subplots_adjust(
        left=0.05, right=0.93, top=1 - 0.8 / height, bottom=bottom / height, wspace=0.04, hspace=0.04
    )
    colors = None
    for row, moment in zip(axes, moments, strict=True):
        for axis, (name, label, which) in zip(row, columns, strict=True):
            axis.set_xticks([]), axis.set_yticks([])
            if moment is first:
                axis.set_title(label, fontsize=9)
            picture = moment.camera if name == "camera" else getattr(moment, name)[which]
            if picture is None:  # not recorded
                axis.set_facecolor("0.6")
            elif name in ("depth", "future_depth"):
                colors = draw_depth(axis, picture, limits)
            elif name == "flow":
                colors = draw_flow(axis, moment.camera, picture, limits) or colors
            else:
                axis.imshow(picture)
        row[0].set_ylabel(f"frame {moment.frame}", fontsize=9)
    if colors is not None:
        add_depth_scale(figure, colors, (0.945, bottom / height, 0.01, 1 - (0.8 + bottom) / height))
    figure.suptitle(title, fontsize=10, y=1 - 0.12 / height, va="top", parse_math=False)
    figure.text(0.05, 0.12 / height, caption, fontsize=7.5, va="bottom")
    return figure


def explain_figure(config: ForesightConfig, fps: float) -> str:
    """The caption of a figure: what its pictures show, at `fps` control steps per second."""
    parts = []
    if config.has("future"):
        distance = f"{config.future_shift} frames ({config.future_shift / fps:.2f} s)"
        if config.future_targets == "window":  # the newest frame's future was never trained
            parts.append(f"Future: of this frame, predicted {distance} before.")
        else:
            parts.append(f"Future: {distance} ahead.")
    metric = config.depth_form == "metric" and config.has_depth_decoder
    if metric:
        parts.append("Depth is predicted in meters.")
    if config.has("future") or (config.has("depth") and not metric):
        what = "Images and depth" if config.has_depth_decoder and not metric else "Images"
        parts.append(
            f"{what} are predicted normalized per patch; for display each patch has the mean and deviation "
            "of the current recorded frame, so only the structure within patches is the model's."
        )
    if config.has_depth_decoder:
        parts.append("Gray: no depth was recorded; what is predicted there was never trained.")
    if config.has("flow"):
        color = " colored by depth" if config.flow_dim == 3 else ""
        parts.append(
            f"Flow: {config.flow_length} steps of the tracked point nearest to each grid node, trails of "
            f"moving points{color}, still points gray."
        )
    return " ".join(parts)


def to_pixels(figure) -> np.ndarray:
    """A figure as `(H, W, 3)` uint8."""
    figure.set_dpi(120)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
