"""What a run is made of: accelerator, model, optimizer and schedule; and its summaries."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import ProjectConfiguration
from torch import Tensor
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from datasets_scripts.storage.atomic import write_json
from datasets_scripts.storage.settings_changes import flatten
from modeling_foresight import ForesightForActionPrediction, ForesightProcessor
from modeling_foresight.bfloat16_support import NO_BFLOAT16, has_bfloat16
from modeling_foresight.step_seed import sample_seeds
from modeling_foresight.targets import draw_training
from training.config import RunConfig, TrainConfig
from training.engines.averaging import WeightAverage
from training.engines.selection import check_average, check_engine, configure_engine, join_processes
from training.engines.wrapping import plain_model
from training.models.adapters import add_lora, describe_base, save_only_adapter
from training.models.model_folder import summary_places
from training.models.starting_model import build_model, pin_base
from training.run_data import RunData
from training.run_record import describe_run, portable_path
from training.windows import WindowSampler

__all__ = ["Run", "build_accelerator", "build_run", "print_summary", "resolve_epochs", "write_summary"]


@dataclasses.dataclass
class Run:
    """What the loop works with.

    Attributes:
        model (`torch.nn.Module`): As Accelerate prepared it.
        trained (`list`): Its parameters that are trained.
        parameters (`tuple[int, int]`): Those of the whole model, and those that are trained.
        average (`WeightAverage`, *optional*): With `train.ema_decay`.
        base (`dict`, *optional*): With LoRA, the description of the model that the adapter is trained on.
        start (`int`): First step; above 0 in a resumed run.
        is_rehearsal (`bool`): Whether nothing of it is kept.
    """

    config: RunConfig
    accelerator: Accelerator
    data: RunData
    model: torch.nn.Module
    processor: ForesightProcessor
    trained: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    parameters: tuple[int, int]
    average: WeightAverage | None = None
    base: dict | None = None
    start: int = 0
    is_rehearsal: bool = False

    @property
    def plain(self) -> torch.nn.Module:
        """The model without wrappers; with LoRA, peft's, which FSDP needs to gather the weights."""
        return plain_model(self.accelerator, self.model)

    @property
    def policy(self) -> ForesightForActionPrediction:
        """[`plain`] or, with LoRA, the base with the adapter in its layers: for its methods and settings."""
        return self.plain.get_base_model() if self.base else self.plain

    @functools.cached_property
    def sampler(self) -> WindowSampler:
        """Which windows form the micro-batches of this process; a step takes as many as it has parts."""
        options = self.config.train
        return self.data.sampler(
            options.batch_size // options.gradient_accumulation_steps,
            seed=self.config.seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            start_step=self.start * options.gradient_accumulation_steps,
            steps=options.steps * options.gradient_accumulation_steps,
        )

    def exported_weights(self) -> AbstractContextManager:
        """Inside, the model has the weights that validation and export use; all processes call it."""
        averaged = self.average is not None and self.config.train.export_ema
        return self.average.in_place() if averaged else nullcontext()

    def prepare_batch(self, raw: Mapping, step: int) -> dict[str, Tensor]:
        """A raw batch as a model batch on the run's device, with random numbers.

        `step` counts micro-batches. A sample's numbers depend on its place in the stream of samples alone,
        not on how many processes and parts share a batch.
        """
        config = self.policy.config
        batch = self.processor.prepare_batch(raw, self.accelerator.device, config.history_length)
        seeds = sample_seeds(self.config.seed, self.sampler.positions(step))
        return batch | draw_training(config, batch, seeds)


def resolve_epochs(config: RunConfig, windows: int) -> RunConfig:
    """The run with its epochs as optimizer steps, for `windows` training windows in all datasets together.

    The last step of the last epoch is a whole batch, so windows of the next epoch may fill it.
    """
    options = config.train
    if options.epochs is None:
        return config
    lengths = {"steps": math.ceil(options.epochs * windows / options.batch_size), "epochs": None}
    if options.warmup_epochs is not None:
        lengths["warmup_steps"] = math.ceil(options.warmup_epochs * windows / options.batch_size)
    train = dataclasses.replace(options, **lengths, warmup_epochs=None)
    return dataclasses.replace(config, train=train)


def count_epochs(run: Run) -> float:
    """Passes over as many windows as all datasets have together."""
    return run.config.train.steps * run.config.train.batch_size / len(run.data.train)


def find_precision(options: TrainConfig, device: torch.device) -> str:
    """`bf16` where it was asked for and the device has kernels for it, otherwise `no`."""
    return options.mixed_precision if has_bfloat16(device) else "no"


