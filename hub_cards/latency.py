"""Measures the control step of a published folder on this machine: evaluation/latency.json.

A step is what a robot waits for: images are prepared, the new ones encoded, and the newest action is decoded
(`ForesightStream`). Further machines and devices add their rows; the same one replaces its own.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datasets_scripts.storage.atomic import write_json

__all__ = ["main", "measure_latency"]

PLACE = "evaluation/latency.json"
EXAMPLE = """examples:
  python hub_cards/latency.py outputs/quickstart/model
  python hub_cards/latency.py outputs/quickstart/model --device cuda --dtype bfloat16 --repeats 200"""
# Rows that agree in these are measurements of the same thing.
SAME = ("device", "hardware", "threads", "dtype", "camera_px")


def measure_latency(
    folder: str | Path,
    device: str = "cpu",
    threads: Sequence[int] = (),
    dtype: str = "float32",
    warmup: int = 10,
    repeats: int = 50,
    given: Sequence[str] | None = None,
) -> list[dict]:
    """Times the control step of one robot and adds the rows to `evaluation/latency.json`.

    Args:
        folder (`str` or `Path`): A model that acts, or an adapter on one.
        device (`str`): Where it runs.
        threads (`Sequence[int]`): Of PyTorch, a row each; by default 1, and as many as PyTorch chooses.
        dtype (`str`): `float32` or `bfloat16`.
        warmup, repeats (`int`): Steps before the measured ones, and measured steps.
        given (`Sequence[str]`, *optional*): The command's arguments, for the record.

    Returns:
        `list[dict]`: The new rows: `median_ms` and `p90_ms` of `count` steps, and what they were got with.

    Raises:
        ValueError: If the folder cannot be loaded, or its model does not act; says why.
    """
    import torch

    from hub_cards.cards.evidence import read_json
    from training.checkpoint_folder import load_checkpoint
    from training.run_facts import describe_run

    path = Path(folder) / PLACE
    if not Path(folder).is_dir():
        raise ValueError(
            f"{folder} is no folder: of a model on the Hub, `hf download ID --local-dir DIR` first"
        )
    known = read_json(path).get("measurements", []) if path.is_file() else []
    model, processor = load_checkpoint(folder, device)
    if not model.config.has("action"):
        raise ValueError(f"{folder} has no action head: it has no control step to measure")
    model = model.to(getattr(torch, dtype))
    arguments = [str(folder)] if given is None else list(given)
    before, rows = torch.get_num_threads(), []
    try:
        for count in threads or sorted({1, before}):
            torch.set_num_threads(count)
            run = describe_run("hub_cards/latency.py", arguments)
            hardware = run.pop("hardware")
            row = {
                "device": torch.device(device).type,
                "hardware": hardware["gpu"] if torch.device(device).type == "cuda" else hardware["cpu"],
                "cores": hardware["cores"],
                "threads": count,
                "dtype": dtype,
                "camera_px": processor.image_size,
                **_time_steps(model, processor, warmup, repeats),
                **run,
            }
            rows.append(row)
    finally:
        torch.set_num_threads(before)
    kept = [old for old in known if not any(_key(old) == _key(row) for row in rows)]
    path.parent.mkdir(exist_ok=True)
    write_json(path, {"version": 1, "measurements": kept + rows})
    return rows


def _key(row: dict) -> tuple:
    return tuple(row[name] for name in SAME)


def _time_steps(model, processor, warmup: int, repeats: int) -> dict:
    from modeling_foresight import ForesightStream

    config, random = model.config, np.random.default_rng(0)
    size = (processor.image_size,) * 2
    images = {view: random.integers(0, 256, (*size, 3), dtype=np.uint8) for view in config.views}
    state = np.zeros(config.state_dim, np.float32) if config.state_dim else None
    stream = ForesightStream(model, processor)
    stream.reset("measure")
    durations = []
    # The window fills during the first steps; a step of a full window is the usual one.
    for number in range(warmup + config.history_length + repeats):
        begun = time.perf_counter()
        stream.step(images, state)
        # The action is on the CPU by now, so a device has finished.
        if number >= warmup + config.history_length:
            durations.append(1000 * (time.perf_counter() - begun))
    median, p90 = np.percentile(durations, [50, 90])
    return {
        "median_ms": round(float(median), 3),
        "p90_ms": round(float(p90), 3),
        "count": repeats,
        "warmup": warmup + config.history_length,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="model or adapter that acts")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[], help="a row each (default: 1, and PyTorch's own choice)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--warmup", type=int, default=10, help="steps not measured (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=50, help="steps measured (default: %(default)s)")
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(given)
    try:
        for name in ("warmup", "repeats", "threads"):
            value = getattr(args, name)
            if np.less(value, 1).any():
                raise ValueError(f"--{name} is {value}; it must be at least 1")
        rows = measure_latency(
            args.folder, args.device, args.threads, args.dtype, args.warmup, args.repeats, given
        )
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for row in rows:
        print(
            f"{row['hardware']}, {row['threads']} threads, {row['dtype']}: {row['median_ms']:.1f} ms a "
            f"control step (90th percentile {row['p90_ms']:.1f}, {row['count']} steps)"
        )
    print(f"wrote {args.folder / PLACE}; hub_cards/build.py puts it into the card")
    return 0


if __name__ == "__main__":
    sys.exit(main())
