"""Pictures of labels: moments of an episode, the ways of its points, distributions over a dataset."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datasets_scripts.columns import picture_size
from datasets_scripts.inspection.labelled_episode import Camera, LabelledEpisode
from datasets_scripts.inspection.pictures import (
    Flow,
    add_depth_scale,
    depth_range,
    draw_depth,
    draw_flow,
    draw_trails,
    import_matplotlib,
    plain_ticks,
)
from datasets_scripts.inspection.quality import DEPTH_EDGES_M, TrackMeter

__all__ = ["draw_distributions", "draw_episode", "draw_motion", "to_page"]

TRAIL_STEPS = 6  # of a moving point in the picture
TRAIL_MOMENTS = 60  # of an episode, between which whole ways are drawn
DEPTH_BINS = 96


def draw_episode(episode: LabelledEpisode, moments: int):
    """Contact sheet: a column per moment; per camera its image with tracks, and its depth.

    Returns:
        `matplotlib.figure.Figure`: To be saved.
    """
    figure_type, canvas_type = import_matplotlib()
    chosen = sorted({round(i) for i in np.linspace(0, episode.length - 1, moments)})
    shapes = [picture_size(episode.rows.features[camera.image_key]) for camera in episode.cameras]
    sizes = []  # height of every row by its width
    for camera, (height, width) in zip(episode.cameras, shapes, strict=True):
        sizes += [height / width] * (1 + (camera.depth_key is not None))
    side, above, below, left, right = 1.9, 0.5, 0.35, 0.45, 0.95  # inches
    width, height = side * len(chosen) + left + right, side * sum(sizes) + above + below
    figure = figure_type(figsize=(width, height))
    canvas_type(figure)
    axes = figure.subplots(len(sizes), len(chosen), squeeze=False, gridspec_kw={"height_ratios": sizes})
    figure.subplots_adjust(
        left / width, below / height, 1 - right / width, 1 - above / height, wspace=0.03, hspace=0.03
    )
    for axis in axes.flat:
        axis.set_xticks([]), axis.set_yticks([])
    for axis, t in zip(axes[0], chosen, strict=True):
        axis.set_title(f"frame {t}", fontsize=9)
    rows = iter(axes)
    for camera in episode.cameras:
        image_row = next(rows)
        depth_row = next(rows) if camera.depth_key else None
        colours = _draw_camera(episode, camera, chosen, image_row, depth_row)
        if colours is not None:
            upper = image_row[-1].get_position()
            lower = upper if depth_row is None else depth_row[-1].get_position()
            place = (upper.x1 + 0.12 / width, lower.y0, 0.12 / width, upper.y1 - lower.y0)
            add_depth_scale(figure, colours, place)
    title = f"{Path(episode.rows.name).name}, episode {episode.number}: “{episode.task}”"
    figure.suptitle(title, fontsize=10, y=1 - 0.08 / height, va="top")
    caption = ""
    if any(camera.depth_key for camera in episode.cameras):
        caption = "Depth: grey is unknown."
    if any(camera.points is not None for camera in episode.cameras):
        steps = f"with their last {TRAIL_STEPS - 1} steps"
        recorded = all(camera.moving is not None for camera in episode.cameras if camera.points is not None)
        caption += f" Tracks: still points grey, moving ones {steps}." if recorded else f" Tracks {steps}."
    figure.text(left / width, 0.1 / height, caption.strip(), fontsize=7.5)
    return figure


def _draw_camera(episode: LabelledEpisode, camera: Camera, chosen: list[int], image_row, depth_row):
    """One camera's rows; returns the colours that mean metres, if there are any."""
    depths = []
    if camera.depth_key:
        depths = [episode.read(camera.depth_key, t)[0] for t in chosen]
    limits = depth_range(np.concatenate([depth.ravel() for depth in depths]) if depths else np.zeros(0))
    if camera.points is not None and not depths:
        limits = depth_range(camera.points[..., 2][camera.visible])
    image_row[0].set_ylabel(camera.name, fontsize=9)
    colours = None
    for i, t in enumerate(chosen):
        image = episode.read(camera.image_key, t)[0] / 255
        if camera.points is None:
            image_row[i].imshow(image)
        else:
            colours = draw_flow(image_row[i], image, _trails(camera, t), limits) or colours
        if depths:
            colours = draw_depth(depth_row[i], np.where(depths[i] > 0, depths[i], np.nan), limits)
    if depths:
        depth_row[0].set_ylabel("depth", fontsize=9)
    return colours


def _trails(camera: Camera, t: int) -> Flow:
    """Where the points are now and whence they came."""
    past = range(t, max(t - TRAIL_STEPS, -1), -1)
    shown = camera.visible[past].copy()
    shown[:, ~shown[0]] = False  # hidden now
    # Where it is not recorded which points move, all have a trail: what moves is seen then.
    moving = np.ones(shown.shape[1], bool) if camera.moving is None else camera.moving
    return Flow(camera.points[past], shown, moving)


