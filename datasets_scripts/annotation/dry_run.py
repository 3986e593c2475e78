"""Describe what an annotation would do, its time and its disk space, without writing anything."""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from datasets_scripts.annotation.episode import LabelMaker
from datasets_scripts.annotation.job import AnnotationJob, open_job
from datasets_scripts.columns import depth_key, points_key, points_visible_key
from datasets_scripts.storage.dataset_copy import list_copied_files
from datasets_scripts.storage.dataset_rows import BrokenEpisodeError, DatasetRows
from datasets_scripts.storage.shards import ARRAYS_FILE

__all__ = ["describe_plan"]

TRIED_FRAMES = 48


def describe_plan(job: AnnotationJob, workers: int = 1) -> str:
    """Check a job and describe it in a few lines; time and space are measured on some frames.

    Raises:
        ValueError: If the job cannot be done; says why.
    """
    work = open_job(job)
    annotation, rows = job.annotation, work.rows
    if work.shards.is_finished:
        work.confirm()
        return f"{job.output} is there already; nothing would be made"
    readable = work.check()
    n_frames = int((rows.episode_stops - rows.episode_starts)[readable].sum())
    columns = [points_key(annotation.cameras[0]), points_visible_key(annotation.cameras[0])]
    columns += [depth_key(camera) for camera in annotation.cameras if annotation.estimates_depth]
    broken = f"; {len(work.episodes) - len(readable)} cannot be read" if job.skip_broken else ""
    lines = [
        f"{rows.name}: {len(readable)} of {rows.n_episodes} episodes, {n_frames} frames at {rows.fps} per "
        f"second{broken}",
        f"cameras: {', '.join(annotation.cameras)} (tracks of {annotation.cameras[0]})",
        f"depth: {annotation.depth}; tracks: {annotation.tracks}, {annotation.n_points} points",
        f"columns to add: {', '.join(columns)}",
    ]
    seconds, n_tried, loading_s, *n_bytes = _time_some(rows, job, readable)
    expected_s = seconds / n_tried * n_frames / min(workers, len(readable))
    lines.append(
        f"time: about {_format_time(expected_s)} with {workers} workers "
        f"({n_tried} frames took {seconds:.2f} s, loading the sources {loading_s:.1f} s)"
    )
    shard_bytes, final_bytes = (sizes / n_tried * n_frames for sizes in n_bytes)
    parent = next(folder for folder in job.output.resolve().parents if folder.exists())
    for place in list_copied_files(rows, work.episodes, job.linked_videos):
        status = (rows.root / place).stat()
        # Videos are hard-linked where the file system allows it.
        if place.parts[0] != "videos" or status.st_dev != parent.stat().st_dev:
            final_bytes += status.st_size
    needed, free = shard_bytes + final_bytes, shutil.disk_usage(parent).free
    sizes = [tqdm.format_sizeof(size, "B") for size in (final_bytes, needed, free)]
    lines.append(
        "disk: about {} in the end, {} while it is put together; {} are free".format(*sizes)
        + ("; videos are downloaded in addition" if rows.hub is not None else "")
    )
    if needed > free:
        lines.append("this is NOT enough: free some space, or choose an --output on another disk")
    return "\n".join(lines)


def _format_time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _time_some(rows: DatasetRows, job: AnnotationJob, episodes: Sequence[int]) -> tuple:
    """[`_time_labels`] of the first episode, with `skip_broken` of the first one that can be read."""
    tried = episodes if job.skip_broken else episodes[:1]
    for episode in tried[:-1]:
        with contextlib.suppress(BrokenEpisodeError):
            return _time_labels(rows, job, episode)
    return _time_labels(rows, job, tried[-1])


def _time_labels(rows: DatasetRows, job: AnnotationJob, episode: int) -> tuple[float, int, float, int, int]:
    """Seconds for some frames, their number, seconds to load the sources, bytes in a shard and in the end."""
    start = time.perf_counter()
    maker = LabelMaker(rows, job.annotation, job.device, job.batch_size)
    loading_s = time.perf_counter() - start
    span = rows.rows_of(episode)[:TRIED_FRAMES]
    taken = []
    for _ in range(2):  # the first time is longer: files are opened, kernels chosen
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            maker.label(span, episode, Path(folder))
            taken.append(time.perf_counter() - start)
            sizes = {path.name: path.stat().st_size for path in Path(folder).iterdir()}
            with np.load(Path(folder, ARRAYS_FILE)) as arrays:
                columns = [len(pa.compress(arrays[name], "zstd")) for name in ("points", "visible")]
    shard_bytes = sum(sizes.values())
    return min(taken), len(span), loading_s, shard_bytes, shard_bytes - sizes[ARRAYS_FILE] + sum(columns)
