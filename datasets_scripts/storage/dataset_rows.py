"""Read a LeRobot v3 dataset as rows: columns, episode bounds and video segments, checked when opened.

LeRobot's own item reader turns every value of a row into a Python object, which costs up to 100 ms for a
window of tracks; slicing a memory-mapped Arrow table takes about 0.1 ms. Row numbers are global frame
numbers (`index` of the dataset).
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from lerobot.datasets.io_utils import load_stats, load_tasks
from lerobot.datasets.utils import DatasetInfo, has_legacy_hub_download_metadata
from lerobot.utils.constants import HF_LEROBOT_HOME

from datasets_scripts.storage.atomic import read_json
from datasets_scripts.storage.cache.row_table import ArrowColumn, RowTable
from datasets_scripts.storage.dataset_folder import (
    INFO_PATH,
    RESTORE,
    data_files,
    is_dataset_folder,
    load_info,
    refuse_patterns,
)
from datasets_scripts.storage.hub.download import HubFiles, is_hub_id, open_hub_dataset

__all__ = [
    "ArrowColumn",
    "BrokenEpisodeError",
    "DatasetRows",
    "VideoSegments",
    "dataset_name",
    "find_dataset",
    "find_folder",
    "parse_episodes",
    "pin_commit",
]

TASKS = "meta/tasks.parquet"


class BrokenEpisodeError(ValueError):
    """One episode cannot be read; `path` is the faulty file, if known."""

    def __init__(self, message: str, path: Path | None = None):
        super().__init__(message, path)  # both, for pickling
        self.path = path

    def __str__(self) -> str:
        return self.args[0]


@dataclasses.dataclass(frozen=True)
class VideoSegments:
    """Where each episode's frames lie in the video files of one key."""

    paths: list[Path]  # distinct
    file_of_episode: np.ndarray  # (episodes,) positions in `paths`
    start_s: np.ndarray  # (episodes,) float64, times of the first frames within their files
    stop_s: np.ndarray  # (episodes,) float64, times after the last frames


