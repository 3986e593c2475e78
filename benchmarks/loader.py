"""Windows per second of `ForesightWindows` beside the stock `LeRobotDataset`, on the same windows in one run.

The stock reader delivers the same content through `delta_timestamps`: RGB and depth of all views (T history
and F lookahead frames), state, action chunks and tracks. All readers run in this process without workers, on
the same shuffled windows, in turns so that a busy machine disturbs them alike.

The stock reader turns whole rows into Python objects, so track columns slow it down even where they are not
asked for. A second pair of readers therefore works on a copy of the dataset without track columns (the videos
are linked): that ratio is about frames, state and actions alone.

The streamed reader reads windows in the order of a streamed training, while files are downloaded into a
folder of bounded size and deleted again: from the folder, or from a Hub or bucket that has the dataset
(`--stream`).

What labels cost is measured on our own readers: windows with depth and tracks beside windows of the same
frames without, as read, and as batches prepared for the model (`ForesightProcessor.prepare_batch` on the
CPU). The last line is one JSON object.
"""

import argparse
import dataclasses
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from _measure import peak_rss_mb
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from datasets_scripts.columns import (
    POINTS_PREFIX,
    POINTS_VISIBLE_PREFIX,
    clean_depth,
    find_depth_key,
    image_key,
    points_key,
    points_visible_key,
)
from datasets_scripts.command_line import entry_point, split_names
from datasets_scripts.storage.dataset_folder import data_files, load_features
from datasets_scripts.storage.streaming.file_store import FileStore
from datasets_scripts.storage.streaming.streamed_rows import StreamedRows
from modeling_foresight import ForesightProcessor, build_small_tokenizer
from training.windows import (
    ConcatWindows,
    ForesightWindows,
    WindowConfig,
    WindowSampler,
    collate_windows,
)
from training.windows.stream_plan import StreamedBatches, StreamedSampler, StreamPlan

BATCH = 8  # windows prepared for the model at a time
CHECKED_WINDOWS = 5  # compared value by value before anything is timed

