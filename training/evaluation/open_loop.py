"""Open-loop errors in real units, each beside those of trivial predictors on exactly the same elements.

A loss of 0.001 says nothing by itself: a flow that only repeats where its points are has a small one too.

| prediction | unit | trivial predictors |
| --- | --- | --- |
| current depth | squared, normalized per patch | `mean`: training mean of each pixel's normalized value |
| current and future depth in meters | AbsRel, delta1 | `mean` of each pixel; `node_mean` of each patch |
| future RGB, future depth | the same, apart | `mean`; `current`: the current frame repeated |
| flow | pixels, fractions, meters | `mean` per node and step; `stay_put`, z as labeled |
| flow, start depth and displacement apart | pixels, meters | `mean` of each; `stay_put` (zero displacement) |
| actions | the raw batch's | `mean` per step of the chunk |
| progress | [0, 1] | `mean` |

The absolute z of a flow is the depth at the start, which a model must guess from RGB, plus the change since:
`stay_put` is told the first part, so only errors of the change can be compared with it.

What a model does not predict has no errors: depth in meters without `depth_form="metric"`, future depth with
`future_rgb`, z with `flow_2d`. Actions are
compared as a raw batch holds them: in the dataset's units, or as `local_delta` (1 = 2 cm or 0.05 rad).

Masks (padding, absent views, invalid depth, unsupervised points, actions past the end) are respected
everywhere. Sums are kept in float64.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, distributed
from tqdm import tqdm

from datasets_scripts.storage.provenance import find_intrinsics, read_provenance
from modeling_foresight import ForesightConfig, ForesightForActionPrediction, ForesightProcessor
from modeling_foresight.inputs import ForesightInputs
from modeling_foresight.targets import (
    Target,
    action_weight,
    depth_statistics,
    depth_target,
    depth_targets,
    flow_targets,
    future_depth,
    future_targets,
    patchify,
    progress_targets,
    rgb_target,
)
from training.engines.sharding import batches_in_step, is_sharded
from training.evaluation.means import Means
from training.evaluation.physical_errors import measure_physical_errors
from training.run_data import RunData, evaluation_loader

__all__ = [
    "evaluate_open_loop",
    "fit_baselines",
    "flow_errors",
    "format_open_loop",
    "measure_held_out",
    "measure_losses",
    "measure_recorded",
]


def measure_held_out(
    model: ForesightForActionPrediction,
    processor: ForesightProcessor,
    data: RunData,
    batch_size: int = 32,
    baseline_windows: int = 2000,
) -> dict:
    """What [`evaluate_open_loop`] gives for the validation windows of a run.

    The trivial predictors are fitted to `baseline_windows` evenly spread training windows. In distributed
    training all processes call it together; each measures its share, and all get the same errors.
    """
    bar = {"unit": "batch", "disable": distributed.is_initialized() and distributed.get_rank() > 0}
    train = evaluation_loader(data.unaugmented_train(), batch_size, baseline_windows)
    train = tqdm(train, desc="trivial predictors", **bar)
    baselines = fit_baselines(train, processor, model.config, model.device)
    held_out = tqdm(evaluation_loader(data.val, batch_size), desc="held-out episodes", **bar)
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
        processor, config: The model's; they decide the targets.
        device (`torch.device`, *optional*): Where targets are computed.

    Returns:
        `dict[str, Tensor]`: float32 on the CPU, as far as the batches have targets: `depth`, `future_rgb`,
        `future_depth` `(V, N, values per patch)` normalized; `metric_depth`, `metric_future_depth` the same
        in meters, and `<name>_node` `(V, N)`; `flow_displacement` `(L, P, 3 or 2)` from the start, image
        fractions and meters; `flow_start_z` `(P,)` meters; `actions` `(K, A)` in the raw batch's units, or
        one of each robot as `actions/NAME`; `progress` `()`.
    """
    means = Means()
    for raw in batches:
        batch = processor.prepare_batch(raw, device, config.history_length)
        for name, (target, weight) in _targets(config, raw, batch).items():
            if name == "flow":
                origin, known = _flow_origin(batch, target, weight)
                means.add("flow_displacement", target - origin, known, 3)
                if target.shape[-1] == 3:
                    means.add("flow_start_z", target[:, :, 0, :, 2], weight[:, :, 0], 1)
            elif name.startswith("actions"):
                means.add(name, target, weight[..., None], 2)
            else:
                means.add(name, target, weight, 0 if name == "progress" else 3)
            if name.startswith("metric"):
                means.add(f"{name}_node", target.movedim(-1, 0), weight.movedim(-1, 0), 2)
    return {name: mean.value().float() for name, mean in means.merge_processes().items() if mean}


