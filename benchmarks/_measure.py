"""What the benchmarks share: timing in turns, peak memory, CSV files named by what matters."""

import csv
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def synchronise(device: torch.device) -> None:
    """Waits until the device has done all it was asked to; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_in_turns(
    ways: dict[str, Callable[[], object]], device: torch.device, warmup: int, repeats: int
) -> dict[str, list[float]]:
    """Milliseconds of every call of every way.

    After `warmup` calls of each, they are called in turns, in an order that is reversed every round, so that
    a busy machine and the call before disturb all alike. The device is synchronised before and after each.

    Args:
        ways (`dict[str, Callable]`): What to call, by name.
        device (`torch.device`): Where they compute.
        warmup (`int`): Calls of each that are not counted.
        repeats (`int`): Calls of each that are.
    """
    for call in ways.values():
        for _ in range(warmup):
            call()
    durations: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats):
        for name, call in list(ways.items())[:: 1 if turn % 2 == 0 else -1]:
            synchronise(device)
            start = time.perf_counter()
            call()
            synchronise(device)
            durations[name].append((time.perf_counter() - start) * 1000)
    return durations


def peak_memory_mb(call: Callable[[], object], device: torch.device) -> float | None:
    """Peak memory during a call in MB: allocated on a GPU, resident of the process on Linux, else `None`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # forgets the peak so far
    except OSError:
        return None
    call()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text()).group(1)) / 1024


def spread(durations_ms: list[float]) -> dict[str, float]:
    """Median and 90th percentile."""
    median, p90 = np.percentile(durations_ms, [50, 90])
    return {"median_ms": round(float(median), 3), "p90_ms": round(float(p90), 3)}


def paired_ratio(slow: list[float], fast: list[float]) -> float:
    """Median of the ratios of calls that followed each other."""
    return float(np.median(np.asarray(slow) / np.asarray(fast)))


def describe_machine(device: torch.device) -> str:
    """The device in words, for tables."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*: (.+)", cpuinfo.read_text())):
        model = found.group(1)
    return f"{model}, {torch.get_num_threads()} of {os.cpu_count()} threads, torch {torch.__version__}"


def write_csv(path: Path, rows: list[dict]) -> None:
    """Writes rows as CSV; columns are those of all rows, in order of appearance."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)
    print(f"written: {path}")


def print_table(rows: list[dict], columns: list[str]) -> None:
    """Prints rows as an aligned table."""
    text = [columns, *([("" if row.get(c) is None else str(row[c])) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in text) for i in range(len(columns))]
    for line in text:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
