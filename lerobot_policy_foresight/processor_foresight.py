# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""LeRobot's steps before and after the policy: rename, batch, device; and back.

They are LeRobot's own, under the names that its commands override. The two normalizers change nothing,
because `ForesightProcessor` normalizes. One step of ours checks the size of the state.
"""

from dataclasses import dataclass
from typing import Any

from lerobot.processor import (
    ObservationProcessorStep,
    PolicyAction,
    PolicyProcessorPipeline,
    ProcessorStepRegistry,
)
from lerobot.processor.factory import make_default_policy_processor_steps, make_policy_processor_pipelines
from lerobot.utils.constants import OBS_STATE

from .configuration_foresight import LeRobotForesightConfig

__all__ = ["CheckStateStep", "make_foresight_pre_post_processors"]


@ProcessorStepRegistry.register("foresight_check_state")
@dataclass
class CheckStateStep(ObservationProcessorStep):
    """Refuses states of another size than the policy's, such as those of a robot with other joints."""

    size: int | None = None  # entries of the state; `None` where the policy has none

    def observation(self, observation: dict) -> dict:
        """Returns the observation, whose state `(..., size)` must fit."""
        state = observation.get(OBS_STATE)
        # A single number has no axis in LeRobot's batches; the last axis is time then.
        if self.size not in (None, 1) and state is not None and state.shape[-1] != self.size:
            raise ValueError(
                f"{OBS_STATE} has {state.shape[-1]} entries; the policy was made for {self.size}: use the "
                "robot of its dataset, with the same joints in the same order."
            )
        return observation

    def get_config(self) -> dict:
        """The options that are saved with the pipeline."""
        return {"size": self.size}

    def transform_features(self, features: dict) -> dict:
        """Returns the features unchanged."""
        return features


def make_foresight_pre_post_processors(
    config: LeRobotForesightConfig, dataset_stats: dict[str, dict[str, Any]] | None = None
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]],
    PolicyProcessorPipeline[PolicyAction, PolicyAction],
]:
    """Pipelines before and after the policy; LeRobot finds this function by its name.

    `config` has validated features, as the policy leaves it. `dataset_stats` are ignored.
    """
    state = config.robot_state_feature
    steps = make_default_policy_processor_steps(config, None, normalizer_device=config.device)
    check = CheckStateStep(state.shape[0] if state else None)
    return make_policy_processor_pipelines(
        input_steps=[steps.rename_observations, steps.add_batch_dim, steps.to_device, check, steps.normalize],
        output_steps=[steps.unnormalize, steps.to_cpu],
    )
