"""Refuse a folder that should not be published: one line per problem, with its remedy.

Checked: the folder loads; its weights match its configuration and are finite; the processor has statistics;
the card is complete and has the figures of `evaluation/`; the Hub accepts its metadata; the stored sample
gives the same outputs; there are no pickles, programs or foreign code. A folder with files that could run
code is not loaded.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from datasets_scripts.command_line import entry_point

EXAMPLE = """example:
  python hub_cards/check.py outputs/quickstart/model hub_cards/models/*"""


@entry_point()
def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="model, adapter or dataset")
    args = parser.parse_args(arguments)
    # Imported here because it loads transformers: --help answers at once.
    from hub_cards.checks.folder import check_folder

    failed = False
    for folder in args.folders:
        problems = check_folder(folder)
        failed = failed or bool(problems)
        for problem in problems:
            print(f"error: {folder}: {problem}", file=sys.stderr)
        if not problems:
            print(f"{folder}: fit to publish")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