def evaluate_open_loop(
    model: ForesightForActionPrediction,
    processor: ForesightProcessor,
    batches: Iterable[Mapping],
    baselines: Mapping[str, Tensor] | None = None,
) -> dict:
    """Losses and errors of a model in evaluation mode on recorded windows, beside trivial predictors.

    In distributed training every process calls it with its share of the windows.

    Args:
        model, processor: The policy.
        batches (`Iterable`): Raw batches (schema in `inputs.py`), as `collate_windows` makes.
        baselines (`Mapping`, *optional*): From [`fit_baselines`]; without them the `mean` rows are missing.

    Returns:
        `dict`: Plain floats, `{section: {group: {predictor: {metric: value}}}}`, and `windows`, `losses`.

        - `losses`: those of [`measure_losses`], and their weighted sum `total`.
        - `depth`, `future_rgb`, `future_depth`: group = view; `mse`.
        - `metric_depth`, `metric_future_depth`: group = view; `abs_rel`, the mean of |error| / depth, and
          `delta1`, the share of pixels with less than a factor of 1.25 between prediction and depth.
        - `flow`: groups `all`, `moving` and `still` (as labeled); `x_px`, `y_px` mean absolute error and
          `xy_px` mean distance in pixels of the flow view's native resolution, `xy_rmse` in image fractions,
          `z_m` mean absolute error and `z_rmse_m` in meters; step 0 (now) counts, as in the loss.
          `start_z_m` is the error at step 0, `displacement_x_px`, `displacement_y_px` and
          `displacement_z_m` those of the change since step 0, over all later steps.
        - `actions`: groups `chunk` (all steps) and `first`; `l1` per dimension in the raw batch's units and
          `l1_mean`. Of several robots `chunk/NAME` and `first/NAME` of each.
        - `progress`: group `all`; `mae`.

    Raises:
        ValueError: If there is no window.
    """
    baselines = {name: mean.to(model.device) for name, mean in (baselines or {}).items()}
    errors, losses, windows = Means(), Means(), Means()
    for raw, batch, output in _predict(model, processor, batches):
        windows.add("windows", torch.ones(len(raw["task"])), torch.ones(()))
        losses.add_losses(model.config, output, batch)
        _compare(errors, model, processor, raw, batch, output, baselines)
    errors, losses, windows = (means.merge_processes() for means in (errors, losses, windows))
    if not windows:
        raise ValueError("no windows to evaluate on; give validation episodes")
    losses = losses.losses()
    if losses:
        weights = {name: getattr(model.config, f"{name}_loss_weight") for name in losses}
        losses["total"] = sum(weights[name] * loss for name, loss in losses.items())
    return {"windows": int(windows["windows"].weight), "losses": losses, **errors.errors()}


def measure_losses(
    model: ForesightForActionPrediction, processor: ForesightProcessor, batches: Iterable[Mapping]
) -> dict[str, float]:
    """The losses of a model in evaluation mode, each one masked mean over all batches of all processes.

    In distributed training every process calls it with its share of the windows.
    """
    losses = Means()
    for _, batch, output in _predict(model, processor, batches):
        losses.add_losses(model.config, output, batch)
    return losses.merge_processes().losses()


