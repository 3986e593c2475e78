"""Diagnose a policy: success with changed inputs, errors by task, calibration of progress, causality."""

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence

from datasets_scripts.storage.atomic import write_json
from training.diagnostics.report import DiagnosticOptions, format_diagnostics, measure_diagnostics

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
    try:
        options = DiagnosticOptions(**given)
        results = measure_diagnostics(options, sys.argv[1:] if arguments is None else arguments)
        write_json(options.output, results)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(format_diagnostics(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
