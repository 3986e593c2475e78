"""Finetune a goal generator: `accelerate launch -m training.goal_generator.train --base DIR ...`."""

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence

from datasets_scripts.storage.hub_download import HubError

EXAMPLE = """example:
  accelerate launch -m training.goal_generator.train --base timbrooks/instruct-pix2pix \\
      --dataset outputs/calvin_d_training --output outputs/goal_generator --mixed_precision bf16 --resume

The base may be what goal_images.convert_grmg or this command wrote."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; user mistakes become one line and exit code 1."""
    from transformers import HfArgumentParser

    from training.goal_generator.finetuning import GoalTraining, finetune

    parser = HfArgumentParser(
        GoalTraining,
        description=__doc__.splitlines()[0],
        epilog=EXAMPLE,
        formatter_class=RawDescriptionHelpFormatter,
    )
    given = vars(parser.parse_args(arguments))
    try:
        return finetune(GoalTraining(**given))
    except (ValueError, RuntimeError, OSError, HubError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
