"""Copy a LeRobot v3 dataset under other column names; videos are shared, never encoded again."""

import argparse
import sys
from pathlib import Path

from datasets_scripts.command_line import entry_point, read_pair
from datasets_scripts.conversion.column_renaming import rename_columns


def build_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = argparse.ArgumentParser(
        description="Copy a LeRobot v3 dataset under other column names; videos are shared, not copied.",
        epilog="example:\n  python -m datasets_scripts.rename_columns --dataset YOU/HUMANOID "
        "--output outputs/humanoid \\\n      --rename image=observation.images.front state=observation.state "
        "actions=action",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dataset", required=True, help="folder or Hub id of a LeRobot v3 dataset")
    parser.add_argument("--output", type=Path, required=True, help="folder of the dataset to make")
    parser.add_argument(
        "--rename",
        nargs="+",
        action="extend",
        type=read_pair,
        required=True,
        metavar="OLD=NEW",
        help="columns to rename; depth and points of a camera go with it",
    )
    parser.add_argument(
        "--linked-videos",
        type=Path,
        metavar="DIR",
        help="folder into which videos of the dataset may be links (default: no link may lead out of it)",
    )
    return parser


@entry_point()
def main(argv: list[str] | None = None) -> None:
    """Entry point; returns the exit code."""
    args = build_parser().parse_args(argv)
    names = dict(args.rename)
    if len(names) < len(args.rename):
        raise ValueError(f"a column gets two names in {' '.join(map('='.join, args.rename))}")
    for old, new in rename_columns(args.dataset, args.output, names, args.linked_videos).items():
        print(f"{old} -> {new}")
    print(f"{args.output}: renamed; {args.dataset} is unchanged")


if __name__ == "__main__":
    sys.exit(main())
