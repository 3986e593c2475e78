# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""What a policy takes from the dataset that it is trained on, and whether the two fit."""

import warnings

import numpy as np
from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_IMAGES, OBS_PREFIX, OBS_STATE
from transformers import AutoTokenizer

from datasets_scripts.columns import is_label_key
from datasets_scripts.storage.dataset_rows import DatasetRows, read_instructions
from modeling_foresight import ForesightConfig
from modeling_foresight.processing_foresight import fit_small_tokenizer
from training.windows.columns import two_dimensional

from .configuration_foresight import LeRobotForesightConfig

__all__ = ["check_column_names", "check_dataset_fits", "fill_from_dataset", "statistics_from_dataset"]


def fill_from_dataset(config: LeRobotForesightConfig, dataset_meta):
    """Fills what a fresh policy's config leaves open from a dataset, in place; returns the tokenizer."""
    if config.tokenizer == "small":
        instructions = list(read_instructions(dataset_meta.tasks, dataset_meta.root).values())
        tokenizer, config.text_config = fit_small_tokenizer(instructions, config.text_config)
    else:
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    for name, feature in (("state", config.robot_state_feature), ("action", config.action_feature)):
        if getattr(config, f"{name}_dim") is None:
            setattr(config, f"{name}_dim", feature.shape[0] if feature else int(name == "action"))
        if getattr(config, f"binary_{name}_indices") is None:
            setattr(config, f"binary_{name}_indices", [])
    if config.fps not in (None, dataset_meta.fps):
        raise ValueError(
            f"fps={config.fps:g}, but the dataset has {dataset_meta.fps} frames per second: leave it out."
        )
    config.fps = dataset_meta.fps
    return tokenizer


def statistics_from_dataset(
    config: LeRobotForesightConfig, dataset_stats, dataset_meta=None
) -> dict[str, dict]:
    """`action_stats` and `state_stats` of the processor, from a dataset's statistics by column.

    One NaN in a dataset makes LeRobot's statistics NaN, also where `--dataset.episodes` leaves its episode
    out. Those of the finite frames of `dataset_meta` take their place; windows refuse the other frames.
    """
    wanted = {"action_stats": ACTION} if config.action_feature else {}
    if config.robot_state_feature:
        wanted["state_stats"] = OBS_STATE
    stats = dataset_stats or {}
    if absent := [key for key in wanted.values() if key not in stats]:
        raise ValueError(
            f"The dataset has no statistics of {absent} under the policy's names: compute them with LeRobot, "
            "and rename states in the dataset instead of with --rename_map."
        )
    found = {name: stats[key] for name, key in wanted.items()}
    for name, key in wanted.items():
        if dataset_meta is not None and not all(np.isfinite(value).all() for value in stats[key].values()):
            rows = DatasetRows(dataset_meta.root)
            values = two_dimensional(rows.column(key).read(range(len(rows))))
            values = values[np.isfinite(values).all(1)].astype(np.float64)
            found[name] = {how: getattr(values, how)(0) for how in ("mean", "std", "min", "max")}
            warnings.warn(
                f"{dataset_meta.root}: the statistics of '{key}' are not finite; those of its {len(values)} "
                "finite frames are used",
                stacklevel=2,
            )
    return found


def check_dataset_fits(model: ForesightConfig, dataset_meta) -> None:
    """Raises if a trained policy was made for another size of the state or another frame rate."""
    state = dataset_meta.features.get(OBS_STATE)
    if state is not None and model.state_dim and tuple(state["shape"]) != (model.state_dim,):
        raise ValueError(
            f"The dataset's state has shape {tuple(state['shape'])}; the policy was made for "
            f"{model.state_dim} entries."
        )
    if model.fps and dataset_meta.fps != model.fps:
        raise ValueError(
            f"The dataset has {dataset_meta.fps} frames per second; the policy learned from {model.fps}, and "
            f"its steps would mean other times. To train on it anyway: --policy.fps={dataset_meta.fps}."
        )


def check_column_names(features: dict[str, dict], root, with_state: bool = True) -> None:
    """Raises if cameras, state or actions have names that LeRobot hands to no policy; gives the remedy.

    Only `observation.*` and `action` arrive. Without this check the first batch would fail without naming a
    column, or the policy would train without a state.

    Args:
        features (`dict[str, dict]`): The dataset's.
        root (`Path`): Its folder, for the remedy.
        with_state (`bool`): Whether the policy may have a state.
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
            "which it needs as cameras, state or actions, would be dropped. Rename them in a copy of the "
            "dataset that shares its videos: "
            f"`python -m datasets_scripts.rename_columns --dataset {root} --output DIR --rename {pairs}`"
            + (" (or do without a state: --policy.state_dim=0)" if OBS_STATE in rename.values() else "")
        )
