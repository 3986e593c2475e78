"""Refuses a folder that should not be published: one line per problem, with its remedy."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["check_folder", "main"]

EXAMPLE = "example: python hub_cards/check.py outputs/quickstart/model"


def check_folder(folder: str | Path) -> list[str]:
    """What is wrong with a folder that is to be published.

    Args:
        folder (`str` or `Path`): A model as `train.py` exports it, an adapter, or a LeRobot dataset.

    Returns:
        `list[str]`: One line per problem, with its remedy; empty if there is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return [f"{folder} is no folder: give the one that train.py exports, or a dataset's"]
    if not (folder / "README.md").is_file():
        return [f"README.md is missing: write the card with hub_cards/build.py, for {folder}"]
    return []


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="model, adapter or dataset")
    args = parser.parse_args(arguments)
    failed = False
    for folder in args.folders:
        problems = check_folder(folder)
        failed = failed or bool(problems)
        for problem in problems:
            print(f"{folder}: {problem}", file=sys.stderr)
        if not problems:
            print(f"{folder}: fit to publish")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
