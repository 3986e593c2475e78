"""What a model predicts for held-out windows, undone to meters, pixels and commands, in the hub's metrics.

The model predicts pictures and depth normalized per patch; undone, a patch has the level and contrast of the
current frame (see predictions.py). So depth here says how well the structure inside the patches is known, and
not how well a depth camera could be replaced; with `depth_form="metric"` depth is the model's own, in meters.
Each prediction stands beside one that needs no model: `patch_mean`, the recorded mean depth of each patch;
`current`, the current frame repeated; `stay_put`, points that stay where they are.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from datasets_scripts.storage.even_spread import spread_evenly
from modeling_foresight import ForesightConfig, ForesightForActionPrediction, ForesightProcessor
from modeling_foresight.targets import depth_statistics, unpatchify
from training.evaluation.metric_loader import import_evaluate
from training.evaluation.predictions import Prediction, predict_windows
from training.windows import ForesightWindows

__all__ = ["measure_physical_errors"]

MAX_PIXELS = 2_000_000  # of one view, which are kept until all are compared

# Metric, group and predictor, and several examples for it: predictions and references.
Examples = tuple[tuple[str, str, str], np.ndarray, np.ndarray]


def measure_physical_errors(
    model: ForesightForActionPrediction,
    processor: ForesightProcessor,
    windows: ForesightWindows,
    intrinsics: dict[str, float] | None = None,
    count: int = 256,
) -> dict[str, Any]:
    """Figures of the hub's metrics (docs/metrics.md) over the newest frames of windows.

    Args:
        model, processor: The policy, in evaluation mode.
        windows (`ForesightWindows`): Held-out windows; only what they have labels for is measured.
        intrinsics (`dict`, *optional*): `fx`, `fy`, `cx`, `cy` of the flow view in pixels of its recorded
            size, for errors in space.
        count (`int`): Windows, evenly spread; all if there are fewer, and fewer if pictures are large (39 at
            224 px).

    Returns:
        `dict`: `windows`, how many, and `{metric: {group: {predictor: figures}}}` of what can be compared:
        `robot_action` (group `chunk`), `flow_3d`, `masked_depth` and `future_rgbd` (groups are views).
    """
    import_evaluate()  # the library that the metrics import, not the command of that name
    from training.evaluation.hub_metrics.flow_3d.flow_3d import end_point_errors
    from training.evaluation.hub_metrics.future_rgbd.future_rgbd import frame_errors
    from training.evaluation.hub_metrics.masked_depth.masked_depth import depth_errors
    from training.evaluation.hub_metrics.robot_action.robot_action import action_errors

    errors = {"flow_3d": end_point_errors, "future_rgbd": frame_errors}
    errors |= {"masked_depth": depth_errors, "robot_action": action_errors}
    config, has_future = model.config, model.config.has("future")
    processor = processor.for_embodiment(windows.config.embodiment)
    windows = ForesightWindows(
        windows.rows, dataclasses.replace(windows.config, lookahead=has_future, p_moving=0.5)
    )
    count = max(1, min(count, MAX_PIXELS // config.image_size**2))
    chosen = spread_evenly(len(windows), count)
    height, width = windows.view_sizes[config.views[0]]
    options = {
        "flow_3d": {"width": width, "height": height, **(intrinsics or {})},
        "robot_action": _grippers(processor, config),
    }
    found: dict[tuple[str, str, str], list] = {}
    predictions = predict_windows(model, processor, windows, chosen)
    for prediction in tqdm(predictions, total=len(chosen), desc="in real units", unit="window"):
        for place, predicted, truth in _find_examples(prediction, config.patch_size):
            if np.isfinite(truth).any():  # a metric without anything to compare is an error
                found.setdefault(place, []).append((predicted, truth))
    result: dict[str, Any] = {"windows": len(chosen)}
    for (name, group, predictor), pairs in found.items():
        predicted, truth = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
        figures = errors[name](predicted, truth, **options.get(name, {}))
        result.setdefault(name, {}).setdefault(group, {})[predictor] = figures
    return result


def _find_examples(prediction: Prediction, patch: int) -> Iterator[Examples]:
    if prediction.actions is not None and prediction.actions[0] is not None:
        recorded, predicted = prediction.actions  # (K, A)
        yield ("robot_action", "chunk", "model"), predicted, recorded
    for view, moment in prediction.views.items():
        if moment.flow is not None and moment.flow[0] is not None:
            truth, predicted = moment.flow
            # (L, P); where a point starts must be known to let it stay there
            shown = truth.shown & truth.shown[:1]
            known = np.where(shown[..., None], truth.points, np.nan).swapaxes(0, 1)  # (P, L, 3)
            yield ("flow_3d", view, "model"), predicted.points.swapaxes(0, 1), known
            yield ("flow_3d", view, "stay_put"), np.broadcast_to(known[:, :1], known.shape), known
        if moment.depth is not None and moment.depth[0] is not None:
            truth, predicted = moment.depth  # (H, W), NaN where unknown
            yield ("masked_depth", view, "model"), predicted[None], truth[None]
            _, valid, mean, _ = depth_statistics(torch.from_numpy(truth), patch)
            flat = unpatchify(mean.expand(valid.shape), patch, 1).numpy()  # (1, H, W)
            yield ("masked_depth", view, "patch_mean"), flat, truth[None]
        if moment.future_rgb is not None and moment.future_rgb[0] is not None:
            meters, depth_now = moment.future_depth or (None, None), moment.now_depth
            if meters[0] is not None and depth_now is not None:
                # Both predictors on the same pixels: what is unknown now can be neither undone nor repeated.
                known = np.isfinite(meters[1]) & np.isfinite(depth_now)
                meters = np.where(known, meters[0], np.nan), meters[1]
            truth, predicted = (_picture(*pair) for pair in zip(moment.future_rgb, meters, strict=True))
            yield ("future_rgbd", view, "model"), predicted[None], truth[None]
            yield ("future_rgbd", view, "current"), _picture(moment.now_rgb, depth_now)[None], truth[None]


def _picture(rgb: np.ndarray, meters: np.ndarray | None) -> np.ndarray:
    """`(H, W, 4)`, with NaN where there is no depth."""
    return np.dstack([rgb, np.full(rgb.shape[:2], np.nan) if meters is None else meters])


def _grippers(processor: ForesightProcessor, config: ForesightConfig) -> dict[str, list]:
    """The binary entries of an action, and what lies half way between the two values of each."""
    binary = processor.own_binary_entries("action")
    ends = [processor.denormalize_actions(torch.full((config.action_dim,), side)) for side in (0.0, 1.0)]
    ends = [processor.take_entries("action", end) for end in ends]
    return {"binary_indices": binary, "threshold": [float(sum(end[i] for end in ends)) / 2 for i in binary]}
