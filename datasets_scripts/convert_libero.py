"""Convert LIBERO's demonstrations to a LeRobot v3 dataset; see `conversion/libero.py`."""

import sys
from collections.abc import Sequence

from datasets_scripts.command_line import entry_point
from datasets_scripts.conversion.job import LabelOptions, convert, converter_parser, print_summary
from datasets_scripts.conversion.libero import LiberoArchive


@entry_point(resumes=True)
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
    replay = "set the stored states in LIBERO's simulator, for exact depth and 3D tracks (extra libero)"
    parser.add_argument("--replay", action="store_true", help=replay)
    default = LabelOptions()
    points = "with --replay: tracked points per episode (default: %(default)s)"
    parser.add_argument("--n-points", type=int, default=default.n_points, help=points)
    seed = "with --replay: seed of the choice of points (default: %(default)s)"
    parser.add_argument("--seed", type=int, default=default.seed, help=seed)
    args = parser.parse_args(argv)
    labels = LabelOptions(args.n_points, args.seed) if args.replay else None
    archive = LiberoArchive(args.source, args.next_action, args.limit, labels)
    print_summary(args.output, convert(archive, args.output, args.workers))


if __name__ == "__main__":
    sys.exit(main())
