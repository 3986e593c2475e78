"""Convert a split of CALVIN to a LeRobot v3 dataset with depth; see `conversion/calvin.py`."""

import sys
from collections.abc import Sequence

from datasets_scripts.command_line import entry_point
from datasets_scripts.conversion.calvin import CalvinArchive
from datasets_scripts.conversion.job import convert, converter_parser, print_summary


@entry_point(resumes=True)
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; returns the exit code."""
    parser = converter_parser(
        "Convert a split of CALVIN to a LeRobot v3 dataset with depth.",
        "python datasets_scripts/convert_calvin.py --source task_D_D/training --output outputs/calvin_d",
        "a split of the unpacked archive: task_D_D/training",
    )
    parser.add_argument(
        "--depth-scale",
        type=float,
        default=1.0,
        help="meters per stored unit; 2 for older recordings (%(default)s)",
    )
    args = parser.parse_args(argv)
    archive = CalvinArchive(args.source, args.depth_scale, args.limit)
    print_summary(args.output, convert(archive, args.output, args.workers))


if __name__ == "__main__":
    sys.exit(main())
