"""Write episodes as shards, and join shards to a LeRobot v3 dataset.

A shard is a folder with one mp4 per video column, `arrays.npz` with the other columns by name, and
`facts.json`. LeRobot's recorder copies the whole video file for every episode; here each file is written
once, and LeRobot's metadata class writes the metadata.
"""

import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datasets_scripts.storage.atomic import read_json, write_json, write_whole_folder
from datasets_scripts.storage.videos.writing import (
    encode_depth,
    encode_rgb,
    group_files,
    join_videos,
    video_stats,
)

__all__ = [
    "ARRAYS_FILE",
    "Layout",
    "assemble_dataset",
    "read_array",
    "read_shard_summary",
    "write_shard",
    "write_shard_summary",
]

ARRAYS_FILE, FACTS_FILE = "arrays.npz", "facts.json"


def write_shard(
    shard: Path,
    videos: Mapping[str, np.ndarray],
    arrays: Mapping[str, np.ndarray],
    facts: Mapping,
    fps: int,
    depth_max_m: Mapping[str, float],
) -> dict:
    """Encode an episode and write its shard.

    Args:
        shard (`Path`): Folder to create.
        videos (`Mapping[str, np.ndarray]`): By column `(F, H, W, 3)` uint8 RGB, or `(F, H, W)` float32
            meters.
        arrays (`Mapping[str, np.ndarray]`): Other columns by name, `(F, size)`, and further arrays.
        facts (`Mapping`): JSON facts of the episode: `instruction`, and further ones.
        fps (`int`): Frames per second.
        depth_max_m (`Mapping[str, float]`): Farthest depth kept, by depth column.

    Returns:
        `dict`: The facts, with `n_frames`, `stats` of the videos and sizes of the files.

    Raises:
        OSError: If the disk is full or not writable; nothing is left under the shard's name.
    """
    stats = {}
    with write_whole_folder(shard) as folder:
        for key, frames in videos.items():
            is_rgb = frames.dtype == np.uint8
            encoded = encode_rgb(frames, fps) if is_rgb else encode_depth(frames, fps, depth_max_m[key])
            (folder / f"{key}.mp4").write_bytes(encoded)
            stats[key] = video_stats(frames)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        (folder / ARRAYS_FILE).write_bytes(buffer.getvalue())
        n_frames = len(next(iter(videos.values())))
        return write_shard_summary(folder, {**facts, "n_frames": n_frames, "stats": stats})


