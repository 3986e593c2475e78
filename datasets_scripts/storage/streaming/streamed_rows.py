"""Read a dataset that does not lie on this machine as rows: each file is downloaded when a row of it is read.

LeRobot's `StreamingLeRobotDataset` (0.6.1) gives frames one after the other, so a run could not resume at a
step, and it seeks in videos by dataset time, which is another frame in every video file but the first
(github.com/huggingface/lerobot/issues/4524). Here rows and frames are read by number, as from a folder.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import re
import threading
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets.table import table_cast
from filelock import FileLock
from lerobot.datasets.feature_utils import get_hf_features_from_features
from lerobot.datasets.io_utils import load_tasks
from lerobot.datasets.utils import DatasetInfo

from datasets_scripts.storage.atomic import write_whole_folder
from datasets_scripts.storage.cache.cache_folder import FOR_ALL_USERS, cache_base
from datasets_scripts.storage.dataset_folder import episode_files
from datasets_scripts.storage.dataset_rows import (
    RESTORE,
    TASKS,
    ArrowColumn,
    BrokenEpisodeError,
    DatasetRows,
    dataset_name,
)
from datasets_scripts.storage.frame_cache import OnDemandFrames
from datasets_scripts.storage.statistics import pool_statistics
from datasets_scripts.storage.streaming.file_store import FileStore
from datasets_scripts.storage.streaming.remote_files import RemoteFiles

__all__ = ["StreamedFrames", "StreamedRows", "open_store"]

MAX_OPEN_TABLES = 64  # per process; mapped, not in memory
BATCH_ROWS = 1024  # converted at a time
TRIES = 3  # another process may remove a file between its download and its opening


def open_store(limit_gb: float) -> FileStore:
    """The folder for streamed files: `streams` in `$FORESIGHT_CACHE` or `~/.cache/foresight`."""
    return FileStore(cache_base() / "streams", int(limit_gb * 1e9))


class StreamedRows(DatasetRows):
    """Rows, episodes and files of a LeRobot v3 dataset elsewhere; only `meta` is downloaded at once.

    A data file is kept as an Arrow file, which is larger and which all processes map instead of each
    decompressing it. What would need all rows is checked file by file when it is downloaded.

    Args:
        name (`str`): See `RemoteFiles`.
        store (`FileStore`): Where the files are kept for a while.

    Raises:
        ValueError: If the dataset is missing, or its metadata are damaged.
        HubError: If it cannot be reached.
    """

    def __init__(self, name: str | Path, store: FileStore):
        self.name, self.store = str(name), store
        self.stream, self.hub = True, None
        self.remote = RemoteFiles(self.name)
        self.version, self.commit = self.remote.digest, self.remote.commit
        label = re.sub(r"[^\w.-]+", "_", dataset_name(self.name))
        self.root = store.folder / f"{label}-{self.version}"
        with FileLock(store.folder / f".{self.root.name}.lock", mode=FOR_ALL_USERS):
            if not (self.root / "meta").exists():
                with write_whole_folder(self.root / "meta") as folder:
                    self.remote.download_metadata(folder)
        self._open()
        self._check_counts()

    def _open(self) -> None:
        info = self._load_info()
        try:
            self.info, tasks = DatasetInfo.from_dict(info), load_tasks(self.root)
            episodes = _read_episodes(self.root)
            numbers = [episodes.column(f"data/{part}_index").to_numpy() for part in ("chunk", "file")]
        except Exception as error:  # whatever LeRobot, datasets or Arrow raise
            raise ValueError(f"the metadata of dataset {self.name} cannot be read: {error}") from error
        self._keep_metadata(episodes, tasks)
        distinct, file_of_episode = np.unique(np.stack(numbers), axis=1, return_inverse=True)
        self._data_file = file_of_episode.reshape(-1)  # (episodes,) positions in `_data_places`
        self._data_places = [
            self.info.data_path.format(chunk_index=chunk, file_index=file)
            for chunk, file in distinct.T.tolist()
        ]
        self._tables: collections.OrderedDict[int, dict[str, ArrowColumn]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self.episode_stops[-1]) if len(self.episode_stops) else 0

    def column(self, key: str) -> "StreamedColumn":
        """Values of a (non-video) feature, of rows of one episode at a time."""
        return StreamedColumn(self, key)

    def read_column(self, key: str, rows: range) -> np.ndarray:
        """Values of ascending rows of one episode, as of [`ArrowColumn`]."""
        file = int(self._data_file[self.episode_of(rows[0])])
        first = self._rows_of_data_file(file).start
        with self._lock:
            column = self._open_table(file)[key]
            return column.read(range(rows[0] - first, rows[-1] + 1 - first, rows.step))

    def _rows_of_data_file(self, file: int) -> range:
        episodes = np.flatnonzero(self._data_file == file)
        return range(int(self.episode_starts[episodes[0]]), int(self.episode_stops[episodes[-1]]))

    def _open_table(self, file: int) -> dict[str, ArrowColumn]:
        """Columns of a data file by key, mapped; those of removed files are closed."""
        if file not in self._tables:
            for known in [known for known in self._tables if not self._data_path(known).exists()]:
                del self._tables[known]
            while len(self._tables) >= MAX_OPEN_TABLES:
                self._tables.popitem(last=False)
            self._tables[file] = self._map_table(file)
        self._tables.move_to_end(file)
        return self._tables[file]

    def _map_table(self, file: int) -> dict[str, ArrowColumn]:
        path = self._data_path(file)
        for _ in range(TRIES):
            self.local(path)
            with contextlib.suppress(FileNotFoundError):
                table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
                return {key: ArrowColumn(table.column(key)) for key in table.column_names}
        raise self._too_small(path)

    def _too_small(self, path: Path) -> BrokenEpisodeError:
        return BrokenEpisodeError(
            f"dataset {self.name}: {path.relative_to(self.root)} was removed before it could be read, "
            f"{TRIES} times: raise data.streaming_disk_gb",
            path,
        )

    def _data_path(self, file: int) -> Path:
        """Where a data file is kept."""
        return (self.root / self._data_places[file]).with_suffix(".arrow")

    @functools.cached_property
    def _places(self) -> dict[Path, tuple[str, int | None]]:
        """Place of every file that episodes name, and the number of a data file, by the path here."""
        places = {self._data_path(file): (place, file) for file, place in enumerate(self._data_places)}
        for key in (key for key, feature in self.features.items() if feature["dtype"] == "video"):
            for path in self.video_segments(key).paths:
                places[path] = (path.relative_to(self.root).as_posix(), None)
        return places

    def files_of(self, episode: int, keys: Iterable[str]) -> tuple[Path, ...]:
        """Files here that hold the rows of an episode and its frames of some features."""
        segments = [self.video_segments(key) for key in keys if self.features[key]["dtype"] == "video"]
        videos = [known.paths[known.file_of_episode[episode]] for known in segments]
        return (self._data_path(int(self._data_file[episode])), *videos)

    def runs_of(self, keys: Iterable[str], episodes: np.ndarray) -> list[range]:
        """Places in `episodes` (ascending, `(E,)`) of runs that share all files of rows and some features."""
        videos = [key for key in keys if self.features[key]["dtype"] == "video"]
        files = [self._data_file, *(self.video_segments(key).file_of_episode for key in videos)]
        changes = np.diff(np.stack(files)[:, episodes], axis=1).any(0)
        bounds = [0, *(np.flatnonzero(changes) + 1).tolist(), len(episodes)]
        return [range(start, stop) for start, stop in itertools.pairwise(bounds)]

    def bytes_of(self, path: Path) -> int:
        """Room that a file needs here while it is made.

        Raises:
            BrokenEpisodeError: If it was not there when the dataset was opened.
        """
        place, file = self._places[path]
        if place not in self.remote.files or not self.remote.files[place].size:
            raise BrokenEpisodeError(
                f"dataset {self.name}: the file {place} is missing or empty at {self.remote.url}; {RESTORE}",
                path,
            )
        size = self.remote.files[place].size
        if file is None:
            return size
        width, is_variable = 0, False
        for feature in self.features.values():
            if feature["dtype"] in ("string", "image"):
                is_variable = True
            elif feature["dtype"] != "video":
                width += np.dtype(feature["dtype"]).itemsize * int(np.prod(feature["shape"]))
        # Parquet beside Arrow while one becomes the other; Arrow's own headers.
        table = int(1.02 * len(self._rows_of_data_file(file)) * width) + size * is_variable + 2**15
        return size + table

    def fetch(self, path: Path, keep: Collection[Path] | None = None) -> bool:
        """Downloads a file if it is not here; see `FileStore.fetch` for `keep` and the result.

        Raises:
            BrokenEpisodeError: If it is missing, has changed or is damaged; names it.
            HubError: If it cannot be reached.
        """
        if self.store.use(path):
            return True
        write = functools.partial(self._write, *self._places[path])
        try:
            return self.store.fetch(path, self.bytes_of(path), write, keep)
        except BrokenEpisodeError:
            raise
        except ValueError as error:
            raise BrokenEpisodeError(str(error), path) from error

    def local(self, path: Path) -> Path:
        """The same path, downloaded if necessary; raises as `fetch`."""
        self.fetch(path)
        return path

    def _write(self, place: str, file: int | None, target: Path) -> None:
        if file is None:
            self.remote.download(place, target)
            return
        parquet = target.with_name(f"{target.name}.parquet")
        self.remote.download(place, parquet)
        self._convert(place, parquet, self._rows_of_data_file(file), target)

    def _convert(self, place: str, parquet: Path, rows: range, target: Path) -> None:
        """Writes the rows of a data file as Arrow; they must be those that the episodes promise."""
        schema = get_hf_features_from_features(self.features).arrow_schema
        where = f"dataset {self.name}: data file {place}"
        try:
            with pq.ParquetFile(parquet) as source, pa.ipc.new_file(str(target), schema) as writer:
                row = rows.start
                for batch in source.iter_batches(BATCH_ROWS):
                    table = table_cast(pa.Table.from_batches([batch]), schema)
                    index = table.column("index").to_numpy()
                    if not np.array_equal(index, np.arange(row, row + len(index))):
                        raise ValueError(f"its frame numbers do not count up from {rows.start}")
                    used = pc.unique(table.column("task_index")).to_pylist()
                    if unknown := sorted(set(used) - self.instructions.keys()):
                        raise ValueError(f"it has task_index {unknown[:5]}, but {TASKS} does not")
                    writer.write_table(table)
                    row += len(index)
            if row != rows.stop:
                raise ValueError(f"it has {row - rows.start} rows, and its episodes {len(rows)}")
        except (ValueError, TypeError, pa.ArrowException, KeyError) as error:  # a cast fails with TypeError
            raise BrokenEpisodeError(f"{where} cannot be used: {error}; {RESTORE}") from error

    def read_statistics(self, key: str, episodes: np.ndarray) -> dict[str, np.ndarray]:
        """`mean`, `std`, `min` and `max` `(size,)` of a feature over some episodes, from `meta/episodes`.

        Raises:
            ValueError: If they are not there, or not finite.
        """
        names = ("mean", "std", "min", "max", "count")
        columns = [f"stats/{key}/{name}" for name in names]
        try:
            tables = [pq.read_table(path, columns=columns) for path in episode_files(self.root)]
            table = pa.concat_tables(tables)
            values = [np.array(table.column(name).to_pylist(), np.float64)[episodes] for name in columns]
        except (KeyError, ValueError, IndexError, pa.ArrowException):
            raise ValueError(
                f"dataset {self.name} cannot be streamed: its meta/episodes have no {columns[0]} of every "
                "episode, and statistics of all rows would need all files. Record or convert it with LeRobot "
                "0.4 or newer, or train without data.streaming"
            ) from None
        *parts, count = values  # each (episodes, size), but the count (episodes, 1)
        finite = np.isfinite(parts).all((0, 2))
        if not finite.all():
            bad = int(episodes[np.flatnonzero(~finite)[0]])
            raise ValueError(
                f"dataset {self.name}: '{key}' is not finite in episode {bad}: repair it, or leave it out"
            )
        return pool_statistics(dict(zip(names, parts, strict=False)), count[:, 0])

    def __getstate__(self) -> dict:
        names = ("name", "root", "stream", "hub", "commit", "store", "remote", "version")
        return {name: getattr(self, name) for name in names}


def _read_episodes(root: Path) -> pa.Table:
    """`meta/episodes` without statistics, which are most of it."""
    tables = []
    for path in episode_files(root):
        with pq.ParquetFile(path) as file:
            tables.append(
                file.read([name for name in file.schema_arrow.names if not name.startswith("stats/")])
            )
    return pa.concat_tables(tables)


@dataclasses.dataclass(frozen=True)
class StreamedColumn:
    """One column of a stream; see `StreamedRows.column`."""

    rows: StreamedRows
    key: str

    def read(self, rows: range) -> np.ndarray:
        """See `StreamedRows.read_column`."""
        return self.rows.read_column(self.key, rows)


class StreamedFrames(OnDemandFrames):
    """Decodes frames of a stream; closes videos that were removed, so that the disk has room again."""

    def __init__(self, rows: StreamedRows, keys: Sequence[str]):
        super().__init__(rows, list(keys))
        self._opened: dict[str, set[Path]] = {key: set() for key in keys}

    def read_stored(self, key: str, rows: range) -> np.ndarray:
        """Frames of one episode as `FrameDecoder.decode` gives them."""
        decoder, opened = self.decoders[key], self._opened[key]
        if not decoder.is_video:
            return decoder.decode(rows)
        path = decoder.file_of(decoder.rows.episode_of(rows[0]))
        for _ in range(TRIES):
            if path not in opened and not all(other.exists() for other in opened):
                decoder.close_files()
                opened.clear()
            opened.add(path)
            decoder.rows.local(path)
            try:
                return decoder.decode(rows)
            except BrokenEpisodeError:
                if path.exists():
                    raise
        raise decoder.rows._too_small(path)

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_opened": {key: set() for key in self._opened}}