EXAMPLE = """example:
  python benchmarks/loader.py --dataset outputs/quickstart/dataset --history 2
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0],
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--dataset",
        default="outputs/quickstart/dataset",
        help="LeRobot dataset folder (default: what `make quickstart` leaves in outputs/quickstart/dataset)",
    )
    parser.add_argument("--views", default="main,wrist", help="camera names, the first with tracks")
    parser.add_argument("--history", type=int, default=2, help="T, history frames")
    parser.add_argument("--future-shift", type=int, default=3, help="S, lookahead frames")
    parser.add_argument("--chunk", type=int, default=5, help="K, action chunk")
    parser.add_argument("--flow-length", type=int, default=6, help="L, flow steps")
    parser.add_argument("--grid", type=int, default=14, help="side of the flow grid")
    parser.add_argument(
        "--image-size", type=int, help="side of prepared pictures in px (default: the camera's)"
    )
    parser.add_argument("--windows", type=int, default=200, help="windows read by the slow readers")
    parser.add_argument("--rounds", type=int, default=4, help="turns each reader takes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of windows")
    parser.add_argument("--stream", help="Hub id or URL to stream from (default: the folder of --dataset)")
    parser.add_argument("--stream-gb", type=float, default=1.0, help="room for streamed files")
    parser.add_argument("--cache", help="folder of the frame cache (a temporary one if omitted)")
    return parser.parse_args(arguments)


def copy_without_tracks(root: Path, target: Path) -> Path:
    """The same dataset without its track columns; video files are linked, not copied."""
    shutil.copytree(root / "meta", target / "meta")
    (target / "videos").symlink_to((root / "videos").resolve(), target_is_directory=True)
    info_path = target / "meta" / "info.json"
    info = json.loads(info_path.read_text())
    tracks = [key for key in info["features"] if key.startswith((POINTS_PREFIX, POINTS_VISIBLE_PREFIX))]
    info["features"] = {key: feature for key, feature in info["features"].items() if key not in tracks}
    info_path.write_text(json.dumps(info))
    for path in data_files(root):
        copy = target / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pq.read_table(path).drop_columns(tracks), copy)
    return target


def open_stock(windows: ForesightWindows) -> LeRobotDataset:
    """The stock reader, asked for what a window holds."""
    fps, config = windows.rows.fps, windows.config
    history = 1 - config.history_length
    frames = [step / fps for step in range(history, config.lookahead_frames + 1)]
    camera = windows.cameras[config.views[0]]
    track_steps = [step / fps for step in range(history, config.flow_length)]
    keys = windows.frames.decoders
    deltas = {
        **dict.fromkeys(keys, frames),
        config.action_key: [step / fps for step in range(history, config.chunk_size)],
    }
    if "flow" in config.objectives:
        deltas |= dict.fromkeys((points_key(camera), points_visible_key(camera)), track_steps)
    if windows.state_dim:
        deltas[config.state_key] = [step / fps for step in range(history, 1)]
    return LeRobotDataset(
        "local/benchmark",
        root=windows.rows.root,
        delta_timestamps=deltas,
        return_uint8=True,
        depth_output_unit="m",
    )


def rows_of_windows(windows: ForesightWindows, order: list[tuple[int, int]]) -> list[int]:
    """Global row of each window's newest frame: the stock reader's index."""
    span = windows.config.history_length - 1
    return [windows.locate(i)[1] + span for i, _ in order]


def check_same(windows: ForesightWindows, stock: LeRobotDataset, order: list[tuple[int, int]]) -> None:
    """Refuse to compare readers that do not deliver the same content.

    Raises:
        ValueError: If they differ; names the column.
    """
    for (i, _), row in zip(order, rows_of_windows(windows, order), strict=True):
        plain, item = windows[i], stock[row]
        real = plain["frame_mask"]
        pairs = {"action": (plain["actions"][-1], item["action"][-windows.config.chunk_size :])}
        pairs["action"] = tuple(chunk[plain["action_mask"][-1]] for chunk in pairs["action"])
        for view, camera in windows.cameras.items():
            pairs[image_key(camera)] = plain["images"][view][real], item[image_key(camera)][real]
            key = find_depth_key(windows.rows.features, camera)
            depth = clean_depth(item[key][real].squeeze(1), windows.frames.decoders[key].limit_m)
            pairs[key] = plain["depth"][view][real], depth
        for key, (ours, theirs) in pairs.items():
            if not torch.allclose(ours.float(), theirs.float(), rtol=0, atol=1e-6):
                raise ValueError(
                    f"the readers disagree on '{key}' of window {i}: the comparison means nothing"
                )


def measure(
    readers: dict[str, Callable[[int], object]], n_windows: dict[str, int], rounds: int
) -> dict[str, float]:
    """Median windows per second of each reader, in turns."""
    rates: dict[str, list[float]] = {name: [] for name in readers}
    cursors: dict[str, Iterator[int]] = {name: itertools.count() for name in readers}
    for name, read in readers.items():  # warm-up: decoders, maps, imports
        read(next(cursors[name]))
    for _ in range(rounds):
        for name, read in readers.items():
            n = max(1, n_windows[name] // rounds)
            start = time.perf_counter()
            for _ in range(n):
                read(next(cursors[name]))
            rates[name].append(n / (time.perf_counter() - start))
    return {name: float(np.median(values)) for name, values in rates.items()}


def open_streamed(args: argparse.Namespace, config: WindowConfig, folder: Path) -> Callable[[int], object]:
    """Reads the next window of a streamed training; its first call waits for the first files."""
    rows = StreamedRows(args.stream or args.dataset, FileStore(folder, int(args.stream_gb * 1e9)))
    windows = ConcatWindows([ForesightWindows(rows, config)])
    plan = StreamPlan(windows, None, "natural", args.seed)
    print(plan.describe())
    sampler = StreamedSampler(plan.orders, windows.sizes, batch_size=1, seed=args.seed)
    batches = iter(StreamedBatches(plan, sampler, workers=0))
    return lambda n: windows[next(batches)[0]]


def cost_of_labels(
    pairs: dict[str, tuple[ForesightWindows, ForesightWindows]],
    order: list[tuple[int, int]],
    processor: ForesightProcessor,
    n_batches: int,
    rounds: int,
) -> dict[str, float]:
    """Time with depth and tracks over time without, by reader: as read, and prepared for the model."""

    def prepared(windows: ForesightWindows) -> Callable[[int], object]:
        def read(n: int) -> object:
            chosen = [order[(n * BATCH + k) % len(order)] for k in range(BATCH)]
            raw = collate_windows([windows[item] for item in chosen])
            return processor.prepare_batch(raw, "cpu", windows.config.history_length)

        return read

    def plain(windows: ForesightWindows) -> Callable[[int], object]:
        return lambda n: windows[order[n % len(order)]]

    ratios = {}
    for name, both in pairs.items():
        for suffix, reader, n in (("", plain, BATCH * n_batches), ("_prepared", prepared, n_batches)):
            readers = dict(zip(("with", "without"), map(reader, both), strict=True))
            rates = measure(readers, dict.fromkeys(readers, n), rounds)
            ratios[name + suffix] = round(rates["without"] / rates["with"], 2)
    return ratios


def build_config(args: argparse.Namespace, scratch: Path) -> WindowConfig:
    """What a window holds; the frame cache is in `scratch` unless the user names a folder."""
    return WindowConfig(
        views=split_names(args.views),
        history_length=args.history,
        future_shift=args.future_shift,
        lookahead=True,
        chunk_size=args.chunk,
        flow_length=args.flow_length,
        flow_grid=(args.grid, args.grid),
        random_shift=0.05,
        frame_cache=args.cache or str(scratch / "cache"),
        seed=args.seed,
    )


def open_cached(args: argparse.Namespace, config: WindowConfig) -> tuple[ForesightWindows, list[float]]:
    """The cached reader, and the seconds to build the cache and open it, and to open it again."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        cached = ForesightWindows(args.dataset, config)
        seconds.append(time.perf_counter() - start)
    return cached, seconds


