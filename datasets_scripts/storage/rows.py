"""A LeRobot v3 dataset as plain rows: Arrow columns, episode bounds and video segments, checked when opened.

LeRobot's own item reader turns every value of a row into a Python object first, which costs up to 100 ms for
a window of tracks. Here the same memory-mapped Arrow table is sliced directly (about 0.1 ms). Row numbers are
global frame numbers (`index` of the dataset) throughout.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.feature_utils import get_hf_features_from_features
from lerobot.datasets.io_utils import load_nested_dataset
from lerobot.datasets.utils import has_legacy_hub_download_metadata
from lerobot.utils.constants import HF_LEROBOT_HOME

from datasets_scripts.storage.dataset_folder import INFO_PATH, data_files, load_features
from datasets_scripts.storage.hub_download import HubFiles, open_hub_dataset

__all__ = [
    "ArrowColumn",
    "BrokenEpisodeError",
    "DatasetRows",
    "VideoSegments",
    "find_dataset",
    "parse_episodes",
]


class BrokenEpisodeError(ValueError):
    """An episode cannot be read, and others perhaps can.

    Attributes:
        path (`Path | None`): The file that is at fault.
    """

    def __init__(self, message: str, path: Path | None = None):
        super().__init__(message, path)  # both, so that it can be pickled
        self.path = path

    def __str__(self) -> str:
        return self.args[0]


class ArrowColumn:
    """One column of a memory-mapped Arrow table, read by row range without Python lists.

    Args:
        column (`pyarrow.ChunkedArray`): Scalars, or fixed-size lists (flat 1-D features).
    """

    def __init__(self, column: pa.ChunkedArray):
        self._chunks = column.chunks
        self._starts = np.cumsum([0] + [len(chunk) for chunk in self._chunks])
        self._views: dict[int, np.ndarray | None] = {}  # of chunks; `None` where numpy cannot look into one

    def read(self, rows: range) -> np.ndarray:
        """Values of some rows.

        Args:
            rows (`range`): Ascending global row numbers.

        Returns:
            `numpy.ndarray`: `(len(rows),)` for scalars, `(len(rows), size)` for lists, the stored dtype.
            Numbers are a view of the file: do not write.
        """
        if not rows:
            return self._chunk_values(0, 0, 0)
        start, stop = rows[0], rows[-1] + 1
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = int(np.searchsorted(self._starts, stop, side="left")) - 1
        parts = [
            self._chunk_values(
                chunk,
                max(start - self._starts[chunk], 0),
                min(stop, self._starts[chunk + 1]) - self._starts[chunk],
            )
            for chunk in range(first, last + 1)
        ]
        values = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return values[:: rows.step]

    def _chunk_values(self, chunk: int, start: int, stop: int) -> np.ndarray:
        if chunk not in self._views:
            whole = self._chunks[chunk]
            try:
                self._views[chunk] = _to_numpy(whole, zero_copy_only=True)
            except pa.ArrowInvalid:  # bits, text, pictures or missing values: converted at every read
                self._views[chunk] = None
        if self._views[chunk] is None:
            return _to_numpy(self._chunks[chunk].slice(start, stop - start), zero_copy_only=False)
        return self._views[chunk][start:stop]


def _to_numpy(array: pa.Array, zero_copy_only: bool) -> np.ndarray:
    if pa.types.is_fixed_size_list(array.type):  # flatten honours a slice, `.values` would not
        size = array.type.list_size
        return array.flatten().to_numpy(zero_copy_only=zero_copy_only).reshape(-1, size)
    return array.to_numpy(zero_copy_only=zero_copy_only)


@dataclasses.dataclass(frozen=True)
class VideoSegments:
    """Where each episode's frames lie in the video files of one key.

    Args:
        paths (`list[Path]`): Files, each once.
        file_of_episode (`numpy.ndarray`): `(episodes,)` position in `paths`.
        start_s (`numpy.ndarray`): `(episodes,)` float64, time of an episode's first frame within its file.
    """

    paths: list[Path]
    file_of_episode: np.ndarray
    start_s: np.ndarray


class DatasetRows:
    """Rows, episodes and files of one LeRobot v3 dataset, local or from the Hub.

    Pickling (worker processes started by spawn) carries the path only; the Arrow file is mapped again there.

    Args:
        repo_id_or_dir (`str` or `Path`): Dataset folder, or Hub id (`owner/name`, `owner/name@revision`).
        stream (`bool`): Look at a video file, and download it from the Hub, when `local` asks for it; not at
            all of them now.

    Attributes:
        root (`Path`): The folder.
        name (`str`): As given, for messages.
        hub (`HubFiles | None`): Where videos come from that are not in the folder yet; `None` where nothing
            is to be downloaded.
        features (`dict[str, dict]`): LeRobot features.
        fps (`int`): Frames per second.
        tasks (`list[str]`): Instruction by `task_index`.
        episode_starts, episode_stops (`numpy.ndarray`): `(episodes,)` int64 row bounds, stop exclusive.

    Raises:
        ValueError: If something is missing, damaged or truncated; names the file and the remedy.
    """

    def __init__(self, repo_id_or_dir: str | Path, stream: bool = False):
        self.name = str(repo_id_or_dir)
        self.root, files = find_dataset(self.name, videos=not stream)
        self.stream = stream
        self.hub: HubFiles | None = files if stream else None
        self._open()
        self._check_rows()

    def _open(self) -> None:
        features = load_features(self.root)  # says clearly what is wrong with meta/info.json
        for part in ("meta/tasks.parquet", "meta/episodes"):
            if not (self.root / part).exists():  # LeRobot would go looking on the Hub
                raise ValueError(f"dataset {self.name} lacks {self.root / part}; {RESTORE}")
        files = data_files(self.root)
        for path in files:
            _check_parquet(path)
        try:
            meta = LeRobotDatasetMetadata(self.root.name, root=self.root)
            table = load_nested_dataset(
                self.root / "data", features=get_hf_features_from_features(meta.features)
            )
        except (
            Exception
        ) as error:  # whatever LeRobot, datasets or Arrow raise: find the file that is at fault
            for path in [*files, *sorted((self.root / "meta").rglob("*.parquet"))]:
                _check_parquet(path, read=True)
            raise ValueError(f"dataset {self.name} cannot be read: {error}; {RESTORE}") from error
        self.meta, self.features, self.fps, self._table = meta, features, meta.fps, table
        episodes = meta.episodes.data
        self.episode_starts = episodes.column("dataset_from_index").to_numpy().astype(np.int64)
        self.episode_stops = episodes.column("dataset_to_index").to_numpy().astype(np.int64)
        by_index = dict(zip(meta.tasks["task_index"], meta.tasks.index, strict=True))
        self.tasks = [str(by_index[i]) for i in range(len(by_index))]
        self._columns: dict[str, ArrowColumn] = {}
        self._segments: dict[str, VideoSegments] = {}

    def _check_rows(self) -> None:
        """The index column must count the rows and the episode table must cover them."""
        index = self.column("index").read(range(len(self)))
        promised = int(self.episode_stops[-1]) if len(self.episode_stops) else 0
        if len(index) != promised or not np.array_equal(index, np.arange(len(index))):
            raise ValueError(
                f"dataset {self.name}: its data files hold {len(index)} frames but meta/episodes lists "
                f"{promised}, or their frame numbers do not count up; the dataset is incomplete: {RESTORE}"
            )

    def __len__(self) -> int:
        return len(self._table)

    @property
    def n_episodes(self) -> int:
        """Number of episodes."""
        return len(self.episode_starts)

    def column(self, key: str) -> ArrowColumn:
        """The Arrow column of a (non-video) feature."""
        if key not in self._columns:
            self._columns[key] = ArrowColumn(self._table.data.column(key))
        return self._columns[key]

    def episode_of(self, row: int) -> int:
        """Episode that holds a row."""
        return int(np.searchsorted(self.episode_starts, row, side="right")) - 1

    def video_segments(self, key: str) -> VideoSegments:
        """Files and start times of a video feature, one entry per episode.

        Raises:
            BrokenEpisodeError: If a file is missing or empty, unless videos are looked at singly; names it.
        """
        if key not in self._segments:  # asked for once per episode, of which there may be a million
            self._segments[key] = self._read_segments(key)
        for path in () if self.stream else self._segments[key].paths:
            self.local(path)
        return self._segments[key]

    def _read_segments(self, key: str) -> VideoSegments:
        episodes = self.meta.episodes.data
        columns = [
            episodes.column(f"videos/{key}/{part}").to_numpy()
            for part in ("chunk_index", "file_index", "from_timestamp")
        ]
        names = [(int(chunk), int(file)) for chunk, file in zip(*columns[:2], strict=True)]
        unique = sorted(set(names))
        paths = [
            self.root / self.meta.video_path.format(video_key=key, chunk_index=chunk, file_index=file)
            for chunk, file in unique
        ]
        position = {name: i for i, name in enumerate(unique)}
        return VideoSegments(
            paths, np.array([position[name] for name in names]), columns[2].astype(np.float64)
        )

    def local(self, path: Path) -> Path:
        """A video file of the dataset, downloaded if it is not here yet.

        Raises:
            BrokenEpisodeError: If there is no such file, or nothing in it; names it.
            HubError: If it has to be downloaded and the Hub cannot be reached.
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

    def without_folder(self, error: Exception) -> str:
        """Message of an error without the dataset's folder: it goes into files that are published."""
        return str(error).replace(f"{self.root}/", "").removeprefix(f"dataset {self.name}: ")

    def fetch_videos(self, episodes: Sequence[int] | None = None) -> None:
        """Downloads all video files of some episodes that are not here yet, several side by side.

        Args:
            episodes (`Sequence[int]`, *optional*): Which; all by default.

        Raises:
            ValueError: If the dataset lacks a file.
            HubError: If the Hub cannot be reached.
        """
        if self.hub is None:
            return
        paths = set()
        for key in self.meta.video_keys:
            segments = self.video_segments(key)
            used = segments.file_of_episode if episodes is None else segments.file_of_episode[list(episodes)]
            paths |= {segments.paths[file] for file in used}
        missing = sorted(path.relative_to(self.root).as_posix() for path in paths if not path.exists())
        self.hub.fetch(missing)

    def __getstate__(self) -> dict:
        return {"name": self.name, "root": self.root, "stream": self.stream, "hub": self.hub}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()


