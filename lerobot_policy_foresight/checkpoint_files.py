# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""What LeRobot needs beside a model that `training/train.py` or `save_pretrained` wrote.

python -m lerobot_policy_foresight outputs/quickstart/model
lerobot-eval --policy.path=outputs/quickstart/model --env.type=...
"""

import json
import os
import shutil
import warnings
from pathlib import Path

from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from modeling_foresight import ForesightConfig as ModelConfig
from modeling_foresight import ForesightProcessor

from .configuration_foresight import ForesightConfig
from .processor_foresight import make_foresight_pre_post_processors

__all__ = ["merge_adapter", "write_lerobot_files"]


def write_lerobot_files(folder: str | Path, cameras: dict[str, str] | None = None) -> None:
    """Completes a model's folder, in place, so that LeRobot's commands take it as `--policy.path`.

    `config.json` gains LeRobot's fields and keeps its own; the pipelines are written beside it. What
    `transformers` reads stays as it is.

    Args:
        folder (`str` or `Path`): Model and processor.
        cameras (`dict[str, str]`, *optional*): View -> image key of the robot or environment; by default
            `observation.images.<view>` for every view of the model.

    Raises:
        ValueError: If it is not the folder of a 3D Foresight model.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file() or not (folder / "processor_config.json").is_file():
        raise ValueError(
            f"{folder} does not hold a model and its processor (config.json, processor_config.json)."
        )
    before = json.loads((folder / "config.json").read_text())
    model = ModelConfig.from_pretrained(folder)
    processor = ForesightProcessor.from_pretrained(folder)
    cameras = cameras or {view: f"{OBS_IMAGES}.{view}" for view in model.views}
    shape = (3, model.image_size, model.image_size)
    inputs = {key: PolicyFeature(FeatureType.VISUAL, shape) for key in cameras.values()}
    if model.state_dim:
        inputs[OBS_STATE] = PolicyFeature(FeatureType.STATE, (model.state_dim,))
    config = ForesightConfig(
        **{name: getattr(model, name) for name in ("action_codec", "history_length")},
        cameras=cameras,
        input_features=inputs,
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (model.action_dim,))},
    )
    config.keep_model(model)
    config.validate_features()
    config._save_pretrained(folder)
    after = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(after | before | {"type": config.type}, indent=2) + "\n")
    stats = {ACTION: processor.action_stats, OBS_STATE: processor.state_stats}
    used = {key: value for key, value in stats.items() if value is not None}
    for pipeline in make_foresight_pre_post_processors(config, used):
        pipeline.save_pretrained(folder)


def merge_adapter(adapter: str | Path, target: str | Path) -> None:
    """Puts an adapter that `lerobot-train --peft.*` trained into its base: a policy that stands alone.

    Args:
        adapter (`str` or `Path`): Folder of the adapter, or its Hub id.
        target (`str` or `Path`): Folder for the merged policy, which both libraries open.

    Raises:
        ValueError: If it is no adapter, does not fit its base, or `target` exists.
    """
    from lerobot.policies.factory import make_pre_post_processors
    from peft import PeftConfig, PeftModel

    from .modeling_foresight import ForesightPolicy

    target = Path(target)
    if target.exists():
        raise ValueError(f"{target} exists: choose another folder.")
    config = PreTrainedConfig.from_pretrained(adapter)
    if not config.use_peft:
        raise ValueError(f"{adapter} is no adapter: it needs no merging.")
    config.pretrained_path = Path(adapter)
    base = PeftConfig.from_pretrained(str(adapter))
    policy = ForesightPolicy.from_pretrained(
        base.base_model_name_or_path, config=config, revision=base.revision
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        policy = PeftModel.from_pretrained(policy, str(adapter)).merge_and_unload()
    policy.config.use_peft = False
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    policy.save_pretrained(partial)
    for pipeline in make_pre_post_processors(config, str(adapter)):
        pipeline.save_pretrained(partial)
    os.replace(partial, target)
