r"""Print what a policy other than ours should take from a dataset with depth and points: cameras and state.

LeRobot shows every picture to a policy as a camera, depth too, and every other `observation.*` column as a
state, points too. Name the inputs to train its policies on such a dataset:

lerobot-train --policy.type=act --dataset.repo_id=YOU/DATASET \
    --policy.input_features="$(python -m datasets_scripts.policy_inputs YOU/DATASET)" ...
"""

import argparse
import json
import sys

from datasets_scripts.columns import is_label_key
from datasets_scripts.command_line import entry_point


@entry_point()
def main(argv: list[str] | None = None) -> None:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", help="folder or Hub id of a LeRobot v3 dataset")
    dataset = parser.parse_args(argv).dataset
    from lerobot.utils.feature_utils import dataset_to_policy_features

    from datasets_scripts.storage.dataset_rows import DatasetRows

    features = DatasetRows(dataset).features
    plain = {key: feature for key, feature in features.items() if not is_label_key(key, feature)}
    inputs = {
        key: {"type": feature.type.value, "shape": list(feature.shape)}
        for key, feature in dataset_to_policy_features(plain).items()
        if key.startswith("observation.")
    }
    if not inputs:
        raise ValueError(
            f"LeRobot shows policies what begins with 'observation.', and of the columns of {dataset} "
            f"({', '.join(features)}) no input does: rename them with "
            "python -m datasets_scripts.rename_columns"
        )
    print(json.dumps(inputs))


if __name__ == "__main__":
    sys.exit(main())
