"""Measure how often a checkpoint solves tasks in MetaWorld, and its errors on held-out episodes."""

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence

from datasets_scripts.storage.atomic import write_json
from training.evaluation.metaworld_success import SuccessOptions, format_success, measure_success

EXAMPLE = """example:
  python training/evaluate.py --checkpoint outputs/quickstart/model --tasks drawer-open-v3 \\
      --episodes 20 --seed 10000 --output eval.json --video rollout.mp4"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    # Every simulator process imports this file again: nothing at its top imports PyTorch or transformers.
    from transformers import HfArgumentParser

    help_page = {"description": __doc__, "epilog": EXAMPLE, "formatter_class": RawDescriptionHelpFormatter}
    given = HfArgumentParser(SuccessOptions, **help_page).parse_args(arguments)
    try:
        options = SuccessOptions(**vars(given))
        results = measure_success(options, arguments)
        write_json(options.output, results)
    except KeyboardInterrupt:
        print("interrupted: the results are not written, or not complete", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(format_success(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
