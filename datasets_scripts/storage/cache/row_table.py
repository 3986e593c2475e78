"""The columns of a dataset as memory-mapped Arrow files, converted once from its parquet files.

Numbers are converted together when a dataset is opened. A column of tracks or pictures is a hundred times as
large, and is converted data file by data file when it is first read. `datasets` converts everything when it
opens a dataset, and casts every row group by itself: 19 s of CPU time for a million frames of 5,000 episodes.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import table_cast
from filelock import FileLock
from lerobot.datasets.feature_utils import get_hf_features_from_features

from datasets_scripts.storage.atomic import write_whole_file
from datasets_scripts.storage.cache.cache_folder import (
    FOR_ALL_USERS,
    cache_base,
    make_room,
    open_cache_folder,
)
from datasets_scripts.storage.dataset_folder import RESTORE, episode_files

__all__ = ["ArrowColumn", "RowTable"]

BATCH_BYTES = 4 * 2**20  # of the rows converted at a time; decoding takes several times as much
LARGE_ENTRIES = 64  # per row; columns of more are converted when they are read
MAX_OPEN_FILES = 64  # of large columns, per dataset and process
FILE_ROWS = b"rows of each data file"


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
        """Values of ascending rows, in the stored dtype; numbers are a view of the file: do not write.

        Returns:
            `numpy.ndarray`: `(len(rows),)` for scalars, `(len(rows), size)` for lists; NaN, or false, where
            a row has no value.
        """
        return _read_parts(self._starts, self._read_chunk, rows)

    def _read_chunk(self, chunk: int, start: int, stop: int) -> np.ndarray:
        if chunk not in self._views:
            whole = self._chunks[chunk]
            try:
                self._views[chunk] = _to_numpy(whole, zero_copy_only=True)
            except pa.ArrowInvalid:  # bits, text, pictures or missing values: converted at every read
                self._views[chunk] = None
        if self._views[chunk] is None:
            return _to_numpy(self._chunks[chunk].slice(start, stop - start), zero_copy_only=False)
        return self._views[chunk][start:stop]


def _read_parts(
    starts: np.ndarray, read_part: Callable[[int, int, int], np.ndarray], rows: range
) -> np.ndarray:
    """Values of ascending rows from consecutive parts; part `i` holds the rows `starts[i]:starts[i + 1]`."""
    if not rows:
        return read_part(0, 0, 0)
    start, stop = rows[0], rows[-1] + 1
    first = int(np.searchsorted(starts, start, side="right")) - 1
    last = int(np.searchsorted(starts, stop, side="left")) - 1
    parts = []
    for part in range(first, last + 1):
        offset, end = (int(bound) for bound in starts[part : part + 2])
        parts.append(read_part(part, max(start - offset, 0), min(stop, end) - offset))
    values = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return values[:: rows.step]


def _to_numpy(array: pa.Array, zero_copy_only: bool) -> np.ndarray:
    if pa.types.is_fixed_size_list(array.type):
        if array.null_count and zero_copy_only:
            raise pa.ArrowInvalid("missing rows")
        size = array.type.list_size
        # `flatten` would leave out missing rows, and all rows after them would move up.
        entries = array.values.slice(array.offset * size, len(array) * size)
        rows = entries.to_numpy(zero_copy_only=zero_copy_only).reshape(-1, size)
        if array.null_count == 0:
            return rows
        present = array.is_valid().to_numpy(zero_copy_only=False)[:, None]
        if pa.types.is_boolean(array.type.value_type):
            return present & rows.astype(bool)
        return np.where(present, rows, np.nan)
    return array.to_numpy(zero_copy_only=zero_copy_only)


class RowTable:
    """All columns of a dataset but its videos, and its list of episodes.

    Args:
        root (`Path`): The dataset.
        features (`dict[str, dict]`): Its LeRobot features.
        paths (`Sequence[Path]`): Its data files in order.

    Attributes:
        numbers (`pyarrow.Table`): The small columns.
        episodes (`pyarrow.Table`): `meta/episodes` without statistics, which are most of it.

    Raises:
        ValueError: If the cache cannot be written; says what to set.
        pyarrow.ArrowException, OSError, ValueError: If a data file is damaged or lacks columns.
    """

    def __init__(self, root: Path, features: dict[str, dict], paths: Sequence[Path]):
        self._paths, self._folder = list(paths), open_cache_folder(cache_base(), "rows", root)
        self._schema = get_hf_features_from_features(features).arrow_schema.remove_metadata()
        self._large = {name for name in self._schema.names if _is_large(features[name])}
        listed = episode_files(root)
        self._state = _fingerprint(features, [*self._paths, *listed])
        self.episodes = self._open_table("episodes", listed, None)
        schema = pa.schema([field for field in self._schema if field.name not in self._large])
        self.numbers = self._open_table("numbers", self._paths, schema)
        lengths = json.loads(self.numbers.schema.metadata[FILE_ROWS])
        self._file_starts = np.cumsum([0, *lengths])
        self._open_file = functools.lru_cache(MAX_OPEN_FILES)(self._open_large)

    def column(self, key: str) -> "ArrowColumn | _LargeColumn":
        """A column, to be read by row range."""
        if key not in self._large:
            return ArrowColumn(self.numbers.column(key))
        return _LargeColumn(self._file_starts, functools.partial(self._open_file, key))

    def _open_large(self, key: str, file: int) -> ArrowColumn:
        path, schema = self._paths[file], pa.schema([self._schema.field(key)])
        try:
            return ArrowColumn(self._open_table(f"{key}-{file:04d}", [path], schema).column(key))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"data file {path} is damaged or truncated ({error}); {RESTORE}") from error

    def _open_table(self, name: str, paths: list[Path], schema: pa.Schema | None) -> pa.Table:
        """One file of the cache, made if it is missing; without a schema, of all columns but statistics."""
        path = self._folder / f"{self._state}-{name}.arrow"
        if not path.exists():  # before the lock, which needs a folder that can be written to
            with FileLock(self._folder / f"{name}.lock", mode=FOR_ALL_USERS):
                if not path.exists():  # another process made it meanwhile
                    for stale in self._folder.glob(f"*-{name}.arrow"):  # open maps keep their pages
                        stale.unlink(missing_ok=True)
                    _write_table(path, paths, schema)
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


class _LargeColumn:
    """Reads as `ArrowColumn` does, from one Arrow file per data file."""

    def __init__(self, starts: np.ndarray, open_file: Callable[[int], ArrowColumn]):
        self._starts, self._open_file = starts, open_file

    def read(self, rows: range) -> np.ndarray:
        return _read_parts(self._starts, self._read_file, rows)

    def _read_file(self, file: int, start: int, stop: int) -> np.ndarray:
        return self._open_file(file).read(range(start, stop))


def _is_large(feature: dict) -> bool:
    return feature["dtype"] == "image" or math.prod(feature["shape"]) > LARGE_ENTRIES


def _fingerprint(features: dict[str, dict], paths: Sequence[Path]) -> str:
    files = [(path.name, status.st_size, status.st_mtime_ns) for path in paths for status in (path.stat(),)]
    return hashlib.sha256(json.dumps([1, features, files], default=str).encode()).hexdigest()[:16]


def _write_table(path: Path, sources: list[Path], schema: pa.Schema | None) -> None:
    """Convert some columns of some parquet files."""
    if schema is not None:
        lengths = [pq.read_metadata(source).num_rows for source in sources]
        schema = schema.with_metadata({FILE_ROWS: json.dumps(lengths)})
    make_room(cache_base(), sum(source.stat().st_size for source in sources))
    try:
        with (
            write_whole_file(path) as temporary,
            pa.OSFile(os.fspath(temporary), "wb") as target,
            contextlib.ExitStack() as stack,
        ):
            writer = None
            for source in sources:
                with pq.ParquetFile(source) as file:  # its footer may take 80 MB: open one at a time
                    if schema is None:
                        fields = [field for field in file.schema_arrow if not field.name.startswith("stats/")]
                        schema = pa.schema(fields)
                    writer = writer or stack.enter_context(pa.ipc.new_file(target, schema))
                    for table in _read_batches(file, schema.names):
                        writer.write_table(table_cast(table, schema))
    except OSError as error:
        if error.errno is None:  # Arrow's, of a damaged file
            raise
        raise ValueError(
            f"the columns of a dataset cannot be written to {path.parent}: {error.strerror or error}; set "
            "FORESIGHT_CACHE to a folder on another disk"
        ) from error
    pa.default_memory_pool().release_unused()


def _read_batches(file: pq.ParquetFile, names: list[str]) -> Iterator[pa.Table]:
    """Rows of a parquet file, many row groups at a time."""
    wanted = [name for name in file.schema_arrow.names if name in names]
    groups, rows, batch_rows = [], 0, BATCH_BYTES // _row_bytes(file.metadata, wanted)
    for group in range(file.num_row_groups):
        groups.append(group)
        rows += file.metadata.row_group(group).num_rows
        if rows >= batch_rows or group == file.num_row_groups - 1:
            table = file.read_row_groups(groups, wanted, use_threads=False)
            yield table.replace_schema_metadata(None).combine_chunks()
            groups, rows = [], 0


def _row_bytes(metadata: pq.FileMetaData, names: list[str]) -> int:
    """Bytes of some columns per row while they are decoded, judged by the first row group."""
    if not metadata.num_row_groups:
        return 1
    group = metadata.row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    chosen = [column for column in columns if column.path_in_schema.split(".list.")[0] in names]
    size = sum(max(column.total_uncompressed_size, 4 * column.num_values) for column in chosen)
    return max(1, size // max(1, group.num_rows))