def draw_motion(episode: LabelledEpisode, camera: Camera):
    """Whole ways of a camera's points over the middle frame, coloured by their depth and by how far they go.

    Args:
        episode (`LabelledEpisode`): Of the camera.
        camera (`Camera`): One with points.

    Returns:
        `matplotlib.figure.Figure`: To be saved.
    """
    from matplotlib.colors import LogNorm

    figure_type, canvas_type = import_matplotlib()
    height, width = picture_size(episode.rows.features[camera.image_key])
    side = 3.6  # inches
    figure = figure_type(figsize=(2 * side + 1.6, side * height / width + 0.3), layout="constrained")
    canvas_type(figure)
    moments = np.unique(np.linspace(0, episode.length - 1, TRAIL_MOMENTS).round().astype(int))
    points, shown = camera.points[moments], camera.visible[moments]
    motion_px = TrackMeter(camera.points, camera.visible, camera.moving).motion_px
    image = episode.read(camera.image_key, episode.length // 2)[0] / 255
    near, far = depth_range(points[..., 2][shown])
    drawn = [
        ("depth (m)", points[..., 2], LogNorm(near, far)),
        ("range of motion (px at 224 px)", np.broadcast_to(motion_px, shown.shape), LogNorm(1, 100)),
    ]
    for axis, (name, values, norm) in zip(figure.subplots(1, 2), drawn, strict=True):
        axis.set_xticks([]), axis.set_yticks([])
        trails = draw_trails(axis, image, points[..., :2], shown, values, norm)
        trails.set_cmap("turbo_r" if name.startswith("depth") else "turbo")
        bar = figure.colorbar(trails, ax=axis, fraction=0.05, pad=0.02)
        plain_ticks(bar.ax.yaxis, (1, 1.5, 2, 3, 5, 7))
        bar.set_label(name, fontsize=8), bar.ax.tick_params(labelsize=7)
    return figure


def draw_distributions(
    depth_counts: np.ndarray | None,
    motion_px: np.ndarray,
    shares: np.ndarray,
    moving: np.ndarray,
    errors: Sequence[float],
):
    """Distributions of one camera over the episodes looked at; panels of what it lacks are left out.

    Args:
        depth_counts (`np.ndarray`, *optional*): Pixels between `DEPTH_EDGES_M`.
        motion_px, shares (`np.ndarray`): `(n,)`, of all points as `TrackMeter` has them.
        moving (`np.ndarray`): `(n,)` float, 1 for a point labelled moving, NaN where that is not recorded.
        errors (`Sequence[float]`): Relative alignment error of every episode that has one.

    Returns:
        `matplotlib.figure.Figure` or `None`: To be saved; `None` if there is nothing to show.
    """
    figure_type, canvas_type = import_matplotlib()
    panels = []
    if depth_counts is not None and depth_counts.any():
        panels.append(lambda axis: _draw_depths(axis, depth_counts))
    if len(motion_px):
        panels.append(lambda axis: _draw_motions(axis, motion_px, moving))
        panels.append(lambda axis: _draw_shares(axis, shares, moving))
    if len(errors):
        panels.append(lambda axis: _draw_errors(axis, errors))
    if not panels:
        return None
    figure = figure_type(figsize=(3.1 * len(panels), 2.3), layout="constrained")
    canvas_type(figure)
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(axis)
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
    plain_ticks(axis.xaxis, (1, 1.5, 2, 3, 5, 7))
    axis.set_xlabel("depth (m)"), axis.set_ylabel("pixels (%)")


def _stack_kinds(axis, values: np.ndarray, moving: np.ndarray, edges: np.ndarray) -> None:
    """Histogram of a value of points: still ones, moving ones, and those of which it is not recorded."""
    kinds = {
        "still": (moving == 0, "0.65"),
        "moving": (moving == 1, "tab:orange"),
        "motion not recorded": (np.isnan(moving), "tab:olive"),
    }
    groups = [(values[chosen], colour, name) for name, (chosen, colour) in kinds.items() if chosen.any()]
    values, colours, names = zip(*groups, strict=True)
    axis.hist(values, edges, stacked=True, color=colours, label=names)


def _draw_motions(axis, motion_px: np.ndarray, moving: np.ndarray) -> None:
    edges = np.geomspace(0.1, 1000, 41)
    _stack_kinds(axis, motion_px.clip(0.1, 999), moving, edges)
    axis.set_xscale("log"), plain_ticks(axis.xaxis, (1,)), axis.legend(fontsize=7, frameon=False)
    axis.set_xlabel("range of motion of a point (px at 224 px)"), axis.set_ylabel("points")


def _draw_shares(axis, shares: np.ndarray, moving: np.ndarray) -> None:
    _stack_kinds(axis, 100 * shares, moving, np.linspace(0, 100, 21))
    axis.set_xlabel("frames in which a point is visible (%)"), axis.set_ylabel("points")


def _draw_errors(axis, errors: Sequence[float]) -> None:
    axis.hist(100 * np.asarray(errors), 20, color="tab:red")
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("alignment error of an episode (%)"), axis.set_ylabel("episodes")


def to_page(figure) -> str:
    """A figure as the address of an `<img>`, in the page itself."""
    file = io.BytesIO()
    figure.savefig(file, dpi=110, format="webp", pil_kwargs={"quality": 88})
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
