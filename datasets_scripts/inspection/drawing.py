"""Pictures of depth and tracks, drawn without a display: colors that mean meters, points and trails."""

import dataclasses
from pathlib import Path

import numpy as np

from datasets_scripts.extras import install_advice
from datasets_scripts.storage.atomic import write_whole_file

__all__ = [
    "Flow",
    "add_color_bar",
    "add_depth_scale",
    "depth_range",
    "draw_depth",
    "draw_flow",
    "draw_trails",
    "import_matplotlib",
    "new_figure",
    "locate_points",
    "save_png",
    "set_plain_ticks",
]


@dataclasses.dataclass
class Flow:
    """Trajectories of points over a camera image.

    Attributes:
        points (`np.ndarray`): `(L, P, 3)` x, y as image fractions, z in meters; `(L, P, 2)` for 2D flow.
        shown (`np.ndarray`): Boolean `(L, P)`: where the point is known.
        moving (`np.ndarray`): Boolean `(P,)`: points labeled moving.
    """

    points: np.ndarray
    shown: np.ndarray
    moving: np.ndarray


def depth_range(values_m: np.ndarray) -> tuple[float, float]:
    """Range of the depth colors: all but the outermost 2 % at both ends of what is known; meters."""
    values_m = values_m[np.isfinite(values_m) & (values_m > 0)]
    near, far = np.percentile(values_m, [2, 98]) if values_m.size else (0.1, 1.0)
    return float(near), float(max(far, 1.01 * near))


def draw_depth(axis, depth_m: np.ndarray, limits_m: tuple[float, float]):
    """A depth map `(H, W)` in meters, NaN where unknown; returns its colors for `add_depth_scale`."""
    from matplotlib.colors import LogNorm  # near things matter, a far background would take the colors

    axis.set_facecolor("0.6")  # unknown depth
    return axis.imshow(depth_m, cmap="turbo_r", norm=LogNorm(*limits_m))


def draw_flow(axis, camera: np.ndarray, flow: Flow, limits: tuple[float, float]):
    """Points over a pale camera image: still ones as dots, moving ones as trails colored by depth.

    Returns the trails if their colors mean depth: not for 2D flow, whose trails have one color.
    """
    from matplotlib.colors import LogNorm

    xy, known = flow.points[..., :2], flow.shown.any(0)
    still, moving = known & ~flow.moving, known & flow.moving
    has_depth = flow.points.shape[-1] == 3
    values = flow.points[:, moving, 2] if has_depth else None
    trails = draw_trails(axis, camera, xy[:, moving], flow.shown[:, moving], values, LogNorm(*limits))
    trails.set(cmap="turbo_r", linewidths=1.3)
    start_px = xy[0] * camera.shape[1::-1] - 0.5
    axis.scatter(*start_px[still].T, s=1.2, c="0.35", linewidths=0)
    axis.scatter(*start_px[moving].T, s=3.0, c="black", linewidths=0)
    return trails if has_depth and len(trails.get_segments()) else None


def draw_trails(axis, camera: np.ndarray, xy: np.ndarray, shown: np.ndarray, values: np.ndarray | None, norm):
    """Paths of points over a pale camera image, colored by a value; returns the trails for a color bar.

    Args:
        axis (`matplotlib.axes.Axes`): Where to.
        camera (`np.ndarray`): `(H, W, 3)` in [0, 1].
        xy (`np.ndarray`): `(L, P, 2)` image fractions.
        shown (`np.ndarray`): Boolean `(L, P)`, where the point is known.
        values (`np.ndarray`, *optional*): `(L, P)`; large ones are drawn last. One color if omitted.
        norm (`matplotlib.colors.Normalize`): Range of the colors.
    """
    from matplotlib.collections import LineCollection

    height, width = camera.shape[:2]
    axis.imshow(0.5 + 0.5 * camera)
    xy = xy * (width, height) - 0.5  # imshow counts from the first pixel's center
    t, p = np.nonzero(shown[1:] & shown[:-1])
    style = {"colors": "tab:red"}
    if values is not None:
        order = np.argsort(values[t + 1, p], kind="stable")
        t, p = t[order], p[order]
        style = {"array": values[t + 1, p], "norm": norm}
    segments = np.stack([xy[t, p], xy[t + 1, p]], axis=1)  # (m, 2, 2)
    trails = LineCollection(segments, cmap="turbo", linewidths=0.8, **style)
    axis.add_collection(trails)
    axis.set_xlim(-0.5, width - 0.5), axis.set_ylim(height - 0.5, -0.5)
    return trails


def add_depth_scale(figure, colors, place: tuple[float, float, float, float]) -> None:
    """What the colors mean, drawn at left, bottom, width and height in shares of the figure."""
    add_color_bar(figure, colors, cax=figure.add_axes(place))


def add_color_bar(figure, colors, label: str = "depth (m)", **place) -> None:
    """What the colors mean; `place` is `ax` or `cax` of matplotlib's `colorbar`."""
    bar = figure.colorbar(colors, **place)
    set_plain_ticks(bar.ax.yaxis)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def set_plain_ticks(axis, subs: tuple[float, ...] = (1, 1.5, 2, 3, 5, 7)) -> None:
    """Numbers without exponents on the x or y axis of a logarithmic scale."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_locator(NullLocator())


def save_png(path: str | Path, figure) -> None:
    """Writes a figure; the file appears only when it is whole."""
    with write_whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def import_matplotlib():
    """Figure and canvas types that draw without a display.

    Raises:
        RuntimeError: If matplotlib is missing; says what to install.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(f"pictures need matplotlib ({error}); run `{install_advice('viz')}`") from error
    return Figure, FigureCanvasAgg


def new_figure(width: float, height: float, **options):
    """An empty figure of this size in inches that draws without a display."""
    figure_type, canvas_type = import_matplotlib()
    figure = figure_type(figsize=(width, height), **options)
    canvas_type(figure)
    return figure


def locate_points(points: np.ndarray, intrinsics: dict) -> np.ndarray:
    """`(..., 3)` x, y as image fractions and z in meters -> x right, y down, z ahead in meters."""
    k, z = intrinsics, points[..., 2]
    x = (points[..., 0] * k["width"] - k["cx"]) / k["fx"] * z
    y = (points[..., 1] * k["height"] - k["cy"]) / k["fy"] * z
    return np.stack([x, y, z], axis=-1)
