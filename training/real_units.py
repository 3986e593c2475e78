"""What a model predicts for held-out windows, undone to metres, pixels and commands, in the hub's metrics.

The model predicts pictures and depth normalised per patch; undone, a patch has the level and contrast of the
current frame (see foresee.py). So `depth` here says how well the structure inside the patches is known, and
not how well a depth camera could be replaced.
"""

import dataclasses

import numpy as np
from tqdm import tqdm

from modeling_foresight import ForesightForActionPrediction, ForesightProcessor
from training.foresee import Moment, predict_windows
from training.metrics import load_metric
from training.windows import ForesightWindows

__all__ = ["measure_in_real_units"]

# `evaluate` makes Python numbers of what it compares: some 650 bytes for a pixel of RGB-D and its truth.
MAX_PIXELS = 2_000_000


def measure_in_real_units(
    model: ForesightForActionPrediction,
    processor: ForesightProcessor,
    windows: ForesightWindows,
    intrinsics: dict[str, float] | None = None,
    count: int = 256,
) -> dict[str, dict]:
    """Figures of the hub's metrics (docs/metrics.md) over the newest frames of windows.

    Args:
        model (`ForesightForActionPrediction`): In evaluation mode.
        processor (`ForesightProcessor`): Its processor.
        windows (`ForesightWindows`): Held-out windows; only what they have labels for is measured.
        intrinsics (`dict`, *optional*): `fx`, `fy`, `cx`, `cy` of the flow view in pixels of its recorded
            size, for errors in space.
        count (`int`): Windows, evenly spread; all if there are fewer, and fewer if pictures are large (39 at
            224 px).

    Returns:
        `dict`: `windows`, and as far as they can be told: `robot_action` (the chunk's actions), `flow_3d`,
        `masked_depth` and `future_rgbd`, both by view.
    """
    config, has_future = model.config, model.config.has("future")
    windows = ForesightWindows(
        windows.rows.root, dataclasses.replace(windows.config, lookahead=has_future, p_moving=0.5)
    )
    count = max(1, min(count, MAX_PIXELS // config.image_size**2))
    chosen = np.unique(np.linspace(0, len(windows) - 1, min(count, len(windows))).round().astype(int))
    action, flow = load_metric("robot_action"), load_metric("flow_3d")
    depth = {view: load_metric("masked_depth") for view in config.views}
    future = {view: load_metric("future_rgbd") for view in config.views}
    predictions = predict_windows(model, processor, windows, chosen.tolist())
    for one in tqdm(predictions, total=len(chosen), desc="in real units", unit="window"):
        if one.actions and one.actions[0] is not None:
            action.add_batch(references=one.actions[0], predictions=one.actions[1])
        for view, moment in one.views.items():
            _add_pictures(depth[view], future[view], moment)
            if moment.flow and moment.flow[0] is not None:
                truth, predicted = moment.flow
                known = np.where(truth.shown[..., None], truth.points, np.nan)
                flow.add_batch(references=known.swapaxes(0, 1), predictions=predicted.points.swapaxes(0, 1))
    height, width = windows.view_sizes[config.views[0]]
    result = {
        "robot_action": _compute(action, binary_indices=list(config.binary_action_indices)),
        "flow_3d": _compute(flow, width=width, height=height, **(intrinsics or {})),
        "masked_depth": {view: _compute(metric) for view, metric in depth.items()},
        "future_rgbd": {view: _compute(metric) for view, metric in future.items()},
    }
    for name in ("masked_depth", "future_rgbd"):
        result[name] = {view: figures for view, figures in result[name].items() if figures}
    return {"windows": len(chosen), **{name: figures for name, figures in result.items() if figures}}


def _add_pictures(depth, future, moment: Moment) -> None:
    if moment.depth and all(part is not None for part in moment.depth):
        depth.add(references=moment.depth[0], predictions=moment.depth[1])
    if moment.future_rgb and moment.future_rgb[0] is not None:
        pictures = []
        for rgb, metres in zip(moment.future_rgb, moment.future_depth or (None, None), strict=True):
            # A depth that is not there is unknown, never a reason to leave the colours out.
            layer = np.full(rgb.shape[:2], np.nan) if metres is None else metres
            pictures.append(np.dstack([rgb, layer]))
        future.add(references=pictures[0], predictions=pictures[1])


def _compute(metric, **options) -> dict | None:
    """Figures of a metric; `None` if there was nothing to compare."""
    return metric.compute(**options) if len(metric) else None