def _predict(model, processor, batches: Iterable[Mapping]) -> Iterator[tuple]:
    """Raw batches with their model batches and outputs; the model is in evaluation mode meanwhile."""
    was_training = model.training
    model.eval()
    # The encoder of the action CVAE reads actions for the KL term; the style is zero in evaluation.
    given = (*ForesightInputs.__annotations__, "actions", "action_mask")
    try:
        together = batches_in_step(batches) if is_sharded(model) else ((raw, True) for raw in batches)
        for raw, counts in together:
            batch = processor.prepare_batch(raw, model.device, model.config.history_length)
            with torch.no_grad():
                output = model(**{name: batch[name] for name in given if name in batch})
            if counts:
                yield raw, batch, output
    finally:
        model.train(was_training)


def measure_recorded(
    model: ForesightForActionPrediction, processor: ForesightProcessor, data: RunData
) -> dict:
    """Errors on the held-out episodes of one dataset (`policy_data.held_out_data`).

    Returns:
        `dict`: `dataset` (name), `episodes` (held out), `metrics` of [`evaluate_open_loop`] and `real_units`
        of [`measure_physical_errors`].
    """
    (described,) = data.describe()
    windows = data.val.datasets[0]
    camera = windows.cameras.get(model.config.views[0])  # of the dataset, whatever the view's name is
    intrinsics = camera and find_intrinsics(read_provenance(windows.rows.root), windows.rows.features, camera)
    if intrinsics:
        intrinsics = {name: intrinsics[name] for name in ("fx", "fy", "cx", "cy")}
    return {
        "dataset": described["name"],
        "episodes": described["validation_episodes"],
        "metrics": measure_held_out(model, processor, data),
        "real_units": measure_physical_errors(model, processor, windows, intrinsics or None),
    }


def format_open_loop(metrics: Mapping) -> str:
    """A few lines for people: each error of the model, and in brackets those of the trivial predictors.

    Args:
        metrics (`Mapping`): What `evaluate_open_loop` or `measure_physical_errors` gives.
    """
    losses = ", ".join(f"{name} {loss:.4g}" for name, loss in metrics.get("losses", {}).items())
    lines = [f"losses: {losses}"] if losses else []
    for section, groups in metrics.items():
        if section in ("losses", "windows"):
            continue
        for group, predictors in groups.items():
            trivial = {name: figures for name, figures in predictors.items() if name != "model"}
            parts = []
            for metric, value in predictors["model"].items():
                if isinstance(value, float):  # neither a list nor a count
                    others = [f"{name} {f[metric]:.4g}" for name, f in trivial.items() if metric in f]
                    parts.append(f"{metric} {value:.4g}" + (f" ({', '.join(others)})" if others else ""))
            lines.append(f"{section} {group}: " + ", ".join(parts))
    return "\n".join(lines)


def flow_errors(config: ForesightConfig, flow: Tensor, raw: Mapping, batch: Mapping) -> dict[str, float]:
    """Flow errors of one batch for the training log: x, y and z apart, on the points that move.

    Points are those labeled moving (all, if the batch has no labels or none moves): elsewhere staying put is
    right anyway.

    Args:
        config (`ForesightConfig`): The model's.
        flow (`torch.Tensor`): Its prediction `(B, T, L, P, 3 or 2)`.
        raw, batch (`Mapping`): The raw batch, and the model batch it was predicted from.

    Returns:
        `dict`: Mean absolute errors of the displacement, `flow_x_px`, `flow_y_px` (pixels of the flow view as
        recorded) and `flow_z_m` (if z is predicted), those of points that stay where they are as
        `stay_put_x_px` and so on, and `flow_start_z_m`. Empty if nothing is supervised.
    """
    means, target = Means(), flow_targets(config, batch)
    if target is not None:
        _compare_flow(means, raw, batch, flow, target, config.views[0], {})
    groups = means.errors().get("flow", {})
    errors = groups.get("moving") or groups.get("all") or {}
    logged = {("model", "start_z_m"): "flow_start_z_m"}
    for axis in ("x_px", "y_px", "z_m"):
        logged["model", f"displacement_{axis}"] = f"flow_{axis}"
        logged["stay_put", f"displacement_{axis}"] = f"stay_put_{axis}"
    return {
        name: errors[predictor][metric]
        for (predictor, metric), name in logged.items()
        if metric in errors.get(predictor, {})
    }


