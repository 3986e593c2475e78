# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""Write LeRobot's config and pipelines into an exported model folder; merge adapters into their base."""

import json
import warnings
from pathlib import Path

from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from datasets_scripts.storage.atomic import write_json, write_whole_folder
from modeling_foresight import ForesightConfig, ForesightProcessor

from .configuration_foresight import MODEL_FIELDS, LeRobotForesightConfig
from .processor_foresight import make_foresight_pre_post_processors

__all__ = ["write_merged_policy", "write_lerobot_files"]


def write_lerobot_files(folder: str | Path, cameras: dict[str, str] | None = None) -> None:
    """Completes a model's folder, in place, so that LeRobot's commands take it as `--policy.path`.

    `config.json` gains LeRobot's fields and keeps its own; the pipelines are written next to it. In the
    folder of a policy of LeRobot only the cameras change.

    Args:
        folder (`str` or `Path`): Model and processor.
        cameras (`dict[str, str]`, *optional*): View -> image key of the robot or environment; `None` or `""`
            leaves the view out. Views that are not named keep their key, at first
            `observation.images.<view>`.

    Raises:
        ValueError: If the folder holds no 3D Foresight model, or one that LeRobot's commands cannot use;
            nothing is written then.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file() or not (folder / "processor_config.json").is_file():
        raise ValueError(
            f"{folder} does not hold a model and its processor (config.json, processor_config.json)."
        )
    before = json.loads((folder / "config.json").read_text())
    model = ForesightConfig.from_pretrained(folder)
    if not model.has("action"):
        raise ValueError(f"The model in {folder} predicts no actions; its objectives are {model.objectives}.")
    if absent := {"text", "vision"} - set(model.towers):
        raise ValueError(f"The model in {folder} has no {' and '.join(sorted(absent))} tower.")
    ForesightProcessor.from_pretrained(folder)  # raises before anything is written
    known = before.get("cameras") or {view: f"{OBS_IMAGES}.{view}" for view in model.views}
    cameras = {view: key for view, key in (known | (cameras or {})).items() if key}
    shape = (3, model.image_size, model.image_size)
    inputs = {key: PolicyFeature(FeatureType.VISUAL, shape) for key in cameras.values()}
    if model.state_dim:
        inputs[OBS_STATE] = PolicyFeature(FeatureType.STATE, (model.state_dim,))
    if "type" in before:  # a policy of LeRobot, whose settings stay
        own = ["--device=cpu", "--dtype=float32"]  # settings of a run, not of the folder
        config = PreTrainedConfig.from_pretrained(folder, cli_overrides=own)
    else:
        fields = json.loads(model.to_json_string())
        config = LeRobotForesightConfig(**{name: fields.get(name) for name in MODEL_FIELDS}, device="cpu")
    config.cameras, config.input_features = cameras, inputs
    config.output_features = {ACTION: PolicyFeature(FeatureType.ACTION, (model.action_dim,))}
    config.validate_features()
    # LeRobot's dtype is the precision of training; without this one, transformers takes that of the weights.
    before.pop("dtype", None)
    # The device is that of the machine that opens it.
    write_json(folder / "config.json", before | config.lerobot_fields() | {"device": None})
    for pipeline in make_foresight_pre_post_processors(config):
        pipeline.save_pretrained(folder)


def write_merged_policy(adapter: str | Path, target: str | Path) -> None:
    """Merges an adapter that `lerobot-train --peft.*` trained into its base: a policy that stands alone.

    Args:
        adapter (`str` or `Path`): Folder of the adapter, or its Hub id.
        target (`str` or `Path`): Folder for the merged policy, which both libraries open.

    Raises:
        ValueError: If it is not an adapter, does not fit its base, or `target` exists.
    """
    from lerobot.policies.factory import make_pre_post_processors
    from peft import PeftConfig, PeftModel

    from .modeling_foresight import LeRobotForesightPolicy

    target = Path(target)
    if target.exists():
        raise ValueError(f"{target} exists: choose another folder.")
    if (Path(adapter) / "foresight_adapter.json").is_file():
        raise ValueError(f"{adapter} was trained by training/train.py, which merges with --lora.merge true.")
    config = PreTrainedConfig.from_pretrained(adapter)
    if not config.use_peft:
        raise ValueError(f"{adapter} is not an adapter: it needs no merging.")
    config.pretrained_path = Path(adapter)
    base = PeftConfig.from_pretrained(str(adapter))
    policy = LeRobotForesightPolicy.from_pretrained(
        base.base_model_name_or_path, config=config, revision=base.revision
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        policy = PeftModel.from_pretrained(policy, str(adapter)).merge_and_unload()
    policy.config.use_peft = False
    with write_whole_folder(target) as folder:
        policy.save_pretrained(folder)
        for pipeline in make_pre_post_processors(config, str(adapter)):
            pipeline.save_pretrained(folder)
