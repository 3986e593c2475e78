# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""LeRobot's items, read as `training/` reads windows: Arrow slices, and frames that are decoded once.

LeRobot turns every value of a row into a Python object and decodes video anew for every item; with tracks
this takes many times as long as slicing the same file. `lerobot-train` makes its dataset itself, and a policy
can say what an item holds but not how it is read: all that it is given is the dataset's metadata. So the
policy leaves a mark on that, and LeRobot's reader, whose `get_item` is wrapped when the first mark is made,
heeds it. Datasets without a mark, or without the policy's windows, are read by LeRobot as ever.

Items are read value by value as the stock reader has them, less the columns that the policy does not use,
and made into samples at once (`BatchReader.read_item`), which the training process then need not do. The
first item is compared with the stock reader's own. If anything differs or fails, because LeRobot's internals
have changed for example, the dataset is left to LeRobot, with a warning.
"""

import copy
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from lerobot.datasets.dataset_reader import DatasetReader
from lerobot.datasets.depth_utils import MM_PER_METRE
from lerobot.utils.constants import DEFAULT_FEATURES
from torch import Tensor

from datasets_scripts.storage.frame_cache import FrameDecoder, open_frames
from datasets_scripts.storage.rows import ArrowColumn, DatasetRows

from .batches import BatchReader

__all__ = ["FastItems", "read_fast"]

logger = logging.getLogger(__name__)

MARK = "_foresight_reading"


def read_fast(dataset_meta, batches: BatchReader, frame_cache: str = "auto") -> None:
    """Has the dataset of this metadata read our way, in this process and in its loader's.

    Args:
        dataset_meta (`LeRobotDatasetMetadata`): The object that the dataset itself holds.
        batches (`BatchReader`): Knows the columns and what becomes of them. If the dataset lacks one, as
            under `--rename_map`, nothing is done.
        frame_cache (`str`): `"auto"`, `"off"` or a folder; see `storage.frame_cache.open_frames`.
    """
    if set(batches.columns) <= set(dataset_meta.features):
        setattr(dataset_meta, MARK, _Mark(batches, frame_cache))


class _Mark:
    """What the policy leaves on a dataset's metadata; it travels to worker processes with the dataset."""

    def __init__(self, batches: BatchReader, frame_cache: str):
        self.batches, self.frame_cache = batches, frame_cache
        self._items: FastItems | None = None
        self._opened_for: DatasetReader | None = None
        _wrap_reader()

    def get_item(self, reader: DatasetReader, idx: int, stock: Callable) -> dict:
        if self._opened_for is not reader:
            self._items, self._opened_for = self._open(reader, idx, stock), reader
        return stock(reader, idx) if self._items is None else self.batches.read_item(self._items[idx])

    def _open(self, reader: DatasetReader, idx: int, stock: Callable) -> "FastItems | None":
        try:
            if not self.batches.has_windows(reader.delta_indices or {}):
                return None  # opened to look at, not to train on
            items = FastItems(reader, self.batches.columns, self.frame_cache)
            untransformed = copy.copy(reader)
            untransformed._image_transforms = None  # they may be random
            check_same(items.read(idx), stock(untransformed, idx))
            return items
        except Exception as error:  # whatever LeRobot has changed, or the dataset has that we do not know
            logger.warning(
                "%s is read by LeRobot's own reader, which may take most of the time of training: %s",
                *(getattr(reader, "root", "The dataset"), error),
            )
            return None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_items": None, "_opened_for": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        _wrap_reader()  # a worker process


def _wrap_reader() -> None:
    """Makes LeRobot's reader heed marks, once per process."""
    stock = DatasetReader.get_item
    if hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def get_item(self, idx):
        mark = getattr(self._meta, MARK, None)
        return stock(self, idx) if mark is None else mark.get_item(self, idx, stock)

    DatasetReader.get_item = get_item


def check_same(ours: dict, stock: dict) -> None:
    """Compares an item with the stock reader's.

    Raises:
        ValueError: If a value of ours differs; names its column.
    """
    for key, value in ours.items():
        other = stock.get(key)
        if isinstance(value, Tensor):
            same = isinstance(other, Tensor) and value.dtype == other.dtype and value.shape == other.shape
            if same and value.is_floating_point():
                same = torch.allclose(value, other, rtol=1e-6, atol=0, equal_nan=True)
            elif same:
                same = torch.equal(value, other)
        else:
            same = type(value) is type(other) and value == other
        if not same:
            raise ValueError(f"{key!r} would not be what LeRobot delivers")


