"""Measure a control step: images are prepared, new ones encoded, and the newest action is decoded.

The file has a row per machine and setting; measuring again replaces the row.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from datasets_scripts.storage.atomic import read_json, write_json
from modeling_foresight import ForesightForActionPrediction, ForesightProcessor
from training.models.model_folder import load_checkpoint
from training.run_record import describe_run

__all__ = ["LATENCY", "measure_latency"]

LATENCY = "evaluation/latency.json"
CONDITIONS = ("device", "hardware", "threads", "dtype", "camera_px")  # of one row


def measure_latency(
    folder: str | Path,
    device: str = "cpu",
    threads: Sequence[int] = (),
    dtype: str = "float32",
    warmup: int = 10,
    repeats: int = 50,
    arguments: Sequence[str] | None = None,
) -> list[dict]:
    """Time the control step of one robot and add the rows to `evaluation/latency.json`.

    Args:
        folder (`str` or `Path`): A model that acts, or an adapter on one.
        device (`str`): Device of the model.
        threads (`Sequence[int]`): Threads of PyTorch, a row each; by default 1, and what PyTorch chooses.
        dtype (`str`): `float32` or `bfloat16`.
        warmup, repeats (`int`): Steps before the measured ones, and measured steps.
        arguments (`Sequence[str]`, *optional*): The command's arguments, for the record.

    Returns:
        `list[dict]`: The new rows: `median_ms` and `p90_ms` of `count` steps, and their conditions.

    Raises:
        ValueError: If an argument is below 1, the folder cannot be loaded, or its model does not act.
    """
    for name, values in {"warmup": [warmup], "repeats": [repeats], "threads": threads}.items():
        if any(value < 1 for value in values):
            raise ValueError(f"--{name} is {min(values)}; it must be at least 1")
    path = Path(folder) / LATENCY
    if not Path(folder).is_dir():
        raise ValueError(
            f"{folder} is not a folder: for a model on the Hub, run `hf download ID --local-dir DIR` first"
        )
    known = read_json(path).get("measurements", []) if path.is_file() else []
    model, processor = load_checkpoint(folder, device)
    if not model.config.has("action"):
        raise ValueError(f"{folder} has no action head, so it has no control step to measure")
    model = model.to(getattr(torch, dtype))
    before, rows = torch.get_num_threads(), []
    try:
        for count in threads or sorted({1, before}):
            torch.set_num_threads(count)
            run = describe_run("hub_cards/measure_latency.py", list(arguments or [str(folder)]))
            hardware, kind = run.pop("hardware"), torch.device(device).type
            row = {
                "device": kind,
                "hardware": hardware["gpu" if kind == "cuda" else "cpu"],
                "cores": hardware["cores"],
                "threads": count,
                "dtype": dtype,
                "camera_px": processor.image_size,
            }
            rows.append(row | _time_steps(model, processor, warmup, repeats) | run)
    finally:
        torch.set_num_threads(before)
    by_conditions = {tuple(row[name] for name in CONDITIONS): row for row in known + rows}
    write_json(path, {"version": 1, "measurements": list(by_conditions.values())})
    return rows


def _time_steps(
    model: ForesightForActionPrediction, processor: ForesightProcessor, warmup: int, repeats: int
) -> dict:
    config, random = model.config, np.random.default_rng(0)
    shape = (processor.image_size, processor.image_size, 3)
    images = {view: random.integers(0, 256, shape, dtype=np.uint8) for view in config.views}
    stream = model.stream(processor, embodiment=min(processor.embodiments or (), default=None))
    state = np.zeros(stream.state_dim, np.float32) if stream.state_dim else None
    stream.reset("measure")
    durations_ms, skipped = [], warmup + config.history_length  # the usual step has a full window
    for _ in range(skipped + repeats):
        begun = time.perf_counter()
        stream.step(images, state)  # returns the action on the CPU, so a device has finished
        durations_ms.append(1000 * (time.perf_counter() - begun))
    median, p90 = np.percentile(durations_ms[skipped:], [50, 90])
    return {
        "median_ms": round(float(median), 3),
        "p90_ms": round(float(p90), 3),
        "count": repeats,
        "warmup": skipped,
    }