def _targets(config: ForesightConfig, raw: Mapping, batch: Mapping) -> dict[str, Target]:
    """What the heads should say for a batch, as the losses have it, but actions as they are raw."""
    targets = future_targets(config, batch) if config.has("future") else {}
    if config.has("action") and raw.get("actions") is not None:
        actions = raw["actions"].to(batch["frame_mask"].device).float()
        weight = action_weight(config, batch)
        for robot, (rows, places) in _find_robots(config, batch).items():
            targets[f"actions{robot}"] = Target(actions[rows][..., places], weight[rows])
    makers = {"depth": depth_targets, "flow": flow_targets, "progress": progress_targets}
    for objective, make in makers.items():
        if config.has(objective) and (target := make(config, batch)) is not None:
            targets[objective] = target
    if config.depth_form == "metric":
        meters = {"depth": batch.get("depth"), "future_depth": future_depth(config, batch)}
        for name, depth in meters.items():
            if name in targets:
                patches = depth_statistics(depth, config.patch_size)[0]
                targets[f"metric_{name}"] = Target(patches, targets[name].weight)
    return targets


def _find_robots(config: ForesightConfig, batch: Mapping) -> dict[str, tuple]:
    """Samples of each robot in a batch, and the entries of its action, by `/NAME`; all by the empty name."""
    if not config.embodiments:
        return {"": (slice(None), slice(None))}
    numbered = enumerate(sorted(config.embodiments))
    found = {name: (batch["embodiment"] == number).nonzero()[:, 0] for number, name in numbered}
    return {
        f"/{name}": (rows, config.embodiments[name]["action"]) for name, rows in found.items() if len(rows)
    }


def _compare(means: Means, model, processor, raw, batch, output, baselines) -> None:
    """Adds the errors of one batch."""
    config, targets = model.config, _targets(model.config, raw, batch)
    patch = config.patch_size

    def compare_patches(section: str, predicted: Tensor, **trivial: Tensor | None) -> None:
        target, mask = targets[section]
        predictors = {"model": predicted[:, : target.shape[1]], "mean": baselines.get(section), **trivial}
        for predictor, values in predictors.items():
            if values is not None:
                error = (values.float() - target) ** 2
                for v, view in enumerate(config.views):
                    means.add((section, view, predictor, "mse"), error[:, :, v], mask[:, :, v])

    if "depth" in targets:
        compare_patches("depth", output.depth)
    if "future_rgb" in targets:
        n = targets["future_rgb"].values.shape[1]
        current = rgb_target(batch["pixel_values"][:, :n], patch)
        compare_patches("future_rgb", output.future_rgb, current=current)
        if "future_depth" in targets:
            current, valid = depth_target(batch["depth"][:, :n], patch)
            # Where the current frame has no depth, its patch's mean is the best that can be repeated.
            current = torch.where(valid, current, torch.zeros_like(current))
            compare_patches("future_depth", output.future_depth, current=current)
    for name in ("depth", "future_depth"):
        if f"metric_{name}" in targets:
            meters = patchify(output[f"predicted_{name}"][..., None, :, :], patch)  # (B, T, V, N, p * p)
            _compare_meters(means, config.views, f"metric_{name}", meters, targets, baselines)
    if "flow" in targets:
        _compare_flow(means, raw, batch, output.flow, targets["flow"], config.views[0], baselines)
    robots = _find_robots(config, batch) if raw.get("actions") is not None and config.has("action") else {}
    for robot, (rows, places) in robots.items():
        actions, mask = targets[f"actions{robot}"]
        predicted = processor.denormalize_actions(output.actions[rows], robot[1:] or None)[..., places]
        for predictor, values in {"model": predicted, "mean": baselines.get(f"actions{robot}")}.items():
            if values is not None:
                error = (values - actions).abs()
                means.add(("actions", f"chunk{robot}", predictor, "l1"), error, mask[..., None], 1)
                means.add(
                    ("actions", f"first{robot}", predictor, "l1"), error[:, :, 0], mask[:, :, 0, None], 1
                )
    if "progress" in targets:
        progress, mask = targets["progress"]
        for predictor, values in {"model": output.progress, "mean": baselines.get("progress")}.items():
            if values is not None:
                means.add(("progress", "all", predictor, "mae"), (values - progress).abs(), mask)


