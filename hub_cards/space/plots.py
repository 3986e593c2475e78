"""Plots that can be turned and read: the scene with its flow in 3D, and actions over the episode."""

import html

import numpy as np
import plotly.graph_objects as go
from PIL import Image
from plotly.subplots import make_subplots

from datasets_scripts.inspection.drawing import Flow, locate_points
from hub_cards.space.episode_predictions import EpisodeView
from training.evaluation.predictions import Moment

__all__ = ["CLOUDS", "draw_actions", "draw_scene"]

RECORDED, PREDICTED, OTHER = "#3b82f6", "#f97316", "#9ca3af"
CLOUD_POINTS = 9216  # of a depth map, at most
BACKGROUND = 1.8  # times the median depth: what is farther is not drawn
# What the cloud of points is made of: fields of `Moment` for colors and depth, and which one of the pair.
CLOUDS = {
    "now": ("camera", "depth", 0),
    "now, predicted": ("camera", "depth", 1),
    "ahead": ("future_rgb", "future_depth", 0),
    "ahead, predicted": ("future_rgb", "future_depth", 1),
}
LAYOUT = {
    **dict.fromkeys(("paper_bgcolor", "plot_bgcolor"), "rgba(0,0,0,0)"),
    "font": {"color": "#808080", "size": 11},
    "legend": {"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom", "font": {"size": 12}},
    "uirevision": "keep",  # the point of view that somebody has chosen
}
# Without intrinsics a camera is drawn as wide as it is far: 53 degrees.
ASSUMED_INTRINSICS = {"fx": 1.0, "fy": 1.0, "cx": 0.5, "cy": 0.5, "width": 1, "height": 1}


def draw_scene(view: EpisodeView, number: int, cloud: str) -> go.Figure:
    """The first view's scene at moment `number`, with recorded and predicted flow.

    In meters, seen from beside the camera: x to the right, y away from the camera, z up. `cloud` says what
    the cloud of colored points shows; one of `CLOUDS`.
    """
    moment = view.predictions[number].views.get(view.config.views[0])
    figure, missing = go.Figure(), []
    if moment is not None:
        missing += _add_cloud(figure, view, moment, cloud)
        missing += _add_flow(figure, view, moment)
    if view.intrinsics is None and figure.data:
        missing.append("camera intrinsics unknown: 53° assumed")
    note = {"text": "<br>".join(missing), "showarrow": False, "font": {"size": 12}}
    note |= {"xref": "paper", "yref": "paper", "x": 0.5, "y": 0.0, "yanchor": "bottom"}
    figure.update_layout(
        **LAYOUT,
        height=430,
        margin={"l": 0, "r": 0, "t": 24, "b": 0},
        annotations=[note],
        scene={
            "aspectmode": "data",
            "uirevision": "keep",
            **dict.fromkeys(("xaxis", "yaxis", "zaxis"), {"visible": False}),
            "camera": {"eye": {"x": 0.55, "y": -1.25, "z": 0.55}, "center": {"x": 0, "y": 0, "z": 0}},
        },
    )
    return figure