def measure_readers(
    args: argparse.Namespace,
    both: tuple[ForesightWindows, ForesightWindows],
    order: list[tuple[int, int]],
    config: WindowConfig,
    scratch: Path,
) -> dict[str, float]:
    """Windows per second of all readers in turns; `both` are ours, with the frame cache and without."""
    cached, on_demand = both
    no_tracks = [name for name in config.objectives if name != "flow"]
    bare = copy_without_tracks(cached.rows.root, scratch / "without_tracks")
    cached_no_tracks = ForesightWindows(bare, dataclasses.replace(config, objectives=no_tracks))
    stock, stock_no_tracks = open_stock(cached), open_stock(cached_no_tracks)
    rows = rows_of_windows(cached, order)
    check_same(ForesightWindows(args.dataset, config.for_evaluation()), stock, order[:CHECKED_WINDOWS])
    readers = {
        "streamed": open_streamed(args, config, scratch / "streams"),
        "cached": lambda n: cached[order[n % len(order)]],
        "on_demand": lambda n: on_demand[order[n % len(order)]],
        "stock": lambda n: stock[rows[n % len(order)]],
        "cached_no_tracks": lambda n: cached_no_tracks[order[n % len(order)]],
        "stock_no_tracks": lambda n: stock_no_tracks[rows[n % len(order)]],
    }
    counts = {name: args.windows * (10 if name.startswith("cached") else 1) for name in readers}
    return measure(readers, counts, args.rounds)


