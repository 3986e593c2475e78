"""Open-loop errors in real units, each beside what trivial predictors get on exactly the same elements.

A loss of 0.001 says nothing by itself: a flow that only repeats where its points are has a small one too. So
every error here comes with those of the predictors that need no model:

| prediction | unit | trivial predictors |
| --- | --- | --- |
| current depth | squared, normalised per patch | `mean`: training mean of each pixel's normalised value |
| future RGB, future depth | the same, apart | `mean`; `current`: the current frame repeated |
| flow | pixels, fractions, metres | `mean` displacement and z per node and step; `stay_put`, z as labelled |
| actions | the raw batch's | `mean` per step of the chunk |
| progress | [0, 1] | `mean` |

What a model does not predict has no errors: future depth with `future_rgb`, z with `flow_2d`. Actions are
compared as a raw batch holds them: in the dataset's units, or as `local_delta` (1 = 2 cm or 0.05 rad).

Masks (padding, absent views, invalid depth, unsupervised points, actions past the end) are respected
everywhere. Sums are kept in float64.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed
from tqdm import tqdm

from modeling_foresight import ForesightConfig, ForesightForActionPrediction, ForesightProcessor
from modeling_foresight.losses import masked_mean
from modeling_foresight.targets import (
    Target,
    action_weight,
    depth_target,
    depth_targets,
    flow_targets,
    future_targets,
    progress_targets,
    rgb_target,
)

if TYPE_CHECKING:
    from training.run_data import RunData

__all__ = [
    "evaluate_open_loop",
    "fit_baselines",
    "flatten_metrics",
    "flow_errors",
    "format_open_loop",
    "measure_held_out",
]


class _Mean:
    """A weighted running mean; the last `kept_axes` axes are kept, all others are averaged over."""

    def __init__(self, kept_axes: int = 0):
        self.kept_axes, self.sum, self.weight = kept_axes, 0.0, 0.0

    def add(self, values: Tensor, weight: Tensor) -> None:
        """Adds `values`; `weight` (or mask) broadcasts to them. Values without weight may be anything."""
        weight = weight.to(values.dtype).expand_as(values)
        values = torch.where(weight > 0, values, torch.zeros_like(values))
        axes = tuple(range(values.ndim - self.kept_axes))
        self.sum = self.sum + (values * weight).sum(axes, dtype=torch.float64).cpu()
        self.weight = self.weight + weight.sum(axes, dtype=torch.float64).cpu()

    def merge(self, other: "_Mean") -> None:
        """Adds what another process has summed up."""
        self.sum, self.weight = self.sum + other.sum, self.weight + other.weight

    def __bool__(self) -> bool:
        return bool(torch.as_tensor(self.weight).sum() > 0)

    def value(self) -> Tensor:
        """The mean; where an element was never seen, the mean over all elements."""
        total = self.sum.sum() / self.weight.sum().clamp(min=1e-12)
        seen = self.weight > 0
        return torch.where(seen, self.sum / self.weight.clamp(min=1e-12), total)


def _merge_processes(means: dict) -> dict:
    """The same means over the shares of all processes; every process calls it and gets them."""
    if not distributed.is_initialized():
        return means
    shares: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(shares, means)
    merged: dict = {}
    for share in shares:
        for name, mean in share.items():
            if name in merged:
                merged[name].merge(mean)
            else:
                merged[name] = mean
    return merged


def measure_held_out(
    model: ForesightForActionPrediction,
    processor: ForesightProcessor,
    data: "RunData",
    batch_size: int,
    baseline_windows: int,
    rank: int = 0,
    world_size: int = 1,
) -> dict:
    """Errors on the validation windows, beside trivial predictors that are fitted to training windows.

    Args:
        model, processor: The policy.
        data (`RunData`): Its `val` must exist.
        batch_size (`int`): Windows per forward pass.
        baseline_windows (`int`): Training windows, evenly spread, that the trivial predictors are fitted to.
        rank, world_size (`int`): Each process measures a share of the windows; all must call this together.

    Returns:
        `dict`: As [`evaluate_open_loop`]; the same in every process.
    """
    from training.run_data import evaluation_loader

    share = {"rank": rank, "world_size": world_size}
    bar = {"unit": "batch", "disable": rank > 0}
    train = evaluation_loader(data.unaugmented_train(), batch_size, baseline_windows, **share)
    train = tqdm(train, desc="trivial predictors", **bar)
    baselines = fit_baselines(train, processor, model.config, model.device)
    held_out = tqdm(evaluation_loader(data.val, batch_size, **share), desc="held-out episodes", **bar)
    return evaluate_open_loop(model, processor, held_out, baselines)


def fit_baselines(
    batches: Iterable[Mapping],
    processor: ForesightProcessor,
    config: ForesightConfig,
    device: torch.device | None = None,
) -> dict[str, Tensor]:
    """Training-set means that stand in for a model, from one pass over training windows.

    In distributed training every process calls it with its share of the windows.

    Args:
        batches (`Iterable`): Raw batches of *training* windows, best without augmentation.
        processor (`ForesightProcessor`): Prepares them.
        config (`ForesightConfig`): Says which targets there are and where; no model is needed.
        device (`torch.device`, *optional*): Where targets are computed.

    Returns:
        `dict[str, Tensor]`: float32 on the CPU, as far as the batches have targets: `depth`, `future_rgb`,
        `future_depth` `(V, N, values per patch)` normalised; `flow_displacement` `(L, P, 2)` fractions from
        the start; `flow_z` `(L, P)` metres; `actions` `(K, A)` in the raw batch's units; `progress` `()`.
    """
    means: dict[str, _Mean] = {}

    def add(name: str, kept_axes: int, values: Tensor, weight: Tensor) -> None:
        means.setdefault(name, _Mean(kept_axes)).add(values, weight)

    with torch.no_grad():
        for raw in batches:
            batch = processor.prepare_batch(raw, device, config.history_length)
            for name, (target, weight) in _targets(config, raw, batch).items():
                if name == "flow":
                    displacement = target[..., :2] - batch["track_start"].float()[:, :, None]
                    add("flow_displacement", 3, displacement, weight[..., None])
                    if target.shape[-1] == 3:
                        add("flow_z", 2, target[..., 2], weight)
                elif name == "actions":
                    add(name, 2, target, weight[..., None])
                else:
                    add(name, 0 if name == "progress" else 3, target, weight)
    means = _merge_processes(means)
    return {name: mean.value().float() for name, mean in means.items() if mean}


def evaluate_open_loop(
    model: ForesightForActionPrediction,
    processor: ForesightProcessor,
    batches: Iterable[Mapping],
    baselines: Mapping[str, Tensor] | None = None,
) -> dict:
    """Losses and errors of a model on recorded windows, beside trivial predictors.

    The model is in evaluation mode meanwhile (the style of the action CVAE is zero then). In distributed
    training every process calls it with its share of the windows.

    Args:
        model (`ForesightForActionPrediction`): The policy.
        processor (`ForesightProcessor`): Its processor.
        batches (`Iterable`): Raw batches (schema in `inputs.py`), as `collate_windows` makes.
        baselines (`Mapping`, *optional*): From [`fit_baselines`]; without them the `mean` rows are missing.

    Returns:
        `dict`: Plain floats, `{section: {group: {predictor: {metric: value}}}}`, and `windows`, `losses`.

        - `losses`: validation losses, the mean over batches weighted by their size, and `total`.
        - `depth`, `future_rgb`, `future_depth`: group = view; `mse`.
        - `flow`: groups `all` and `moving` (labelled moving); `x_px`, `y_px` mean absolute error and `xy_px`
          mean distance in pixels of the flow view's native resolution, `xy_rmse` in image fractions, `z_m`
          mean absolute error and `z_rmse_m` in metres. Step 0 (now) counts, as in the loss.
        - `actions`: groups `chunk` (all steps) and `first`; `l1` per dimension in the raw batch's units and
          `l1_mean`.
        - `progress`: group `all`; `mae`.

    Raises:
        ValueError: If there is no window.
    """
    baselines = dict(baselines or {})
    table = _Table()
    losses: dict[str, _Mean] = {}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for raw in batches:
                batch = processor.prepare_batch(raw, model.device, model.config.history_length)
                output = model(**batch)
                size = torch.tensor(float(len(batch["pixel_values"])))
                named = {"windows": torch.ones(()), **(output.losses or {})}
                if output.loss is not None:
                    named["total"] = output.loss
                for name, loss in named.items():
                    losses.setdefault(name, _Mean()).add(loss.detach().float().cpu(), size)
                targets = _targets(model.config, raw, batch)
                _compare(table, model, processor, raw, batch, output, targets, baselines)
    finally:
        model.train(was_training)
    losses, table.means = _merge_processes(losses), _merge_processes(table.means)
    if not losses:
        raise ValueError("no windows to evaluate on; give validation episodes")
    return {
        "windows": int(losses.pop("windows").weight),
        "losses": {name: mean.value().item() for name, mean in losses.items()},
        **table.result(),
    }


def flatten_metrics(metrics: Mapping, prefix: str = "") -> dict[str, float]:
    """`{"a": {"b": 1.0}}` -> `{"a/b": 1.0}`, for trackers; lists become `name/0`, `name/1`, ..."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        value = dict(enumerate(value)) if isinstance(value, (list, tuple)) else value
        if isinstance(value, Mapping):
            flat |= flatten_metrics(value, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def format_open_loop(metrics: Mapping) -> str:
    """A few lines for people: each error of the model, and in brackets those of the trivial predictors.

    Args:
        metrics (`Mapping`): What `evaluate_open_loop` or `measure_in_real_units` gives.
    """
    losses = ", ".join(f"{name} {loss:.4g}" for name, loss in metrics.get("losses", {}).items())
    lines = [f"losses: {losses}"] if losses else []
    for section, groups in metrics.items():
        if section in ("losses", "windows"):
            continue
        for group, predictors in groups.items():
            parts = []
            for metric, value in predictors["model"].items():
                if isinstance(value, float):  # neither a list nor a count
                    others = [f"{who} {m[metric]:.4g}" for who, m in predictors.items() if who != "model"
                              and metric in m]  # fmt: skip
                    parts.append(f"{metric} {value:.4g}" + (f" ({', '.join(others)})" if others else ""))
            lines.append(f"{section} {group}: " + ", ".join(parts))
    return "\n".join(lines)


def flow_errors(flow: Tensor, raw: Mapping) -> dict[str, float]:
    """Flow errors of one batch for the training log: x, y and z apart, on the points that move.

    Points are those labelled moving (all, if the batch has no labels or none moves): elsewhere staying put is
    right anyway. Args: `flow`, the model's `(B, T, L, P, 3 or 2)`; `raw`, the raw batch it was computed from.

    Returns:
        `dict`: Mean absolute errors `flow_x_px`, `flow_y_px` (pixels of the flow view as recorded),
        `flow_z_m` (if z is predicted), and `stay_put_x_px`, `stay_put_y_px` of points that stay where they
        are. Empty if nothing is supervised.
    """
    track, frames = raw["track"].float()[..., : flow.shape[-1]], flow.shape[1]
    weight = (
        raw["track_weight"].float() if raw.get("track_weight") is not None else torch.ones_like(track[..., 0])
    )
    if raw.get("frame_mask") is not None:
        weight = weight * raw["frame_mask"][:, :frames, None, None]
    moving = raw.get("track_moving")
    if moving is not None and (weight * moving[:, :, None]).sum() > 0:
        weight = weight * moving[:, :, None]
    if not weight.sum():
        return {}
    height, width = next(iter(raw["images"].values())).shape[-2:]
    unit = track.new_tensor([width, height, 1.0])[: flow.shape[-1]]
    still = raw["track_start"].float()[:, :, None].expand_as(track[..., :2])
    errors = {
        "flow": ((flow.detach().float().to(track.device) - track) * unit).abs(),
        "stay_put": ((still - track[..., :2]) * unit[:2]).abs(),
    }
    return {
        f"{predictor}_{axis}": masked_mean(error[..., i], weight).item()
        for predictor, error in errors.items()
        for i, axis in enumerate(("x_px", "y_px", "z_m")[: error.shape[-1]])
    }


def _targets(config: ForesightConfig, raw: Mapping, batch: Mapping) -> dict[str, Target]:
    """What the heads should say for a batch, as the losses have it, but actions as they are raw."""
    targets = future_targets(config, batch) if config.has("future") else {}
    if config.has("action") and raw.get("actions") is not None:
        actions = raw["actions"].to(batch["frame_mask"].device).float()
        targets["actions"] = Target(actions, action_weight(config, batch))
    makers = {"depth": depth_targets, "flow": flow_targets, "progress": progress_targets}
    for objective, make in makers.items():
        if config.has(objective) and (target := make(config, batch)) is not None:
            targets[objective] = target
    return targets


class _Table:
    """Means by section, group, predictor and metric."""

    def __init__(self):
        self.means: dict[tuple[str, str, str, str], _Mean] = {}

    def add(self, section, group, predictor, metric, error: Tensor, weight: Tensor, kept_axes=0) -> None:
        """Adds errors with their weights to one entry."""
        self.means.setdefault((section, group, predictor, metric), _Mean(kept_axes)).add(error, weight)

    def result(self) -> dict:
        """Nested plain floats. Groups that never had an element are left out; `..rmse..` are roots."""
        result: dict = {}
        for (section, group, predictor, metric), mean in self.means.items():
            if not mean:
                continue
            value = mean.value()
            value = value.sqrt() if "rmse" in metric else value
            entry = result.setdefault(section, {}).setdefault(group, {}).setdefault(predictor, {})
            entry[metric] = value.tolist()
            if value.ndim:
                entry[f"{metric}_mean"] = value.mean().item()
        return result


def _compare(table: _Table, model, processor, raw, batch, output, targets, baselines) -> None:
    """Adds the errors of one batch to the table."""
    patch, views = model.config.patch_size, list(model.config.views)
    baselines = {name: mean.to(model.device) for name, mean in baselines.items()}

    def patches(section: str, **predictors: Tensor | None) -> None:
        target, mask = targets[section]
        for predictor, values in predictors.items():
            if values is not None:
                error = (values.float() - target) ** 2
                for v, view in enumerate(views):
                    table.add(section, view, predictor, "mse", error[:, :, v], mask[:, :, v])

    if "depth" in targets:
        patches("depth", model=output.depth, mean=baselines.get("depth"))
    if "future_rgb" in targets:
        n = targets["future_rgb"][0].shape[1]
        patches(
            "future_rgb",
            model=output.future_rgb[:, :n],
            mean=baselines.get("future_rgb"),
            current=rgb_target(batch["pixel_values"][:, :n], patch),
        )
        if "future_depth" in targets:
            current, valid = depth_target(batch["depth"][:, :n], patch)
            patches(
                "future_depth",
                model=output.future_depth[:, :n],
                mean=baselines.get("future_depth"),
                # Where the current frame has no depth, its patch's mean is the best that can be repeated.
                current=torch.where(valid, current, torch.zeros_like(current)),
            )
    if "flow" in targets:
        _compare_flow(table, raw, batch, output.flow, *targets["flow"], views[0], baselines)
    if "actions" in targets:
        actions, mask = targets["actions"]
        predicted = processor.denormalize_actions(output.actions)
        predictors = {"model": predicted, "mean": baselines.get("actions")}
        for predictor, values in predictors.items():
            if values is not None:
                error = (values - actions).abs()
                table.add("actions", "chunk", predictor, "l1", error, mask[..., None], 1)
                table.add("actions", "first", predictor, "l1", error[:, :, 0], mask[:, :, 0, None], 1)
    if "progress" in targets:
        progress, mask = targets["progress"]
        for predictor, values in {"model": output.progress, "mean": baselines.get("progress")}.items():
            if values is not None:
                table.add("progress", "all", predictor, "mae", (values - progress).abs(), mask)


def _compare_flow(table, raw, batch, predicted, track, weight, view, baselines) -> None:
    """Flow errors of the model and of the trivial predictors, for all points and for those that move."""
    height, width = raw["images"][view].shape[-2:]
    size_px = track.new_tensor([width, height])
    start = batch["track_start"].float()[:, :, None].expand_as(track[..., :2])  # (B, T, L, P, 2)
    z_now = track[:, :, :1, :, 2].expand_as(weight) if predicted.shape[-1] == 3 else None
    z_known = weight[:, :, :1] > 0  # a point whose depth now has no label cannot be said to keep it
    has_z = predicted.shape[-1] == 3
    z = predicted[..., 2].float() if has_z else None
    predictors = {"model": (predicted[..., :2].float(), z), "stay_put": (start, z_now)}
    if "flow_displacement" in baselines:
        z = baselines.get("flow_z") if has_z else None
        predictors["mean"] = start + baselines["flow_displacement"], z
    groups = {"all": weight}
    if raw.get("track_moving") is not None:
        groups["moving"] = weight * raw["track_moving"].to(weight.device)[:, :, None]
    for predictor, (xy, z) in predictors.items():
        error_xy = xy - track[..., :2]
        error_px = (error_xy * size_px).abs()
        error_z = None if z is None else (z - track[..., 2]).abs()
        for group, w in groups.items():
            table.add("flow", group, predictor, "x_px", error_px[..., 0], w)
            table.add("flow", group, predictor, "y_px", error_px[..., 1], w)
            table.add("flow", group, predictor, "xy_px", error_px.norm(dim=-1), w)
            table.add("flow", group, predictor, "xy_rmse", error_xy**2, w[..., None])
            if error_z is not None:
                w = w * z_known
                table.add("flow", group, predictor, "z_m", error_z, w)
                table.add("flow", group, predictor, "z_rmse_m", error_z**2, w)
