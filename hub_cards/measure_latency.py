"""Measure the control step of a published folder on this machine: adds rows to evaluation/latency.json."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from datasets_scripts.command_line import entry_point

EXAMPLE = """examples:
  python hub_cards/measure_latency.py outputs/quickstart/model
  python hub_cards/measure_latency.py outputs/quickstart/model --device cuda --dtype bfloat16 --repeats 200"""


@entry_point()
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="model or adapter that acts")
    parser.add_argument("--device", default="cpu", help="device to measure (default: %(default)s)")
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=[],
        help="threads of PyTorch, a row each (default: 1, and PyTorch's own choice)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--warmup", type=int, default=10, help="steps not measured (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=50, help="steps measured (default: %(default)s)")
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(given)
    # Imported here because it loads transformers: --help answers at once.
    from hub_cards.cards.latency_measurement import LATENCY, measure_latency

    for row in measure_latency(**vars(args), arguments=given):
        print(
            f"{row['hardware']}, {row['threads']} threads, {row['dtype']}: {row['median_ms']:.1f} ms per "
            f"control step (90th percentile {row['p90_ms']:.1f}, {row['count']} steps)"
        )
    print(f"wrote {args.folder / LATENCY}; hub_cards/build.py puts it into the card")


if __name__ == "__main__":
    sys.exit(main())
