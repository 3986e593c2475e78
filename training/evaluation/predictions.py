"""Predictions for the frames of an episode, undone to pictures, beside what happened.

The model predicts RGB and depth normalized per patch (zero mean, unit deviation), so level and contrast of a
patch are not part of the prediction. For display they are taken from the *current* frame: its pixels, and for
depth its recorded depth. What a prediction shows by itself is the structure inside the patches. With
`depth_form="metric"` depth is predicted in meters and shown unchanged.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from datasets_scripts.inspection.drawing import Flow, depth_range
from modeling_foresight import ForesightForActionPrediction, ForesightProcessor
from modeling_foresight.inputs import ForesightInputs
from modeling_foresight.targets import depth_statistics, newest_trained_future, patchify, unpatchify
from training.windows import ForesightWindows, collate_windows

__all__ = ["Moment", "Prediction", "depth_limits", "predict_windows"]

# Where it is not recorded what moves: points that go farther than this share of the picture.
SHOWN_MOTION = 0.01


@dataclasses.dataclass
class Moment:
    """All pictures of one view at one moment; images `(H, W, 3)` float in [0, 1], depth `(H, W)` meters.

    Pairs are truth and prediction; depth is NaN where it is unknown. `None` stands for a pair whose objective
    is off, for a truth that was not recorded, and for a prediction that cannot be undone without it.

    Attributes:
        frame (`int`): Number of the frame in its episode.
        camera (`np.ndarray`): What the camera saw.
        depth, future_rgb, future_depth (`tuple`, *optional*): Truth and prediction.
        flow (`tuple[Flow | None, Flow]`, *optional*): Truth and prediction, of the model's first view.
        now_rgb, now_depth (`np.ndarray`, *optional*): What the future was predicted from: this frame. A model
            with `future_targets="window"` is not trained to predict the newest frame's future; its pair is
            what it predicted `future_shift` frames before, and this frame.
    """

    frame: int
    camera: np.ndarray
    depth: tuple[np.ndarray | None, np.ndarray | None] | None = None
    future_rgb: tuple[np.ndarray | None, np.ndarray] | None = None
    future_depth: tuple[np.ndarray | None, np.ndarray | None] | None = None
    flow: tuple[Flow | None, Flow] | None = None
    now_rgb: np.ndarray | None = None
    now_depth: np.ndarray | None = None


@dataclasses.dataclass
class Prediction:
    """What the model gives for the newest frame of a window.

    Attributes:
        frame (`int`): Number of the frame in its episode.
        views (`dict[str, Moment]`): Pictures of every view that the dataset has.
        actions (`tuple`, *optional*): Recorded and predicted chunk `(K, A)` float32 in the dataset's units
            (`local_delta`: the codec's); recorded steps past the episode's end are NaN, and `None` stands for
            a dataset without such actions.
        progress (`tuple[float, float]`, *optional*): True and predicted share of the episode that is done.
    """

    frame: int
    views: dict[str, Moment]
    actions: tuple[np.ndarray | None, np.ndarray] | None = None
    progress: tuple[float, float] | None = None


def predict_windows(
    model: ForesightForActionPrediction,
    processor: ForesightProcessor,
    windows: ForesightWindows,
    chosen: Sequence[int],
    views: Sequence[str] | None = None,
    instruction: str | None = None,
    batch_size: int = 16,
) -> Iterator[Prediction]:
    """Predictions for the newest frame of some windows, undone to pictures, beside the truth.

    Args:
        model, processor: The policy, in evaluation mode; a head that is off leaves its field empty.
        windows (`ForesightWindows`): Windows with lookahead frames for the future's truth.
        chosen (`Sequence[int]`): The numbers of those to predict.
        views (`Sequence[str]`, *optional*): Cameras; all of the model's that the dataset has by default. Flow
            is only there for the model's first one.
        instruction (`str`, *optional*): Given to the model in place of the recorded one.
        batch_size (`int`): Windows per forward pass.
    """
    views = [view for view in views or model.config.views if view in windows.cameras]
    processor = processor.for_embodiment(windows.config.embodiment)
    for begin in range(0, len(chosen), batch_size):
        samples = [windows[i] for i in chosen[begin : begin + batch_size]]
        raw = collate_windows(samples)
        if instruction is not None:
            raw["task"] = [instruction] * len(samples)
        raw = processor.place_batch(raw)
        batch = processor.prepare_batch(raw, model.device, model.config.history_length)
        with torch.no_grad():
            output = model(**{name: batch[name] for name in ForesightInputs.__annotations__ if name in batch})
        for i, sample in enumerate(samples):
            newest, progress = model.config.history_length - 1, None
            if output.progress is not None:
                progress = float(sample["progress"][newest]), float(output.progress[i, newest])
            frame = int(sample["index"] - windows.rows.episode_starts[sample["episode_index"]])
            yield Prediction(
                frame,
                {view: _moment(model, processor, batch, output, sample, i, view, frame) for view in views},
                _actions(model, processor, output, sample, i),
                progress,
            )


def _actions(model, processor, output, sample: dict, i: int):
    """Recorded and predicted chunk of sample `i`, newest frame."""
    if output.actions is None:
        return None
    newest = model.config.history_length - 1
    predicted = processor.denormalize_actions(output.actions[i, newest])
    predicted = processor.take_entries("action", predicted).cpu().numpy()  # (K, A)
    if "actions" not in sample:
        return None, predicted
    exists = sample["action_mask"][newest][:, None].numpy()
    return np.where(exists, sample["actions"][newest].numpy(), np.nan), predicted


def _moment(model, processor, batch, output, sample: dict, i: int, view: str, frame: int) -> Moment:
    """Sample `i` of a batch, newest frame of the window."""
    config = model.config
    v, newest, patch = list(config.views).index(view), config.history_length - 1, config.patch_size
    pixels = batch["pixel_values"][i, newest, v]  # (3, H, W) normalized
    moment = Moment(frame, _to_rgb(pixels, processor))
    depth = batch["depth"][i, newest, v] if view in sample["depth"] else None  # (H, W) meters
    if config.has("depth"):
        moment.depth = _mark_unknown(depth), _show_depth(output, "depth", (i, newest, v), depth, patch)
    if config.has("future"):
        _add_future(moment, processor, config, batch, output, i, v, depth is not None)
    if config.has("flow") and v == 0:
        moment.flow = _flow(config, sample, output.flow[i, newest].float().cpu().numpy(), newest)
    return moment


def _add_future(moment: Moment, processor, config, batch, output, i: int, v: int, depth_known: bool) -> None:
    """Adds the pairs of the newest frame whose future is trained, of sample `i` and view `v`."""
    now, patch = newest_trained_future(config), config.patch_size
    later = now + config.future_shift
    exists = bool(torch.cat([batch["frame_mask"], batch["lookahead_mask"]], dim=1)[i, later])

    def at(name: str, frame: int) -> torch.Tensor:
        return torch.cat([batch[name], batch[f"lookahead_{name}"]], dim=1)[i, frame, v]

    pixels = at("pixel_values", now)
    predicted = _to_rgb(_undo_rgb(output.future_rgb[i, now, v], pixels, patch), processor)
    truth = _to_rgb(at("pixel_values", later), processor) if exists else None
    moment.now_rgb, moment.future_rgb = _to_rgb(pixels, processor), (truth, predicted)
    depth = at("depth", now) if depth_known else None
    moment.now_depth = _mark_unknown(depth)
    if output.future_depth is not None:
        truth = at("depth", later) if exists and depth_known else None
        predicted = _show_depth(output, "future_depth", (i, now, v), depth, patch)
        moment.future_depth = _mark_unknown(truth), predicted


def _flow(config, sample: dict, predicted: np.ndarray, newest: int) -> tuple[Flow | None, Flow]:
    """True flow, and the predicted one `(L, P, 3)` at the points that are shown of it."""
    shown = sample["track_weight"][newest].numpy() > 0
    if not shown.any():  # no tracks: points start on the grid
        return None, Flow(predicted, np.ones_like(shown), _find_moving(predicted))
    truth = sample["track"][newest, ..., : config.flow_dim].numpy()
    moving = sample["track_moving"][newest].numpy()
    # Flags may be lost, as after LeRobot's own tools.
    moving = moving if moving.any() else _find_moving(truth)
    return Flow(truth, shown, moving), Flow(predicted, shown, moving)


def _find_moving(points: np.ndarray) -> np.ndarray:
    """Which of the points `(L, P, 2 or 3)` leave their place in the picture: boolean `(P,)`."""
    return np.linalg.norm(points[..., :2] - points[:1, :, :2], axis=-1).max(0) > SHOWN_MOTION


def _undo_rgb(prediction: torch.Tensor, current: torch.Tensor, patch: int) -> torch.Tensor:
    """Normalized patches `(N, p * p * 3)` -> `(3, H, W)` with the current frame's patch statistics."""
    patches = patchify(current, patch)
    mean, std = patches.mean(-1, keepdim=True), patches.std(-1, keepdim=True)
    return unpatchify(prediction.float() * (std + 1e-6) + mean, patch, 3)


def _show_depth(
    output, name: str, place: tuple, current: torch.Tensor | None, patch: int
) -> np.ndarray | None:
    """Predicted depth at `place`, `(H, W)` meters: the model's own, or undone with the current frame."""
    if (meters := output.get(f"predicted_{name}")) is not None:
        return meters[place].cpu().numpy()
    return _undo_depth(output[name][place], current, patch)


def _undo_depth(prediction: torch.Tensor, current: torch.Tensor | None, patch: int) -> np.ndarray | None:
    """Normalized patches `(N, p * p)` -> `(H, W)` meters with the current frame's patch statistics."""
    if current is None:
        return None
    _, valid, mean, deviation = depth_statistics(current, patch)
    meters = prediction.float() * deviation + mean
    meters = torch.where(valid.any(-1, keepdim=True), meters, torch.full_like(meters, torch.nan))
    return unpatchify(meters, patch, 1)[0].cpu().numpy()


def _mark_unknown(depth: torch.Tensor | None) -> np.ndarray | None:
    """`(H, W)` meters with NaN where invalid."""
    if depth is None:
        return None
    return torch.where(depth > 0, depth, torch.full_like(depth, torch.nan)).cpu().numpy()


def _to_rgb(pixels: torch.Tensor, processor: ForesightProcessor) -> np.ndarray:
    """Normalized `(3, H, W)` -> `(H, W, 3)` in [0, 1]."""
    mean, std = (pixels.new_tensor(x)[:, None, None] for x in (processor.image_mean, processor.image_std))
    return (pixels * std + mean).clamp(0, 1).movedim(0, -1).cpu().numpy()


def depth_limits(moments: Sequence[Moment]) -> tuple[float, float]:
    """Range of depth over all moments, without the outermost 2 % at both ends; meters.

    It is that of recorded depth; of predicted depth where none was recorded.
    """
    pairs = [pair for m in moments for pair in (m.depth, m.future_depth) if pair is not None]
    recorded, predicted = ([pair[which] for pair in pairs if pair[which] is not None] for which in (0, 1))
    maps = [depth.ravel() for depth in recorded or predicted]
    flows = [truth or predicted for truth, predicted in (m.flow for m in moments if m.flow is not None)]
    maps += [flow.points[..., 2][flow.shown] for flow in flows if flow.points.shape[-1] == 3]
    return depth_range(np.concatenate(maps) if maps else np.zeros(0))
