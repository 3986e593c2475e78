"""Pictures of depth and tracks, drawn without a display: colours that mean metres, points and trails."""

import dataclasses
from pathlib import Path

import numpy as np

from datasets_scripts.storage.atomic import write_whole_file

__all__ = [
    "Flow",
    "add_depth_scale",
    "depth_range",
    "draw_depth",
    "draw_flow",
    "draw_trails",
    "import_matplotlib",
    "plain_ticks",
    "save_png",
]


@dataclasses.dataclass
class Flow:
    """Trajectories of points over a camera image.

    Attributes:
        points (`np.ndarray`): `(L, P, 3)` x, y as image fractions, z in metres; `(L, P, 2)` for 2D flow.
        shown (`np.ndarray`): Boolean `(L, P)`: where the point is known.
        moving (`np.ndarray`): Boolean `(P,)`: points labelled moving.
    """

    points: np.ndarray
    shown: np.ndarray
    moving: np.ndarray


def depth_range(values_m: np.ndarray) -> tuple[float, float]:
    """Range of the depth colours: all but the outermost 2 % at both ends of what is known; metres."""
    values_m = values_m[np.isfinite(values_m) & (values_m > 0)]
    near, far = np.percentile(values_m, [2, 98]) if values_m.size else (0.1, 1.0)
    return float(near), float(max(far, 1.01 * near))


def draw_depth(axis, depth_m: np.ndarray, limits_m: tuple[float, float]):
    """A depth map `(H, W)` in metres, NaN where unknown; returns its colours for `add_depth_scale`."""
    from matplotlib.colors import LogNorm  # near things matter, a far background would take the colours

    axis.set_facecolor("0.6")  # unknown depth
    return axis.imshow(depth_m, cmap="turbo_r", norm=LogNorm(*limits_m))


def draw_flow(axis, camera: np.ndarray, flow: Flow, limits: tuple[float, float]):
    """Points over a pale camera image: still ones as dots, moving ones as trails coloured by depth.

    Returns the trails if their colours mean depth: not for 2D flow, whose trails have one colour.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LogNorm

    height, width = camera.shape[:2]
    axis.imshow(0.5 + 0.5 * camera)
    xy = flow.points[..., :2] * (width, height) - 0.5  # imshow counts from the first pixel's centre
    known = flow.shown.any(0)
    still = known & ~flow.moving
    axis.scatter(*xy[0, still].T, s=1.2, c="0.35", linewidths=0)
    has_depth = flow.points.shape[-1] == 3
    segments, depths = [], []
    for p in np.flatnonzero(known & flow.moving):
        steps = np.flatnonzero(flow.shown[:, p])
        for a, b in zip(steps[:-1], steps[1:], strict=True):
            segments.append(xy[[a, b], p])
            if has_depth:
                depths.append(flow.points[b, p, 2])
    style = (
        {"array": np.asarray(depths), "cmap": "turbo_r", "norm": LogNorm(*limits)}
        if has_depth
        else {"colors": "tab:red"}
    )
    trails = LineCollection(segments, linewidths=1.3, **style)
    axis.add_collection(trails)
    moving = known & flow.moving
    axis.scatter(*xy[0, moving].T, s=3.0, c="black", linewidths=0)
    axis.set_xlim(-0.5, width - 0.5), axis.set_ylim(height - 0.5, -0.5)
    return trails if segments and has_depth else None


def draw_trails(axis, camera: np.ndarray, xy: np.ndarray, shown: np.ndarray, values: np.ndarray, norm):
    """Ways of points over a pale camera image, coloured by a value; returns the trails for a colour bar.

    Args:
        axis (`matplotlib.axes.Axes`): Where to.
        camera (`np.ndarray`): `(H, W, 3)` in [0, 1].
        xy (`np.ndarray`): `(L, P, 2)` image fractions.
        shown (`np.ndarray`): Boolean `(L, P)`.
        values (`np.ndarray`): `(L, P)`; large ones are drawn last.
        norm (`matplotlib.colors.Normalize`): Range of the colours.
    """
    from matplotlib.collections import LineCollection

    height, width = camera.shape[:2]
    axis.imshow(0.5 + 0.5 * camera)
    xy = xy * (width, height) - 0.5
    t, p = np.nonzero(shown[1:] & shown[:-1])
    order = np.argsort(values[t + 1, p], kind="stable")
    t, p = t[order], p[order]
    segments = np.stack([xy[t, p], xy[t + 1, p]], axis=1)  # (m, 2, 2)
    trails = LineCollection(segments, array=values[t + 1, p], cmap="turbo", norm=norm, linewidths=0.8)
    axis.add_collection(trails)
    axis.set_xlim(-0.5, width - 0.5), axis.set_ylim(height - 0.5, -0.5)
    return trails


def add_depth_scale(figure, colours, place: tuple[float, float, float, float]) -> None:
    """What the colours mean, drawn at left, bottom, width and height in shares of the figure."""
    axis = figure.add_axes(place)
    bar = figure.colorbar(colours, cax=axis)
    plain_ticks(bar.ax.yaxis, (1, 1.5, 2, 3, 5, 7))
    bar.set_label("depth (m)", fontsize=8)
    axis.tick_params(labelsize=7)


def plain_ticks(axis, subs: tuple[float, ...] = (1, 2, 5)) -> None:
    """Numbers without exponents on the x or y axis of a logarithmic scale."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_locator(NullLocator())


def save_png(path: str | Path, figure) -> None:
    """Writes a figure; the file appears only when it is whole."""
    path = Path(path)
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
        raise RuntimeError(
            f"pictures need matplotlib ({error}); run `pip install 'lerobot_policy_foresight[viz]'`"
        ) from error
    return Figure, FigureCanvasAgg
