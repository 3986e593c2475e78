"""Diagnose a policy: success with changed inputs, errors by task, calibration of progress, causality."""

import sys
from collections.abc import Sequence

from datasets_scripts.command_line import entry_point
from datasets_scripts.storage.atomic import write_json
from training.diagnostics.benchmarks import LiberoDiagnostics, MetaWorldDiagnostics
from training.diagnostics.report import format_diagnostics, measure_diagnostics
from training.evaluation.simulated.options import parse_benchmark

EXAMPLE = """examples:
  python training/diagnose.py --checkpoint hub_cards/models/3d-foresight-metaworld-tiny \\
      --tasks drawer-open-v3,drawer-close-v3 --dataset hub_cards/sample_data/metaworld \\
      --output outputs/diagnostics/tiny.json
  python training/diagnose.py --benchmark libero --checkpoint hub_cards/models/3d-foresight-libero-object \\
      --suite libero_object --output outputs/diagnostics/libero.json

`--benchmark libero --help` shows the options of that benchmark. After an interruption, run the same command
again to resume."""

DIAGNOSED_BENCHMARKS = {"metaworld": MetaWorldDiagnostics, "libero": LiberoDiagnostics}


@entry_point(resumes=True)
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; returns the exit code."""
    _, options = parse_benchmark(DIAGNOSED_BENCHMARKS, __doc__, EXAMPLE, arguments)
    results = measure_diagnostics(options, sys.argv[1:] if arguments is None else arguments)
    write_json(options.output, results)
    print(format_diagnostics(results))


if __name__ == "__main__":
    sys.exit(main())