class FastItems:
    """The items of a LeRobot dataset, by the stock reader's numbers.

    Args:
        reader (`DatasetReader`): LeRobot's own, loaded: its table, windows, episodes, settings.
        columns (`Sequence[str]`): Columns of the items beside LeRobot's own (`index`, `timestamp`, ...).
        frame_cache (`str`): See `datasets_scripts.storage.frame_cache.open_frames`.

    Raises:
        ValueError: If the dataset has something that only LeRobot can read, or is incomplete; names it.
    """

    def __init__(self, reader: DatasetReader, columns: Sequence[str], frame_cache: str):
        meta, table = reader._meta, reader.hf_dataset.data
        if reader.hf_dataset._indices is not None:
            raise ValueError("its rows were selected or shuffled")
        wanted = {*columns, *DEFAULT_FEATURES}
        cameras = [key for key in meta.camera_keys if key in wanted]
        self._reader = reader
        self._plain = {
            key: _PlainColumn(key, table.column(key))
            for key in table.column_names
            if key in wanted.difference(cameras)
        }
        if missing := wanted - {*self._plain, *cameras}:
            raise ValueError(f"its files lack the columns {sorted(missing)}")
        self._deltas = {key: np.array(d) for key, d in (reader.delta_indices or {}).items() if key in wanted}
        self._index = table.column("index").to_numpy()
        self._episode = table.column("episode_index").to_numpy()
        within = self._episode[1:] == self._episode[:-1]
        if not (np.diff(self._index)[within] == 1).all():
            raise ValueError("the rows of an episode do not follow each other")
        self._starts, self._stops = (
            np.asarray(meta.episodes[f"dataset_{end}_index"]) for end in ("from", "to")
        )
        self._tasks = list(meta.tasks.index)
        self._frames = open_frames(DatasetRows(reader.root), cameras, frame_cache)
        self._convert = {key: _conversion(reader, self._frames.decoders[key]) for key in cameras}
        self._rgb = [key for key in cameras if key not in meta.depth_keys]

    def __getitem__(self, idx: int) -> dict[str, Any]:
        """Item `idx` of the chosen episodes, image transforms applied."""
        item, transforms = self.read(idx), self._reader._image_transforms
        if transforms is not None:
            item |= {key: transforms(item[key]) for key in self._rgb}
        return item

    def read(self, idx: int) -> dict[str, Any]:
        """Item `idx` without image transforms."""
        idx = range(len(self._index))[int(idx)]  # a negative one counts from the end
        row, episode = int(self._index[idx]), int(self._episode[idx])
        first, last = int(self._starts[episode]), int(self._stops[episode]) - 1
        item, rows = {}, {}
        for key, deltas in self._deltas.items():
            asked = row + deltas
            rows[key] = asked.clip(first, last)
            item[f"{key}_is_pad"] = torch.from_numpy(asked != rows[key])
        now = np.array([row])
        for key, column in self._plain.items():
            values = column.read(rows.get(key, now) - row + idx)
            item[key] = values if key in rows else values[0]
        spans = {key: rows.get(key, now) for key in self._convert}
        stored = self._frames.read_many_stored(
            {key: range(int(span.min()), int(span.max()) + 1) for key, span in spans.items()}
        )
        for key, convert in self._convert.items():
            frames = convert(stored[key][spans[key] - spans[key].min()])
            # LeRobot drops the axis of time from windows of one frame too, if that comes from a video.
            single = len(frames) == 1 and (self._frames.decoders[key].is_video or key not in rows)
            item[key] = frames[0] if single else frames
        item["task"] = self._tasks[int(item["task_index"])]
        return item


class _PlainColumn:
    """A column of numbers or of lists of them, as LeRobot's tensors: int64, float32 or bool."""

    def __init__(self, key: str, column: pa.ChunkedArray):
        kind = column.type.value_type if pa.types.is_fixed_size_list(column.type) else column.type
        if pa.types.is_boolean(kind):
            self._dtype = np.bool_
        elif pa.types.is_integer(kind):
            self._dtype = np.int64
        elif pa.types.is_floating(kind):
            self._dtype = np.float32
        else:
            raise ValueError(f"column {key!r} is of type {column.type}")
        if column.null_count:
            raise ValueError(f"column {key!r} has rows without a value")
        self._column = ArrowColumn(column)

    def read(self, rows: np.ndarray) -> Tensor:
        """Values of rows of one episode, in any order."""
        low = int(rows.min())
        values = self._column.read(range(low, int(rows.max()) + 1))
        return torch.from_numpy(values[rows - low].astype(self._dtype, copy=False))


def _conversion(reader: DatasetReader, decoder: FrameDecoder) -> Callable[[np.ndarray], Tensor]:
    """From frames as they are stored to LeRobot's: RGB `(n, 3, h, w)`, depth `(n, 1, h, w)` float32."""
    if not decoder.is_depth:
        if decoder.is_video and reader._return_uint8:
            return torch.from_numpy
        return lambda frames: torch.from_numpy(frames).float() / 255
    unit = reader._depth_output_unit
    if decoder.is_video:
        table = decoder.code_table(unit)
        return lambda codes: torch.from_numpy(np.take(table, codes, mode="clip")[:, None])
    recorded = reader._image_depth_units[decoder.key]
    if recorded is None:
        raise ValueError(f"column {decoder.key!r} does not say the unit of its depth")
    if unit == "m":
        return lambda metres: torch.from_numpy(metres[:, None])
    if recorded == "m":
        return lambda metres: torch.from_numpy(metres[:, None] * np.float32(MM_PER_METRE))
    # They were whole millimetres before the cache had them in metres.
    return lambda metres: torch.from_numpy(np.rint(metres[:, None] * np.float32(MM_PER_METRE)))
