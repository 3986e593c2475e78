"""One training run, from its settings to the exported model; [`run_steps`] is the loop.

The batch of a step and its randomness are functions of (seed, step) alone, so an interrupted run resumes
exactly.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration, gather_object, parse_flag_from_env
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from datasets_scripts.storage.atomic import write_json
from modeling_foresight import ForesightForActionPrediction, ForesightProcessor
from modeling_foresight.precision import NO_BFLOAT16, has_bfloat16
from modeling_foresight.seeds import step_seed
from training.adapters import add_lora, describe_base, save_only_adapter
from training.checkpoint_folder import export_model
from training.checkpoints import (
    FINISHED,
    StopRequest,
    check_run_folder,
    describe_run_folder,
    own_run_folder,
    save_checkpoint,
)
from training.config import RunConfig
from training.evaluation.open_loop import flatten_metrics, flow_errors, format_open_loop, measure_held_out
from training.run_data import RunData, evaluation_loader, open_datasets, training_loader
from training.run_facts import describe_run, portable_path
from training.run_log import RunLog
from training.starting_model import build_model, starting_config
from training.windows import WindowSampler

__all__ = ["train", "validate"]


@dataclasses.dataclass
class Run:
    """What the loop works with.

    Attributes:
        model (`torch.nn.Module`): As Accelerate prepared it.
        trained (`list`): Its parameters that are trained.
        base (`dict`, *optional*): With LoRA, the description of the model that the adapter is trained on.
        parameters (`int`): All parameters of the model, the adapter's included.
        start (`int`): First step; above 0 in a resumed run.
    """

    config: RunConfig
    accelerator: Accelerator
    data: RunData
    model: torch.nn.Module
    processor: ForesightProcessor
    trained: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    parameters: int
    base: dict | None = None
    start: int = 0

    @property
    def policy(self) -> ForesightForActionPrediction:
        """The model without DDP around it; with LoRA, the base with the adapter in its layers."""
        # Unwrapping mixed precision too would take it from `self.model` for the rest of the run.
        plain = self.accelerator.unwrap_model(self.model)
        return plain.get_base_model() if self.base else plain

    def sampler(self) -> WindowSampler:
        """Which windows form the micro-batches of this process; a step takes as many as it has parts."""
        options = self.config.train
        return WindowSampler(
            self.data.train.sizes,
            options.batch_size // options.gradient_accumulation_steps,
            seed=self.config.seed,
            mixture=self.config.data.mixture,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            start_step=self.start * options.gradient_accumulation_steps,
            steps=options.steps * options.gradient_accumulation_steps,
        )

    def prepare_batch(self, raw: Mapping) -> dict[str, Tensor]:
        """A batch of windows as the model takes it, on its device."""
        return self.processor.prepare_batch(raw, self.accelerator.device, self.policy.config.history_length)


def train(config: RunConfig, resume: bool) -> int:
    """Runs one training from its settings to the exported model.

    Args:
        config (`RunConfig`): The run.
        resume (`bool`): Continue from the newest checkpoint in `config.output`, if there is one.

    Returns:
        `int`: Exit code: 0 when finished, 128 + signal when stopped by one.

    Raises:
        ValueError: If config, data and run folder do not fit together, or a loss is not finite.
    """
    accelerator = build_accelerator(config)
    with own_run_folder(accelerator, Path(config.output)):
        # One process per machine downloads the data and fills the frame cache; the others then find it there.
        with accelerator.local_main_process_first():
            datasets = open_datasets(config)
        found = check_run_folder(config, datasets, resume)
        if found == FINISHED:
            accelerator.print(f"{config.output} holds this finished run; its model is in {config.export}")
            return 0
        torch.manual_seed(config.seed)
        with accelerator.local_main_process_first():
            data = RunData(config, starting_config(config), datasets)
        run = build_run(accelerator, config, data)
        if found:
            accelerator.load_state(str(found[0]))
            run.start = found[1]
        elif accelerator.is_main_process:
            describe_run_folder(config, datasets)
        accelerator.wait_for_everyone()
        print_summary(run)
        log = RunLog(accelerator, Path(config.output), run.start, config.train.steps)
        stop = StopRequest(accelerator)
        try:
            if exit_code := run_steps(run, log, stop):
                return exit_code
        finally:
            log.close()
            stop.close()
        export_model(accelerator, run.model, run.processor, config, data.image_keys, run.base)
        write_summary(run, log.seconds, measure_final_model(run))
        accelerator.print(f"done: model in {config.export}, log and checkpoints in {config.output}")
        accelerator.end_training()
        return 0


def build_accelerator(config: RunConfig) -> Accelerator:
    """Accelerate's view of this process; bfloat16 only where the device has kernels for it."""
    options = config.train
    # Without `cpu`, several processes on CPUs would not find each other.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    no_kernels = options.mixed_precision == "bf16" and not has_bfloat16(state.device)
    if no_kernels:
        state.print(NO_BFLOAT16)
    return Accelerator(
        mixed_precision="no" if no_kernels else options.mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        step_scheduler_with_optimizer=False,
        log_with=options.tracker,
        project_config=ProjectConfiguration(project_dir=config.output),
    )


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
    trained = [p for p in model.parameters() if p.requires_grad]
    parameters = count_parameters(model.parameters())
    optimizer = torch.optim.AdamW(
        trained, lr=options.learning_rate, betas=tuple(options.betas), weight_decay=options.weight_decay
    )
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, options.warmup_steps, options.steps, min_lr_rate=options.min_learning_rate_ratio
    )
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    if options.tracker:
        # Trackers take plain values only.
        settings = {name: str(value) for name, value in flatten_metrics(dataclasses.asdict(config)).items()}
        accelerator.init_trackers("3d-foresight", config=settings)
    return Run(config, accelerator, data, model, processor, trained, optimizer, scheduler, parameters, base)