def _compare_meters(means: Means, views, section: str, predicted: Tensor, targets, baselines) -> None:
    """Relative errors of depth in meters."""
    depth, mask = targets[section]
    predictors = {"model": predicted[:, : depth.shape[1]]}
    if section in baselines:
        predictors |= {"mean": baselines[section], "node_mean": baselines[f"{section}_node"][..., None]}
    for predictor, values in predictors.items():
        ratio = values / depth
        close = (torch.maximum(ratio, 1 / ratio) < 1.25).float()
        for v, view in enumerate(views):
            means.add((section, view, predictor, "abs_rel"), (ratio - 1).abs()[:, :, v], mask[:, :, v])
            means.add((section, view, predictor, "delta1"), close[:, :, v], mask[:, :, v])


def _flow_origin(batch: Mapping, track: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Where points start `(B, T, L, P, 3 or 2)`, z as labeled now, and the weights of changes since."""
    origin = torch.cat([batch["track_start"].float(), track[:, :, 0, :, 2:]], -1)[:, :, None]
    weights = weight[..., None].repeat(*[1] * weight.ndim, track.shape[-1])
    weights[..., 2:] *= (weight[:, :, :1] > 0)[..., None]  # without a label now, the change of z is not known
    return origin.expand_as(track), weights


def _compare_flow(means: Means, raw, batch, predicted, target: Target, view, baselines) -> None:
    """Flow errors of the model and of the trivial predictors: all points, those that move, and the rest."""
    track, weight = target
    height, width = raw["images"][view].shape[-2:]
    origin, _ = _flow_origin(batch, track, weight)
    known = weight[:, :, :1] > 0  # a point whose place now has no label cannot be said to keep it
    predictors = {"model": predicted.float(), "stay_put": origin}
    if "flow_displacement" in baselines:
        displacement = baselines["flow_displacement"]
        predictors["mean"] = mean = origin + displacement
        if "flow_start_z" in baselines:
            mean[..., 2] = baselines["flow_start_z"] + displacement[..., 2]
    groups = {"all": weight}
    if raw.get("track_moving") is not None:
        moving = raw["track_moving"].to(weight.device)[:, :, None]
        groups |= {"moving": weight * moving, "still": weight * ~moving}
    for predictor, flow in predictors.items():
        error = flow - track  # (B, T, L, P, 3 or 2)
        change = error[:, :, 1:] - error[:, :, :1]  # (B, T, L - 1, P, 3 or 2)
        px = torch.stack([error[..., 0] * width, error[..., 1] * height], -1)
        for group, w in groups.items():

            def add(metric, values, weight, place=("flow", group, predictor)):
                means.add((*place, metric), values, weight)

            add("x_px", px[..., 0].abs(), w)
            add("y_px", px[..., 1].abs(), w)
            add("xy_px", px.norm(dim=-1), w)
            add("xy_rmse", error[..., :2] ** 2, w[..., None])
            add("displacement_x_px", change[..., 0].abs() * width, (w * known)[:, :, 1:])
            add("displacement_y_px", change[..., 1].abs() * height, (w * known)[:, :, 1:])
            if error.shape[-1] == 3:
                add("z_m", error[..., 2].abs(), w * known)
                add("z_rmse_m", error[..., 2] ** 2, w * known)
                add("displacement_z_m", change[..., 2].abs(), (w * known)[:, :, 1:])
                if predictor != "stay_put":  # it is told the depth at the start
                    add("start_z_m", error[:, :, 0, :, 2].abs(), w[:, :, 0])
