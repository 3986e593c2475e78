"""Join recorded episodes into one LeRobot v3 dataset.

LeRobot's recorder encodes and concatenates in one process, copying the whole video file for every episode.
Here episodes arrive encoded (`shards.py`), each file is written once, and LeRobot's own metadata class keeps
the books.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datasets_scripts.columns import data_files, write_json_atomic
from datasets_scripts.storage.shards import ARRAYS
from datasets_scripts.storage.video_writing import join_videos, lerobot_depth_encoder, lerobot_rgb_encoder

__all__ = ["Layout", "assemble_dataset", "check_dataset", "video_sizes"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What all episodes of a dataset have in common.

    Args:
        fps (`int`): Frames per second.
        robot_type (`str`): Name of the robot.
        features (`Mapping[str, dict]`): LeRobot features of the columns, videos included.
        depth_max_m (`Mapping[str, float]`): Farthest depth kept, by depth column.
        later_bytes (`float`): Size per frame of the columns that will be appended, so that data files stay
            near LeRobot's limit with them.
    """

    fps: int
    robot_type: str
    features: Mapping[str, dict]
    depth_max_m: Mapping[str, float]
    later_bytes: float = 0.0

    @property
    def video_keys(self) -> list[str]:
        """Columns that are videos."""
        return [key for key, feature in self.features.items() if feature["dtype"] == "video"]


def assemble_dataset(
    root: Path,
    layout: Layout,
    shard_of: Callable[[int], Path],
    facts: Sequence[dict],
) -> None:
    """Write a complete dataset from shards.

    Args:
        root (`Path`): Folder to create.
        layout (`Layout`): Columns and their form.
        shard_of (`Callable`): Folder of an episode.
        facts (`Sequence[dict]`): Facts of every episode, in order: `n_frames`, `instruction` and `stats`.

    Raises:
        OSError: If the disk is full, or a file does not hold the frames it should.
    """
    from lerobot.datasets.compute_stats import compute_episode_stats
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
    from lerobot.datasets.io_utils import write_info

    meta = LeRobotDatasetMetadata.create(
        root.name, layout.fps, dict(layout.features), robot_type=layout.robot_type, root=root, use_videos=True
    )
    lengths = [episode["n_frames"] for episode in facts]
    videos = {}
    for key in layout.video_keys:
        paths = [shard_of(episode) / f"{key}.mp4" for episode in range(len(facts))]
        videos[key] = join_videos(meta, key, paths, lengths)
        is_depth = key in meta.depth_keys
        if is_depth:
            meta.features[key]["info"]["depth_unit"] = "m"
        encoder = lerobot_depth_encoder(layout.depth_max_m[key]) if is_depth else lerobot_rgb_encoder()
        meta.update_video_info(key, encoder)
    write_info(meta.info, meta.root)
    data = _DataWriter(meta, layout.later_bytes)
    try:
        for episode, known in enumerate(facts):
            meta.save_episode_tasks([known["instruction"]])
            columns = _columns(episode, known, shard_of(episode), meta, layout, data.n_frames)
            place = data.write(columns)
            for key in videos:
                place |= videos[key][episode]
            stats = compute_episode_stats(columns, meta.features)
            for key, values in known["stats"].items():
                stats[key] = {name: np.array(value) for name, value in values.items()}
            meta.save_episode(episode, known["n_frames"], [known["instruction"]], stats, place)
    finally:
        data.close()
        meta.finalize()
    # LeRobot's order is that of a set, another one in every process: the same dataset has the same bytes.
    stats_path = root / "meta/stats.json"
    write_json_atomic(stats_path, dict(sorted(json.loads(stats_path.read_text()).items())))


