"""The log of a run: a progress bar, one JSON line per interval, and Accelerate's trackers.

Of a mixture a line has the losses of each dataset too, `action/NAME`.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from datasets_scripts.storage.atomic import write_whole_file
from modeling_foresight import ForesightConfig
from modeling_foresight.heads import heads_of
from modeling_foresight.inputs import real_frames
from modeling_foresight.losses import LossSum

__all__ = ["DatasetLosses", "RunLog"]


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

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Adds one micro-batch's values to the running means."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def write(self, step: int, lr: float, windows: int, **extra: float) -> None:
        """Writes the means since the last line; `data_s`, `step_s` and `cpu_s` are seconds per step.

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
        line["seconds"] = self.seconds
        self._append(line)
        self.bar.set_postfix(
            {
                name: f"{value:.3g}"
                for name, value in {**means, **extra}.items()
                if name != "grad_norm" and "/" not in name
            }
        )
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


class DatasetLosses:
    """The losses of each dataset of a mixture: masked means over the samples of all processes.

    Ten steps of an interval of the log count, because the losses are computed again for every dataset.

    Args:
        accelerator (`Accelerator`): Adds up what the processes have seen.
        config (`ForesightConfig`): The model's.
        names (`Sequence[str]`): Of the datasets, in the order of the mixture; a single one has no lines.
        log_every (`int`): Steps of an interval.
    """

    def __init__(
        self, accelerator: Accelerator, config: ForesightConfig, names: Sequence[str], log_every: int
    ):
        self.accelerator, self.config, self.every = accelerator, config, max(1, log_every // 10)
        self.names = list(names) if len(names) > 1 else []
        self.losses = [name for head in heads_of(config) for name in head.losses]
        # Total and count of each loss; a loss that is a mean per view has one of them for each.
        shape = len(self.names), len(self.losses), 2, len(config.views)
        self.sums = torch.zeros(shape, device=accelerator.device)

    @torch.no_grad()
    def add(self, step: int, outputs: Mapping, batch: Mapping, datasets: Tensor) -> None:
        """Adds the losses of a batch, whose samples are of `datasets` `(B,)`, int64 on the CPU."""
        if (step + 1) % self.every:
            return
        for number in range(len(self.names)):
            rows = datasets == number
            if not rows.any():
                continue
            here = rows.to(self.sums.device)[:, None]
            part = {**batch, "frame_mask": real_frames(batch) & here}
            predicted = dict(outputs.items())
            for name in ("style_mean", "style_log_var"):  # of which padded frames count too
                if name in predicted:
                    predicted[name] = predicted[name][here[:, 0]]
            for head in heads_of(self.config):
                for name, loss in head.loss(self.config, predicted, part).items():
                    pair = torch.stack([loss.total.view(-1), loss.count.view(-1)])
                    self.sums[number, self.losses.index(name), :, : pair.shape[1]] += pair

    def pop(self) -> dict[str, float]:
        """The means since the last call, as `loss/dataset`; all processes call it."""
        if not self.names:
            return {}
        sums = self.accelerator.reduce(self.sums, "sum").cpu()
        self.sums = torch.zeros_like(self.sums)
        return {
            f"{loss}/{dataset}": LossSum(*pair).mean().item()
            for dataset, pairs in zip(self.names, sums, strict=True)
            for loss, pair in zip(self.losses, pairs, strict=True)
            if pair[1].any()
        }