def run_steps(run: Run, log: RunLog, stop: StopRequest) -> int:
    """The optimization, up to the last step or a signal.

    Returns:
        `int`: 0 after the last step, else the exit code for the signal.
    """
    config, options, accelerator = run.config, run.config.train, run.accelerator
    parts = options.gradient_accumulation_steps
    batches = iter(training_loader(config, run.data, run.sampler(), accelerator.device))
    run.model.train()
    for step in range(run.start, options.steps):
        with log.timed("data_s"):
            raws = [next(batches) for _ in range(parts)]
        micro_batches = [run.prepare_batch(raw) for raw in raws]
        counts = count_targets(run, micro_batches)
        total = 0.0
        for part, batch in enumerate(micro_batches):
            # Dropout and noise are a function of (seed, step, process), whatever ran in between.
            torch.manual_seed(step_seed(config.seed, step * parts + part, accelerator.process_index))
            with accelerator.accumulate(run.model):
                outputs = run.model(**batch, loss_counts=counts)
                accelerator.backward(outputs.loss)
                total = total + outputs.loss.detach()
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(run.trained, options.max_grad_norm)
                    check_finite(run, step, micro_batches, total, norm)
                    log.add({"grad_norm": norm})
                run.optimizer.step()
                run.optimizer.zero_grad()
            log.add({"loss": outputs.loss.detach(), **(outputs.losses or {})})
        run.scheduler.step()
        log.bar.update()
        done, last = step + 1, step + 1 == options.steps
        if done % options.log_every == 0 or last:
            extra = flow_errors(outputs.flow.detach(), raws[-1]) if outputs.flow is not None else {}
            log.write(done, lr=run.scheduler.get_last_lr()[0], windows=options.batch_size, **extra)
        with log.paused():
            if run.data.val and options.val_every and done % options.val_every == 0 and not last:
                subset = evaluation_loader(run.data.val, options.batch_size, options.val_windows)
                log.write_validation(done, validate(accelerator, run.model, run.processor, subset))
            stopping = bool(stop)
            due = options.checkpoint_every and done % options.checkpoint_every == 0
            if due or stopping or last:
                refuse_broken_weights(run, done)
                save_checkpoint(accelerator, Path(config.output), done, options.keep_checkpoints)
        if stopping and not last:
            accelerator.print(f"stopped after step {done}; continue with --resume")
            return stop.exit_code
    return 0


def count_targets(run: Run, batches: Sequence[Mapping]) -> dict[str, Tensor]:
    """Elements that each loss of a step counts, over all parts and processes, per part and process.

    Divided by these, the averages of losses and gradients over parts and processes are those of one mean over
    the whole batch. A batch cut into halves with 1 and with 30 points would otherwise weigh each half alike.
    """
    counts: dict[str, Tensor] = {}
    for batch in batches:
        for name, count in run.policy.count_targets(batch).items():
            counts[name] = counts.get(name, 0) + count / len(batches)
    return run.accelerator.reduce(counts, "mean") if run.accelerator.num_processes > 1 else counts


def check_finite(run: Run, step: int, batches: Sequence[Mapping], loss: Tensor, norm: Tensor) -> None:
    """Stops all processes before an update with a loss or gradient that is not finite.

    The weights are still those of before the update; they are saved as a checkpoint if they are finite.

    Raises:
        ValueError: In every process; names the windows at fault, and what to do.
    """
    accelerator = run.accelerator
    flags = torch.stack(
        [~torch.isfinite(torch.as_tensor(value, device=loss.device)) for value in (loss, norm)]
    )
    if accelerator.num_processes > 1:
        flags = accelerator.gather(flags)
    if not flags.any():
        return
    suspects = gather_object(find_not_finite(run, step, batches))
    shown = "; ".join(suspects[:5]) or "none of its windows by itself"
    reason = f"the loss or its gradient is not finite at step {step + 1} of {run.config.output}, in {shown}"
    output = Path(run.config.output)
    if has_finite_weights(run):
        run.optimizer.zero_grad()
        save_checkpoint(accelerator, output, step, run.config.train.keep_checkpoints)
        saved = f"The weights of before are saved as the checkpoint of step {step}"
    else:
        saved = "The weights are not finite either, so nothing was saved after the last checkpoint"
    raise ValueError(
        f"{reason}. {saved}. Repair or leave out that data (NaN, infinite or huge values), or lower "
        "train.learning_rate, and start a run with another --output"
    )


