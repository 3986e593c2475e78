"""Measure how often a checkpoint solves simulated tasks, and its errors on held-out episodes."""

import sys
from collections.abc import Sequence

from datasets_scripts.command_line import entry_point
from datasets_scripts.storage.atomic import write_json
from training.evaluation.simulated.calvin_success import CalvinOptions, format_calvin, measure_calvin
from training.evaluation.simulated.libero_success import LiberoOptions, format_libero, measure_libero
from training.evaluation.simulated.metaworld_success import (
    MetaWorldOptions,
    format_metaworld,
    measure_metaworld,
)
from training.evaluation.simulated.options import parse_benchmark

EXAMPLE = """examples:
  python training/evaluate.py --checkpoint outputs/quickstart/model --tasks drawer-open-v3 \\
      --episodes 20 --seed 10000 --output eval.json --video rollout.mp4
  python training/evaluate.py --benchmark libero --checkpoint outputs/libero/model --suite libero_object \\
      --output libero_object.json
  python training/evaluate.py --benchmark calvin --checkpoint outputs/calvin_d_d/model \\
      --calvin_data task_D_D --output calvin_d_d.json

`--benchmark libero --help` shows the options of that benchmark. After an interruption, run the same command
again to resume. With more --episodes (--chains of CALVIN), or a --video, a finished evaluation runs only what
it lacks."""

SIMULATED_BENCHMARKS = {
    "metaworld": (MetaWorldOptions, measure_metaworld, format_metaworld),
    "libero": (LiberoOptions, measure_libero, format_libero),
    "calvin": (CalvinOptions, measure_calvin, format_calvin),
}


@entry_point(resumes=True)
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; returns the exit code."""
    kinds = {name: functions[0] for name, functions in SIMULATED_BENCHMARKS.items()}
    name, options = parse_benchmark(kinds, __doc__, EXAMPLE, arguments)
    _, measure, describe = SIMULATED_BENCHMARKS[name]
    results = measure(options, arguments)
    write_json(options.output, results)
    print(describe(results))


if __name__ == "__main__":
    sys.exit(main())
