# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""Makes a trained model's folder one of LeRobot's too, or an adapter of LeRobot a policy that stands alone.

python -m lerobot_policy_foresight outputs/quickstart/model --camera main=observation.image
python -m lerobot_policy_foresight ADAPTER --merge outputs/merged
"""

import argparse

from .checkpoint_files import merge_adapter, write_lerobot_files


def main() -> None:
    """Reads the command line."""
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
        default=[],
        metavar="VIEW=KEY",
        help="image key of a view, such as main=observation.image; wrist= leaves that view out; by default "
        "what the folder says, or observation.images.<view>",
    )
    parser.add_argument("--merge", metavar="FOLDER", help="where the adapter goes, merged into its base")
    options = parser.parse_args()
    try:
        if options.merge:
            merge_adapter(options.folder, options.merge)
        else:
            write_lerobot_files(options.folder, dict(pair.split("=", 1) for pair in options.camera))
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
