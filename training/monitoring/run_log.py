"""The log of a run: a progress bar, one JSON line per interval, and Accelerate's trackers."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from datasets_scripts.storage.atomic import write_whole_file
from training.monitoring.throughput import FlopMeter

__all__ = ["RunLog"]


class RunLog:
    """Progress bar, `metrics.jsonl` and Accelerate's trackers; values wait on the device until written.

    Args:
        accelerator (`Accelerator`): Only its main process writes.
        output (`Path`): Run folder.
        start, steps (`int`): First step of this session, and the last step. Log lines of steps after `start`
            are from a lost session and removed.
    """

    def __init__(self, accelerator: Accelerator, output: Path, start: int, steps: int):
        self.accelerator, self.path = accelerator, output / "metrics.jsonl"
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}
        self.data_s = 0.0
        self.since, self.since_step, self.seconds = time.perf_counter(), start, 0.0
        self.cpu_since = time.process_time()
        self.meter, self.start = FlopMeter(accelerator.device), start
        if accelerator.is_main_process:
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            kept = [line for line in lines if _read_step(line) <= start]
            with write_whole_file(self.path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept))
            training = [json.loads(line) for line in kept if "step_s" in line]
            self.seconds = training[-1]["seconds"] if training else 0.0
        self.bar = tqdm(
            total=steps, initial=start, desc="training", unit="step", disable=not accelerator.is_main_process
        )

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """What happens inside counts as waiting for data."""
        start = time.perf_counter()
        yield
        self.data_s += time.perf_counter() - start

    def counting_flops(self, step: int) -> contextlib.AbstractContextManager:
        """Counts what a GPU computes inside, once: in the first step of this session."""
        counts = self.accelerator.device.type == "cuda" and step == self.start
        return self.meter.counting() if counts else contextlib.nullcontext()

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Adds one micro-batch's values to the running means."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def write(self, step: int, lr: float, windows: int, **extra: float) -> None:
        """Writes the means since the last line; `data_s`, `step_s` and `cpu_s` are seconds per step.

        On a GPU there are `tflops` and, for those we know, `mfu` too ([`FlopMeter`]).

        `cpu_s` is the processor time of this process, all its threads together: the time that it waits for
        other processes of a busy machine does not count.
        """
        means = self._means()
        now, steps = time.perf_counter(), step - self.since_step
        elapsed = now - self.since
        self.seconds += elapsed
        line = {"step": step, **means, **extra, "lr": lr}
        line["data_s"] = self.data_s / steps
        line["step_s"] = elapsed / steps - line["data_s"]
        line["cpu_s"] = (time.process_time() - self.cpu_since) / steps
        line["samples_per_s"] = windows * steps / elapsed
        line |= self.meter.speed(elapsed / steps)
        line["seconds"] = self.seconds
        self._append(line)
        # The bar has no room for the losses of each dataset, `action/NAME`.
        shown = {name: value for name, value in {**means, **extra}.items() if "/" not in name}
        self.bar.set_postfix({name: f"{x:.3g}" for name, x in shown.items() if name != "grad_norm"})
        self.sums, self.counts, self.data_s = {}, {}, 0.0
        self.since, self.cpu_since, self.since_step = time.perf_counter(), time.process_time(), step

    def _means(self) -> dict[str, float]:
        """Means over the interval and over all processes, brought from the device in one go."""
        if not self.sums:
            return {}
        values = [torch.as_tensor(total).float() / self.counts[name] for name, total in self.sums.items()]
        values = self.accelerator.reduce(torch.stack(values).to(self.accelerator.device), "mean")
        return dict(zip(self.sums, values.tolist(), strict=True))

    def write_validation(self, step: int, losses: dict[str, float]) -> None:
        """Writes validation losses."""
        self._append({"step": step, **{f"val_{name}": value for name, value in losses.items()}})

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside (validation, checkpoints) does not count as training time."""
        start, cpu_start = time.perf_counter(), time.process_time()
        yield
        self.since += time.perf_counter() - start
        self.cpu_since += time.process_time() - cpu_start

    def _append(self, line: dict) -> None:
        if self.accelerator.is_main_process:
            try:
                with self.path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                raise OSError(
                    f"the log {self.path} cannot be written: {error}. Free space and continue with --resume"
                ) from error
        self.accelerator.log(
            {name: value for name, value in line.items() if name != "step"}, step=line["step"]
        )


def _read_step(line: str) -> float:
    """Step of a log line; infinite for one that a full disk or a power cut left half-written."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf
