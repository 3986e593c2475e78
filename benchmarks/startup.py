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
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from _measure import build_parser, print_table

from datasets_scripts.columns import depth_key, image_key, points_features, points_key, points_visible_key
from datasets_scripts.storage.atomic import read_json, share_file, write_json, write_whole_folder
from datasets_scripts.storage.dataset_folder import INFO_PATH
from datasets_scripts.storage.provenance import encode_flags, write_provenance
from datasets_scripts.storage.video_writing import (
    encode_depth,
    encode_rgb,
    lerobot_depth_encoder,
    lerobot_rgb_encoder,
)

CAMERAS = ("main", "wrist")
SIZE_PX, FPS, DEPTH_MAX_M = 32, 20, 4.0
NUMBERS = {"action": 7, "observation.state": 8}
DATA_FILES = 20
SAMPLE_S = 0.005  # between two looks at the memory

EXAMPLE = """example:
  python benchmarks/startup.py
  python benchmarks/startup.py --frames 100000 --episodes 500 --rounds 3
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = build_parser(__doc__, EXAMPLE)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--episodes", type=int, default=5000, help="of equal length")
    parser.add_argument("--video-files", type=int, default=100, help="per camera, RGB and depth each")
    parser.add_argument("--points", type=int, default=400, help="tracked points per frame")
    parser.add_argument("--rounds", type=int, default=1, help="cold and warm starts of each reader")
    parser.add_argument("--dataset", type=Path, help="folder for the synthetic dataset (default: temporary)")
    parser.add_argument("--measure", choices=READERS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def make_dataset(root: Path, frames: int, episodes: int, video_files: int, n_points: int) -> None:
    """Write the synthetic dataset: LeRobot records one episode, whose rows and files are then multiplied."""
    with write_whole_folder(root, replace=True) as folder:
        length = frames // episodes
        template = _record_template(folder / "template")
        info = read_json(template / INFO_PATH)
        info |= {"total_frames": length * episodes, "total_episodes": episodes}
        info["splits"] = {"train": f"0:{episodes}"}
        info["features"] |= points_features(CAMERAS[0], n_points, SIZE_PX, SIZE_PX)
        per_file = -(-episodes // video_files)
        _write_episodes(folder, template, length, episodes, per_file)
        _write_videos(folder, info, length * per_file, -(-episodes // per_file))
        _write_data(folder, length, episodes, n_points)
        for name in ("tasks.parquet", "stats.json"):
            os.replace(template / "meta" / name, folder / "meta" / name)
        write_json(folder / INFO_PATH, info)
        facts = {"n_points": n_points, "n_moving": 9, "moving": encode_flags(np.arange(n_points) % 7 == 0)}
        figures = dict.fromkeys(("flicker_m", "off_depth", "speed_m_s", "visible", "valid_depth"), 0.125)
        known = {str(e): {CAMERAS[0]: facts | figures, "flags": []} for e in range(episodes)}
        write_provenance(folder, {"cameras": {CAMERAS[0]: {"tracks": {"source": "none"}}}, "episodes": known})
        subprocess.run(["rm", "-r", template], check=True)


def _record_template(root: Path) -> Path:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    axes = ["height", "width", "channels"]
    features = {key: {"dtype": "float32", "shape": (size,), "names": None} for key, size in NUMBERS.items()}
    for camera in CAMERAS:
        shape = (SIZE_PX, SIZE_PX)
        features[image_key(camera)] = {"dtype": "video", "shape": (*shape, 3), "names": axes}
        depth = {"dtype": "video", "shape": (*shape, 1), "names": axes, "info": {"is_depth_map": True}}
        features[depth_key(camera)] = depth
    encoders = {"rgb_encoder": lerobot_rgb_encoder(), "depth_encoder": lerobot_depth_encoder(DEPTH_MAX_M)}
    dataset = LeRobotDataset.create("local/startup", FPS, features, root=root, **encoders)
    frame = {key: np.zeros(size, np.float32) for key, size in NUMBERS.items()}
    for camera in CAMERAS:
        frame[image_key(camera)] = np.full((SIZE_PX, SIZE_PX, 3), 90, np.uint8)
        frame[depth_key(camera)] = np.full((SIZE_PX, SIZE_PX, 1), 1.0, np.float32)
    for _ in range(4):
        dataset.add_frame(frame | {"task": "do nothing"})
    dataset.save_episode()
    dataset.finalize()
    return root


def _write_episodes(folder: Path, template: Path, length: int, episodes: int, per_file: int) -> None:
    """`meta/episodes` with all statistics, as LeRobot writes it."""
    (source,) = (template / "meta" / "episodes").glob("*/*.parquet")
    row, numbers = pq.read_table(source), np.arange(episodes)
    values = {
        "episode_index": numbers,
        "length": np.full(episodes, length),
        "dataset_from_index": numbers * length,
        "dataset_to_index": (numbers + 1) * length,
        "data/file_index": numbers * DATA_FILES // episodes,
    }
    for camera in CAMERAS:
        for key in (image_key(camera), depth_key(camera)):
            start_s = numbers % per_file * length / FPS
            values[f"videos/{key}/file_index"] = numbers // per_file
            values[f"videos/{key}/from_timestamp"] = start_s
            values[f"videos/{key}/to_timestamp"] = start_s + length / FPS
    table = row.take(pa.array(np.zeros(episodes, np.int64)))
    for name, column in values.items():
        i = table.schema.get_field_index(name)
        table = table.set_column(i, name, pa.array(column, table.schema.field(i).type))
    path = folder / "meta/episodes/chunk-000/file-000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(table, path, row_group_size=10)  # LeRobot's buffer


def _write_videos(folder: Path, info: dict, frames: int, files: int) -> None:
    """One file per kind, under all names."""
    rgb = encode_rgb((np.full((SIZE_PX, SIZE_PX, 3), 90, np.uint8) for _ in range(frames)), FPS)
    depth = encode_depth(np.full((frames, SIZE_PX, SIZE_PX), 1.0, np.float32), FPS, DEPTH_MAX_M)
    for content, keys in ((rgb, map(image_key, CAMERAS)), (depth, map(depth_key, CAMERAS))):
        first = None
        for key in keys:
            for file in range(files):
                name = info["video_path"].format(video_key=key, chunk_index=0, file_index=file)
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if first is None:
                    path.write_bytes(content)
                    first = path
                else:
                    share_file(first, path)


def _write_data(folder: Path, length: int, episodes: int, n_points: int) -> None:
    """Data files of one row group per episode."""
    rng, (points, visible) = (
        np.random.default_rng(0),
        (points_key(CAMERAS[0]), points_visible_key(CAMERAS[0])),
    )

    def lists(values: np.ndarray) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])

    writer, number = None, None
    for episode in range(episodes):
        rows = np.arange(length)
        columns = {key: lists(rng.normal(size=(length, size)).astype("f4")) for key, size in NUMBERS.items()}
        columns |= {
            "timestamp": (rows / FPS).astype(np.float32),
            "frame_index": rows,
            "episode_index": np.full(length, episode),
            "index": episode * length + rows,
            "task_index": np.zeros(length, np.int64),
            points: lists(np.tile(rng.uniform(size=3 * n_points).astype(np.float16), (length, 1))),
            visible: lists(np.ones((length, n_points), bool)),
        }
        table = pa.table(columns)
        if number != (number := episode * DATA_FILES // episodes):
            if writer:
                writer.close()
            path = folder / f"data/chunk-000/file-{number:03d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            plain = [name for name in table.column_names if name not in (points, visible)]
            writer = pq.ParquetWriter(path, table.schema, compression="zstd", use_dictionary=plain)
        writer.write_table(table)
    writer.close()


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
    for turn in range(args.rounds):
        for reader in list(READERS)[:: 1 if turn % 2 == 0 else -1]:
            cache = scratch / f"{reader}-{turn}"
            for state in ("cold", "warm"):
                if state == "cold":
                    drop_pages(root)
                found.setdefault((state, reader), []).append(start_process(reader, root, cache))
            subprocess.run(["rm", "-rf", cache], check=True)
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


def main() -> int:
    """Command line entry: a table for people, then one JSON line."""
    args = parse_arguments()
    if args.measure:
        print(json.dumps(measure_start(args.measure, args.dataset)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        try:
            figures = run(args, Path(scratch))
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print_table(figures["starts"])
    for name, ratio in figures["ratios"].items():
        print(f"{name}: the stock reader takes {ratio:.2f} times as much")
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