class DatasetRows:
    """Rows, episodes and files of one LeRobot v3 dataset, local or from the Hub.

    Pickling carries the path only; a spawned worker maps the Arrow file again.

    Args:
        repo_id_or_dir (`str` or `Path`): Dataset folder, or Hub id (`owner/name`, `owner/name@revision`).
        stream (`bool`): Check and download each video file when `local` asks for it, not all of them now.

    Attributes:
        root (`Path`): The folder.
        name (`str`): As given, for messages.
        version (`str`): What tells its states apart beside the metadata, if anything.
        commit (`str | None`): That of the Hub, if it comes from there.
        hub (`HubFiles | None`): Source of videos that are not in the folder yet, if any.
        info (`DatasetInfo`): LeRobot's `meta/info.json`.
        features (`dict[str, dict]`): LeRobot features.
        fps (`int`): Frames per second.
        instructions (`dict[int, str]`): Texts by `task_index`.
        tasks (`list[str]`): Those texts, in the order of their numbers.
        episode_starts, episode_stops (`numpy.ndarray`): `(episodes,)` int64 row bounds, stop exclusive.

    Raises:
        ValueError: If something is missing, damaged or truncated; names the file and the remedy.
    """

    version = ""
    commit: str | None = None

    def __init__(self, repo_id_or_dir: str | Path, stream: bool = False):
        self.name = str(repo_id_or_dir)
        self.root, hub = find_dataset(self.name, videos=not stream)
        self.stream, self.hub = stream, hub if stream else None
        self.commit = hub and hub.revision
        self._open()
        self._check_rows()

    def _load_info(self) -> dict:
        """`meta/info.json`, with the other metadata beside it."""
        refuse_patterns(self.root)
        info = load_info(self.root)
        for part in (TASKS, "meta/episodes"):
            if not (self.root / part).exists():  # LeRobot would search the Hub
                raise ValueError(f"dataset {self.name} lacks {self.root / part}; {RESTORE}")
        return info

    def _keep_metadata(self, episodes: pa.Table, tasks: pd.DataFrame | None) -> None:
        """Sets what follows from `info`, the episode table and the instructions."""
        self.features, self.fps, self._episodes = self.info.features, self.info.fps, episodes
        self.episode_starts, self.episode_stops = (
            episodes.column(f"dataset_{end}_index").to_numpy().astype(np.int64) for end in ("from", "to")
        )
        self.instructions = read_instructions(tasks, self.root)
        self.tasks = list(self.instructions.values())
        self._segments: dict[str, VideoSegments] = {}

    def _open(self) -> None:
        info, files = self._load_info(), data_files(self.root)
        try:
            self.info = DatasetInfo.from_dict(info)
            table = RowTable(self.root, self.info.features, files)
            tasks = load_tasks(self.root)
            load_stats(self.root)  # damaged ones would stop LeRobot's tools later
        except Exception as error:  # whatever LeRobot, datasets or Arrow raise: find the faulty file
            for path in [*files, *sorted((self.root / "meta").rglob("*.parquet"))]:
                _check_parquet(path)
            for path in sorted((self.root / "meta").glob("*.json")):
                read_json(path)
            raise ValueError(f"dataset {self.name} cannot be read: {error}; {RESTORE}") from error
        self._table, self._columns = table, {}  # columns by key, as they are asked for
        self._keep_metadata(table.episodes, tasks)

    def _check_rows(self) -> None:
        """Rows must count up, the episode table must cover them, and their instructions must exist."""
        promised = int(self.episode_stops[-1]) if len(self.episode_stops) else 0
        if len(self) != promised or not self._counts_up():
            raise ValueError(
                f"dataset {self.name}: its data files hold {len(self)} frames but meta/episodes lists "
                f"{promised}, or their frame numbers do not count up; the dataset is incomplete: {RESTORE}"
            )
        self._check_counts()
        used = pc.unique(self._table.numbers.column("task_index")).to_pylist()
        if unknown := sorted(set(used) - self.instructions.keys()):
            raise ValueError(
                f"dataset {self.name}: frames have task_index {unknown[:5]}, but {self.root / TASKS} does "
                f"not; {RESTORE}"
            )

    def _check_counts(self) -> None:
        """Episodes must follow each other, and the counts of `info.json` must be theirs."""
        bounds = np.stack([self.episode_starts, self.episode_stops])
        if bounds[0, :1].any() or (bounds[0, 1:] != bounds[1, :-1]).any() or (bounds[0] > bounds[1]).any():
            raise ValueError(
                f"dataset {self.name}: the episodes of meta/episodes do not follow each other "
                f"(dataset_from_index, dataset_to_index); {RESTORE}"
            )
        found = {"total_frames": len(self), "total_episodes": self.n_episodes}
        for name, count in found.items():
            if (said := getattr(self.info, name)) != count:
                raise ValueError(
                    f"dataset {self.name}: {INFO_PATH} says {name} {said}, but there are {count}; the "
                    f"dataset is incomplete: {RESTORE}, or correct the number"
                )

    def _counts_up(self) -> bool:
        index, first = self._table.numbers.column("index"), 0
        for chunk in index.chunks:  # all at once would take memory
            if not np.array_equal(chunk.to_numpy(zero_copy_only=False), first + np.arange(len(chunk))):
                return False
            first += len(chunk)
        return True

    def __len__(self) -> int:
        return len(self._table.numbers)

    @property
    def n_episodes(self) -> int:
        """Number of episodes."""
        return len(self.episode_starts)

    def column(self, key: str) -> ArrowColumn:
        """The Arrow column of a (non-video) feature."""
        if key not in self._columns:
            self._columns[key] = self._table.column(key)
        return self._columns[key]

    def episode_of(self, row: int) -> int:
        """Episode that holds a row."""
        return int(np.searchsorted(self.episode_starts, row, side="right")) - 1

    def rows_of(self, episode: int) -> range:
        """Rows of an episode."""
        return range(int(self.episode_starts[episode]), int(self.episode_stops[episode]))

    def instruction_of(self, row: int) -> str:
        """Instruction that a row belongs to."""
        return self.instructions[int(self.column("task_index").read(range(row, row + 1))[0])]

    def video_segments(self, key: str) -> VideoSegments:
        """Files and start times of a video feature; without `stream`, checked as by `local`."""
        if key not in self._segments:  # asked for once per episode, of which there may be a million
            self._segments[key] = self._read_segments(key)
        for path in () if self.stream else self._segments[key].paths:
            self.local(path)
        return self._segments[key]

    def _read_segments(self, key: str) -> VideoSegments:
        parts = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
        chunks, files, starts_s, stops_s = (
            self._episodes.column(f"videos/{key}/{part}").to_numpy() for part in parts
        )
        numbers, file_of_episode = np.unique(np.stack([chunks, files]), axis=1, return_inverse=True)
        paths = [
            self.root / self.info.video_path.format(video_key=key, chunk_index=chunk, file_index=file)
            for chunk, file in numbers.T.tolist()
        ]
        bounds_s = starts_s.astype(np.float64), stops_s.astype(np.float64)
        return VideoSegments(paths, file_of_episode.reshape(-1), *bounds_s)

    def video_files(self, episodes: Sequence[int]) -> set[Path]:
        """Video files of some episodes, those to be downloaded included."""
        videos = [key for key, feature in self.features.items() if feature["dtype"] == "video"]
        segments = [self.video_segments(key) for key in videos]
        return {known.paths[file] for known in segments for file in known.file_of_episode[list(episodes)]}

    def local(self, path: Path) -> Path:
        """The same path, downloaded if necessary.

        Raises:
            BrokenEpisodeError: If the file does not exist or is empty; names it.
            HubError: If the Hub cannot be reached.
        """
        if self.hub is not None and not path.exists():
            try:
                self.hub.fetch([path.relative_to(self.root).as_posix()])
            except ValueError as error:
                raise BrokenEpisodeError(str(error), path) from error
        if not path.exists() or path.stat().st_size == 0:
            raise BrokenEpisodeError(
                f"dataset {self.name}: video file {path} is missing or empty; {RESTORE}", path
            )
        return path

    def fetch_videos(self, episodes: Sequence[int]) -> None:
        """Download the missing video files of some episodes in parallel; raises as `HubFiles.fetch`."""
        if self.hub is not None:
            missing = [path for path in sorted(self.video_files(episodes)) if not path.exists()]
            self.hub.fetch([path.relative_to(self.root).as_posix() for path in missing])

    def strip_folder(self, error: Exception) -> str:
        """Message of an error without the dataset's folder, for files that are published."""
        return str(error).replace(f"{self.root}/", "").removeprefix(f"dataset {self.name}: ")

    def __getstate__(self) -> dict:
        return {name: getattr(self, name) for name in ("name", "root", "stream", "hub", "commit")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()


def parse_episodes(text: str, n_episodes: int) -> list[int]:
    """Distinct, ascending episodes: `0:100,205` -> 0 to 99 and 205; `:10` and `-5:` as in Python.

    Raises:
        ValueError: If `text` does not have this form, or an episode does not exist.
    """
    chosen: set[int] = set()
    for part in text.split(","):
        first, colon, stop = part.strip().partition(":")
        try:
            if colon:
                found = range(n_episodes)[int(first) if first else None : int(stop) if stop else None]
            else:
                found = [range(n_episodes)[int(first)]]
        except (ValueError, IndexError):
            found = ()
        if not found:
            raise ValueError(
                f"--episodes: '{part}' names none of the episodes 0 to {n_episodes - 1}; give numbers and "
                "ranges such as 0:100,205"
            )
        chosen.update(found)
    return sorted(chosen)


def dataset_name(name: str) -> str:
    """Last part of a folder, URL or Hub id, without the revision: `owner/name@revision` -> `name`."""
    last = Path(name).name
    return last.partition("@")[0] or last


def pin_commit(name: str, commit: str | None) -> str:
    """A Hub id at a commit, if one is given and it names none itself: a branch moves. Other names stay."""
    found = re.fullmatch(r"((?:hf://datasets/)?[\w.-]+/[\w.-]+)(@.+)?", name)
    if not commit or not found or Path(name).is_dir() or re.fullmatch("@[0-9a-f]{40}", found[2] or ""):
        return name
    return f"{found[1]}@{commit}"


def find_dataset(name: str, videos: bool) -> tuple[Path, HubFiles | None]:
    """Folder of a dataset, and its files on the Hub if it is downloaded.

    Args:
        name (`str`): Folder, or Hub id; one that LeRobot has recorded on this machine is not downloaded.
        videos (`bool`): Whether to download the videos too.

    Raises:
        ValueError: If there is no such dataset.
        HubError: If the Hub cannot be reached.
    """
    folder = find_folder(name)
    return open_hub_dataset(name, videos) if folder is None else (folder, None)


def find_folder(name: str) -> Path | None:
    """Folder of a dataset on this machine, one that LeRobot has recorded included; `None` for a Hub id.

    Raises:
        ValueError: If `name` is neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if not is_hub_id(name.partition("@")[0]):  # it may name a revision
        raise ValueError(f"dataset {name} is neither a folder nor a Hub id (owner/name)")
    recorded = HF_LEROBOT_HOME / name
    if is_dataset_folder(recorded) and not has_legacy_hub_download_metadata(recorded):
        return recorded.resolve()
    return None


def read_instructions(tasks: pd.DataFrame | None, root: Path) -> dict[int, str]:
    """Instructions of a dataset by `task_index`; numbers may have gaps, and rows any order.

    LeRobot writes the texts as the table's index; other tools write them as a column `task`.

    Raises:
        ValueError: If the table has no texts, or a number twice; names the file and the remedy.
    """
    tasks = pd.DataFrame() if tasks is None else tasks
    texts = list(tasks.get("task", tasks.index))
    numbers = list(tasks.get("task_index", []))
    if not (
        all(isinstance(text, str) for text in texts)
        and all(isinstance(number, (int, np.integer)) for number in numbers)
        and len(set(numbers)) == len(texts) > 0
    ):
        raise ValueError(
            f"{root / TASKS} must have one row per instruction: a text in `task` (index or column) and "
            f"its own whole number in `task_index`. It begins with {texts[:3]} and {numbers[:3]}: write the "
            "texts of the instructions there"
        )
    return dict(sorted(zip(map(int, numbers), texts, strict=True)))


def _check_parquet(path: Path) -> None:
    """Raise a `ValueError` that names a damaged parquet file."""
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                file.read_row_group(group)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"data file {path} is damaged or truncated ({error}); {RESTORE}") from error
