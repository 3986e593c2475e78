"""One training run, from its settings to the exported model; [`run_steps`] is the loop.

The batch of a step and its randomness are functions of (seed, step) alone, so an interrupted run resumes
exactly.
"""

import contextlib
import functools
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from datasets_scripts.storage.settings_changes import flatten
from modeling_foresight.step_seed import step_seed
from training.checkpoints import (
    FINISHED,
    check_run_folder,
    continued_settings,
    describe_run_folder,
    lock_run_folder,
    read_known_data,
    restore_checkpoint,
    save_checkpoint,
)
from training.config import RunConfig
from training.engines.checkpoint_form import check_form
from training.engines.clipping import clip_gradients
from training.engines.machines import find_writers, is_writer
from training.engines.reading import iterate, read_everywhere
from training.engines.sharding import local_part
from training.engines.stopping import StopRequest
from training.evaluation.open_loop import flow_errors, format_open_loop, measure_held_out, measure_losses
from training.models.model_folder import export_model, export_places
from training.models.own_exports import check_export
from training.models.starting_model import check_start, pin_base, starting_config
from training.monitoring.dataset_losses import DatasetLosses
from training.monitoring.dry_run import REHEARSED, rehearsal_config, rehearse
from training.monitoring.pictures import check_pictures, draw_predictions
from training.monitoring.run_log import RunLog
from training.run_data import RunData, evaluation_loader, open_datasets, training_loader
from training.run_state import (
    Run,
    build_accelerator,
    build_run,
    print_summary,
    resolve_epochs,
    write_summary,
)

__all__ = ["dry_run", "train"]


def train(config: RunConfig, resume: bool) -> int:
    """Runs one training from its settings to the exported model.

    Args:
        config (`RunConfig`): The run.
        resume (`bool`): Continue from the newest checkpoint in `config.output`, if there is one.

    Returns:
        `int`: Exit code: 0 when finished or out of time, 128 + signal when stopped by one.

    Raises:
        ValueError: If config, data and run folder do not fit together, or a loss is not finite.
    """
    started = time.monotonic()
    config = continued_settings(config) if resume else config
    accelerator = build_accelerator(config)
    check_settings(config, accelerator)
    # A run that began passed it. No process waits for others here: one machine may have lost its folder.
    if not (resume and (Path(config.output) / "config.yaml").is_file()):
        check_start(config)
    find_writers(accelerator, Path(config.output))
    with lock_run_folder(accelerator, Path(config.output)):
        # One process per machine downloads the data and fills the frame cache; the others then find it there.
        with accelerator.local_main_process_first():
            datasets = open_datasets(config, read_known_data(Path(config.output)) if resume else ())
        found = check_run_folder(config, datasets, resume)
        if found == FINISHED:
            accelerator.print(f"{config.output} holds this finished run; its model is in {config.export}")
            return 0
        if found:
            check_form(accelerator, found[0])
        check_export(Path(config.output), export_places(config))
        torch.manual_seed(config.seed)
        with accelerator.local_main_process_first():
            data = RunData(config, starting_config(config), datasets)
        run = build_run(accelerator, resolve_epochs(config, len(data.train)), data)
        if found:
            restore_checkpoint(accelerator, found[0])
            run.start = found[1]
        elif is_writer(accelerator):
            describe_run_folder(pin_base(config, run.policy.config), datasets)
        accelerator.wait_for_everyone()
        print_summary(run)
        log = RunLog(accelerator, Path(config.output), run.start, run.config.train.steps)
        limit = StopRequest(accelerator, config.train.max_hours, started)
        with contextlib.closing(log.bar), contextlib.closing(limit) as stop:
            if not run_steps(run, log, stop):
                return stop.exit_code
        check_export(Path(config.output), export_places(config))  # another run may have ended meanwhile
        with run.exported_weights():
            export_model(accelerator, run.model, run.processor, config, data.image_keys, run.base)
            write_summary(run, log.seconds, measure_final_model(run))
        accelerator.print(f"done: model in {config.export}, log and checkpoints in {config.output}")
        # Right after a gather, gloo's thread may still free tensors; ending the process then can hang.
        accelerator.wait_for_everyone()
        accelerator.end_training()
        return 0


def dry_run(config: RunConfig) -> int:
    """Takes a few steps of a run and prints what the whole will take; the run folder does not change.

    Returns:
        `int`: Exit code 0.

    Raises:
        ValueError: As [`train`].
    """
    with tempfile.TemporaryDirectory() as folder:
        config = rehearsal_config(config, Path(folder))
        accelerator = build_accelerator(config)
        check_settings(config, accelerator)
        check_start(config)
        torch.manual_seed(config.seed)
        with accelerator.local_main_process_first():
            data = RunData(config, starting_config(config))
        run = build_run(accelerator, resolve_epochs(config, len(data.train)), data)
        run.is_rehearsal = True
        print_summary(run)
        batches = iter(training_loader(config, data, run.sampler, accelerator.device))
        run.model.train()
        log = RunLog(accelerator, Path(folder), start=0, steps=REHEARSED)
        with contextlib.closing(log.bar):
            told = rehearse(run, batches, lambda step, raws: take_step(run, step, raws, log)[1])
    accelerator.print(told)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