def write_shard_summary(folder: Path, facts: Mapping) -> dict:
    """Write the last file of a shard: its facts with the sizes of the other files; returns these facts."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    facts = {**facts, "bytes": sizes}
    (folder / FACTS_FILE).write_text(json.dumps(facts))
    return facts


def read_shard_summary(shard: Path) -> dict | None:
    """Facts of a shard, or `None` if a file is missing or has another size than when it was written."""
    try:
        facts = read_json(shard / FACTS_FILE)
        whole = all((shard / name).stat().st_size == size for name, size in facts["bytes"].items())
    except (OSError, ValueError, KeyError):
        return None
    return facts if whole else None


def read_array(shard: Path, name: str) -> np.ndarray:
    """One of a shard's arrays."""
    with np.load(shard / ARRAYS_FILE) as arrays:
        return arrays[name]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What all episodes of a dataset have in common."""

    fps: int
    robot_type: str
    features: Mapping[str, dict]  # LeRobot's, videos included
    depth_max_m: Mapping[str, float]  # farthest depth kept, by depth column
    later_bytes: float = 0.0  # per frame, of columns to append: data files then stay near LeRobot's limit

    @property
    def video_keys(self) -> list[str]:
        """Columns that are videos."""
        return [key for key, feature in self.features.items() if feature["dtype"] == "video"]


def assemble_dataset(
    root: Path, layout: Layout, shard_of: Callable[[int], Path], facts: Sequence[dict]
) -> None:
    """Write a complete dataset from shards.

    Args:
        root (`Path`): Folder to fill, missing or empty.
        layout (`Layout`): Columns and their form.
        shard_of (`Callable`): Gives the folder of an episode.
        facts (`Sequence[dict]`): Of every episode, in order: `n_frames`, `instruction` and `stats`.

    Raises:
        OSError: If the disk is full, or a file does not hold the frames it should.
    """
    from lerobot.datasets.compute_stats import compute_episode_stats
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
    from lerobot.datasets.io_utils import write_info

    if root.exists():
        root.rmdir()  # LeRobot makes it
    meta = LeRobotDatasetMetadata.create(
        root.name, layout.fps, dict(layout.features), robot_type=layout.robot_type, root=root, use_videos=True
    )
    lengths = [known["n_frames"] for known in facts]
    places: list[dict] = [{} for _ in facts]
    for key in layout.video_keys:
        paths = [shard_of(episode) / f"{key}.mp4" for episode in range(len(facts))]
        videos = join_videos(meta, key, paths, lengths, layout.depth_max_m.get(key))
        for place, video in zip(places, videos, strict=True):
            place |= video
    write_info(meta.info, meta.root)
    try:
        for episode, (columns, place) in enumerate(_write_data(meta, layout.later_bytes, shard_of, facts)):
            stats = compute_episode_stats(columns, meta.features)
            for key, values in facts[episode]["stats"].items():
                stats[key] = {name: np.array(value) for name, value in values.items()}
            tasks = [facts[episode]["instruction"]]
            meta.save_episode(episode, lengths[episode], tasks, stats, place | places[episode])
    finally:
        meta.finalize()
    # LeRobot's order is that of a set, which differs from process to process.
    stats_path = root / "meta/stats.json"
    write_json(stats_path, dict(sorted(json.loads(stats_path.read_text()).items())))


def _write_data(
    meta: Any, later_bytes: float, shard_of: Callable[[int], Path], facts: Sequence[dict]
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, int]]]:
    """Write the data files; yields each episode's columns and place, as LeRobot's metadata names it."""
    import datasets
    import pyarrow.parquet as pq
    from lerobot.datasets.feature_utils import get_hf_features_from_features

    features = get_hf_features_from_features(meta.features)
    values = sum(int(np.prod(f["shape"])) for f in meta.features.values() if f["dtype"] != "video")
    sizes = [known["n_frames"] * (4 * values + later_bytes) for known in facts]  # before compression
    first = 0
    for chunk, file, start, stop in group_files(sizes, meta.data_files_size_in_mb * 1e6, meta.chunks_size):
        path = meta.root / meta.data_path.format(chunk_index=chunk, file_index=file)
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(path, features.arrow_schema, compression="zstd") as writer:
            for episode in range(start, stop):
                columns = _build_columns(meta, episode, facts[episode], shard_of(episode), first)
                rows = {key: columns[key] for key in features}
                writer.write_table(
                    datasets.Dataset.from_dict(rows, features=features).with_format("arrow")[:]
                )
                place = {"data/chunk_index": chunk, "data/file_index": file, "dataset_from_index": first}
                first += facts[episode]["n_frames"]
                yield columns, place | {"dataset_to_index": first}


def _build_columns(
    meta: Any, episode: int, facts: dict, shard: Path, first_frame: int
) -> dict[str, np.ndarray]:
    """Values of the plain columns of one episode, LeRobot's own ones included."""
    n_frames, task = facts["n_frames"], facts["instruction"]
    meta.save_episode_tasks([task])
    frames = np.arange(n_frames)
    own = {
        "timestamp": (frames / meta.fps).astype(np.float32),
        "frame_index": frames,
        "episode_index": np.full(n_frames, episode),
        "index": first_frame + frames,
        "task_index": np.full(n_frames, meta.get_task_index(task)),
    }
    plain = [key for key, feature in meta.features.items() if feature["dtype"] != "video" and key not in own]
    with np.load(shard / ARRAYS_FILE) as arrays:
        return {key: arrays[key] for key in plain} | own
