"""Finetune a goal generator: `accelerate launch -m training.goal_generator.train --base DIR ...`."""

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence

from datasets_scripts.command_line import entry_point

EXAMPLE = """example:
  accelerate launch -m training.goal_generator.train --base timbrooks/instruct-pix2pix \\
      --dataset outputs/calvin_d_training --output outputs/goal_generator --mixed_precision bf16 --resume

The base may be what goal_images.convert_grmg or this command wrote."""


@entry_point()
def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    from transformers import HfArgumentParser

    from training.goal_generator.finetuning import GoalTraining, finetune

    parser = HfArgumentParser(
        GoalTraining,
        description=__doc__.splitlines()[0],
        epilog=EXAMPLE,
        formatter_class=RawDescriptionHelpFormatter,
    )
    return finetune(GoalTraining(**vars(parser.parse_args(arguments))))


if __name__ == "__main__":
    sys.exit(main())
