# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""The policy: LeRobot's methods around `ForesightForActionPrediction` and its processor.

LeRobot's pipelines keep states and actions in the dataset's units; `ForesightProcessor` normalizes them.
"""

import functools
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import OBS_STATE
from torch import Tensor, nn
from transformers.utils import logging

from goal_images.background import GoalWorker
from goal_images.control import GoalStream
from goal_images.generator import GoalGenerator
from modeling_foresight import ForesightForActionPrediction, ForesightProcessor, ForesightStream
from modeling_foresight.bfloat16_support import NO_BFLOAT16, has_bfloat16
from modeling_foresight.lora import TOP_LEVEL, TOWERS, lora_config
from modeling_foresight.step_seed import sample_seeds, step_seed
from modeling_foresight.targets import draw_training

from .config_from_dataset import (
    check_column_names,
    check_dataset_fits,
    fill_from_dataset,
    statistics_from_dataset,
)
from .configuration_foresight import LeRobotForesightConfig
from .processor_foresight import check_pipelines
from .window_reading import WindowReader, to_uint8

__all__ = ["LeRobotForesightPolicy"]

logger = logging.get_logger(__name__)

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")


class LeRobotForesightPolicy(PreTrainedPolicy):
    """3D Foresight for LeRobot.

    Its folder is also a model of `transformers`: `AutoModel` and `AutoProcessor` open it.

    Args:
        config (`LeRobotForesightConfig`): With features filled by LeRobot. Without `pretrained_path` the
            policy is fresh: towers from the checkpoints that the config names, everything else random.
        dataset_stats (`dict`, *optional*): Statistics by column, by which a fresh policy normalizes.
        dataset_meta (`LeRobotDatasetMetadata`, *optional*): The dataset to train on.

    Raises:
        ValueError: If the dataset does not fit the policy.
    """

    config_class = LeRobotForesightConfig
    name = "foresight"
    # For FSDP. Towers are separate units, because frozen weights must not share a unit with others. Every
    # class must occur in the model.
    _fsdp_wrap_modules = ["ForesightBlock", "TextEncoder", "VisionEncoder"]

    def __init__(self, config: LeRobotForesightConfig, dataset_stats=None, dataset_meta=None, **kwargs):
        super().__init__(config)
        if dataset_meta is not None:
            check_column_names(dataset_meta.features, dataset_meta.root, with_state=config.state_dim != 0)
        config.validate_features()
        config.processor = None
        if not config.pretrained_path:
            config.trained_batches = 0  # from a train_config.json that starts a new run
        if dataset_meta is not None and not config.pretrained_path:
            tokenizer = fill_from_dataset(config, dataset_meta)
            self.model = ForesightForActionPrediction.from_encoder_checkpoints(
                config.model_config(), text=config.text_tower, vision=config.vision_tower
            )
            self.processor = ForesightProcessor.from_config(
                self.model.config, tokenizer, **statistics_from_dataset(config, dataset_stats, dataset_meta)
            )
        else:
            self.model = ForesightForActionPrediction(config.model_config())
            if dataset_meta is not None:
                check_dataset_fits(config.robot, dataset_meta)
        config.keep_model(self.model.config)
        if self.model.config.action_codec == "local_delta" and dataset_meta is not None:
            raise ValueError("action_codec='local_delta' is trained by training/train.py, not by LeRobot.")
        self.windows: WindowReader | None = None
        self._goal_source: GoalGenerator | GoalWorker | None = None
        self._trained_on: dict[str, Tensor] = {}  # episodes and frames of the last batch
        if dataset_meta is not None:
            self.windows = WindowReader(dataset_meta, config.cameras, self.model.config, config.frame_cache)
            self.windows.attach()
        self.reset()

    @property
    def processor(self) -> ForesightProcessor | None:
        """The processor; `None` in a fresh policy that was made without a dataset."""
        return self.config.processor

    @processor.setter
    def processor(self, processor: ForesightProcessor) -> None:
        self.config.processor = processor

    # ------------------------------------------------------------------ one folder for both libraries

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Weights under `transformers`' names; the config that both libraries read, and the processor."""
        state_dict = state_dict or self.state_dict()  # of FSDP: gathered under the policy's names
        state_dict = {name.removeprefix("model."): value for name, value in state_dict.items()}
        # LeRobot reads unsharded files only.
        self.model.save_pretrained(save_directory, state_dict=state_dict, max_shard_size="1TB")
        self.config._save_pretrained(save_directory)

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        """As in `torch`; what LeRobot and peft write passes here, so broken weights never reach a file.

        Raises:
            ValueError: If a weight is not finite: the loss of a step can be finite and its update overflow.
        """
        state = super().state_dict(*args, **kwargs)
        stored = {name: value for name, value in state.items() if not value.is_meta}
        local = {name: getattr(value, "to_local", lambda v=value: v)() for name, value in stored.items()}
        if broken := [name for name, value in local.items() if not value.isfinite().all()]:
            raise ValueError(
                f"{len(broken)} weights are not finite, such as {broken[0]}, after {self._describe_batch()}. "
                "They are not saved; earlier checkpoints are intact. Look at these frames, or lower "
                "--policy.optimizer_lr."
            )
        return state

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        dataset_stats=None,
        revision: str | None = None,
        **kwargs,
    ) -> "LeRobotForesightPolicy":
        """As in LeRobot; `dataset_stats` of the data to train on replace the folder's.

        Raises:
            ValueError: If weights are missing, unexpected, of other sizes, or only an adapter's; if the
                folder's pipelines could run code; or if a run is resumed on data with other statistics.
        """
        folder = Path(pretrained_name_or_path)
        is_adapter = ValueError(
            f"{folder} is an adapter, of which nothing would be loaded here. LeRobot's make_policy, "
            "lerobot-train and lerobot-eval load it with its base; where one policy is needed, merge them: "
            f"python -m lerobot_policy_foresight {folder} --merge FOLDER"
        )
        if (folder / "adapter_config.json").is_file() and not (folder / "model.safetensors").is_file():
            raise is_adapter
        hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        if config is not None and config.embodiment is None and len(config.embodiments or {}) > 1:
            known = ", ".join(sorted(config.embodiments))
            raise ValueError(
                f"The policy has the embodiments {known}, and none is chosen: add --policy.embodiment=NAME."
            )
        config = config or PreTrainedConfig.from_pretrained(pretrained_name_or_path, revision=revision, **hub)
        config.pretrained_path = config.pretrained_path or Path(pretrained_name_or_path)
        # LeRobot opens the base with the adapter's config, then adds the adapter.
        source, source_revision = pretrained_name_or_path, revision
        if config.use_peft:
            source, source_revision = config.pretrained_path, config.pretrained_revision
            if str(source) == str(pretrained_name_or_path):  # on the Hub
                raise is_adapter
        # LeRobot makes the policy before it opens the weights.
        model = config.model_config()
        ForesightForActionPrediction.check_checkpoint(source, model, revision=source_revision, **hub)
        kwargs |= {"config": config, "dataset_stats": dataset_stats, "revision": revision}
        for place in {(str(pretrained_name_or_path), revision), (str(source), source_revision)}:
            check_pipelines(*place, **hub)  # LeRobot opens them next
        policy = super().from_pretrained(pretrained_name_or_path, **kwargs)
        policy.processor = ForesightProcessor.from_pretrained(source, revision=source_revision, **hub)
        if dataset_stats:
            policy._replace_statistics(dataset_stats, kwargs.get("dataset_meta"))
        return policy

    def _replace_statistics(self, dataset_stats, dataset_meta) -> None:
        """Normalizes by the statistics of a dataset, which must not change when a run resumes."""
        stats, before = statistics_from_dataset(self.config, dataset_stats, dataset_meta), self.processor
        if (robot := before.choose_embodiment(self.config.embodiment)) is not None:
            own = {name.removesuffix("_stats"): values for name, values in stats.items()}
            stats = {"statistics": (before.statistics or {}) | {robot: own}}
        self.processor = ForesightProcessor.from_config(self.model.config, before.tokenizer, **stats)
        saved = Path(self.config.pretrained_path) / "train_config.json"
        if not self.config.trained_batches or not saved.is_file():
            return
        run = json.loads(saved.read_text())["policy"]
        same = all(getattr(self.processor, name) == getattr(before, name) for name in stats)
        if run.get("trained_batches") == self.config.trained_batches and not same:
            raise ValueError(
                f"The dataset has other statistics than when the run of {saved.parent} began. Restore the "
                f"data, or start a new run from the policy: --policy.path={saved.parent} without --resume."
            )

    @classmethod
    def _load_as_safetensor(cls, model, model_file: str, map_location: str, strict: bool):
        # Ours knows which weights may be absent, and refuses all others whatever `strict` says.
        model.model = ForesightForActionPrediction.from_pretrained(
            Path(model_file).parent, config=model.model.config, dtype=torch.float32
        )
        return model

    # ------------------------------------------------------------------ adapters

    # For peft: names in adapters of training/train.py, where no policy wraps the model.
    _checkpoint_conversion_mapping = {rf"^(?!model\.{TOP_LEVEL})": "model."}

    def _get_default_peft_targets(self) -> dict[str, Any]:
        """The layers that `--peft.method_type=LORA` adapts or trains in full, as in `training/train.py`."""
        adapter = lora_config(self.model)
        return {
            "target_modules": adapter.target_modules,
            "modules_to_save": adapter.modules_to_save,
            "revision": self.config.pretrained_revision,  # otherwise the newest base would be loaded later
        }

    def _validate_peft_config(self, peft_config) -> None:
        super()._validate_peft_config(peft_config)
        if hasattr(peft_config, "exclude_modules"):  # whatever --peft.target_modules says
            peft_config.exclude_modules = TOWERS

    # ------------------------------------------------------------------ training

    def get_optim_params(self) -> list[nn.Parameter]:
        """The parameters that train: all but frozen towers."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def forward(self, batch: dict, reduction: str = "mean") -> tuple[Tensor, dict[str, float]]:
        """The loss of a training batch, and its parts by name.

        Args:
            batch (`dict`): Items of the policy's dataset, after the preprocessor: windows, as a data loader
                reads them; otherwise they are read here by `index`.
            reduction (`str`): `"mean"`, or `"none"` for one loss per sample `(B,)`, which LeRobot's
                `--sample_weighting` needs. Each sample is then a separate batch: a mean over its valid
                elements, and a forward pass. The mean of these losses is not the loss of the batch where
                samples have different numbers of valid elements.

        Raises:
            ValueError: If the batch does not fit, or no objective has a target in it.
        """
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction={reduction!r} is unknown; choose 'mean' or 'none'.")
        with self._seeded() as place, self._precision():
            return self._compute_losses(batch, reduction, place)

    def _precision(self) -> AbstractContextManager:
        """Turns off Accelerate's bfloat16 where the device has no kernels for it."""
        device = self.model.device
        if has_bfloat16(device) or not torch.is_autocast_enabled(device.type):
            return nullcontext()
        logger.warning_once(NO_BFLOAT16)
        return torch.autocast(device.type, enabled=False)

    @contextmanager
    def _seeded(self) -> Iterator[tuple[int, int]]:
        """Draws dropout of a batch as `training/train.py` does, whatever was drawn before.

        LeRobot restores the generators on resuming, but the new data loader has drawn from them by then.
        Yields the run's seed, and the number of batches that all processes had before this one.
        """
        seed, process, processes = torch.initial_seed(), 0, 1
        if torch.distributed.is_initialized():
            process, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
        before = self.config.trained_batches
        self.config.trained_batches += self.training
        with torch.random.fork_rng([self.model.device] if self.model.device.type == "cuda" else []):
            torch.manual_seed(step_seed(seed, before, process))
            yield seed, before * processes + process

    def _compute_losses(
        self, batch: dict, reduction: str, place: tuple[int, int]
    ) -> tuple[Tensor, dict[str, float]]:
        if self.windows is None:
            raise ValueError("This policy has no dataset to train on: make it for a dataset.")
        processor = self._require_processor()
        raw = processor.place_batch(self.windows.read_batch(batch), self.config.embodiment)
        inputs = processor.prepare_batch(
            raw, device=self.model.device, history_length=self.model.config.history_length
        )
        size = len(raw["task"])
        if self.training:
            seed, batches_before = place
            seeds = sample_seeds(seed, range(batches_before * size, (batches_before + 1) * size))
            inputs |= draw_training(self.model.config, inputs, seeds)
        batches, counts = [inputs], None
        if reduction == "mean":
            counts = self._global_counts(inputs)
        else:
            rows = (slice(i, i + 1) for i in range(size))
            batches = [{name: value[row] for name, value in inputs.items()} for row in rows]
        outputs = [self.model(**inputs, loss_counts=counts) for inputs in batches]
        untrained = counts is not None and not any(count.any() for count in counts.values())
        if outputs[0].loss is None or untrained:
            raise ValueError(
                f"The batch has no target of any of the objectives {list(self.model.config.objectives)}."
            )
        # Every process has the same names, even without targets: LeRobot averages them by name.
        found = [output.losses or {} for output in outputs]
        parts = {
            f"{name}_loss": sum(float(losses.get(name, 0)) for losses in found) / len(found)
            for name in counts or found[0]
        }
        losses = torch.stack([output.loss for output in outputs])
        if self.training:
            self._trained_on = {name: batch[name] for name in ("episode_index", "index") if name in batch}
            if not losses.isfinite().all():
                self._refuse_loss(parts)
        return losses if reduction == "none" else losses[0], parts

    def _global_counts(self, inputs: dict) -> dict[str, Tensor] | None:
        """Divisors of this process's losses with which averaged gradients are those of one global mean.

        `None` for a single process, where the batch's own counts divide. Every process must call this in
        every step, even one with nothing to supervise.
        """
        if not (self.training and torch.distributed.is_initialized()):
            return None
        counts = self.model.count_targets(inputs)
        together = torch.cat([counts[name].flatten() for name in counts])
        torch.distributed.all_reduce(together)
        sizes = [count.numel() for count in counts.values()]
        parts = (together / torch.distributed.get_world_size()).split(sizes)
        return {name: part.view_as(counts[name]) for name, part in zip(counts, parts, strict=True)}

    def _describe_batch(self) -> str:
        """Where the windows of the last batch come from, for messages."""
        if self.windows is None or len(self._trained_on) < 2:
            return "no batch"
        pairs = zip(*(values.flatten().tolist() for values in self._trained_on.values()), strict=True)
        places = ", ".join(f"episode {episode} frame {frame}" for episode, frame in pairs)
        return f"a batch of {self.windows.root}: {places} (`index`, the newest frame of a window)"

    def _refuse_loss(self, parts: dict[str, float]) -> None:
        """Raises before the weights become NaN, and names the frames of the batch."""
        values = ", ".join(f"{name} {value:g}" for name, value in parts.items())
        raise ValueError(
            f"The loss is not finite ({values}) on {self._describe_batch()}. Look at these frames, or lower "
            "--policy.optimizer_lr. The last checkpoint is intact."
        )

    # ------------------------------------------------------------------ control

    def reset(self) -> None:
        """Forgets all frames and instructions: a new episode of all environments."""
        compiled = self.config.compile_model and getattr(self, "_stream", None)
        self._stream: ForesightStream | GoalStream | None = compiled or None  # a new one would compile again
        self._tasks: list[str | None] = [None] * compiled.num_envs if compiled else []
        self._plan: Tensor | None = None  # (B, n_action_steps, A)
        self._executed: Tensor | None = None  # int64 (B,): how many of the planned actions

    @torch.compiler.disable  # lerobot-rollout would compile everything around the step
    @torch.no_grad()
    def predict_action_chunk(self, batch: dict, again: bool = False, **kwargs) -> Tensor:
        """The next K actions of every environment after one more observation of each.

        Every call is one time step: the policy keeps the last T frames itself. A new instruction clears the
        frames of its environment.

        Args:
            batch (`dict`): Images `(B, 3, h, w)` in [0, 1], state `(B, state_dim)`, `task`; after the
                preprocessor.
            again (`bool`): The observation replaces the newest one in the window, because the robots have
                not acted since.
            **kwargs: Ignored; LeRobot passes options of other policies.

        Returns:
            `torch.Tensor`: float32 `(B, K, A)` in the dataset's units.

        Raises:
            ValueError: If a camera, the state or the instruction is missing, or a size does not fit.
        """
        self.eval()
        images = self._read_cameras(batch)
        robots = len(next(iter(images.values())))
        state = None
        if self.config.robot.state_dim:
            if OBS_STATE not in batch:
                raise ValueError(f"The observation lacks {OBS_STATE!r}, which the policy was trained with.")
            state = batch[OBS_STATE].float()
        with self._precision():  # lerobot-train evaluates in the precision of training
            self._update_stream(read_tasks(batch, robots))
            chunk = self._stream.step_chunk(images, state, again=again)
        return chunk.to(self.model.device)

    def select_action(self, batch: dict, **kwargs) -> Tensor:
        """The next action `(B, A)` of every environment.

        `n_action_steps` actions of each plan are executed; every observation enters the window. A new
        instruction ends the plan of its environment at once.
        """
        chunk = self.predict_action_chunk(batch)[:, : self.config.n_action_steps]
        if self._plan is None or self._plan.shape != chunk.shape:
            self._plan = chunk
            self._executed = torch.full((len(chunk),), chunk.shape[1], device=chunk.device)
        ended = self._executed == chunk.shape[1]
        ended[self._begun] = True
        self._plan = torch.where(ended[:, None, None], chunk, self._plan)
        place = torch.where(ended, 0, self._executed)
        self._executed = place + 1
        return self._plan[torch.arange(len(chunk)), place]

    def _update_stream(self, tasks: list[str]) -> None:
        """Makes a stream for as many robots as there are tasks, and resets those with a new instruction."""
        is_usable = self._stream is not None and not self._stream.is_outdated
        if not is_usable or self._stream.num_envs != len(tasks):
            self._stream = self._open_stream(len(tasks))
            self._tasks = [None] * len(tasks)
        pairs = zip(self._tasks, tasks, strict=True)
        self._begun = [i for i, (old, new) in enumerate(pairs) if old != new]  # of this step
        if self._begun:
            self._stream.reset([tasks[i] for i in self._begun], envs=self._begun)
            self._tasks = tasks

    def _open_stream(self, robots: int) -> ForesightStream | GoalStream:
        """The stream of some robots, with goals if there is a generator; it is loaded once."""
        options = {"num_envs": robots, "compile": self.config.compile_model}
        options["embodiment"] = self.config.embodiment
        if self.config.goal_generator is None:
            return self.model.stream(self._require_processor(), **options)
        if self._goal_source is None:
            make = functools.partial(GoalGenerator, self.config.goal_generator, device=str(self.model.device))
            self._goal_source = GoalWorker(make) if self.config.goal_background else make()
        return GoalStream(
            self.model.stream(self._require_processor(), with_progress=True, **options), self._goal_source
        )

    def _read_cameras(self, batch: dict) -> dict[str, Tensor]:
        images = {}
        for view, key in self.config.cameras.items():
            if key not in batch:
                there = [name for name in batch if name.startswith("observation.image")]
                raise ValueError(
                    f"The observation lacks {key!r}, the camera of view {view!r}; it has {there}. Name it "
                    f"""with --policy.cameras='{{"{view}": "KEY"}}', or leave it out: '{{"{view}": null}}'."""
                )
            if batch[key].ndim != 4:
                raise ValueError(
                    f"{key} has shape {tuple(batch[key].shape)}; expected (environments, 3, height, width)."
                )
            if not batch[key].isfinite().all():
                raise ValueError(f"{key} holds NaN or infinite values: look at the camera, or leave it out.")
            images[view] = to_uint8(batch[key], key)
        return images

    def _require_processor(self) -> ForesightProcessor:
        if self.processor is None:
            raise ValueError(
                "This policy has no processor: make it for a dataset, or load it with from_pretrained."
            )
        return self.processor


def read_tasks(batch: dict, samples: int) -> list[str]:
    """The instruction of every sample."""
    tasks = batch.get("task")
    tasks = [tasks] if isinstance(tasks, str) else list(tasks or [])
    if len(tasks) == 1:  # LeRobot's pipelines make a list of one text
        tasks *= samples
    if len(tasks) != samples:
        raise ValueError(f"The batch has {len(tasks)} instructions (`task`) for {samples} samples.")
    return tasks
