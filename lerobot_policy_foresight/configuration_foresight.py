# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the policy for LeRobot, and the one config.json that both libraries read.

Every field of the model's config is also an option of the policy (`--policy.hidden_size=384`). So LeRobot can
parse the file that `transformers` writes, and `AutoConfig` keeps LeRobot's fields as attributes.
"""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import draccus
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.optim import AdamWConfig, LRSchedulerConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_PREFIX, OBS_STATE
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from datasets_scripts.columns import is_label_key
from datasets_scripts.storage.atomic import write_json
from modeling_foresight import ForesightConfig

from .lerobot_version import refuse_untested_lerobot

__all__ = ["ForesightScheduleConfig", "LeRobotForesightConfig"]

# What transformers, and its Trainer, write into a config.json for themselves; read and dropped.
BOOKKEEPING = ("architectures", "auto_map", "model_type", "transformers_version")
BOOKKEEPING += ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache")
MODEL_FIELDS = tuple(name for name in ForesightConfig.__annotations__ if name not in BOOKKEEPING)
# Settings of one run. transformers would misread two: the dtype of the weights, and a method's name.
NOT_SAVED = (
    "attn_implementation",
    "compile_model",
    "dtype",
    "frame_cache",
    "goal_background",
    "goal_generator",
)
NOT_SAVED += ("pretrained_path", "push_to_hub", "trained_batches")


@LRSchedulerConfig.register_subclass("foresight_cosine")
@dataclasses.dataclass
class ForesightScheduleConfig(LRSchedulerConfig):
    """Linear warm-up, then a cosine down to `min_lr_ratio` of the peak, as in `training/train.py`.

    LeRobot's own `cosine_decay_with_warmup` shortens the warm-up in short runs and counts its steps as decay.
    """

    num_warmup_steps: int = 100
    min_lr_ratio: float = 0.01

    def build(self, optimizer: Optimizer, num_training_steps: int) -> LRScheduler:
        """The schedule over `num_training_steps`."""
        return get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, self.num_warmup_steps, num_training_steps, min_lr_rate=self.min_lr_ratio
        )


def _option_type(annotation: Any) -> Any:
    """Type of an option that may be left open; draccus reads `1e-5` as a number only if the type says so."""
    if annotation in (int | float, int | float | None):
        annotation = float
    return annotation | None if annotation in (bool, int, float, str) else Any


_OPEN = {name: _option_type(ForesightConfig.__annotations__[name]) for name in MODEL_FIELDS}
_OPEN |= dict.fromkeys(BOOKKEEPING, Any)
_ModelOptions = dataclasses.make_dataclass(
    "_ModelOptions",
    [(name, kind, dataclasses.field(default=None)) for name, kind in _OPEN.items()],
    bases=(PreTrainedConfig,),
)


@PreTrainedConfig.register_subclass("foresight")
@dataclasses.dataclass
class LeRobotForesightConfig(_ModelOptions):
    """3D Foresight as a LeRobot policy (`--policy.type=foresight`).

    Its options are those below and those of `modeling_foresight.ForesightConfig`, with the defaults there.
    But a fresh policy takes `views`, `action_dim`, `state_dim`, `fps` and the tokenizer's numbers from the
    dataset, and has no binary entries unless they are named.

    Args:
        cameras (`dict[str, str]`): View -> image key. By default the views are the dataset's cameras; given
            views are cameras `observation.images.<view>`. On the command line a trained policy's entries stay
            unless they are replaced; `{"wrist": null}` leaves one out.
        embodiment (`str`, *optional*): The robot that is controlled or trained on, of a policy for several
            (`embodiments`); a folder may have one chosen.
        tokenizer (`str`): `"small"` builds one from the dataset's instructions; or a folder or Hub id.
        text_tower, vision_tower (`str`, *optional*): Checkpoints (CLIP, MAE) that a fresh policy starts
            from. Their configs replace `text_config` and `vision_config`.
        attn_implementation (`str`): `"sdpa"`, `"eager"` (faster with bfloat16 on a CPU) or
            `"flex_attention"`.
        dtype (`str`): `"bfloat16"` or `"float16"` for mixed precision in training. A CPU without bfloat16
            kernels trains in float32.
        frame_cache (`str`): Where training keeps decoded frames: `"auto"` (`$FORESIGHT_CACHE`, or
            `~/.cache/foresight`, if there is room), a folder, or `"off"` to decode on demand.
        n_action_steps (`int`): Actions of a chunk that are executed before the next chunk starts.
        compile_model (`bool`): Compile the control step; `lerobot-rollout --use_torch_compile=true` sets it.
            The first step then takes long.
        goal_generator (`str`, *optional*): InstructPix2Pix pipeline, folder or Hub id, that draws goals for a
            policy trained with goal images.
        goal_background (`bool`): Draw goals beside the control loop; otherwise it waits for each of them, and
            an evaluation can be repeated.
        drop_n_last_frames (`int`): Newest frames of an episode that no window ends with (GR-MG: one).

    Raises:
        ValueError: If fields contradict each other or are unknown; the message names them.
        ImportError: If the plugin was not tested with the installed LeRobot.
    """

    cameras: dict[str, str | None] = dataclasses.field(default_factory=dict)
    embodiment: str | None = None
    tokenizer: str = "small"
    text_tower: str | None = None
    vision_tower: str | None = None
    attn_implementation: str = "sdpa"
    dtype: str = "float32"
    frame_cache: str = "auto"
    n_action_steps: int = 1
    compile_model: bool = False
    goal_generator: str | None = None
    goal_background: bool = True
    drop_n_last_frames: int = 1
    normalization_mapping: dict[str, NormalizationMode] = dataclasses.field(
        # `ForesightProcessor` normalizes, once.
        default_factory=lambda: dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)
    )

    # Not an option: batches of this run so far, per process. A resumed run reads it from train_config.json.
    trained_batches: int = 0
    # Not a field: what AutoProcessor opens, set by the policy. LeRobot saves an adapter without the policy,
    # but with this config.
    processor = None

    optimizer_lr: float = 1e-3
    optimizer_betas: tuple[float, float] = (0.9, 0.999)
    optimizer_weight_decay: float = 0.0
    optimizer_grad_clip_norm: float = 1.0
    scheduler_warmup_steps: int = 100
    scheduler_min_lr_ratio: float = 0.01

    def __post_init__(self):
        # Not at import: LeRobot only logs import errors, then says that the policy is unknown.
        refuse_untested_lerobot()
        super().__post_init__()
        for name in BOOKKEEPING:
            setattr(self, name, None)
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={self.dtype!r} is unknown; choose 'float32', 'bfloat16' or 'float16'.")
        if set(self.normalization_mapping.values()) - {NormalizationMode.IDENTITY}:
            raise ValueError(
                f"normalization_mapping={self.normalization_mapping} would normalize twice, because the "
                "policy's own processor does it. Leave it out. In a folder of an earlier version delete it "
                "from config.json and run `python -m lerobot_policy_foresight FOLDER`."
            )
        model = self.model_config()
        if missing := [tower for tower in ("text", "vision") if tower not in model.towers]:
            raise ValueError(
                f"towers={list(model.towers)} lacks {missing}, whose features LeRobot cannot give: leave it "
                "out."
            )
        self.n_obs_steps = model.history_length
        if not 1 <= self.n_action_steps <= model.chunk_size:
            raise ValueError(
                f"n_action_steps={self.n_action_steps} must be between 1 and chunk_size={model.chunk_size}, "
                "the actions of a chunk."
            )
        if self.goal_generator and not (model.goal_image and model.has("progress")):
            raise ValueError(
                f"goal_generator={self.goal_generator!r} is for a policy with goal_image and the objective "
                f"progress, which the prompt holds; this one has goal_image={model.goal_image} and "
                f"{list(model.objectives)}. Leave it out."
            )

    def model_config(self) -> ForesightConfig:
        """The config of the model; what is left open has `modeling_foresight`'s defaults."""
        given = {name: getattr(self, name) for name in MODEL_FIELDS}
        fields = copy.deepcopy({name: value for name, value in given.items() if value is not None})
        return ForesightConfig(**fields, attn_implementation=self.attn_implementation)

    @property
    def robot(self) -> ForesightConfig:
        """The model's config for the chosen robot; as it is, if none is chosen.

        Raises:
            ValueError: If the policy does not know the robot; names those that it knows.
        """
        model, known = self.model_config(), sorted(self.embodiments or {})
        if self.embodiment is None:
            return model
        if self.embodiment not in known:
            raise ValueError(
                f"--policy.embodiment={self.embodiment} is unknown: the policy has "
                f"{'the embodiments ' + ', '.join(known) if known else 'one robot without a name'}."
            )
        return model.for_robot(self.embodiment)

    def keep_model(self, model: ForesightConfig) -> None:
        """Takes over a model's config, nothing left open."""
        content = json.loads(model.to_json_string())
        for name in MODEL_FIELDS:
            setattr(self, name, content.get(name))

    @property
    def observation_delta_indices(self) -> None:
        """No steps around an item: windows are read by its frame number (`window_reading.py`)."""

    action_delta_indices = reward_delta_indices = observation_delta_indices

    def get_optimizer_preset(self) -> AdamWConfig:
        """The paper's AdamW."""
        return AdamWConfig(
            lr=self.optimizer_lr,
            betas=self.optimizer_betas,
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )

    def get_scheduler_preset(self) -> ForesightScheduleConfig:
        """The schedule of `training/train.py`."""
        return ForesightScheduleConfig(self.scheduler_warmup_steps, self.scheduler_min_lr_ratio)

    def validate_features(self) -> None:
        """Chooses the camera of each view and leaves only inputs in `input_features`.

        LeRobot lists depth among the cameras and points among the states; both are targets.

        Raises:
            ValueError: If no camera fits, or an action or state has another size than the model's.
        """
        features = self.input_features or {}
        images = [
            key
            for key, feature in features.items()
            if feature.type is FeatureType.VISUAL and key.startswith(OBS_PREFIX)  # others never arrive
            if not is_label_key(key) and 1 not in feature.shape
        ]
        if not self.cameras:
            named = {key.removeprefix(f"{OBS_IMAGES}.").removeprefix(OBS_PREFIX): key for key in images}
            views = self.views or named
            self.cameras = {view: named[view] for view in views if view in named}
        else:
            self.cameras = {view: key for view, key in self.cameras.items() if key}
        if self.pretrained_path:  # the dataset may have other names: observations are checked as they arrive
            side = self.model_config().image_size
            camera = PolicyFeature(FeatureType.VISUAL, (3, side, side))
            features = dict.fromkeys(self.cameras.values(), camera) | features
            images = [key for key in self.cameras.values() if not is_label_key(key)]
        absent = [key for key in self.cameras.values() if key not in images]
        if absent or not self.cameras:
            raise ValueError(
                f"Views {self.views or list(self.cameras)} need image columns, but "
                f"{absent or 'none of theirs'} is not among {images}: name them with "
                """--policy.cameras='{"main": "observation.images.KEY"}'."""
            )
        self.views = self.views or list(self.cameras)
        if unknown := [view for view in self.cameras if view not in self.views]:
            raise ValueError(f"cameras names the views {unknown}; the model has {self.views}.")
        robot = self.robot
        if self.embodiment is not None:  # a folder has the places of all robots
            action = self.action_feature
            if action is not None and tuple(action.shape) == (self.action_dim,):
                self.output_features = {ACTION: PolicyFeature(FeatureType.ACTION, (robot.action_dim,))}
            if OBS_STATE in features:
                features = features | {OBS_STATE: PolicyFeature(FeatureType.STATE, (robot.state_dim,))}
        with_state = OBS_STATE in features and self.state_dim != 0 and robot.state_dim > 0
        kept = [*self.cameras.values(), *([OBS_STATE] if with_state else [])]
        self.input_features = {key: features[key] for key in kept}
        for name, feature in (("state", self.robot_state_feature), ("action", self.action_feature)):
            if name == "action" and self.action_codec == "local_delta":
                continue  # its size does not depend on the dataset
            size = getattr(self, f"{name}_dim") and getattr(robot, f"{name}_dim")
            if feature is not None and size and tuple(feature.shape) != (size,):
                raise ValueError(
                    f"The {name} has shape {tuple(feature.shape)}, but the policy was made for {size} "
                    "entries: choose a dataset, robot or environment that fits, or train a new policy."
                    + self._list_robots()
                )

    def _list_robots(self) -> str:
        """How to choose a robot, if there are several."""
        known = ", ".join(sorted(self.embodiments or {}))
        return f" It has the embodiments {known}: choose with --policy.embodiment=NAME." if known else ""

    def lerobot_fields(self) -> dict[str, Any]:
        """LeRobot's fields in config.json, without those of the model."""
        skipped = (*MODEL_FIELDS, *BOOKKEEPING, *NOT_SAVED)
        encoded = draccus.encode(self, PreTrainedConfig)
        return {name: value for name, value in encoded.items() if name not in skipped}

    def _save_pretrained(self, save_directory: Path) -> None:
        content = json.loads(self.model_config().to_json_string()) | self.lerobot_fields()
        content["architectures"] = ["ForesightForActionPrediction"]
        write_json(save_directory / "config.json", content)
        if self.processor is not None:
            self.processor.save_pretrained(save_directory)
