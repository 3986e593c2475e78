"""What a policy other than ours should take from a dataset with depth and points: cameras and state.

LeRobot shows every picture to a policy as a camera, depth too, and every other `observation.*` column as a
state, points too. Its policies train on such a dataset if their inputs are named, and this prints them:

lerobot-train --policy.type=act --dataset.repo_id=YOU/DATASET \
    --policy.input_features="$(python -m datasets_scripts.policy_inputs YOU/DATASET)" ...
"""

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

from datasets_scripts.columns import is_label_key

__all__ = ["policy_inputs"]


def policy_inputs(features: Mapping[str, Mapping[str, Any]]) -> dict[str, dict]:
    """Inputs as LeRobot would list them, without labels.

    Args:
        features (`Mapping[str, Mapping]`): Features of the dataset (`meta.features`).

    Returns:
        `dict[str, dict]`: `{"type": "VISUAL" or "STATE" or "ENV", "shape": [...]}` by column; pictures are
        `[3, height, width]`.
    """
    from lerobot.utils.feature_utils import dataset_to_policy_features

    plain = {key: feature for key, feature in features.items() if not is_label_key(key, feature)}
    return {
        key: {"type": feature.type.value, "shape": list(feature.shape)}
        for key, feature in dataset_to_policy_features(plain).items()
        if key.startswith("observation.")
    }


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", help="folder or Hub id of a LeRobot v3 dataset")
    options = parser.parse_args(argv)
    from datasets_scripts.storage.rows import DatasetRows

    try:
        features = DatasetRows(options.dataset).features
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not (inputs := policy_inputs(features)):
        print(
            f"error: LeRobot shows policies what begins with 'observation.', and of the columns of "
            f"{options.dataset} ({', '.join(features)}) no input does: rename them with "
            "python -m datasets_scripts.rename_columns",
            file=sys.stderr,
        )
        return 1
    print(json.dumps(inputs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
