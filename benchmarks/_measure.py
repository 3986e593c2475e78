"""What the benchmarks share: model sizes, timing in turns, peak memory, tables."""

import argparse
import contextlib
import csv
import gc
import json
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPTextConfig, ViTConfig

from datasets_scripts.command_line import count_cores
from datasets_scripts.storage.atomic import write_whole_file

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_parser(doc: str, example: str) -> argparse.ArgumentParser:
    """A parser described by the first line of a benchmark's docstring."""
    return argparse.ArgumentParser(
        description=doc.split("\n", 1)[0],
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_run_options(parser: argparse.ArgumentParser, interval: int, rounds: int) -> None:
    """Options of benchmarks that take short runs of a training."""
    add = parser.add_argument
    add("--config", default=ROOT / "training" / "configs" / "quickstart.yaml")
    add("--dataset", default="outputs/quickstart/dataset", help="made by `make quickstart`")
    add("--interval", type=int, default=interval, help="steps between log lines (default: %(default)s)")
    add("--rounds", type=int, default=rounds, help="short runs of each (default: %(default)s)")
    add(
        "--threads",
        type=int,
        default=count_cores(),
        help="threads of PyTorch (default: all, %(default)s here)",
    )


def model_sizes(small: bool, **token_ids: int) -> dict:
    """Config fields on top of a preset: the paper's size, or a `small` one to try a script."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    if not small:
        return {"text_config": CLIPTextConfig(projection_dim=512, **token_ids)}
    return {
        "text_config": CLIPTextConfig(projection_dim=32, **tower, **token_ids),
        "vision_config": ViTConfig(**tower, image_size=32, patch_size=16),
        "image_size": 32,
        "patch_size": 16,
        "history_length": 4,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "resampler_depth": 1,
        "action_hidden_size": 24,
        "action_encoder_depth": 1,
        "action_decoder_depth": 1,
    }


def start_afresh(device: torch.device) -> None:
    """Free models in reference cycles, cached memory and compiled variants (at most 8 per function)."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def catch_out_of_memory(call: Callable[[], object], device: torch.device) -> object | None:
    """Result of a call, or `None` if the GPU's memory ran out; then nothing that the call made is kept."""
    with contextlib.suppress(torch.OutOfMemoryError):
        return call()
    start_afresh(device)  # afterwards, as the exception holds tensors
    return None


def synchronize(device: torch.device) -> None:
    """Wait until a GPU is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns[T](names: Iterable[T], rounds: int) -> Iterator[tuple[int, T]]:
    """Number of the round and name: all in every round, in an order that is reversed every round.

    A busy machine, and whatever ran before, then disturb all alike.
    """
    for turn in range(rounds):
        for name in list(names)[:: 1 if turn % 2 == 0 else -1]:
            yield turn, name


def time_in_turns(
    calls: dict[str, Callable[[], object]], device: torch.device, warmup: int, repeats: int
) -> dict[str, list[float]]:
    """Milliseconds of `repeats` calls of each, by name, after `warmup` calls of each.

    They run in turns ([`take_turns`]). The device is synchronized before and after each.
    """
    for call in calls.values():
        for _ in range(warmup):
            call()
    durations: dict[str, list[float]] = {name: [] for name in calls}
    for _, name in take_turns(calls, repeats):
        synchronize(device)
        start = time.perf_counter()
        calls[name]()
        synchronize(device)
        durations[name].append((time.perf_counter() - start) * 1000)
    return durations


def memory_mb(call: Callable[[], object], device: torch.device, graphed: bool = False) -> dict[str, float]:
    """Memory in MB during a call that has run before, including everything resident; empty where unknown.

    Returns:
        `dict`: `peak_memory_mb`: peak allocated on a GPU, of the process (RSS) on Linux; not for a CUDA graph
        (`graphed`), whose memory PyTorch counts as free. `reserved_memory_mb`, on a GPU only: what PyTorch
        has reserved after the call, graphs included.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the cache of the setup is not needed to run
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        memory = {"reserved_memory_mb": round(torch.cuda.memory_reserved(device) / 2**20, 1)}
        if not graphed:
            memory["peak_memory_mb"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
        return memory
    reset = Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # forgets the peak so far
    except OSError:
        return {}
    call()
    return {"peak_memory_mb": peak_rss_mb()}


def peak_rss_mb() -> float:
    """Most memory that this process has had, in MB; `getrusage` counts that of its parent too. Linux only."""
    status = Path("/proc/self/status").read_text()
    return round(int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 1024, 1)


def spread(durations_ms: list[float]) -> dict[str, float]:
    """Median and 90th percentile."""
    median, p90 = np.percentile(durations_ms, [50, 90])
    return {"median_ms": round(float(median), 3), "p90_ms": round(float(p90), 3)}


def paired_ratio(slow: list[float], fast: list[float]) -> float:
    """Median of the ratios of successive calls."""
    return float(np.median(np.asarray(slow) / np.asarray(fast)))


def describe_machine(device: torch.device) -> str:
    """Name of the device and version of PyTorch."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*: (.+)", cpuinfo.read_text())):
        model = found.group(1)
    return f"{model}, {torch.get_num_threads()} of {count_cores()} threads, torch {torch.__version__}"


def list_columns(rows: list[dict]) -> list[str]:
    """Columns of all rows, in order of appearance."""
    return list(dict.fromkeys(column for row in rows for column in row))


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write rows as CSV."""
    columns = list_columns(rows)
    with write_whole_file(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def print_table(rows: list[dict]) -> None:
    """Print rows as an aligned table."""
    columns = list_columns(rows)
    text = [columns, *([("" if row.get(c) is None else str(row[c])) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in text) for i in range(len(columns))]
    for line in text:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


class Results:
    """Rows and ratios so far; the CSV is written after every setting, so that a crash keeps the others.

    Args:
        args (`argparse.Namespace`): The command line, with `device`, `warmup`, `repeats` and `output`.
        columns (`dict`): Columns of every row, in front of those of the machine.
    """

    def __init__(self, args: argparse.Namespace, columns: dict | None = None):
        self.args, self.device = args, torch.device(args.device)
        self.machine = {**(columns or {}), "machine": describe_machine(self.device)}
        self.machine |= {"warmup": args.warmup, "repeats": args.repeats}
        self.rows: list[dict] = []
        self.ratios: dict[str, float] = {}

    def keep(self, rows: Iterable[dict]) -> None:
        """Adds rows, and writes all of them."""
        self.rows.extend(rows)
        write_csv(self.args.output, [{**row, **self.machine} for row in self.rows])

    def report(self) -> None:
        """Prints a table and the ratios; the last line is one JSON object."""
        print_table(self.rows)
        for name, ratio in self.ratios.items():
            print(f"{name}: {ratio:.3f}")
        print(f"written: {self.args.output}")
        print(json.dumps({name: round(ratio, 4) for name, ratio in self.ratios.items()}))
