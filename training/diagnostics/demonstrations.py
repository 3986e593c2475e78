"""What a policy predicts on demonstrations that it was not trained on: by task, how calibrated, from what.

Every figure is of the newest frame of a window, whose actions a robot would execute, except the errors of
depth, future and flow, which are those of `evaluation/open_loop.py`. Flow starts on the grid, as in control,
not at labeled points: the action sees the flow queries.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from datasets_scripts.storage.atomic import read_json, write_json
from datasets_scripts.storage.dataset_rows import DatasetRows
from modeling_foresight import ForesightConfig, ForesightForActionPrediction, ForesightProcessor
from modeling_foresight.inputs import ForesightInputs
from training.evaluation.open_loop import evaluate_open_loop
from training.policy_data import fit_windows, held_out_data, is_trained_on
from training.run_data import dataset_identity
from training.windows import ConcatWindows, ForesightWindows, collate_windows

__all__ = [
    "measure_calibration",
    "measure_causality",
    "measure_demonstrations",
    "measure_once",
    "open_demonstrations",
]

BINS = 10
BATCH_SIZE = 32
CAUSALITY_WINDOWS = 64
LABELS = ("lookahead_pixel_values", "lookahead_depth", "depth", "track", "actions", "progress")


def open_demonstrations(
    checkpoint: str, config: ForesightConfig, dataset: str, cameras: str = "", embodiment: str | None = None
) -> tuple[ConcatWindows, str]:
    """Windows of the episodes of a dataset that a policy was not trained on, and how that is known.

    Args:
        checkpoint (`str`): Folder of the policy.
        config (`ForesightConfig`): Its config.
        dataset (`str`): One of the datasets that it was trained on, of which the episodes that the run held
            out are taken; or another one, of which all are.
        cameras (`str`): Of a dataset of other camera names; see `policy_data.match_cameras`.
        embodiment (`str`, *optional*): The robot, of a policy for several.

    Returns:
        `tuple`: The windows, and `"held out"`, `"other"`, or `"unknown"` if the policy may have seen them.

    Raises:
        ValueError: If it is unknown which episodes were held out, or the dataset does not fit the policy.
    """
    rows = DatasetRows(dataset)
    trained_on = is_trained_on(checkpoint, rows)
    if trained_on:
        return held_out_data(checkpoint, config, dataset).val, "held out"
    wanted, notes = fit_windows(checkpoint, config, rows, cameras, embodiment, skip_flagged=False)
    for note in notes:
        print(note)
    windows = ConcatWindows([ForesightWindows(rows, wanted)], config.embodiments)
    return windows, "unknown" if trained_on is None else "other"


def measure_once(
    model, processor, windows: ConcatWindows, replaced: Mapping[str, str], weights: str | None, path: Path
) -> dict:
    """What [`measure_demonstrations`] gives, kept in the file `path`.

    Raises:
        ValueError: If the file is of other weights (`weights` is their digest), of another dataset, or of
            other cameras of it.
    """
    recorded = windows.datasets[0]
    facts = {
        "weights_sha256": weights,
        "data": dataset_identity(recorded.rows),
        "cameras": recorded.cameras,
        "frame_stride": recorded.config.frame_stride,
        "embodiment": processor.embodiment,
        "instructions_in_place": dict(sorted(replaced.items())),
    }
    if not path.exists():
        write_json(path, {**facts, "figures": measure_demonstrations(model, processor, windows, replaced)})
    kept = read_json(path, "delete it; it is measured again")
    if differing := [name for name, fact in facts.items() if kept.get(name) != fact]:
        raise ValueError(
            f"{path} was measured with other {' and '.join(differing)}: choose another --output, or delete it"
        )
    return kept["figures"]


def measure_demonstrations(
    model: ForesightForActionPrediction,
    processor: ForesightProcessor,
    windows: ConcatWindows,
    replaced: Mapping[str, str],
) -> dict:
    """All figures of demonstrations.

    Args:
        model, processor: The policy, in evaluation mode; the processor for the robot of the demonstrations.
        windows (`ConcatWindows`): The demonstrations, one dataset.
        replaced (`Mapping[str, str]`): Instruction -> that of another task of the scene, where there is one.

    Returns:
        `dict`: `dataset` (name), `episodes` and `windows` (their number); `tasks`, by instruction the
        `windows`, `next_action_l1` in the dataset's units, `progress_mae`, and the model's other errors of
        `evaluate_open_loop`; `progress` of [`measure_calibration`] if it is predicted; `instruction` of
        [`measure_instruction`] if two tasks share a scene; `causality` of [`measure_causality`].
    """
    predicted, recorded = _predict(model, processor, windows), windows.datasets[0]
    results = {
        "dataset": Path(recorded.rows.name).name,
        "episodes": len(recorded.episodes),
        "windows": len(windows),
        "tasks": _measure_tasks(model, processor, windows, predicted),
    }
    if "progress" in predicted:
        results["progress"] = measure_calibration(predicted["progress"], predicted["true_progress"])
    if found := measure_instruction(model, processor, windows, predicted, replaced):
        results["instruction"] = found
    # Rounded down, unlike `spread_evenly`: saved figures are those of these windows.
    spread = np.linspace(0, len(windows) - 1, min(CAUSALITY_WINDOWS, len(windows))).astype(int)
    raw = collate_windows([windows[int(i)] for i in spread])
    return results | {"causality": measure_causality(model, processor, raw)}


def measure_calibration(predicted: np.ndarray, true: np.ndarray, bins: int = BINS) -> dict:
    """How far predicted progress is from the true share of the episode, in bins of equal width.

    Args:
        predicted, true (`np.ndarray`): `(N,)` shares in [0, 1]; predictions beyond are counted at the end.
        bins (`int`): Bins of the predicted value.

    Returns:
        `dict`: `mae`, the mean absolute error; `ece`, the expected calibration error: the mean over windows
        of the distance between mean prediction and mean truth in their bin; `bins` with `low`, `high`,
        `windows` and, unless there is none, mean `predicted` and `true`.
    """
    places = np.clip((predicted * bins).astype(int), 0, bins - 1)
    rows, gap = [], 0.0
    for place in range(bins):
        inside = places == place
        row = {"low": place / bins, "high": (place + 1) / bins, "windows": int(inside.sum())}
        if inside.any():
            row |= {"predicted": float(predicted[inside].mean()), "true": float(true[inside].mean())}
            gap += row["windows"] * abs(row["predicted"] - row["true"])
        rows.append(row)
    mae = float(np.abs(predicted - true).mean())
    return {"mae": mae, "ece": gap / len(predicted), "bins": rows}


def measure_instruction(
    model, processor, windows: ConcatWindows, predicted: Mapping, replaced: Mapping[str, str]
) -> dict | None:
    """How far the next action moves when another task of the same scene is named, and its errors.

    Returns:
        `dict`, *optional*: `windows` of tasks that share a scene with another task of the dataset, and mean
        absolute distances in the dataset's units: `named_l1` and `other_l1` to the demonstration, `change_l1`
        between the two actions. `None` if no tasks share a scene, or the dataset has no actions.
    """
    if "true_action" not in predicted:
        return None
    is_known = np.isfinite(predicted["true_action"]).all(-1)
    chosen = [i for i, text in enumerate(predicted["task"]) if text in replaced and is_known[i]]
    if not chosen:
        return None
    other = _predict(model, processor, Subset(windows, chosen), replaced)["action"]
    named, true = predicted["action"][chosen], predicted["true_action"][chosen]
    errors = {"named_l1": named - true, "other_l1": other - true, "change_l1": other - named}
    return {"windows": len(chosen)} | {name: float(np.abs(error).mean()) for name, error in errors.items()}


def measure_causality(model, processor, raw: Mapping) -> dict:
    """Whether anything that comes after a frame, or a label, reaches the actions of that frame.

    Args:
        model, processor: The policy, in evaluation mode.
        raw (`Mapping`): A raw batch of windows, of one robot.

    Returns:
        `dict`: `windows`, and the largest absolute changes of a normalized action: `later_frames`, when
        images and states of all frames after it are replaced by noise (`None` with one frame); `labels`, when
        depth, tracks, future images, actions and progress are; `points`, when flow starts at the labeled
        points of this frame instead of the grid (`None` without). `stream`, in the dataset's units, is the
        distance between the window and a stream that gets the frames one by one.
    """
    batch = processor.prepare_batch(raw, model.device, model.config.history_length)
    points = batch.pop("track_start", None)
    draw = torch.Generator().manual_seed(0)

    def noise(values: Tensor) -> Tensor:
        return torch.randn(values.shape, generator=draw).to(values)

    def actions(changed: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return model(**{**batch, **changed}).actions  # (B, T, K, A)

    before, frames = actions({}), model.config.history_length
    moved = []
    for t in range(frames - 1):
        changed = {}
        for name in ("pixel_values", "state"):
            if name in batch:
                changed[name] = batch[name].clone()
                changed[name][:, t + 1 :] = noise(changed[name][:, t + 1 :])
        moved.append((actions(changed) - before)[:, : t + 1].abs().max().item())
    labels = {name: noise(batch[name]) for name in LABELS if name in batch}
    return {
        "windows": len(raw["task"]),
        "later_frames": max(moved, default=None),
        "labels": (actions(labels) - before).abs().max().item(),
        "points": None if points is None else (actions({"track_start": points}) - before).abs().max().item(),
        "stream": _compare_with_stream(model, processor, raw, batch, before),
    }


def _compare_with_stream(model, processor, raw: Mapping, batch: Mapping, before: Tensor) -> float:
    """Largest distance between the actions of whole windows and of a stream, on frames that exist."""
    robots = len(raw["task"])
    stream = model.stream(processor, num_envs=robots)
    stream.reset(raw["task"])
    goals = raw.get("goal_image")
    if goals is not None:
        has_goal = raw.get("goal_mask")
        rows = torch.arange(robots) if has_goal is None else has_goal.nonzero()[:, 0]
        if len(rows):
            stream.set_goal(goals[rows], envs=rows.tolist())
    farthest = 0.0
    for t in range(model.config.history_length):
        images = {view: frames[:, t].numpy() for view, frames in raw["images"].items()}
        state = None
        if stream.state_dim and raw.get("state") is not None:
            state = processor.take_entries("state", raw["state"][:, t]).numpy()
        chunk = stream.step_chunk(images, state, view_mask=raw.get("view_mask"))
        window = processor.decode_actions(before[:, t].cpu(), state=state)
        real = batch["frame_mask"][:, t].cpu()
        farthest = max(farthest, (chunk - window)[real].abs().max().item() if real.any() else 0.0)
    return farthest


def _measure_tasks(model, processor, windows: ConcatWindows, predicted: Mapping) -> dict[str, dict]:
    """The model's errors by instruction; plain figures only."""
    results, texts = {}, np.array(predicted["task"])
    for task in tqdm(sorted(set(predicted["task"])), desc="errors by task", unit="task"):
        chosen = np.flatnonzero(texts == task)
        loader = DataLoader(Subset(windows, chosen), batch_size=BATCH_SIZE, collate_fn=collate_windows)
        errors = evaluate_open_loop(model, processor, loader)
        results[task] = {"windows": len(chosen)}
        for name, key in {"action": "next_action_l1", "progress": "progress_mae"}.items():
            if f"true_{name}" in predicted and name in predicted:
                error = _mean_size(predicted[name][chosen] - predicted[f"true_{name}"][chosen])
                results[task] |= {} if error is None else {key: error}
        for section in ("windows", "losses", "actions", "progress"):
            errors.pop(section, None)
        for section, groups in errors.items():
            for group, predictors in groups.items():
                for metric, value in predictors["model"].items():
                    if isinstance(value, float):
                        results[task][f"{section}/{group}/{metric}"] = value
    return results


