# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""LeRobot's steps before and after the policy: rename, batch, device, normalise; and back.

They are LeRobot's own, under the names that its commands override. Images pass as they are, labels too.
"""

from typing import Any

from lerobot.processor import PolicyAction, PolicyProcessorPipeline, make_default_pre_post_processors
from lerobot.utils.constants import ACTION, OBS_STATE

from .configuration_foresight import ForesightConfig

__all__ = ["make_foresight_pre_post_processors"]


def make_foresight_pre_post_processors(
    config: ForesightConfig, dataset_stats: dict[str, dict[str, Any]] | None = None
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]],
    PolicyProcessorPipeline[PolicyAction, PolicyAction],
]:
    """Pipelines before and after the policy; LeRobot finds this function by its name.

    Args:
        config (`ForesightConfig`): With its features validated, as the policy leaves it.
        dataset_stats (`dict`, *optional*): Statistics by column. Those of images and labels, which for points
            are large, are not kept.
    """
    used = {key: stats for key, stats in (dataset_stats or {}).items() if key in (ACTION, OBS_STATE)}
    return make_default_pre_post_processors(config, used, normalizer_device=config.device)