def parse_episodes(text: str, n_episodes: int) -> list[int]:
    """Episodes that a command line names: `0:100,205` -> 0 to 99 and 205; `:10` and `-5:` as in Python.

    Args:
        text (`str`): Numbers and ranges (stop exclusive), comma-separated.
        n_episodes (`int`): Episodes of the dataset.

    Returns:
        `list[int]`: Ascending, each once.

    Raises:
        ValueError: If it is not of this form, or an episode does not exist.
    """
    chosen: set[int] = set()
    for part in text.split(","):
        first, colon, stop = part.strip().partition(":")
        try:
            if colon:
                bounds = slice(int(first) if first else None, int(stop) if stop else None)
                found = range(n_episodes)[bounds]
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


RESTORE = "download the dataset again, or make it again with the script that made it"


def find_dataset(name: str, videos: bool) -> tuple[Path, HubFiles | None]:
    """Folder of a dataset; one of the Hub is downloaded, unless LeRobot has recorded it on this machine.

    Args:
        name (`str`): Folder, or Hub id.
        videos (`bool`): Whether to download the videos too.

    Returns:
        `tuple`: The folder; and, of a dataset of the Hub, its files there.

    Raises:
        ValueError: If there is no such dataset.
        HubError: If the Hub cannot be reached.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve(), None
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ValueError(f"dataset {name} is neither a folder nor a Hub id (owner/name)")
    recorded = HF_LEROBOT_HOME / name
    if (recorded / INFO_PATH).is_file() and not has_legacy_hub_download_metadata(recorded):
        return recorded.resolve(), None
    return open_hub_dataset(name, videos)


def _check_parquet(path: Path, read: bool = False) -> None:
    """Raise a `ValueError` that names a damaged parquet file; `read` decodes it, not only its footer."""
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups if read else 0):
                file.read_row_group(group)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"data file {path} is damaged or truncated ({error}); {RESTORE}") from error
