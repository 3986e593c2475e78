"""Publish a model, an adapter or a dataset on the Hugging Face Hub: checked first, then sent in one commit.

A folder that hub_cards/check.py refuses is not sent. A new repository is private unless --public is given.
After an interruption, run the same command again: files that arrived are not sent again, and nothing is
committed twice.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from datasets_scripts.command_line import entry_point

EXAMPLE = """examples:
  python hub_cards/publish.py outputs/quickstart/model --repo-id YOU/DRAWER-POLICY --dry-run
  python hub_cards/publish.py outputs/quickstart/model --repo-id YOU/DRAWER-POLICY --tag v1 --pull
  python hub_cards/publish.py outputs/annotated --repo-id YOU/DATASET --public"""


@entry_point(resumes=True)
def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="model, adapter or dataset with its card")
    parser.add_argument("--repo-id", required=True, metavar="OWNER/NAME", help="repository on the Hub")
    parser.add_argument("--public", action="store_true", help="visible to everybody (default: private)")
    parser.add_argument(
        "--revision",
        default="main",
        metavar="BRANCH",
        help="branch to commit to, created if it is new (default: %(default)s)",
    )
    parser.add_argument("--tag", help="name for the commit, such as v1")
    parser.add_argument("--replace", action="store_true", help="delete files that the folder does not hold")
    parser.add_argument("--code", action="store_true", help="with the code, for trust_remote_code=True")
    parser.add_argument("--dry-run", action="store_true", help="check, list files and sizes, send nothing")
    parser.add_argument("--pull", action="store_true", help="download it afterwards, compare and run it")
    args = parser.parse_args(arguments)
    # Imported here because it loads LeRobot and transformers: --help answers at once.
    from hub_cards.hub.publishing import HubTarget, publish

    try:
        target = HubTarget(args.repo_id, args.revision, args.tag, args.public, args.replace)
        publish(args.folder, target, with_code=args.code, dry_run=args.dry_run, pull=args.pull)
    except ValueError as error:  # of a folder that is refused: one line per problem
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