def measure_labels(
    args: argparse.Namespace,
    both: tuple[ForesightWindows, ForesightWindows],
    order: list[tuple[int, int]],
    config: WindowConfig,
) -> tuple[dict[str, float], int]:
    """[`cost_of_labels`] of our readers, and the side in px of the prepared pictures."""
    cached, on_demand = both
    frames_alone = dataclasses.replace(config, objectives=["action", "future_rgb", "progress"])
    uncached = dataclasses.replace(frames_alone, frame_cache="off")
    pairs = {
        "cached": (cached, ForesightWindows(args.dataset, frames_alone)),
        "on_demand": (on_demand, ForesightWindows(args.dataset, uncached)),
    }
    processor = ForesightProcessor(
        build_small_tokenizer(cached.rows.tasks),
        views=config.views,
        image_size=args.image_size or max(cached.view_sizes[config.views[0]]),
    )
    n_batches = max(args.rounds, args.windows // BATCH)
    return cost_of_labels(pairs, order, processor, n_batches, args.rounds), processor.image_size


def run(args: argparse.Namespace, scratch: Path) -> dict:
    """Open the readers, measure, return the figures; `scratch` is an empty folder."""
    torch.set_num_threads(1)  # no reader needs torch's own threads; they only disturb the others
    config = build_config(args, scratch)
    rss_mb = {"imports": peak_rss_mb()}
    cached, (build_s, open_s) = open_cached(args, config)
    sampler = WindowSampler(len(cached), batch_size=1, seed=args.seed)
    order = [sampler.batch_indices(step)[0] for step in range(max(20 * args.windows, 1))]
    fast = measure({"cached": lambda n: cached[order[n % len(order)]]}, {"cached": 5 * args.windows}, 1)
    rss_mb["cached"] = peak_rss_mb()
    both = cached, ForesightWindows(args.dataset, dataclasses.replace(config, frame_cache="off"))
    rates = measure_readers(args, both, order, config, scratch)
    labels, prepared_size = measure_labels(args, both, order, config)
    rss_mb["all_readers"] = peak_rss_mb()
    return {
        "benchmark": "loader",
        "dataset_frames": len(cached.rows),
        "windows": len(cached),
        "history": args.history,
        "lookahead": args.future_shift,
        "views": config.views,
        "image_size": list(cached.view_sizes[config.views[0]]),
        "n_points": load_features(args.dataset)[points_key(cached.cameras[config.views[0]])]["shape"][0] // 3,
        "windows_per_s": {name: round(rate, 1) for name, rate in rates.items()},
        "cached_alone_windows_per_s": round(fast["cached"], 1),
        "ratio_cached_to_stock": round(rates["cached"] / rates["stock"], 2),
        "ratio_streamed_to_on_demand": round(rates["streamed"] / rates["on_demand"], 2),
        "ratio_on_demand_to_stock": round(rates["on_demand"] / rates["stock"], 2),
        "ratio_without_tracks": round(rates["cached_no_tracks"] / rates["stock_no_tracks"], 2),
        "time_with_labels_to_without": labels,
        "prepared_size": prepared_size,
        "cache_mb": round(cached.frames.nbytes / 1e6, 1),
        "cache_build_s": round(build_s, 2),
        "open_s": round(open_s, 2),
        "peak_rss_mb": rss_mb,
    }


@entry_point()
def main() -> int:
    """Command line entry: a table for people, then one JSON line."""
    args = parse_arguments()
    if args.windows < 1 or args.rounds < 1:
        raise ValueError("--windows and --rounds must be at least 1")
    with tempfile.TemporaryDirectory() as scratch:
        figures = run(args, Path(scratch))
    rates = figures["windows_per_s"]
    for name, rate in rates.items():
        stock = rates["stock_no_tracks" if name.endswith("no_tracks") else "stock"]
        print(f"{name:16s} {rate:9.1f} windows/s  {1e3 / rate:8.2f} ms  {rate / stock:7.2f} x stock")
    for name, ratio in figures["time_with_labels_to_without"].items():
        print(f"windows with depth and tracks, {name}: {ratio:.2f} x the time without")
    rss = figures["peak_rss_mb"]
    print(
        f"frame cache {figures['cache_mb']:.1f} MB, built in {figures['cache_build_s']:.1f} s; peak memory "
        f"{rss['imports']:.0f} MB after imports, {rss['cached']:.0f} MB with the cached reader (its mapped "
        f"pages included), {rss['all_readers']:.0f} MB with all readers"
    )
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