def _locate_in_scene(view: EpisodeView, xy: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Image fractions `(..., 2)` and depth `(...)` -> `(..., 3)` meters: right, away, up."""
    points = np.concatenate([xy, z[..., None]], axis=-1)
    right, down, away = np.moveaxis(locate_points(points, view.intrinsics or ASSUMED_INTRINSICS), -1, 0)
    return np.stack([right, away, -down], axis=-1)


def _add_cloud(figure: go.Figure, view: EpisodeView, moment: Moment, cloud: str) -> list[str]:
    """Colored points of a depth map; returns what is missing."""
    color_field, depth_field, which = CLOUDS[cloud]
    pair = getattr(moment, depth_field)
    colors = moment.camera if color_field == "camera" else moment.future_rgb and moment.future_rgb[which]
    if pair is None:
        return [f"no points: this checkpoint predicts no {depth_field.replace('_', ' ')}"]
    if pair[which] is None or colors is None:
        return ["no points: no depth was recorded here"]
    depth = pair[which]
    height, width = depth.shape
    step = max(1, round((height * width / CLOUD_POINTS) ** 0.5))
    rows, columns = np.mgrid[0:height:step, 0:width:step]
    z = depth[rows, columns]
    known = np.isfinite(z) & (z > 0)
    if known.any():  # a far background would make the scene small
        known &= z <= BACKGROUND * np.median(z[known])
    xy = np.stack([(columns + 0.5) / width, (rows + 0.5) / height], axis=-1)
    points = _locate_in_scene(view, xy[known], z[known]).astype(np.float32)
    xyz = dict(zip("xyz", points.T, strict=True))
    marker = {"size": 3, "opacity": 1, **_build_palette(colors[rows, columns], known)}
    figure.add_scatter3d(**xyz, mode="markers", marker=marker, hoverinfo="skip", showlegend=False)
    return []


def _build_palette(picture: np.ndarray, chosen: np.ndarray) -> dict:
    """Colors of the chosen pixels of `(h, w, 3)` as numbers of a scale: a text for each is slow to send."""
    pixels = Image.fromarray((255 * np.clip(picture, 0, 1)).round().astype(np.uint8)).quantize(256)
    colors = np.asarray(pixels.getpalette()).reshape(-1, 3)
    last = max(1, len(colors) - 1)
    scale = [(i / last, f"rgb({r},{g},{b})") for i, (r, g, b) in enumerate(colors)]
    scale = scale if len(scale) > 1 else [*scale, (1, scale[0][1])]
    return {"color": np.asarray(pixels)[chosen], "colorscale": scale, "cmin": 0, "cmax": last}


def _add_flow(figure: go.Figure, view: EpisodeView, moment: Moment) -> list[str]:
    """Trails of moving points; returns what is missing."""
    if moment.flow is None:
        return ["no flow: this checkpoint predicts none"]
    if view.config.flow_dim == 2:
        return ["this checkpoint predicts flow in the image only, not in space"]
    names, colors = ("recorded flow", "predicted flow"), (RECORDED, PREDICTED)
    for flow, name, color in zip(moment.flow, names, colors, strict=True):
        if flow is not None:
            xyz = dict(zip("xyz", _join_trails(view, flow).T, strict=True))
            line = {"color": color, "width": 6}
            figure.add_scatter3d(**xyz, mode="lines", line=line, name=name, hoverinfo="skip")
    return [] if moment.flow[0] is not None else ["no tracks were recorded"]


def _join_trails(view: EpisodeView, flow: Flow) -> np.ndarray:
    """Ways of the moving points, `(m, 3)` meters, with NaN between two of them."""
    points = _locate_in_scene(view, flow.points[..., :2], flow.points[..., 2])  # (L, P, 3)
    points = np.where(flow.shown[..., None], points, np.nan)[:, flow.moving]
    gap = np.full((1, *points.shape[1:]), np.nan)
    return np.concatenate([points, gap]).swapaxes(0, 1).reshape(-1, 3).astype(np.float32)


def draw_actions(view: EpisodeView, number: int, usual: EpisodeView | None = None) -> go.Figure:
    """Recorded and predicted actions over the episode; at moment `number`, the whole predicted chunk.

    One row per entry of the action. `usual` is the same episode with the recorded instruction, to compare.
    """
    names = view.action_names if view.config.has("action") else []
    figure = make_subplots(
        rows=max(1, len(names)), cols=1, shared_xaxes=True, vertical_spacing=0.12 / max(2, len(names))
    )
    frames = np.array([prediction.frame for prediction in view.predictions])
    lines = _action_lines(view, number, usual, frames) if names else []
    for entry, title in enumerate(names):
        for name, (x, values, style) in lines.items():
            figure.add_scatter(
                x=x,
                y=values[:, entry],
                name=name,
                legendgroup=name,
                showlegend=entry == 0,
                mode="lines" if x is frames else "lines+markers",
                line={"width": 2, **style},
                marker={"size": 5},
                row=entry + 1,
                col=1,
            )
        figure.update_yaxes(title={"text": html.escape(title), "font": {"size": 11}}, row=entry + 1, col=1)
    figure.update_xaxes(range=[frames[0] - 0.5, frames[-1] + view.config.chunk_size * view.stride])
    figure.update_xaxes(title="frame", row=max(1, len(names)), col=1)
    figure.update_xaxes(gridcolor="rgba(128,128,128,0.2)", zeroline=False)
    figure.update_yaxes(gridcolor="rgba(128,128,128,0.2)", zeroline=False, nticks=4)
    if names:
        figure.add_vline(x=int(frames[number]), line={"color": "#808080", "width": 1, "dash": "dot"})
    else:
        figure.add_annotation(text="this checkpoint predicts no actions", showarrow=False)
    height, margin = max(200, 90 + 80 * len(names)), {"l": 60, "r": 10, "t": 30, "b": 40}
    return figure.update_layout(**LAYOUT, height=height, margin=margin)


def _action_lines(view: EpisodeView, number: int, usual: EpisodeView | None, frames: np.ndarray) -> dict:
    """Name -> x `(n,)`, values `(n, A)` and style of a line."""
    recorded, predicted = zip(*(prediction.actions for prediction in view.predictions), strict=True)
    lines = {}
    if recorded[0] is not None:
        lines["recorded"] = frames, np.stack([chunk[0] for chunk in recorded]), {"color": RECORDED}
    if usual is not None:
        chunks = np.stack([prediction.actions[1][0] for prediction in usual.predictions])
        lines["predicted, recorded words"] = frames, chunks, {"color": OTHER, "dash": "dot"}
    lines["predicted"] = frames, np.stack([chunk[0] for chunk in predicted]), {"color": PREDICTED}
    chunk = predicted[number]  # (K, A)
    ahead = frames[number] + view.stride * np.arange(len(chunk))
    lines["chunk predicted now"] = ahead, chunk, {"color": "#b91c1c"}
    return lines