def _columns(
    episode: int, known: dict, shard: Path, meta: Any, layout: Layout, first_frame: int
) -> dict[str, np.ndarray]:
    """Values of the plain columns of one episode, LeRobot's own ones included."""
    n_frames = known["n_frames"]
    frames = np.arange(n_frames)
    plain = [key for key in layout.features if key not in layout.video_keys]
    with np.load(shard / ARRAYS) as arrays:
        columns = {key: arrays[key] for key in plain}
    return {
        **columns,
        "timestamp": (frames / meta.fps).astype(np.float32),
        "frame_index": frames,
        "episode_index": np.full(n_frames, episode),
        "index": first_frame + frames,
        "task_index": np.full(n_frames, meta.get_task_index(known["instruction"])),
    }


class _DataWriter:
    """Writes episodes as row groups of files that stay near LeRobot's size limit."""

    def __init__(self, meta: Any, later_bytes: float):
        self.n_frames = 0
        self._meta = meta
        sizes = [4 * int(np.prod(f["shape"])) for f in meta.features.values() if f["dtype"] != "video"]
        bytes_per_frame = sum(sizes) + later_bytes  # before compression
        self._frames_per_file = max(1, int(meta.data_files_size_in_mb * 1e6 / bytes_per_frame))
        self._chunk, self._file, self._frames_in_file = 0, 0, 0
        self._writer: Any = None

    def write(self, columns: dict[str, np.ndarray]) -> dict[str, int]:
        """Write one episode; returns where it went, as LeRobot's episode metadata."""
        import datasets
        import pyarrow.parquet as pq
        from lerobot.datasets.feature_utils import get_hf_features_from_features
        from lerobot.datasets.utils import update_chunk_file_indices

        n_frames = len(columns["index"])
        if self._frames_in_file and self._frames_in_file + n_frames > self._frames_per_file:
            self.close()
            self._chunk, self._file = update_chunk_file_indices(
                self._chunk, self._file, self._meta.chunks_size
            )
            self._frames_in_file = 0
        hf_features = get_hf_features_from_features(self._meta.features)
        rows = {key: columns[key] for key in hf_features}
        table = datasets.Dataset.from_dict(rows, features=hf_features).with_format("arrow")[:]
        if self._writer is None:
            path = self._meta.root / self._meta.data_path.format(
                chunk_index=self._chunk, file_index=self._file
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(path, table.schema, compression="zstd")
        self._writer.write_table(table)
        place = {
            "data/chunk_index": self._chunk,
            "data/file_index": self._file,
            "dataset_from_index": self.n_frames,
            "dataset_to_index": self.n_frames + n_frames,
        }
        self.n_frames += n_frames
        self._frames_in_file += n_frames
        return place

    def close(self) -> None:
        """Finish the current file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def video_sizes(root: Path) -> dict[str, int]:
    """Bytes of every video file, by its place in the dataset; kept in the provenance."""
    return {str(path.relative_to(root)): path.stat().st_size for path in sorted(root.glob("videos/**/*.mp4"))}


def check_dataset(root: Path, n_episodes: int, video_bytes: Mapping[str, int]) -> None:
    """Quick check that a finished dataset is still whole: counts, data files' footers, sizes of the videos.

    Args:
        root (`Path`): Folder.
        n_episodes (`int`): Episodes it should hold.
        video_bytes (`Mapping[str, int]`): What `video_sizes` gave when it was made.

    Raises:
        ValueError: Names the file that is missing or damaged and the remedy.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    remedy = f"delete {root} and run the same command again"
    try:
        info = json.loads((root / "meta/info.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{root}/meta/info.json is damaged ({error}); {remedy}") from error
    if info["total_episodes"] != n_episodes:
        raise ValueError(f"{root} holds {info['total_episodes']} episodes, not {n_episodes}; {remedy}")
    n_rows = 0
    for path in data_files(root):
        try:
            n_rows += pq.read_metadata(path).num_rows
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"data file {path} is damaged ({error}); {remedy}") from error
    if n_rows != info["total_frames"]:
        raise ValueError(f"the data files of {root} hold {n_rows} of {info['total_frames']} frames; {remedy}")
    for name, size in video_bytes.items():
        path = root / name
        found = path.stat().st_size if path.exists() else None
        if found != size:
            raise ValueError(f"video file {path} has {found or 'no'} bytes instead of {size}; {remedy}")
