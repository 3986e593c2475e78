"""What an annotation would do, how long it would take and how much room, without writing anything of it."""

import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from datasets_scripts.annotation.episode import LabelMaker
from datasets_scripts.annotation.job import AnnotationJob, confirm, open_job
from datasets_scripts.columns import depth_key, points_key, points_visible_key
from datasets_scripts.storage.dataset_folder import dataset_files
from datasets_scripts.storage.rows import DatasetRows
from datasets_scripts.storage.shards import ARRAYS

__all__ = ["describe_plan"]

TRIED_FRAMES = 48


def describe_plan(job: AnnotationJob, workers: int = 1) -> str:
    """Checks a job, tries its sources on the first frames of an episode, and says what it would do.

    Args:
        job (`AnnotationJob`): What would be done.
        workers (`int`): Processes that would do it.

    Returns:
        `str`: A few lines. Time and room are estimates: what the tried frames took, times all frames.

    Raises:
        ValueError: If the job cannot be done; says why.
    """
    work = open_job(job)
    annotation, rows = job.annotation, work.rows
    if work.shards.is_finished:
        confirm(work)
        return f"{job.output} is there already; nothing would be made"
    readable = work.check()
    lengths = (rows.episode_stops - rows.episode_starts)[readable]
    n_frames = int(lengths.sum())
    columns = [points_key(annotation.cameras[0]), points_visible_key(annotation.cameras[0])]
    columns += [depth_key(camera) for camera in annotation.cameras if annotation.estimates_depth]
    lines = [
        f"{rows.name}: {len(readable)} of {rows.n_episodes} episodes, {n_frames} frames at {rows.fps} per "
        "second" + (f"; {len(work.episodes) - len(readable)} cannot be read" if job.skip_broken else ""),
        f"cameras: {', '.join(annotation.cameras)} (tracks of {annotation.cameras[0]})",
        f"depth: {annotation.depth}; tracks: {annotation.tracks}, {annotation.n_points} points",
        f"columns to add: {', '.join(columns)}",
    ]
    seconds, n_tried, opening_s, *n_bytes = _time_labels(work.rows, job, readable[0])
    expected_s = seconds / n_tried * n_frames / min(workers, len(readable))
    lines.append(
        f"time: about {_format_time(expected_s)} with {workers} workers "
        f"({n_tried} frames took {seconds:.2f} s, loading the sources {opening_s:.1f} s)"
    )
    in_shards, in_the_end = (sizes / n_tried * n_frames for sizes in n_bytes)
    copied = sum(
        (rows.root / place).stat().st_size
        for place in dataset_files(rows.root)
        if place.parts[0] != "videos" or not _can_link(rows.root / place, job.output)
    )
    needed = in_shards + in_the_end + copied
    lines.append(
        f"disk: about {_format_bytes(in_the_end + copied)} in the end, "
        f"{_format_bytes(needed)} while it is put together; {_format_bytes(_free_bytes(job.output))} are free"
        + ("; videos are downloaded in addition" if rows.hub is not None else "")
    )
    if needed > _free_bytes(job.output):
        lines.append("this is NOT enough: free some space, or choose an --output on another disk")
    return "\n".join(lines)


def _time_labels(rows: DatasetRows, job: AnnotationJob, episode: int) -> tuple[float, int, float, int, int]:
    """Seconds for some frames, their number, seconds to load the sources, bytes in a shard and in the end."""
    start = time.perf_counter()
    maker = LabelMaker(rows, job.annotation, job.device, job.batch_size)
    opening_s = time.perf_counter() - start
    first = int(rows.episode_starts[episode])
    span = range(first, min(first + TRIED_FRAMES, int(rows.episode_stops[episode])))
    taken = []
    for _ in range(2):  # the first time is longer: files are opened, kernels chosen
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            maker.label(span, episode, Path(folder))
            taken.append(time.perf_counter() - start)
            sizes = {path.name: path.stat().st_size for path in Path(folder).iterdir()}
            with np.load(Path(folder, ARRAYS)) as arrays:
                columns = [len(pa.compress(arrays[name], "zstd")) for name in ("points", "visible")]
    in_shard = sum(sizes.values())
    return min(taken), len(span), opening_s, in_shard, in_shard - sizes[ARRAYS] + sum(columns)


def _find_parent(output: Path) -> Path:
    """The nearest folder above that exists."""
    return next(folder for folder in output.resolve().parents if folder.exists())


def _free_bytes(output: Path) -> int:
    return shutil.disk_usage(_find_parent(output)).free


def _can_link(path: Path, output: Path) -> bool:
    """Whether a file can be shared rather than copied."""
    return os.stat(path).st_dev == os.stat(_find_parent(output)).st_dev


def _format_time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _format_bytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e7 else f"{n_bytes / 1e6:.2f} MB"
