"""Memory of the loader's workers over many windows of many files: does anything grow?

Windows are read on demand from a synthetic dataset of as many video files per camera as `--files`, in random
order, as `train.py` reads them: spawned workers that keep a few decoders open. After a warm-up the memory of
all workers together is read 20 times. It is the part that belongs to the processes alone: pages of
mapped files are shared, and the system may drop them. The last line is one JSON object.
"""

import argparse
import json
import multiprocessing
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from _measure import build_parser
from _synthetic import make_dataset

from datasets_scripts.command_line import entry_point
from training.config import RunConfig
from training.run_data import training_loader
from training.windows import ConcatWindows, ForesightWindows, WindowConfig, WindowSampler

BATCH, READINGS = 10, 20  # windows; of the memory

EXAMPLE = """example:
  python benchmarks/worker_memory.py
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = build_parser(__doc__, EXAMPLE)
    parser.add_argument("--windows", type=int, default=10_000, help="after the warm-up")
    parser.add_argument("--warmup", type=int, default=2000, help="windows before memory is compared")
    parser.add_argument("--files", type=int, default=200, help="video files per camera, RGB and depth each")
    parser.add_argument("--workers", type=int, default=4)
    return parser.parse_args(arguments)


def own_mb() -> float:
    """Memory of all child processes that does not belong to files."""
    total = 0
    for process in multiprocessing.active_children():
        text = Path(f"/proc/{process.pid}/status").read_text()
        total += int(re.search(r"RssAnon:\s+(\d+) kB", text).group(1))
    return total / 1e3


def open_files() -> int:
    """Files that the child processes have open."""
    return sum(len(list(Path(f"/proc/{p.pid}/fd").iterdir())) for p in multiprocessing.active_children())


def run(args: argparse.Namespace, folder: Path) -> dict:
    """Read the windows; returns the memory by the number of windows read after the warm-up."""
    make_dataset(folder / "dataset", 100 * args.files, 2 * args.files, args.files, n_points=400)
    config = WindowConfig(history_length=2, lookahead=True, random_shift=0.05, frame_cache="off")
    windows = ConcatWindows([ForesightWindows(folder / "dataset", config)])
    steps = (args.warmup + args.windows) // BATCH
    sampler = WindowSampler(len(windows), BATCH, steps=steps)
    run_config = RunConfig()
    run_config.data.num_workers = args.workers
    data = argparse.Namespace(train=windows, stream=None)
    memory, files = {}, {}
    every = max(args.windows // READINGS // BATCH, 1) * BATCH
    for step, _ in enumerate(training_loader(run_config, data, sampler, torch.device("cpu")), 1):
        after = step * BATCH - args.warmup
        if after >= 0 and after % every == 0:
            memory[after], files[after] = round(own_mb(), 1), open_files()
    values = list(memory.values())
    share = max(1, len(values) // 5)  # the allocator's ups and downs
    before, later = np.median(values[:share]), np.median(values[-share:])
    return {
        "benchmark": "worker_memory",
        "workers": args.workers,
        "files": 4 * args.files,
        "memory_mb": memory,
        "open_files": [min(files.values()), max(files.values())],
        "growth": round(float(later / before - 1), 4),
    }


@entry_point()
def main() -> int:
    """Command line entry: one line for people, then one JSON line."""
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        figures = run(args, Path(folder))
    first, *_, last = figures["memory_mb"].values()
    print(f"{first} MB after the warm-up, {last} MB at the end: {figures['growth']:+.1%}")
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
