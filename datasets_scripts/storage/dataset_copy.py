"""Copy a dataset, whole or some of its episodes; videos are shared, never encoded again.

The episodes of a part are renumbered. They point into the old video files, which may hold frames that no
episode uses: LeRobot reads such datasets, and its split, delete and merge tools take them.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lerobot.datasets.compute_stats import aggregate_stats
from lerobot.datasets.io_utils import write_stats
from lerobot.datasets.utils import DEFAULT_DATA_PATH, DEFAULT_EPISODES_PATH, update_chunk_file_indices

from datasets_scripts.storage.atomic import read_json, share_file, write_json
from datasets_scripts.storage.dataset_folder import (
    INFO_PATH,
    STATS_PATH,
    check_inside,
    data_files,
    dataset_files,
    episode_files,
    iterate_episodes,
    load_info,
)
from datasets_scripts.storage.dataset_rows import DatasetRows

__all__ = ["copy_dataset", "list_copied_files"]

# Statistics of a counter (`index`) that move with it; its standard deviation does not.
SHIFTED_STATS = ("min", "max", "mean", "q01", "q10", "q50", "q90", "q99")


def list_copied_files(
    rows: DatasetRows, episodes: Sequence[int], linked_videos: Path | None = None
) -> list[Path]:
    """Sorted relative paths of what a copy takes: the folder's files, and the episodes' videos.

    Raises:
        ValueError: If a link leads out of the dataset, except of these videos into the folder
            `linked_videos`; names it.
    """
    places = set(dataset_files(rows.root, linked_videos))
    for path in sorted(rows.video_files(episodes)):
        if path.exists():  # others are still on the Hub
            if linked_videos is None or not path.resolve().is_relative_to(linked_videos.resolve()):
                check_inside(rows.root, path)
            places.add(path.relative_to(rows.root))
    return sorted(places)


def copy_dataset(
    rows: DatasetRows, root: Path, episodes: Sequence[int], linked_videos: Path | None = None
) -> None:
    """Write a dataset of ascending episodes of another, whose videos are downloaded, to the folder `root`.

    Raises as `list_copied_files`, and:

    Raises:
        OSError: If the disk is full.
        ValueError: If a data file is damaged; names it.
    """
    is_part = len(episodes) < rows.n_episodes
    used = rows.video_files(episodes)
    for place in list_copied_files(rows, episodes, linked_videos):
        is_video = place.parts[0] == "videos"
        is_numbered = place.parts[0] == "data" or place.parts[:2] == ("meta", "episodes")
        if is_part and (is_numbered or (is_video and rows.root / place not in used)):
            continue
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        copy = share_file if is_video else shutil.copyfile
        copy(rows.root / place, root / place)
    if is_part:
        new_numbers = {episode: number for number, episode in enumerate(episodes)}
        _write_metadata(rows, root, new_numbers, _write_data(rows, root, new_numbers))


def _write_data(rows: DatasetRows, root: Path, new_numbers: dict[int, int]) -> list[dict[str, int]]:
    """Write the frames; returns where each episode went, as LeRobot's episode metadata names it."""
    places: list[dict[str, int]] = []
    chunk, file, n_frames = 0, 0, 0
    for path in data_files(rows.root):
        writer = None
        with pq.ParquetFile(path) as source:
            for episode, table in iterate_episodes(source):
                if episode not in new_numbers:
                    continue
                index = n_frames + np.arange(table.num_rows)
                table = _replace_column(table, "episode_index", np.full(len(index), new_numbers[episode]))
                table = _replace_column(table, "index", index)
                if writer is None:
                    target = root / DEFAULT_DATA_PATH.format(chunk_index=chunk, file_index=file)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    writer = pq.ParquetWriter(target, table.schema, compression="zstd")
                writer.write_table(table)
                place = {"data/chunk_index": chunk, "data/file_index": file, "dataset_from_index": n_frames}
                n_frames += len(index)
                places.append(place | {"dataset_to_index": n_frames})
        if writer is not None:
            writer.close()
            chunk, file = update_chunk_file_indices(chunk, file, rows.info.chunks_size)
    return places


def _replace_column(table: pa.Table, name: str, values: np.ndarray) -> pa.Table:
    position = table.schema.get_field_index(name)
    field = table.field(position)
    return table.set_column(position, field, pa.array(values, field.type))


def _write_metadata(
    rows: DatasetRows, root: Path, new_numbers: dict[int, int], places: Sequence[dict[str, int]]
) -> None:
    """Write the episode table, the statistics and `meta/info.json`."""
    chunk, file = 0, 0
    stats: list[dict] = []
    for path in episode_files(rows.root):
        kept = [row for row in pq.read_table(path).to_pylist() if row["episode_index"] in new_numbers]
        if not kept:
            continue
        for row in kept:
            number = new_numbers[row["episode_index"]]
            place = places[number] | {"meta/episodes/chunk_index": chunk, "meta/episodes/file_index": file}
            _shift_stats(row, "episode_index", number - row["episode_index"])
            _shift_stats(row, "index", place["dataset_from_index"] - row["dataset_from_index"])
            row |= place | {"episode_index": number}
            stats.append(_read_stats(row))
        target = root / DEFAULT_EPISODES_PATH.format(chunk_index=chunk, file_index=file)
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(kept, schema=pq.read_schema(path)), target)
        chunk, file = update_chunk_file_indices(chunk, file, rows.info.chunks_size)
    if all(stats):  # some writers keep none by episode
        total = read_json(root / STATS_PATH) | aggregate_stats(stats)
        write_stats(dict(sorted(total.items())), root)  # LeRobot's order differs from process to process
    n_episodes, n_frames = len(new_numbers), places[-1]["dataset_to_index"]
    totals = {
        "total_episodes": n_episodes,
        "total_frames": n_frames,
        "splits": {"train": f"0:{n_episodes}"},
    }
    write_json(root / INFO_PATH, load_info(rows.root) | totals)


def _shift_stats(row: dict[str, Any], column: str, offset: int) -> None:
    for key in (f"stats/{column}/{name}" for name in SHIFTED_STATS):
        if row.get(key) is not None:
            row[key] = (np.asarray(row[key]) + offset).tolist()


def _read_stats(row: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Statistics of an episode by column."""
    stats: dict[str, dict[str, np.ndarray]] = {}
    for key, value in row.items():
        if key.startswith("stats/") and value is not None:
            column, _, name = key.removeprefix("stats/").rpartition("/")
            stats.setdefault(column, {})[name] = np.atleast_1d(value)
    return stats
