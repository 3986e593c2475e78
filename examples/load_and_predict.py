"""Loads a policy and shows what it predicts at one recorded moment: actions, 3D flow, a picture of all.

python examples/load_and_predict.py --checkpoint ORG/NAME --dataset YOU/DATASET --window 40
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoProcessor

import modeling_foresight  # noqa: F401 - registers the model with the Auto classes
from datasets_scripts.inspection.drawing import save_png
from datasets_scripts.storage.dataset_rows import DatasetRows
from training.evaluation.figures import draw_moments
from training.evaluation.predictions import predict_windows
from training.policy_data import fit_windows
from training.windows import ForesightWindows

REPOSITORY = Path(__file__).resolve().parents[1]


def format_action(action: torch.Tensor) -> str:
    """One action as a line of numbers."""
    return " ".join(f"{value:6.2f}" for value in action.tolist())


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default=REPOSITORY / "hub_cards/models/3d-foresight-metaworld-tiny")
    parser.add_argument("--dataset", default=REPOSITORY / "hub_cards/sample_data/metaworld")
    parser.add_argument("--window", type=int, default=10, help="which moment of the dataset (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/foresight.png"), help="the picture")
    args = parser.parse_args()

    model = AutoModel.from_pretrained(args.checkpoint).eval()
    processor = AutoProcessor.from_pretrained(args.checkpoint)
    # Windows as in training, with the labels that the dataset has: the picture shows them beside predictions.
    rows = DatasetRows(args.dataset)
    wanted, notes = fit_windows(args.checkpoint, model.config, rows)
    windows = ForesightWindows(rows, wanted)
    for note in notes:
        print(note)
    if not 0 <= args.window < len(windows):
        raise ValueError(f"--window {args.window}: {args.dataset} has windows 0 to {len(windows) - 1}")
    sample = windows[args.window]

    # What a robot knows: T images of every camera (T, 3, H, W), the instruction, T states.
    now = slice(model.config.history_length)
    images = {view: frames[now] for view, frames in sample["images"].items()}
    state = sample.get("state")  # of a policy or a dataset without one: none
    batch = processor(images, sample["task"], state)
    with torch.no_grad():
        actions = model.predict_action(**batch)  # (1, K, A) normalized
    predicted = processor.decode_actions(actions, None if state is None else state[None, -1])[
        0
    ]  # the dataset's units
    recorded = [""] * len(predicted)
    if "actions" in sample:
        chunk = sample["actions"][model.config.history_length - 1]  # (K, A): from the newest frame on
        recorded = [f"   recorded {format_action(action)}" for action in chunk]
    print(f"“{sample['task']}”, window {args.window} of {len(windows)}")
    for step, (ours, theirs) in enumerate(zip(predicted, recorded, strict=True)):
        print(f"action {step}: predicted {format_action(ours)}{theirs}")

    view = model.config.views[0]
    moment = next(predict_windows(model, processor, windows, [args.window], [view])).views[view]
    for name, flow in zip(("recorded", "predicted"), moment.flow or (), strict=False):  # points: (L, P, 3)
        if flow is None:  # the dataset has no tracks
            continue
        known = flow.moving & flow.shown.all(0)
        path = np.linalg.norm(flow.points[-1, known, :2] - flow.points[0, known, :2], axis=-1)
        share = path.sum() / max(1, len(path))
        print(f"{name} flow: {known.sum()} points move, by {share:.1%} of the image in the mean")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_png(args.output, draw_moments([moment], f"“{sample['task']}”, {view} camera", ""))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
