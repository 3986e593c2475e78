"""Convert LIBERO's demonstrations to a LeRobot v3 dataset; see `conversion/libero.py`."""

import sys
from collections.abc import Sequence

from datasets_scripts.conversion.job import convert, converter_parser, print_summary
from datasets_scripts.conversion.libero import LiberoArchive
from datasets_scripts.storage.episode_job import resumable_command


@resumable_command
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; returns the exit code."""
    parser = converter_parser(
        "Convert LIBERO's demonstrations to a LeRobot v3 dataset.",
        "python datasets_scripts/convert_libero.py --source datasets/libero_spatial "
        "--output outputs/libero_spatial",
        "folder with *_demo.hdf5 files of one or several suites, or one file",
    )
    parser.add_argument(
        "--next-action",
        action="store_true",
        help="give every frame the command that follows it (see the docs)",
    )
    args = parser.parse_args(argv)
    archive = LiberoArchive(args.source, args.next_action, args.limit)
    print_summary(args.output, convert(archive, args.output, args.workers))


if __name__ == "__main__":
    sys.exit(main())
