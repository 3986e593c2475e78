"""A dataset under another folder, whole or some of its episodes: videos are shared, never encoded again.

Of a part, the episodes are numbered anew; they point into the old video files, which may hold frames that no
episode uses. LeRobot reads such datasets and its split, delete and merge tools take them.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lerobot.datasets.compute_stats import aggregate_stats
from lerobot.datasets.io_utils import write_stats
from lerobot.datasets.utils import DEFAULT_DATA_PATH, DEFAULT_EPISODES_PATH, update_chunk_file_indices

from datasets_scripts.storage.atomic import share_file, write_json
from datasets_scripts.storage.dataset_folder import (
    INFO_PATH,
    STATS_PATH,
    data_files,
    dataset_files,
    iterate_episodes,
    load_info,
)
from datasets_scripts.storage.rows import DatasetRows

__all__ = ["copy_dataset"]

# Statistics of what is counted through the dataset move along with it; a standard deviation does not.
SHIFTED_STATS = ("min", "max", "mean", "q01", "q10", "q50", "q90", "q99")


def copy_dataset(rows: DatasetRows, root: Path, episodes: Sequence[int]) -> None:
    """Writes a dataset of some or all episodes of another.

    Args:
        rows (`DatasetRows`): The dataset; its videos are all here.
        root (`Path`): Folder to make.
        episodes (`Sequence[int]`): Which, ascending.

    Raises:
        OSError: If the disk is full.
        ValueError: If a data file is damaged; names it.
    """
    whole = len(episodes) == rows.n_episodes
    used = _video_files(rows, episodes)
    for place in dataset_files(rows.root):
        is_video = place.parts[0] == "videos"
        if not whole and (_is_numbered(place) or (is_video and rows.root / place not in used)):
            continue
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        share = share_file if is_video else shutil.copyfile
        share(rows.root / place, root / place)
    if not whole:
        new = {episode: number for number, episode in enumerate(episodes)}
        _write_metadata(rows, root, new, _write_data(rows, root, new))


def _is_numbered(place: Path) -> bool:
    """Whether a file holds numbers of episodes."""
    return place.parts[0] == "data" or place.parts[:2] == ("meta", "episodes") or place == INFO_PATH


def _video_files(rows: DatasetRows, episodes: Sequence[int]) -> set[Path]:
    used = set()
    for key in rows.meta.video_keys:
        segments = rows.video_segments(key)
        used |= {segments.paths[file] for file in segments.file_of_episode[list(episodes)]}
    return used


def _write_data(rows: DatasetRows, root: Path, new: Mapping[int, int]) -> list[dict[str, int]]:
    """Writes the frames; where each episode went, as LeRobot's episode metadata has it."""
    places: list[dict[str, int]] = []
    chunk, file, n_frames = 0, 0, 0
    for path in data_files(rows.root):
        writer = None
        target = root / DEFAULT_DATA_PATH.format(chunk_index=chunk, file_index=file)
        with pq.ParquetFile(path) as source:
            for episode, table in iterate_episodes(source):
                if episode not in new:
                    continue
                n_rows = table.num_rows
                for name, values in (
                    ("episode_index", np.full(n_rows, new[episode])),
                    ("index", n_frames + np.arange(n_rows)),
                ):
                    at = table.schema.get_field_index(name)
                    table = table.set_column(at, table.field(at), pa.array(values, table.field(at).type))
                if writer is None:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    writer = pq.ParquetWriter(target, table.schema, compression="zstd")
                writer.write_table(table)
                place = {"data/chunk_index": chunk, "data/file_index": file}
                place |= {"dataset_from_index": n_frames, "dataset_to_index": n_frames + n_rows}
                places.append(place)
                n_frames += n_rows
        if writer is not None:
            writer.close()
            chunk, file = update_chunk_file_indices(chunk, file, rows.meta.chunks_size)
    return places


def _write_metadata(
    rows: DatasetRows, root: Path, new: Mapping[int, int], places: Sequence[dict[str, int]]
) -> None:
    """Writes what LeRobot knows of the episodes, and of all of them together."""
    chunk, file = 0, 0
    stats: list[dict] = []
    for path in sorted((rows.root / "meta/episodes").glob("*/*.parquet")):
        found = [row for row in pq.read_table(path).to_pylist() if row["episode_index"] in new]
        if not found:
            continue
        for row in found:
            number = new[row["episode_index"]]
            place = places[number] | {"meta/episodes/chunk_index": chunk, "meta/episodes/file_index": file}
            _shift_stats(row, "episode_index", number - row["episode_index"])
            _shift_stats(row, "index", place["dataset_from_index"] - row["dataset_from_index"])
            row |= place | {"episode_index": number}
            stats.append(_stats_of(row))
        target = root / DEFAULT_EPISODES_PATH.format(chunk_index=chunk, file_index=file)
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(found, schema=pq.read_schema(path)), target)
        chunk, file = update_chunk_file_indices(chunk, file, rows.meta.chunks_size)
    if all(stats):  # some writers keep none by episode
        whole = json.loads((root / STATS_PATH).read_text()) | aggregate_stats(stats)
        write_stats(dict(sorted(whole.items())), root)  # LeRobot's order differs from process to process
    n_frames = places[-1]["dataset_to_index"]
    totals = {"total_episodes": len(new), "total_frames": n_frames, "splits": {"train": f"0:{len(new)}"}}
    write_json(root / INFO_PATH, load_info(rows.root) | totals)


def _shift_stats(row: dict[str, Any], column: str, offset: int) -> None:
    for name in SHIFTED_STATS:
        key = f"stats/{column}/{name}"
        if row.get(key) is not None:
            row[key] = (np.asarray(row[key]) + offset).tolist()


def _stats_of(row: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Statistics of an episode by column."""
    stats: dict[str, dict[str, np.ndarray]] = {}
    for key, value in row.items():
        if key.startswith("stats/") and value is not None:
            column, _, name = key.removeprefix("stats/").rpartition("/")
            stats.setdefault(column, {})[name] = np.atleast_1d(value)
    return stats
