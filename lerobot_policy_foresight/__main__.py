# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""Write LeRobot's files into a trained model's folder, or merge an adapter of LeRobot into its base.

python -m lerobot_policy_foresight outputs/quickstart/model --camera main=observation.image
python -m lerobot_policy_foresight ADAPTER --merge outputs/merged
"""

import argparse
import sys

from datasets_scripts.command_line import entry_point, read_pair

from .lerobot_files import write_lerobot_files, write_merged_policy


@entry_point()
def main() -> None:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lerobot_policy_foresight",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", help="model and processor, as training/train.py exports them; or an adapter"
    )
    parser.add_argument(
        "--camera",
        action="append",
        type=read_pair,
        default=[],
        metavar="VIEW=KEY",
        help="image key of a view, such as main=observation.image; wrist= leaves that view out; the default "
        "is the folder's, or observation.images.<view>",
    )
    parser.add_argument("--merge", metavar="FOLDER", help="where to write the merged policy")
    options = parser.parse_args()
    if options.merge:
        write_merged_policy(options.folder, options.merge)
    else:
        write_lerobot_files(options.folder, dict(options.camera))


if __name__ == "__main__":
    sys.exit(main())
