"""Diagnose a policy: success with changed inputs, errors by task, calibration of progress, causality."""

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence

from datasets_scripts.storage.atomic import write_json
from datasets_scripts.storage.episode_job import resumable_command
from training.diagnostics.report import DiagnosticOptions, format_diagnostics, measure_diagnostics

EXAMPLE = """example:
  python training/diagnose.py --checkpoint hub_cards/models/3d-foresight-metaworld-tiny \\
      --tasks drawer-open-v3,drawer-close-v3 --dataset hub_cards/sample_data/metaworld \\
      --output outputs/diagnostics/tiny.json

After an interruption, run the same command again to resume."""


@resumable_command
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; returns its exit code."""
    # Every simulator process imports this file again: nothing at its top imports PyTorch or transformers.
    from transformers import HfArgumentParser

    help_page = {"description": __doc__, "epilog": EXAMPLE, "formatter_class": RawDescriptionHelpFormatter}
    given = vars(HfArgumentParser(DiagnosticOptions, **help_page).parse_args(arguments))
    options = DiagnosticOptions(**given)
    results = measure_diagnostics(options, sys.argv[1:] if arguments is None else arguments)
    write_json(options.output, results)
    print(format_diagnostics(results))


if __name__ == "__main__":
    sys.exit(main())
