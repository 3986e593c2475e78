# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""`python -m lerobot_policy_foresight FOLDER`: makes a trained model's folder one of LeRobot's too."""

import argparse

from .checkpoint_files import write_lerobot_files


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m lerobot_policy_foresight", description=__doc__)
    parser.add_argument("folder", help="model and processor, as training/train.py exports them")
    parser.add_argument(
        "--camera",
        action="append",
        default=[],
        metavar="VIEW=KEY",
        help="image key of a view, such as main=observation.image; observation.images.<view> by default",
    )
    options = parser.parse_args()
    write_lerobot_files(options.folder, dict(pair.split("=", 1) for pair in options.camera))


if __name__ == "__main__":
    main()