def build_accelerator(config: RunConfig) -> Accelerator:
    """Accelerate's view of this process; bfloat16 only where the device has kernels for it."""
    options = config.train
    state = join_processes()
    precision = find_precision(options, state.device)
    if precision != options.mixed_precision:
        state.print(NO_BFLOAT16)
    accelerator = Accelerator(
        # Accelerate would have DeepSpeed hold bfloat16 weights.
        mixed_precision="no" if state.distributed_type == DistributedType.DEEPSPEED else precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        step_scheduler_with_optimizer=False,
        log_with=options.tracker,
        project_config=ProjectConfiguration(project_dir=config.output),
    )
    if options.tracker and not accelerator.log_with:  # Accelerate leaves it out without a word
        raise ValueError(
            f"train.tracker={options.tracker} is not installed: pip install {options.tracker}, or leave it "
            "out"
        )
    check_engine(accelerator, options)
    return accelerator


def build_run(accelerator: Accelerator, config: RunConfig, data: RunData) -> Run:
    """Model, adapter, optimizer and schedule, prepared by Accelerate."""
    options, base = config.train, None
    model, processor = build_model(config, data)
    if config.lora.r:
        base = describe_base(model)
        model = add_lora(model, config.lora)
        save_only_adapter(accelerator, base)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    configure_engine(accelerator, model, options)
    # Fused takes a third of the time on a CPU: 2.9 ms against 9.2 ms a step of the quickstart.
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=options.learning_rate,
        betas=tuple(options.betas),
        weight_decay=options.weight_decay,
        fused=True,
    )
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, options.warmup_steps, options.steps, min_lr_rate=options.min_learning_rate_ratio
    )
    parameters = count_parameters(model)  # here, as engines leave parts of them
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    trained = [p for p in model.parameters() if p.requires_grad]  # FSDP has replaced those of before
    average = None
    if options.ema_decay is not None:
        check_average(accelerator)
        average = WeightAverage(accelerator, model, options.ema_decay)
    if options.tracker:
        # Trackers take plain values only.
        settings = {name: str(value) for name, value in flatten(dataclasses.asdict(config)).items()}
        try:
            accelerator.init_trackers("3d-foresight", config=settings)
        except Exception as error:  # each tracker raises its own types
            raise ValueError(f"train.tracker={options.tracker} does not start: {error}") from error
    return Run(
        config, accelerator, data, model, processor, trained, optimizer, scheduler, parameters, average, base
    )


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """All parameters and the trained ones, each once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def print_summary(run: Run) -> None:
    """Prints what will be trained on what."""
    data, accelerator = run.data, run.accelerator
    if run.start:
        accelerator.print(f"continuing from step {run.start} of {run.config.output}")
    for dataset in data.describe():
        if left_out := dataset["flagged_episodes"]:
            accelerator.print(f"{dataset['name']}: {len(left_out)} episodes are left out for their flags")
    if len(data.train.datasets) > 1:
        for windows, share in zip(data.train.datasets, run.sampler.shares, strict=True):
            accelerator.print(f"{windows.rows.name}: {len(windows)} windows, {share:.1%} of the batches")
    if data.stream:
        accelerator.print(data.stream.describe())
    accelerator.print(
        f"{len(data.train)} windows for training, {len(data.val) if data.val else 0} for validation; "
        f"{run.parameters[1] / 1e6:.2f} M of {run.parameters[0] / 1e6:.2f} M parameters are trained on "
        f"{accelerator.num_processes} x {accelerator.device.type}"
    )
    options = run.config.train
    accelerator.print(
        f"{options.steps} steps of {options.batch_size} windows, {options.warmup_steps} of them warm-up: "
        f"{count_epochs(run):.3g} epochs"
    )
    if options.warmup_steps >= options.steps:
        accelerator.print("warning: all steps are warm-up: the rate stays below train.learning_rate")


def write_summary(run: Run, seconds: float, validation: dict) -> None:
    """Writes the summary of each export: what was trained on what, how long, and how good it is."""
    config, accelerator = run.config, run.accelerator
    if not accelerator.is_main_process:
        return
    start = {}
    if config.init_from:
        revision = pin_base(config, run.policy.config).init_revision
        start = {"init_from": portable_path(config.init_from), "init_revision": revision}
    if run.average:
        start |= {"ema_decay": config.train.ema_decay, "exported_ema": config.train.export_ema}
    if run.base:
        start |= {"init_revision": run.base["base_revision"], "lora": dataclasses.asdict(config.lora)}
    summary = {
        **describe_run(),
        "seed": config.seed,
        "steps": config.train.steps,
        "epochs": round(count_epochs(run), 4),
        "train_seconds": seconds,
        "datasets": run.data.describe(),
        "parameters": run.parameters[0],
        "trained_parameters": run.parameters[1],
        "objectives": list(run.policy.config.objectives),
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "mixed_precision": find_precision(config.train, accelerator.device),
        **start,
        "validation": validation,
    }
    for place in summary_places(config):
        write_json(place, summary)
