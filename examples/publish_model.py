"""Publishes a model, adapter or dataset on the Hub, private and in one commit, and loads it from there.

python examples/publish_model.py --folder outputs/quickstart/model --repo-id YOU/NAME --send

Without --send nothing leaves this machine: the folder is checked and its files are listed.
"""

import argparse
import sys
from pathlib import Path

from transformers import AutoModel

import modeling_foresight  # noqa: F401 - registers the model with the Auto classes
from datasets_scripts.storage.hub.download import HubError
from hub_cards.checks.folder import check_folder
from hub_cards.hub.publishing import HubTarget, publish

REPOSITORY = Path(__file__).resolve().parents[1]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default=REPOSITORY / "hub_cards/models/3d-foresight-metaworld-tiny")
    parser.add_argument("--repo-id", default="YOU/3d-foresight-metaworld-tiny")
    parser.add_argument("--send", action="store_true", help="publish it; needs `hf auth login`")
    args = parser.parse_args()

    # Loads, has statistics and a card whose figures were measured, holds nothing that could run code, ...
    if problems := check_folder(args.folder):
        # publish would refuse it too
        raise ValueError("\n".join(f"{args.folder}: {problem}" for problem in problems))
    # One commit, so that nobody ever sees half of it; downloaded again and compared file by file.
    commit = publish(args.folder, HubTarget(args.repo_id), dry_run=not args.send, pull=args.send)
    if commit and (Path(args.folder) / "config.json").is_file():
        model = AutoModel.from_pretrained(args.repo_id, revision=commit)  # what others do from now on
        print(f"{args.repo_id}: {model.num_parameters():,} parameters, {list(model.config.objectives)}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError, OSError, HubError) as error:
        sys.exit(f"error: {error}")
