"""The pictures of one moment as HTML: recorded above predicted, one block per view."""

import base64
import functools
import io
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from PIL import Image

from datasets_scripts.inspection.drawing import Flow, draw_flow, new_figure
from datasets_scripts.inspection.label_pictures import encode_picture
from datasets_scripts.inspection.template_rendering import render_template
from hub_cards.space.episode_predictions import EpisodeView
from training.evaluation.predictions import Moment

__all__ = ["color_depth", "render_moment", "encode_image", "place_ticks"]

MOMENT_TEMPLATE = Path(__file__).with_name("moment.html")
FLOW_PX, FLOW_INCHES = 288, 1.9  # side of the drawn flow; inches decide how thick its lines are
UNKNOWN = 0.6  # gray of unknown depth, as in `draw_depth`


def render_moment(view: EpisodeView, number: int) -> str:
    """All pictures of moment `number`, from 0, as HTML that contains them."""
    prediction = view.predictions[number]
    blocks = [
        {
            "name": name,
            "camera": view.cameras[name],
            "now": encode_image(moment.camera),
            "columns": _build_columns(view, moment, view.limits_m[name]),
            "scale": place_ticks(view.limits_m[name]) if view.config.has_depth_decoder else [],
        }
        for name, moment in prediction.views.items()
    ]
    return render_template(
        MOMENT_TEMPLATE,
        frame=prediction.frame,
        seconds=prediction.frame / view.fps,
        progress=prediction.progress,
        blocks=blocks,
        most_columns=max(len(block["columns"]) for block in blocks),
        gradient=_build_gradient(),
    )


def _build_columns(view: EpisodeView, moment: Moment, limits: tuple[float, float]) -> list[dict]:
    """Title, and address or reason of absence of the recorded and the predicted picture."""
    config, columns = view.config, []
    seconds = f"{config.future_shift * view.stride / view.fps:.2g} s"
    # With targets inside the window the newest frame's future was never trained.
    ahead = f"now, as of {seconds} before" if config.future_targets == "window" else f"{seconds} ahead"

    def add(title: str, pair, draw, reason: str) -> None:
        cells = [
            {"picture": None if picture is None else draw(picture), "reason": reason} for picture in pair
        ]
        columns.append({"title": title, "recorded": cells[0], "predicted": cells[1]})

    def colors(depth: np.ndarray) -> str:
        return encode_image(color_depth(depth, limits))

    if moment.depth is not None:
        add("depth now", moment.depth, colors, "no depth recorded")
    if moment.future_rgb is not None:
        add(f"image {ahead}", moment.future_rgb, encode_image, "the episode is over by then")
    if moment.future_depth is not None:
        recorded = moment.depth is None or moment.depth[0] is not None
        reason = "the episode is over by then" if recorded else "no depth recorded"
        add(f"depth {ahead}", moment.future_depth, colors, reason)
    if moment.flow is not None:
        title = f"{config.flow_dim}D flow, next {config.flow_length - 1} steps"
        add(title, moment.flow, lambda flow: _encode_flow(moment.camera, flow, limits), "no tracks recorded")
    return columns


def encode_image(picture: np.ndarray) -> str:
    """A picture `(H, W, 3)` in [0, 1] as the address of an `<img>`, in the page itself."""
    file = io.BytesIO()
    pixels = (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)
    Image.fromarray(pixels).save(file, format="webp", quality=90, method=2)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def color_depth(depth_m: np.ndarray, limits_m: tuple[float, float]) -> np.ndarray:
    """Depth `(H, W)` in meters, NaN where unknown -> `(H, W, 3)`, in the colors of `draw_depth`."""
    colors = colormaps["turbo_r"](LogNorm(*limits_m)(np.where(depth_m > 0, depth_m, limits_m[0])))
    return np.where(np.isfinite(depth_m)[..., None], colors[..., :3], UNKNOWN)


def _encode_flow(camera: np.ndarray, flow: Flow, limits: tuple[float, float]) -> str:
    height, width = camera.shape[:2]
    figure = new_figure(FLOW_INCHES, FLOW_INCHES * height / width, dpi=FLOW_PX / FLOW_INCHES)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    draw_flow(axis, camera, flow, limits)
    return encode_picture(figure, figure.dpi)


def place_ticks(limits_m: tuple[float, float]) -> list[dict]:
    """Round numbers of meters along the depth colors and their places, 0 at the near end to 1."""
    near, far = limits_m
    steps = [m * 10.0**e for e in range(-3, 3) for m in (1, 2, 5)]
    inside = [step for step in steps if near <= step <= far]
    if len(inside) < 2:
        inside = [float(f"{near:.2g}"), float(f"{far:.2g}")]
    inside = inside[:: -(-len(inside) // 4)]
    return [{"label": f"{m:g}", "share": float(np.log(m / near) / np.log(far / near))} for m in inside]


@functools.cache
def _build_gradient() -> str:
    """The depth colors from near to far, as a list for CSS."""
    stops = colormaps["turbo_r"](np.linspace(0, 1, 12))[:, :3]
    return ", ".join("rgb({:.0f} {:.0f} {:.0f})".format(*(255 * stop)) for stop in stops)
