"""Finetunes a policy with transformers' own `Trainer`: our model, windows and collator, its loop.

python examples/transformers_trainer.py --base ORG/NAME --dataset YOU/DATASET --steps 2000
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import modeling_foresight  # noqa: F401 - registers the model with the Auto classes
from datasets_scripts.storage.dataset_rows import DatasetRows
from training.config import DataConfig, RunConfig
from training.policy_data import NEAR_RATE, frames_per_step
from training.run_data import window_config
from training.windows import ForesightWindows, collate_windows, split_episodes

REPOSITORY = Path(__file__).resolve().parents[1]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default=str(REPOSITORY / "hub_cards/models/3d-foresight-metaworld-tiny"))
    parser.add_argument("--dataset", default=str(REPOSITORY / "hub_cards/sample_data/metaworld"))
    parser.add_argument("--steps", type=int, default=20, help="(%(default)s: a try; 2000 for a robot)")
    parser.add_argument("--output", default="outputs/trainer", help="resumes from its newest checkpoint")
    args = parser.parse_args()

    model = AutoModel.from_pretrained(args.base, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(args.base)
    rows = DatasetRows(args.dataset)
    if abs(frames_per_step(model.config, rows) - 1) > NEAR_RATE:
        raise ValueError(
            f"{args.dataset} has {rows.fps:g} frames per second, and {args.base} acts {model.config.fps:g} "
            "times per second: take data of its rate"
        )
    wanted = window_config(model.config, RunConfig(data=DataConfig(missing_targets=True)))
    chosen, held_out_episodes = split_episodes(rows.n_episodes, val_fraction=0.25)
    train = ForesightWindows(rows, dataclasses.replace(wanted, episodes=chosen))
    held_out = ForesightWindows(rows, wanted.for_evaluation(held_out_episodes))  # without augmentation

    def collate(samples: list[dict]) -> dict:
        """Windows as the batch that the model takes."""
        return processor.prepare_batch(collate_windows(samples), history_length=model.config.history_length)

    trainer = Trainer(
        model,
        TrainingArguments(
            args.output,
            # Without this, Trainer drops what `forward` does not name, before the collator sees it.
            remove_unused_columns=False,
            # Without this, it computes no loss in evaluation. Any target that all batches have will do.
            label_names=["progress"],
            max_steps=args.steps,
            per_device_train_batch_size=16,
            learning_rate=1e-4,
            warmup_steps=args.steps // 20,
            lr_scheduler_type="cosine",
            logging_steps=max(1, args.steps // 4),
            eval_strategy="steps",
            eval_steps=max(1, args.steps // 2),
            save_steps=max(1, args.steps // 2),
            save_total_limit=2,
            report_to="none",
        ),
        data_collator=collate,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=processor,  # saved beside the weights
    )
    print(f"before: loss {trainer.evaluate()['eval_loss']:.4f} on {len(held_out)} held-out windows")
    trainer.train(resume_from_checkpoint=Path(args.output).is_dir() and get_last_checkpoint(args.output))
    print(f"after step {trainer.state.global_step}: loss {trainer.evaluate()['eval_loss']:.4f}")
    trainer.save_model()
    print(f"wrote {args.output}, which AutoModel and AutoProcessor load")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
