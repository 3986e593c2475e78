# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""What LeRobot needs beside a model that `training/train.py` or `save_pretrained` wrote.

python -m lerobot_policy_foresight outputs/quickstart/model
lerobot-eval --policy.path=outputs/quickstart/model --env.type=...
"""

import json
from pathlib import Path

from lerobot.configs import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from modeling_foresight import ForesightConfig as ModelConfig
from modeling_foresight import ForesightProcessor

from .configuration_foresight import ForesightConfig
from .processor_foresight import make_foresight_pre_post_processors

__all__ = ["write_lerobot_files"]


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
