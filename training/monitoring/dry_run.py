"""A rehearsal of a run: a few steps of which nothing is kept, then what the whole run will take."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator

from training.config import RunConfig
from training.engines.sharding import local_part
from training.run_state import Run

__all__ = ["REHEARSED", "rehearsal_config", "rehearse"]

REHEARSED = 3  # the first one is slower: kernels are chosen, memory is reserved


def rehearsal_config(config: RunConfig, folder: Path) -> RunConfig:
    """The same training in a temporary `folder`: nothing below knows the run's own folders.

    It has no frame cache and no tracker, which would keep something of it.
    """
    data = dataclasses.replace(config.data, frame_cache="off", num_workers=0)
    train = dataclasses.replace(config.train, tracker=None)
    places = {"output": str(folder / "run"), "export": str(folder / "model")}
    return dataclasses.replace(config, data=data, train=train, **places)


def rehearse(run: Run, batches: Iterator[Mapping], take_step: Callable) -> str:
    """Takes [`REHEARSED`] steps, or all of a shorter run, and tells shapes, memory and time.

    All processes call it.

    Args:
        run (`Run`): As it would train.
        batches (`Iterator`): Its micro-batches.
        take_step (`Callable`): Takes step number `n` on a list of micro-batches; gives the last one as the
            model took it.
    """
    options, seconds, waits = run.config.train, [], []
    for step in range(min(REHEARSED, options.steps)):
        start = time.perf_counter()
        raws = [next(batches) for _ in range(options.gradient_accumulation_steps)]
        waits.append(time.perf_counter() - start)
        batch = take_step(step, raws)
        synchronize(run.accelerator)
        seconds.append(time.perf_counter() - start - waits[-1])
    step, wait = min(seconds[1:] or seconds), min(waits[1:] or waits)
    lines = [f"a micro-batch of this process, {len(raws)} a step:"]
    for name, value in batch.items():
        lines.append(f"  {name:22} {str(value.dtype).removeprefix('torch.'):8} {tuple(value.shape)}")
    lines += [
        describe_memory(run),
        f"a step takes {step:.3g} s (the first {seconds[0]:.3g} s): {options.batch_size / step:.3g} windows "
        f"a second. One process reads its batch in {wait:.3g} s without the frame cache",
        f"{options.steps} steps take about {format_hours(step * options.steps)} if reading keeps up, and "
        "validation, checkpoints and the final measurement come on top",
        "no run was kept: train without --dry-run",
    ]
    return "\n".join(lines)


def synchronize(accelerator: Accelerator) -> None:
    """Waits for what a GPU still computes."""
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize(accelerator.device)


def describe_memory(run: Run) -> str:
    """Weights, gradients and optimizer state of this process, and the peak of what it took in all."""
    parameters = [local_part(p) for p in run.model.parameters()]
    weights = sum(p.numel() * p.element_size() for p in parameters)
    trained = sum(local_part(p).numel() * p.element_size() for p in run.trained)
    device = run.accelerator.device
    if device.type == "cuda":
        peak, total = torch.cuda.max_memory_allocated(device), torch.cuda.mem_get_info(device)[1]
        place = torch.cuda.get_device_name(device)
    else:
        peak, total, place = psutil.Process().memory_info().rss, psutil.virtual_memory().total, "this machine"
    held = {"weights": weights, "gradients": trained, "AdamW": 2 * trained}
    told = ", ".join(f"{name} {size / 1e9:.3g} GB" for name, size in held.items())
    return f"memory: {told}; the peak was {peak / 1e9:.3g} of {total / 1e9:.3g} GB of {place}"


def format_hours(seconds: float) -> str:
    """`5025` -> `1 h 24 min`."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{max(minutes, 1)} min"