def check_settings(config: RunConfig, accelerator: Accelerator) -> None:
    """Refuses, before data are read, what this installation or this number of processes cannot do.

    Raises:
        ValueError: Names the setting and the remedy.
    """
    check_pictures(config)
    size, parts, processes = (
        config.train.batch_size,
        config.train.gradient_accumulation_steps,
        accelerator.num_processes,
    )
    if size // parts % processes:
        raise ValueError(
            f"train.batch_size={size} cannot be cut into train.gradient_accumulation_steps={parts} equal "
            f"parts for each of {processes} processes: choose a multiple of {parts * processes}"
        )


def run_steps(run: Run, log: RunLog, stop: StopRequest) -> bool:
    """The optimization, up to the last step or a request to stop.

    Returns:
        `bool`: Whether to export and measure the model; false if the run was stopped.
    """
    config, options, accelerator = run.config, run.config.train, run.accelerator
    with log.paused():  # the start of its processes is no training
        batches = iterate(training_loader(config, run.data, run.sampler, accelerator.device))
    by_dataset = DatasetLosses(accelerator, run.policy.config, run.data.names, options.log_every)
    run.model.train()
    for step in range(run.start, options.steps):
        with log.reading():
            raws = read_step(run, batches, step)
        outputs, newest = take_step(run, step, raws, log)
        by_dataset.add(step, outputs, newest, raws[-1]["dataset"])
        log.bar.update()
        done, last = step + 1, step + 1 == options.steps
        if done % options.log_every == 0 or last:
            flow = () if outputs.flow is None else (outputs.flow.detach(), raws[-1], newest)
            errors = flow_errors(run.policy.config, *flow) if flow else {}
            errors |= by_dataset.pop()
            # The rate after the step, as LeRobot and the library's Trainer log it.
            log.write(done, lr=run.scheduler.get_last_lr()[0], windows=options.batch_size, **errors)
        with log.paused():
            look_at_validation(run, log, done)
            stopping = stop.is_agreed()
            due = options.checkpoint_every and done % options.checkpoint_every == 0
            if due or stopping or last:
                check_weights(run, done)
                save_checkpoint(accelerator, Path(config.output), done, options.keep_checkpoints)
        # After the last step too: exporting and measuring would take time that is over. A session that only
        # does these is not asked, so that they are done at last.
        if stopping:
            accelerator.print(stop.describe(done))
            return False
    return True


def take_step(run: Run, step: int, raws: Sequence[Mapping], log: RunLog) -> tuple:
    """One optimizer step on the micro-batches `raws`; the last one's outputs and what the model took."""
    options, accelerator, parts = run.config.train, run.accelerator, len(raws)
    # Dropout and draws are a function of (seed, step, process), whatever ran in between.
    seeds = [step_seed(run.config.seed, step * parts + i, accelerator.process_index) for i in range(parts)]
    micro_batches = [run.prepare_batch(raw, step * parts + i) for i, raw in enumerate(raws)]
    counts = count_targets(run, micro_batches)
    total = 0.0
    for seed, batch in zip(seeds, micro_batches, strict=True):
        torch.manual_seed(seed)
        with accelerator.accumulate(run.model), log.counting_flops(step):
            outputs = run.model(**batch, loss_counts=counts)
            accelerator.backward(outputs.loss)
            total = total + outputs.loss.detach()
            if accelerator.sync_gradients:
                # DeepSpeed has made its update already, unless the gradient was not finite.
                norm = clip_gradients(accelerator, run.trained, options.max_grad_norm)
                check_step(run, step, micro_batches, total, norm)
                log.add({"grad_norm": norm})
            run.optimizer.step()
            run.optimizer.zero_grad()
        log.add({"loss": outputs.loss.detach(), **(outputs.losses or {})})
    run.scheduler.step()
    if run.average:
        run.average.update()
    return outputs, batch


def look_at_validation(run: Run, log: RunLog, done: int) -> None:
    """Losses on validation windows and a picture of predictions, where they are due after step `done`."""
    options, val = run.config.train, run.data.val
    if not val or done == options.steps:
        return
    measures, draws = (every and done % every == 0 for every in (options.val_every, options.picture_every))
    if measures or draws:
        with run.exported_weights():
            if measures:
                log.write_validation(done, validate(run))
            if draws:
                path = Path(run.config.output) / "pictures" / f"step-{done:07d}.png"
                draw_predictions(run.accelerator, run.plain, run.processor, val, path)


def read_step(run: Run, batches: Iterator[dict], step: int) -> list[dict]:
    """The raw micro-batches of a step; see [`read_everywhere`]."""
    options, place = run.config.train, Path(run.config.output)
    save = functools.partial(save_checkpoint, run.accelerator, place, step, options.keep_checkpoints)
    parts = options.gradient_accumulation_steps
    return read_everywhere(run.accelerator, batches, parts, step, save if step > run.start else None)


