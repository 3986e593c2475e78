"""Adapts a policy to a dataset with LoRA, and compares both on episodes that the adapter did not train on.

python examples/finetune_lora.py --base ORG/NAME --dataset YOU/DATASET --steps 2000 --output outputs/my-robot
"""

import argparse
import sys
from pathlib import Path

from training.config_reading import load_config
from training.evaluation.open_loop import evaluate_open_loop
from training.loop import train
from training.models.model_folder import load_checkpoint
from training.run_data import RunData, evaluation_loader

REPOSITORY = Path(__file__).resolve().parents[1]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default=str(REPOSITORY / "hub_cards/models/3d-foresight-metaworld-tiny"))
    parser.add_argument("--dataset", default=str(REPOSITORY / "hub_cards/sample_data/metaworld"))
    parser.add_argument("--steps", type=int, default=50, help="(%(default)s: a try; 2000 for a robot)")
    parser.add_argument("--statistics", default="model", help="dataset: for another robot than the base's")
    parser.add_argument("--output", default="outputs/lora")
    args = parser.parse_args()

    # As `accelerate launch training/train.py --config training/configs/lora_custom.yaml --init_from BASE ...`
    settings = {"init_from": args.base, "output": args.output, "lora.r": 16, "train.steps": args.steps}
    settings |= {
        "dataset": args.dataset,
        "data.statistics": args.statistics,
        "train.warmup_steps": args.steps // 20,
    }
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    run = load_config(REPOSITORY / "training/configs/lora_custom.yaml", options)
    if code := train(run, resume=True):  # a finished run is left alone, an interrupted one is resumed
        sys.exit(code)

    # The sample shows tasks that the shipped base knows: a try gains nothing there, your robot's data do.
    for name, checkpoint in {"base": args.base, "adapter": run.export}.items():
        model, processor = load_checkpoint(checkpoint)  # an adapter is merged into its base
        held_out = evaluation_loader(RunData(run, model.config).val, batch_size=16)
        errors = evaluate_open_loop(model, processor, held_out)["actions"]["first"]["model"]
        print(f"{name}: next action is {errors['l1_mean']:.3f} off on average (L1, the dataset's units)")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
