"""CPU time and memory to open a dataset of a million frames, ours beside the stock `LeRobotDataset`.

Ours opens everything before the first training window can be read: `DatasetRows` and `ForesightWindows`, with
statistics, moving flags and a look into every video file. The stock reader opens `LeRobotDataset` with
`delta_timestamps`, which checks less. Then each reads one item. Every start is a fresh process on the same
state, in turns:

- *cold*: no cache of ours or of the `datasets` library, and the files are dropped from the page cache;
- *warm*: everything as the previous start left it.

CPU seconds include threads and exclude imports. Memory is the peak above that after imports, and the part of
it that belongs to the process alone (pages of mapped files are shared, and the system may drop them). The
dataset is synthetic: constant small pictures, hard-linked video files, real tables. The last line is one JSON
object.
"""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from _measure import build_parser, print_table, take_turns
from _synthetic import CAMERAS, FPS, NUMBERS, make_dataset

from datasets_scripts.columns import depth_key, image_key, points_key
from datasets_scripts.command_line import entry_point
from datasets_scripts.storage.atomic import read_json
from datasets_scripts.storage.dataset_folder import INFO_PATH

SAMPLE_S = 0.005  # between two looks at the memory

EXAMPLE = """example:
  python benchmarks/startup.py
  python benchmarks/startup.py --frames 100000 --episodes 500 --rounds 3
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = build_parser(__doc__, EXAMPLE)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--episodes", type=int, default=5000, help="episodes, of equal length")
    parser.add_argument("--video-files", type=int, default=100, help="per camera, RGB and depth each")
    parser.add_argument("--points", type=int, default=400, help="tracked points per frame")
    parser.add_argument("--rounds", type=int, default=1, help="cold and warm starts of each reader")
    parser.add_argument("--dataset", type=Path, help="folder for the synthetic dataset (default: temporary)")
    parser.add_argument("--measure", choices=READERS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def open_ours(root: Path) -> object:
    """Everything before the first window can be read."""
    from training.windows import ForesightWindows, WindowConfig

    config = WindowConfig(history_length=2, lookahead=True, random_shift=0.05, frame_cache="off")
    return ForesightWindows(root, config)


def open_stock(root: Path) -> object:
    """The stock reader, asked for what a window holds."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    frames = [step / FPS for step in (-1, 0, 1, 2, 3)]
    deltas = {key(camera): frames for camera in CAMERAS for key in (image_key, depth_key)}
    deltas |= dict.fromkeys(NUMBERS, frames) | {points_key(CAMERAS[0]): frames}
    return LeRobotDataset("local/startup", root=root, delta_timestamps=deltas, depth_output_unit="m")


READERS = {"ours": open_ours, "stock": open_stock}


def memory_mb() -> tuple[float, float]:
    """Resident memory of this process, and the part that is not of files."""
    text = Path("/proc/self/status").read_text()
    return tuple(int(re.search(rf"{name}:\s+(\d+) kB", text).group(1)) / 1e3 for name in ("VmRSS", "RssAnon"))


def cpu_s() -> float:
    """CPU seconds of this process and of its children."""
    parts = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in parts)


def measure_start(reader: str, root: Path) -> dict[str, float]:
    """Figures of one start, in a process that does nothing else."""
    import training.windows  # noqa: F401 - the imports of both readers are not measured

    stop, seen = threading.Event(), [memory_mb()]

    def watch() -> None:
        while not stop.wait(SAMPLE_S):
            seen.append(memory_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter(), cpu_s()
    opened = READERS[reader](root)
    figures = {"wall_s": time.perf_counter() - start[0], "cpu_s": cpu_s() - start[1]}
    item_start = time.perf_counter()
    opened[0]
    figures["first_item_ms"] = 1e3 * (time.perf_counter() - item_start)
    stop.set()
    watcher.join()
    seen.append(memory_mb())
    peak, peak_own = np.max(seen, axis=0) - seen[0]
    return {**figures, "peak_mb": float(peak), "own_mb": float(peak_own)}


def drop_pages(root: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in root.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def start_process(reader: str, root: Path, cache: Path) -> dict[str, float]:
    """Figures of `measure_start` in a fresh process."""
    command = [sys.executable, __file__, "--measure", reader, "--dataset", str(root)]
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache), "FORESIGHT_CACHE": str(cache)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{reader} could not open {root}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(args: argparse.Namespace, scratch: Path) -> dict:
    """Make the dataset if necessary, start the readers in turns, return the medians."""
    root = args.dataset or scratch / "dataset"
    if not (root / INFO_PATH).exists():
        make_dataset(root, args.frames, args.episodes, args.video_files, args.points)
    found: dict[tuple[str, str], list[dict]] = {}
    for turn, reader in take_turns(READERS, args.rounds):
        cache = scratch / f"{reader}-{turn}"
        for state in ("cold", "warm"):
            if state == "cold":
                drop_pages(root)
            found.setdefault((state, reader), []).append(start_process(reader, root, cache))
        shutil.rmtree(cache)
    rows = []
    for (state, reader), figures in found.items():
        medians = {name: float(np.median([each[name] for each in figures])) for name in figures[0]}
        rows.append({"state": state, "reader": reader, **{k: round(v, 2) for k, v in medians.items()}})
    info = read_json(root / INFO_PATH)
    counts = {name: info[f"total_{name}"] for name in ("frames", "episodes")}
    return {"benchmark": "startup", **counts, "starts": rows, "ratios": compare(rows)}


def compare(rows: list[dict]) -> dict[str, float]:
    """Stock over ours: CPU time and peak memory, by state."""
    found = {(row["state"], row["reader"]): row for row in rows}
    return {
        f"{state}_{name}": round(found[state, "stock"][name] / found[state, "ours"][name], 2)
        for state in ("cold", "warm")
        for name in ("cpu_s", "peak_mb")
    }


@entry_point()
def main() -> int:
    """Command line entry: a table for people, then one JSON line."""
    args = parse_arguments()
    if args.measure:
        print(json.dumps(measure_start(args.measure, args.dataset)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        figures = run(args, Path(scratch))
    print_table(figures["starts"])
    for name, ratio in figures["ratios"].items():
        print(f"{name}: the stock reader takes {ratio:.2f} times as much")
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
