"""Refuses a folder that should not be published: one line per problem, with its remedy.

It would not load; its weights do not match its configuration; statistics or the processor are missing; the
card is missing, has places without figures, or other figures than `evaluation/`; it holds pickles or foreign
code; the Hub would reject its metadata; its stored sample gives other outputs. A folder with files that could
run code is not loaded.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["check_folder", "main"]

EXAMPLE = """example:
  python hub_cards/check.py outputs/quickstart/model hub_cards/models/*"""


def check_folder(folder: str | Path) -> list[str]:
    """What is wrong with a folder that is to be published.

    Args:
        folder (`str` or `Path`): A model as `train.py` exports it, an adapter, or a LeRobot dataset, with its
            card. An adapter's base is loaded too, from the Hub if it is not in the cache.

    Returns:
        `list[str]`: One line per problem, with its remedy; empty if there is none.
    """
    # Here, because they load transformers: --help answers at once.
    from hub_cards.checks.card import check_card
    from hub_cards.checks.files import check_files
    from hub_cards.checks.loading import check_adapter, check_dataset, check_model

    folder = Path(folder)
    kinds = {
        "adapter_config.json": check_adapter,
        "config.json": check_model,
        "meta/info.json": check_dataset,
    }
    own = next((check for name, check in kinds.items() if (folder / name).is_file()), None)
    if own is None:
        return [f"no {', '.join(kinds)}: give the folder of a model that train.py exports, or of a dataset"]
    problems = check_files(folder)
    if not problems:  # else loading might run something
        problems += own(folder)
    return [" ".join(problem.split()) for problem in problems + check_card(folder)]


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
            print(f"error: {folder}: {problem}", file=sys.stderr)
        if not problems:
            print(f"{folder}: fit to publish")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
