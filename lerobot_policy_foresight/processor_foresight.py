# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""LeRobot's steps before and after the policy: rename, batch, device; and back.

They are LeRobot's own, under the names that its commands override. The two normalizers change nothing,
because `ForesightProcessor` normalizes. One step of ours checks the size of the state.
"""

import inspect
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from lerobot.processor import (
    ObservationProcessorStep,
    PolicyAction,
    PolicyProcessorPipeline,
    ProcessorStepRegistry,
)
from lerobot.processor.factory import make_default_policy_processor_steps, make_policy_processor_pipelines
from lerobot.utils.constants import (
    OBS_STATE,
    POLICY_POSTPROCESSOR_DEFAULT_NAME,
    POLICY_PREPROCESSOR_DEFAULT_NAME,
)

from .configuration_foresight import LeRobotForesightConfig

__all__ = ["CheckStateStep", "check_pipelines", "find_foreign_steps", "make_foresight_pre_post_processors"]

# Arguments by which LeRobot's own steps load a tokenizer or a model, with its code.
SOURCE_ARGUMENTS = {"checkpoint_path", "model_name", "pretrained_path", "processor_name", "tokenizer_name"}
SOURCE_ARGUMENTS |= {"trust_remote_code"}


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
    # Robots differ in the size of their states; the policy checks that of the chosen one.
    state = None if config.embodiments else config.robot_state_feature
    steps = make_default_policy_processor_steps(config, None, normalizer_device=config.device)
    check = CheckStateStep(state.shape[0] if state else None)
    return make_policy_processor_pipelines(
        input_steps=[steps.rename_observations, steps.add_batch_dim, steps.to_device, check, steps.normalize],
        output_steps=[steps.unnormalize, steps.to_cpu],
    )


def check_pipelines(source: str | Path, revision: str | None = None, **hub) -> None:
    """Refuses the pipelines of a folder or Hub repo that would run code; LeRobot imports any class they name.

    Args:
        source (`str` or `Path`): Folder or Hub id.
        revision (`str`, *optional*): Of the Hub repo.
        **hub: Options of `hf_hub_download`.

    Raises:
        ValueError: If a step is not one that an installed package has registered; names file and step.
    """
    for name in (POLICY_PREPROCESSOR_DEFAULT_NAME, POLICY_POSTPROCESSOR_DEFAULT_NAME):
        path = Path(source) / f"{name}.json"
        if not Path(source).is_dir():
            with suppress(EntryNotFoundError):
                path = Path(hf_hub_download(str(source), path.name, revision=revision, **hub))
        steps = list(find_foreign_steps(json.loads(path.read_text()))) if path.is_file() else []
        if steps:
            raise ValueError(
                f"{path.name} of {source} has steps that are not registered ones and could run any code: "
                f"{', '.join(steps)}. Write it again with `python -m lerobot_policy_foresight {source}`, or "
                "register your step's class (ProcessorStepRegistry.register) in a plugin."
            )


def find_foreign_steps(pipeline: Any) -> Iterator[str]:
    """Names of the steps of a saved pipeline that no installed package has registered, or that load code."""
    steps = pipeline.get("steps") if isinstance(pipeline, dict) else None
    for step in steps if isinstance(steps, list) else []:
        name = step.get("registry_name") if isinstance(step, dict) else step
        if name not in ProcessorStepRegistry.list():
            yield str(step.get("registry_name", step.get("class")) if isinstance(step, dict) else step)
            continue
        kind = ProcessorStepRegistry.get(name)
        arguments = inspect.signature(kind).parameters.keys()
        if kind.__module__.startswith("lerobot.") and SOURCE_ARGUMENTS & arguments:
            yield name