def has_finite_weights(run: Run) -> bool:
    """Whether all trained weights are finite, in every process."""
    broken = torch.stack([(~parameter.isfinite()).any() for parameter in run.trained]).any()
    return not bool(run.accelerator.gather(broken[None]).any())


def refuse_broken_weights(run: Run, done: int) -> None:
    """Stops all processes before weights that are not finite are saved or exported.

    The loss and the gradient of a step can be finite and its update can still overflow.

    Raises:
        ValueError: In every process; says what is kept, and what to do.
    """
    if not has_finite_weights(run):
        raise ValueError(
            f"the weights are not finite after step {done} of {run.config.output}. They are not saved; "
            "checkpoints of before are kept. Lower train.learning_rate, and start a run with another --output"
        )


@torch.no_grad()
def find_not_finite(run: Run, step: int, batches: Sequence[Mapping]) -> list[str]:
    """Windows of this process whose loss is not finite by itself: dataset, episode and newest frame."""
    sampler, found = run.sampler(), []
    for part, batch in enumerate(batches):
        indices = sampler.batch_indices(step * len(batches) + part)
        for row, (index, _) in enumerate(indices):
            sample = {name: value[row : row + 1] for name, value in batch.items()}
            with run.accelerator.autocast():
                loss = run.policy(**sample).loss
            if loss is not None and not loss.isfinite():
                found.append(run.data.describe_window(index))
    return found


@torch.no_grad()
def validate(
    accelerator: Accelerator, model: torch.nn.Module, processor: ForesightProcessor, loader: DataLoader
) -> dict[str, float]:
    """Mean validation losses; every process measures all windows, so that none waits for another's share."""
    model.eval()
    plain = accelerator.unwrap_model(model)
    totals, count = {}, 0
    for raw in loader:
        with accelerator.autocast():
            batch = processor.prepare_batch(raw, accelerator.device, plain.config.history_length)
            losses = plain(**batch).losses
        size = len(raw["task"])
        count += size
        for name, value in losses.items():
            totals[name] = totals.get(name, 0.0) + float(value) * size
    model.train()
    return {name: value / count for name, value in totals.items()}


def print_summary(run: Run) -> None:
    """Prints what will be trained on what."""
    data, accelerator = run.data, run.accelerator
    if run.start:
        accelerator.print(f"continuing from step {run.start} of {run.config.output}")
    for dataset in data.describe():
        if left_out := dataset["flagged_episodes"]:
            accelerator.print(f"{dataset['name']}: {len(left_out)} episodes are left out for their flags")
    accelerator.print(
        f"{len(data.train)} windows for training, {len(data.val) if data.val else 0} for validation; "
        f"{count_parameters(run.trained) / 1e6:.2f} M of {run.parameters / 1e6:.2f} M parameters are trained "
        f"on {accelerator.num_processes} x {accelerator.device.type}"
    )


def count_parameters(parameters: Iterable[torch.nn.Parameter]) -> int:
    """Numbers in all parameters together."""
    return sum(parameter.numel() for parameter in parameters)


def measure_final_model(run: Run) -> dict:
    """Errors on the validation episodes, in full float32 as the exported weights; `{}` without validation.

    Each process measures its share of the windows, so none waits longer than the process group allows.
    """
    if not run.data.val:
        return {}
    accelerator = run.accelerator
    accelerator.print("measuring the validation episodes, beside trivial predictors")
    accelerator.unwrap_model(run.model, keep_fp32_wrapper=False)  # takes mixed precision from it for good
    errors = measure_held_out(
        run.policy,
        run.processor,
        run.data,
        run.config.train.batch_size,
        run.config.data.baseline_windows,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    accelerator.print(format_open_loop(errors))
    return errors


def write_summary(run: Run, seconds: float, validation: dict) -> None:
    """Writes `summary.json`: what was trained on what, how long, and how good it is."""
    config, accelerator = run.config, run.accelerator
    if not accelerator.is_main_process:
        return
    start = {}
    if config.init_from:
        start = {"init_from": portable_path(config.init_from), "init_revision": config.init_revision}
    if run.base:
        start |= {"init_revision": run.base["base_revision"], "lora": dataclasses.asdict(config.lora)}
    summary = {
        **describe_run(),
        "seed": config.seed,
        "steps": config.train.steps,
        "train_seconds": seconds,
        "datasets": run.data.describe(),
        "parameters": run.parameters,
        "trained_parameters": count_parameters(run.trained),
        "objectives": list(run.policy.config.objectives),
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "mixed_precision": accelerator.mixed_precision,
        **start,
        "validation": validation,
    }
    write_json(Path(config.output) / "summary.json", summary)
