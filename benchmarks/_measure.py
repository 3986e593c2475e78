"""What the benchmarks share: model sizes, timing in turns, peak memory, CSV files named by what matters."""

import csv
import gc
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPTextConfig, ViTConfig

from datasets_scripts.storage.atomic import write_whole_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def model_sizes(small: bool, **token_ids: int) -> dict:
    """Config fields on top of a preset: the paper's size, or one to try a script with, not for figures.

    Args:
        small (`bool`): The second of these.
        **token_ids (`int`): Special tokens of the text tower.
    """
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
    """Frees what earlier settings left: models in reference cycles, cached memory, compiled variants.

    A function has a limited number of compiled variants (8); without this, later settings would meet it.
    """
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def unless_out_of_memory(call: Callable[[], object], device: torch.device) -> object | None:
    """What a call gives, or `None` if the GPU's memory ran out; nothing that the call made is kept then."""
    try:
        return call()
    except torch.OutOfMemoryError:
        pass  # the exception holds the tensors of every frame it passed: they can be freed only after it
    start_afresh(device)
    return None


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


def memory_mb(call: Callable[[], object], device: torch.device, graphed: bool = False) -> dict[str, float]:
    """Memory of a call that has run before, in MB, with all else that is resident; empty where unknown.

    Args:
        call (`Callable`): What to call.
        device (`torch.device`): Where it computes.
        graphed (`bool`): Whether it replays a CUDA graph.

    Returns:
        `dict`: `peak_memory_mb`: peak allocated on a GPU, of the process (RSS) on Linux. A graph's own memory
        counts as free between replays, so that the peak would be too low: none if `graphed`.
        `reserved_memory_mb`, on a GPU only: what PyTorch has taken from the device after the call, graphs
        included; for a graph this is the figure that holds.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what setting up left in the cache is not needed to run
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronise(device)
        memory = {"reserved_memory_mb": round(torch.cuda.memory_reserved(device) / 2**20, 1)}
        if not graphed:
            memory["peak_memory_mb"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
        return memory
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # forgets the peak so far
    except OSError:
        return {}
    call()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text()).group(1)) / 1024
    return {"peak_memory_mb": round(peak, 1)}


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


def columns_of(rows: list[dict]) -> list[str]:
    """Columns of all rows, in order of appearance."""
    return list(dict.fromkeys(column for row in rows for column in row))


def write_csv(path: Path, rows: list[dict]) -> None:
    """Writes rows as CSV, in place of an older file; columns are as in [`columns_of`]."""
    columns = columns_of(rows)
    with write_whole_file(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def print_table(rows: list[dict]) -> None:
    """Prints rows as an aligned table."""
    columns = columns_of(rows)
    text = [columns, *([("" if row.get(c) is None else str(row[c])) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in text) for i in range(len(columns))]
    for line in text:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