def _mean_size(error: np.ndarray) -> float | None:
    """Mean absolute error over what is known; `None` if nothing is."""
    known = error[np.isfinite(error)]
    return float(np.abs(known).mean()) if known.size else None


def _predict(model, processor, windows, replaced: Mapping[str, str] | None = None) -> dict:
    """Next actions and progress of all windows, newest frame: arrays, and the instructions as recorded.

    With `replaced` the model gets other instructions: recorded one -> other one.
    """
    loader = DataLoader(windows, batch_size=BATCH_SIZE, collate_fn=collate_windows)
    found: dict[str, list] = {"task": []}
    for raw in tqdm(loader, desc="demonstrations", unit="batch"):
        found["task"] += raw["task"]
        for name, values in _predict_newest(model, processor, raw, replaced):
            found.setdefault(name, []).append(values.float().cpu().numpy())
    return {name: values if name == "task" else np.concatenate(values) for name, values in found.items()}


def _predict_newest(model, processor, raw: dict, replaced: Mapping[str, str] | None) -> Iterator[tuple]:
    newest = model.config.history_length - 1
    if replaced:
        raw = {**raw, "task": [replaced[task] for task in raw["task"]]}
    batch = processor.prepare_batch(raw, model.device, model.config.history_length)
    with torch.no_grad():
        known = ForesightInputs.__annotations__.keys() - {"track_start"}
        output = model(**{name: batch[name] for name in known if name in batch})
    actions = processor.denormalize_actions(output.actions[:, newest])[:, 0]
    yield "action", processor.take_entries("action", actions)
    if raw.get("actions") is not None:
        true = processor.take_entries("action", raw["actions"][:, newest, 0])
        if raw.get("action_mask") is not None:  # what does not exist is zeros there
            true = torch.where(raw["action_mask"][:, newest, 0, None].bool(), true, torch.nan)
        yield "true_action", true
    if output.progress is not None:
        yield "progress", output.progress[:, newest]
        yield "true_progress", raw["progress"][:, newest]
