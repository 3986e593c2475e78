"""Pictures of labels: moments of an episode, paths of its points, distributions over a dataset."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datasets_scripts.columns import picture_size
from datasets_scripts.inspection.drawing import (
    Flow,
    add_color_bar,
    depth_range,
    draw_depth,
    draw_flow,
    draw_trails,
    new_figure,
    set_plain_ticks,
)
from datasets_scripts.inspection.labeled_episode import Camera, LabeledEpisode
from datasets_scripts.inspection.quality import DEPTH_EDGES_M, TrackMeter
from datasets_scripts.storage.even_spread import spread_evenly

__all__ = ["draw_distributions", "draw_labels", "draw_motion", "encode_picture"]

SIDE_INCHES = 1.9  # width of a picture in the contact sheet
TRAIL_STEPS = 6  # of a moving point in the picture
TRAIL_MOMENTS = 60  # of an episode, between which whole ways are drawn
DEPTH_BINS = 96


def draw_labels(episode: LabeledEpisode, moments: int):
    """Contact sheet: a column per moment; per camera its image with tracks, and its depth.

    Returns:
        `matplotlib.figure.Figure`: To be saved.
    """
    chosen = spread_evenly(episode.length, moments)
    sizes = []  # height of every row by its width
    for camera in episode.cameras:
        height, width = picture_size(episode.rows.features[camera.image_key])
        sizes += [height / width] * (1 + (camera.depth_key is not None))
    width, height = SIDE_INCHES * len(chosen) + 1.4, SIDE_INCHES * sum(sizes) + 0.85
    figure = new_figure(width, height, layout="constrained")
    axes = figure.subplots(len(sizes), len(chosen), squeeze=False, gridspec_kw={"height_ratios": sizes})
    for axis in axes.flat:
        axis.set_xticks([]), axis.set_yticks([])
    for axis, t in zip(axes[0], chosen, strict=True):
        axis.set_title(f"frame {t}", fontsize=9)
    first = 0
    for camera in episode.cameras:
        last = first + (camera.depth_key is not None)
        colors = _draw_camera(episode, camera, chosen, axes[first : last + 1])
        if colors is not None:
            add_color_bar(figure, colors, ax=axes[first : last + 1].ravel().tolist())
        first = last + 1
    name = Path(episode.rows.name).name
    figure.suptitle(f"{name}, episode {episode.number}: “{episode.task}”", fontsize=10, parse_math=False)
    caption = "Depth: gray is unknown. " if any(camera.depth_key for camera in episode.cameras) else ""
    tracked = [camera for camera in episode.cameras if camera.points is not None]
    if tracked:
        steps = f"with their last {TRAIL_STEPS - 1} steps"
        recorded = all(camera.moving is not None for camera in tracked)
        caption += f"Tracks: still points gray, moving ones {steps}." if recorded else f"Tracks {steps}."
    figure.supxlabel(caption, fontsize=7.5, x=0.02, ha="left")
    return figure


def _draw_camera(episode: LabeledEpisode, camera: Camera, chosen: list[int], axes: np.ndarray):
    """Rows of one camera; returns the colors that mean meters, if there are any."""
    depths = [episode.read(camera.depth_key, t)[0] for t in chosen] if camera.depth_key else []
    values = np.concatenate([np.zeros(0), *map(np.ravel, depths)])
    if camera.points is not None and not depths:
        values = camera.points[..., 2][camera.visible]
    limits, colors = depth_range(values), None
    for i, t in enumerate(chosen):
        image = episode.read(camera.image_key, t)[0] / 255
        if camera.points is None:
            axes[0, i].imshow(image)
        else:
            colors = draw_flow(axes[0, i], image, _recent_flow(camera, t), limits) or colors
        if depths:
            colors = draw_depth(axes[1, i], np.where(depths[i] > 0, depths[i], np.nan), limits)
    for axis, name in zip(axes[:, 0], (camera.name, "depth"), strict=False):
        axis.set_ylabel(name, fontsize=9, parse_math=False)
    return colors


def _recent_flow(camera: Camera, t: int) -> Flow:
    """Where the points are in frame `t`, and where they were before."""
    past = range(t, max(t - TRAIL_STEPS, -1), -1)
    shown = camera.visible[past].copy()
    shown[:, ~shown[0]] = False  # hidden now
    # Where it is not recorded which points move, all have a trail, which shows what moves.
    moving = np.ones(shown.shape[1], bool) if camera.moving is None else camera.moving
    return Flow(camera.points[past], shown, moving)


def draw_motion(episode: LabeledEpisode, camera: Camera):
    """Whole paths of a camera's points over the middle frame, colored by their depth and by how far they go.

    Returns:
        `matplotlib.figure.Figure`: To be saved.
    """
    from matplotlib.colors import LogNorm

    height, width = picture_size(episode.rows.features[camera.image_key])
    side = 3.6  # inches
    figure = new_figure(2 * side + 1.6, side * height / width + 0.3, layout="constrained")
    moments = spread_evenly(episode.length, TRAIL_MOMENTS)
    points, shown = camera.points[moments], camera.visible[moments]
    motion_px = TrackMeter(camera.points, camera.visible, camera.moving).motion_px
    image = episode.read(camera.image_key, episode.length // 2)[0] / 255
    near, far = depth_range(points[..., 2][shown])
    motions = np.broadcast_to(motion_px, shown.shape)
    for axis, label, values, norm, colors in zip(
        figure.subplots(1, 2),
        ("depth (m)", "range of motion (px at 224 px)"),
        (points[..., 2], motions),
        (LogNorm(near, far), LogNorm(1, 100)),
        ("turbo_r", "turbo"),
        strict=True,
    ):
        axis.set_xticks([]), axis.set_yticks([])
        trails = draw_trails(axis, image, points[..., :2], shown, values, norm)
        trails.set_cmap(colors)
        add_color_bar(figure, trails, label, ax=axis, fraction=0.05, pad=0.02)
    return figure


def draw_distributions(depth_counts: np.ndarray | None, points: np.ndarray, errors: Sequence[float]):
    """Distributions of one camera over the episodes read; panels without data are left out.

    Args:
        depth_counts (`np.ndarray`, *optional*): Pixels between `DEPTH_EDGES_M`.
        points (`np.ndarray`): `(3, n)`, of all points: `motion_px` and `shares` of `TrackMeter`, and 1 for a
            point labeled moving, 0 for a still one, NaN where that is not recorded.
        errors (`Sequence[float]`): Relative alignment error of every episode that has one.

    Returns:
        `matplotlib.figure.Figure` or `None`: To be saved; `None` if there is nothing to show.
    """
    panels = []
    if depth_counts is not None and depth_counts.any():
        panels.append((_draw_depths, depth_counts))
    if points.size:
        panels += [(_draw_motions, points[0], points[2]), (_draw_shares, points[1], points[2])]
    if len(errors):
        panels.append((_draw_errors, errors))
    if not panels:
        return None
    figure = new_figure(3.1 * len(panels), 2.3, layout="constrained")
    for axis, (draw, *data) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axis, *data)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.label.set_size(8), axis.yaxis.label.set_size(8)
    return figure


def _draw_depths(axis, counts: np.ndarray) -> None:
    """Shares of the pixels over log depth, within the range that is there."""
    known = np.flatnonzero(counts)
    step = max(1, -(-(known[-1] + 1 - known[0]) // DEPTH_BINS))
    starts = np.arange(known[0], known[-1] + 1, step)
    sums = np.add.reduceat(counts[: known[-1] + 1], starts)
    edges = DEPTH_EDGES_M[np.append(starts, known[-1] + 1)]
    axis.stairs(100 * sums / sums.sum(), edges, fill=True, color="tab:blue")
    axis.set_xscale("log")
    set_plain_ticks(axis.xaxis)
    axis.set_xlabel("depth (m)"), axis.set_ylabel("pixels (%)")


def _stack_kinds(axis, values: np.ndarray, moving: np.ndarray, edges: np.ndarray) -> None:
    """Histogram of a value of points: still ones, moving ones, and those without a record."""
    kinds = {
        "still": (moving == 0, "0.65"),
        "moving": (moving == 1, "tab:orange"),
        "motion not recorded": (np.isnan(moving), "tab:olive"),
    }
    groups = [(values[chosen], color, name) for name, (chosen, color) in kinds.items() if chosen.any()]
    values, colors, names = zip(*groups, strict=True)
    axis.hist(values, edges, stacked=True, color=colors, label=names)


def _draw_motions(axis, motion_px: np.ndarray, moving: np.ndarray) -> None:
    edges = np.geomspace(0.1, 1000, 41)
    _stack_kinds(axis, motion_px.clip(0.1, 999), moving, edges)
    axis.set_xscale("log"), set_plain_ticks(axis.xaxis, (1,)), axis.legend(fontsize=7, frameon=False)
    axis.set_xlabel("range of motion of a point (px at 224 px)"), axis.set_ylabel("points")


def _draw_shares(axis, shares: np.ndarray, moving: np.ndarray) -> None:
    _stack_kinds(axis, 100 * shares, moving, np.linspace(0, 100, 21))
    axis.set_xlabel("frames in which a point is visible (%)"), axis.set_ylabel("points")


def _draw_errors(axis, errors: Sequence[float]) -> None:
    axis.hist(100 * np.asarray(errors), 20, color="tab:red")
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("alignment error of an episode (%)"), axis.set_ylabel("episodes")


def encode_picture(figure, dpi: float = 110) -> str:
    """A figure as the address of an `<img>`, in the page itself."""
    file = io.BytesIO()
    figure.savefig(file, dpi=dpi, format="webp", pil_kwargs={"quality": 88})
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
