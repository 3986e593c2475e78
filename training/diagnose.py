"""Diagnose a policy: success with changed inputs, errors by task, calibration of progress, causality."""

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence

from training.diagnostics.report import DiagnosticOptions, format_diagnostics, measure_diagnostics
from training.evaluation.success import run_measurement

EXAMPLE = """example:
  python training/diagnose.py --checkpoint hub_cards/models/3d-foresight-metaworld-tiny \\
      --tasks drawer-open-v3,drawer-close-v3 --dataset hub_cards/sample_data/metaworld \\
      --output outputs/diagnostics/tiny.json

After an interruption, run the same command again to resume."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    # Every simulator process imports this file again: nothing at its top imports PyTorch or transformers.
    from transformers import HfArgumentParser

    help_page = {"description": __doc__, "epilog": EXAMPLE, "formatter_class": RawDescriptionHelpFormatter}
    given = vars(HfArgumentParser(DiagnosticOptions, **help_page).parse_args(arguments))
    words = sys.argv[1:] if arguments is None else arguments
    return run_measurement(
        lambda: DiagnosticOptions(**given),
        lambda options: measure_diagnostics(options, words),
        format_diagnostics,
    )


if __name__ == "__main__":
    sys.exit(main())