def count_targets(run: Run, batches: Sequence[Mapping]) -> dict[str, Tensor]:
    """Elements that each loss of a step counts, over all parts and processes, per part and process.

    Divided by these, the averages of losses and gradients over parts and processes are those of one mean over
    the whole batch. A batch cut into halves with 1 and with 30 points would otherwise weigh each half alike.
    Empty for a batch in one piece: the model counts the same, and this takes 3 % of a step of the quickstart.
    """
    if len(batches) == run.accelerator.num_processes == 1:
        return {}
    counts: dict[str, Tensor] = {}
    for batch in batches:
        for name, count in run.policy.count_targets(batch).items():
            counts[name] = counts.get(name, 0) + count / len(batches)
    return run.accelerator.reduce(counts, "mean")


def validate(run: Run) -> dict[str, float]:
    """Losses on `val_windows` windows of the validation episodes; each process measures its share."""
    options = run.config.train
    subset = evaluation_loader(run.data.val, options.batch_size, options.val_windows)
    with run.accelerator.autocast():
        return measure_losses(run.plain, run.processor, subset)


def measure_final_model(run: Run) -> dict:
    """Errors on the validation episodes, in full float32 as the exported weights; `{}` without validation.

    Each process measures its share of the windows, so none waits longer than the process group allows.
    """
    if not run.data.val:
        return {}
    accelerator, options = run.accelerator, run.config.train
    accelerator.print("measuring the validation episodes, beside trivial predictors")
    accelerator.unwrap_model(run.plain, keep_fp32_wrapper=False)  # takes mixed precision from it for good
    windows = run.config.data.baseline_windows
    errors = measure_held_out(run.plain, run.processor, run.data, options.batch_size, windows)
    accelerator.print(format_open_loop(errors))
    bad = [name for name, x in flatten(errors).items() if isinstance(x, float) and not math.isfinite(x)]
    if bad:
        accelerator.print(f"warning: {bad[0]} is not finite, the model is useless: lower train.learning_rate")
    return errors


def check_step(run: Run, step: int, batches: Sequence[Mapping], loss: Tensor, norm: Tensor) -> None:
    """Stops all processes before an update with a loss or gradient that is not finite.

    The weights before the update are saved as a checkpoint if they are finite, unless this is a rehearsal.

    Raises:
        ValueError: In every process; names the windows at fault, and what to do.
    """
    if is_true_everywhere(run, torch.isfinite(loss) & torch.isfinite(norm)):
        return
    suspects = gather_object(find_broken_windows(run, step, batches))
    shown = "; ".join(suspects[:5]) or "none of its windows by itself"
    output, where = Path(run.config.output), "the dry run" if run.is_rehearsal else run.config.output
    if run.is_rehearsal:
        saved = "Nothing of a dry run is saved"
    elif has_finite_weights(run):
        run.optimizer.zero_grad()
        save_checkpoint(run.accelerator, output, step, run.config.train.keep_checkpoints)
        saved = f"The weights before the update are saved as the checkpoint of step {step}"
    else:
        saved = "The weights are not finite either, so nothing was saved after the last checkpoint"
    raise ValueError(
        f"the loss or its gradient is not finite at step {step + 1} of {where}, in {shown}. {saved}. Repair "
        "or leave out that data (NaN, infinite or huge values), or lower train.learning_rate, and start a "
        "run with another --output"
    )


def check_weights(run: Run, done: int) -> None:
    """Stops all processes before weights that are not finite are saved or exported.

    The loss and the gradient of a step can be finite and its update can still overflow.

    Raises:
        ValueError: In every process; says what is kept, and what to do.
    """
    if not has_finite_weights(run):
        raise ValueError(
            f"the weights are not finite after step {done} of {run.config.output}. They are not saved; "
            "earlier checkpoints are kept. Lower train.learning_rate, and start a run with another --output"
        )


def has_finite_weights(run: Run) -> bool:
    """Whether all weights and running statistics are finite, in every process."""
    state = run.model.state_dict(keep_vars=True)
    parts = [local_part(value) for value in state.values() if value.is_floating_point()]
    return is_true_everywhere(run, torch.stack([part.isfinite().all() for part in parts]).all())


def is_true_everywhere(run: Run, flag: Tensor) -> bool:
    """Whether a boolean `()` is true in all processes."""
    return bool(run.accelerator.gather(flag[None]).all())


@torch.no_grad()
def find_broken_windows(run: Run, step: int, batches: Sequence[Mapping]) -> list[str]:
    """Windows of this process whose loss is not finite by itself: dataset, episode and newest frame."""
    sampler, found = run.sampler, []
    run.plain.eval()  # training may leave out the image at fault
    for part, batch in enumerate(batches):
        for row, (index, _) in enumerate(sampler.batch_indices(step * len(batches) + part)):
            sample = {name: value[row : row + 1] for name, value in batch.items()}
            with run.accelerator.autocast():
                loss = run.plain(**sample).loss
            if loss is not None and not loss.isfinite():
                found.append(run.data.describe_window(index))
    return found
