"""Measures a policy: its success in closed loop in MetaWorld, and its errors on recorded episodes.

python examples/evaluate_policy.py --checkpoint ORG/NAME --dataset YOU/DATASET --tasks drawer-open-v3,reach-v3
"""

import argparse
import sys
from pathlib import Path

from torch.utils.data import DataLoader

from datasets_scripts.storage.atomic import write_json
from datasets_scripts.storage.dataset_rows import DatasetRows
from training.evaluation.open_loop import evaluate_open_loop, format_open_loop
from training.evaluation.simulated.metaworld_success import (
    MetaWorldOptions,
    format_metaworld,
    measure_metaworld,
)
from training.models.model_folder import load_checkpoint
from training.policy_data import fit_windows
from training.windows import ConcatWindows, ForesightWindows, collate_windows

REPOSITORY = Path(__file__).resolve().parents[1]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint", default=str(REPOSITORY / "hub_cards/models/3d-foresight-metaworld-tiny")
    )
    parser.add_argument("--dataset", default=str(REPOSITORY / "hub_cards/sample_data/metaworld"))
    parser.add_argument("--tasks", default="drawer-open-v3", help="or 'none' (%(default)s)")
    parser.add_argument(
        "--episodes", type=int, default=2, help="per task (%(default)s; 20 or more to report)"
    )
    parser.add_argument("--embodiment", help="name of the robot, of a policy for several")
    parser.add_argument("--output", type=Path, default=Path("outputs/eval.json"))
    args = parser.parse_args()

    # A robot or simulator of your own: the loop of streaming_control.py, once per episode.
    if args.tasks != "none":
        options = MetaWorldOptions(
            *(args.checkpoint, args.tasks),
            episodes=args.episodes,
            output=args.output,
            embodiment=args.embodiment,
        )
        results = measure_metaworld(options)
        write_json(args.output, results)  # hub_cards/build.py makes the tables of the model's card from it
        print(format_metaworld(results))
        print(f"seeds {results['seeds']['first']} to {results['seeds']['last']}, commit {results['commit']}")

    # Only what policy and dataset share is measured: no depth or tracks, no depth or flow errors.
    model, processor = load_checkpoint(args.checkpoint)
    processor, rows = processor.for_embodiment(args.embodiment), DatasetRows(args.dataset)
    wanted, notes = fit_windows(args.checkpoint, model.config, rows, embodiment=processor.embodiment)
    windows = ConcatWindows([ForesightWindows(rows, wanted)], model.config.embodiments)
    for note in notes:
        print(note)
    loader = DataLoader(windows, batch_size=32, collate_fn=collate_windows)
    print(f"{len(windows)} windows of {Path(args.dataset).name}; in brackets, what trivial predictors reach")
    print(format_open_loop(evaluate_open_loop(model, processor, loader)))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
