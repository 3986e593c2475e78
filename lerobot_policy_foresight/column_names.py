# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""Columns that LeRobot would drop on their way to a policy: said before training, with the remedy."""

from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_IMAGES, OBS_PREFIX, OBS_STATE

from datasets_scripts.columns import is_label_key

__all__ = ["check_column_names"]


def check_column_names(features: dict[str, dict], root, with_state: bool = True) -> None:
    """Refuses a dataset whose cameras, state or actions have names that LeRobot hands to no policy.

    Only `observation.*` and `action` arrive; without this the first batch fails without naming a column, or
    the policy is trained without a state.

    Args:
        features (`dict[str, dict]`): The dataset's.
        root (`Path`): Its folder, for the remedy.
        with_state (`bool`): Whether the policy may have a state.

    Raises:
        ValueError: Names the columns and the command that renames them.
    """
    images = [key for key, feature in features.items() if feature["dtype"] in ("image", "video")]
    cameras = [key for key in images if not is_label_key(key, features[key])]
    numbers = [key for key in features if features[key]["dtype"].startswith(("float", "int"))]
    states = [key for key in numbers if "state" in key and key != OBS_ENV_STATE]
    actions = [key for key in numbers if key.startswith(ACTION)]
    rename = {}
    if not any(key.startswith(OBS_PREFIX) for key in cameras):
        rename |= {key: f"{OBS_IMAGES}.{key.split('.')[-1]}" for key in cameras}
    if with_state and OBS_STATE not in features:
        rename |= dict.fromkeys(states[:1], OBS_STATE)
    if ACTION not in features:
        rename |= dict.fromkeys(actions[:1], ACTION)
    if rename:
        pairs = " ".join(f"{old}={new}" for old, new in rename.items())
        raise ValueError(
            f"LeRobot hands a policy only '{OBS_PREFIX}*' and '{ACTION}', so the columns {list(rename)}, "
            "which it needs as cameras, state or actions, would be dropped. Give them names that arrive, "
            "in a copy of the dataset that shares its videos: "
            f"`python -m datasets_scripts.rename_columns --dataset {root} --output DIR --rename {pairs}`"
            + (" (or do without a state: --policy.state_dim=0)" if OBS_STATE in rename.values() else "")
        )
