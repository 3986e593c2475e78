"""Measure how often a checkpoint solves the tasks of a benchmark, in closed loop in its simulator."""

import importlib
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence

from datasets_scripts.storage.atomic import write_json

EXAMPLE = """examples:
  python training/evaluate.py --checkpoint outputs/quickstart/model --tasks drawer-open-v3 \\
      --episodes 20 --seed 10000 --output eval.json --video rollout.mp4
  python training/evaluate.py --benchmark calvin --checkpoint outputs/calvin_d_d/model \\
      --calvin_data task_D_D --output calvin_d_d.json"""
# Module of each benchmark: its options, what measures, and what formats the results for people.
BENCHMARK_PARTS = {
    "metaworld": ("metaworld_success", "SuccessOptions", "measure_success", "format_success"),
    "calvin": ("calvin_success", "ChainOptions", "measure_chains", "format_chains"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    # Every simulator process imports this file again: nothing at its top imports PyTorch or transformers.
    from transformers import HfArgumentParser

    choice = ArgumentParser(add_help=False, allow_abbrev=False)
    choice.add_argument(
        "--benchmark", choices=BENCHMARK_PARTS, default="metaworld", help="(default: %(default)s)"
    )
    module, *names = BENCHMARK_PARTS[choice.parse_known_args(arguments)[0].benchmark]
    module = importlib.import_module(f"training.evaluation.{module}")
    options_type, measure, format_results = (getattr(module, name) for name in names)
    help_page = {"description": __doc__, "epilog": EXAMPLE, "formatter_class": RawDescriptionHelpFormatter}
    given = vars(HfArgumentParser(options_type, parents=[choice], **help_page).parse_args(arguments))
    del given["benchmark"]
    try:
        options = options_type(**given)
        results = measure(options, arguments)
        write_json(options.output, results)
    except KeyboardInterrupt:
        print("interrupted: the results are not written, or not complete", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(format_results(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
