"""Read frames of a dataset by row number: decoded on demand, or once into memory-mapped files.

Both readers share one decoder and give the numbers of the stock `LeRobotDataset`. The cache holds what the
decoder gives at the camera's own resolution: uint8 RGB, and for depth the stored 12-bit codes (uint16), half
the size of float32 meters. Files are named after a fingerprint of the videos' sizes and times, so a changed
dataset is decoded again. Episodes for which there is no room are decoded on demand (`cache/frame_files.py`).
"""

import functools
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from datasets_scripts.storage.cache.cache_folder import cache_base, make_room, open_cache_folder
from datasets_scripts.storage.cache.frame_files import FrameFiles, cache_order
from datasets_scripts.storage.cache.packed_frames import pack_frame
from datasets_scripts.storage.dataset_rows import DatasetRows
from datasets_scripts.storage.videos.frame_decoding import FrameDecoder
from datasets_scripts.storage.videos.freed_memory import return_freed_memory

__all__ = ["CachedFrames", "OnDemandFrames", "open_frames"]

logger = logging.getLogger(__name__)

SAMPLED_FRAMES = 8  # whose packed size is taken for that of all
READS_PER_RETURN = 64  # of windows, after which the memory of closed decoders goes back to the system
GROWTH = 1.1  # factor by which a partial cache must be able to grow before it does


class OnDemandFrames:
    """Decodes the frames of each window when it is read: slow, without disk space."""

    def __init__(self, rows: DatasetRows, keys: list[str]):
        self.decoders = {key: FrameDecoder(rows, key) for key in keys}
        self._pool: tuple[int, ThreadPoolExecutor] | None = None
        self._n_reads = 0

    def read(self, key: str, rows: range) -> np.ndarray:
        """Frames of one episode: uint8 `(n, 3, H, W)`, or depth `(n, H, W)` in meters."""
        decoder = self.decoders[key]
        stored = self.read_stored(key, rows)
        return decoder.meters(stored) if decoder.is_depth else stored

    def read_stored(self, key: str, rows: range) -> np.ndarray:
        """Frames of one episode as `FrameDecoder.decode` gives them."""
        return self.decoders[key].decode(rows)

    def read_many_stored(self, requests: dict[str, range]) -> dict[str, np.ndarray]:
        """`read_stored` of several features, in threads: decoding releases the GIL."""
        self._n_reads += 1
        if self._n_reads % READS_PER_RETURN == 0:
            return_freed_memory()
        if len(requests) < 2:
            return {key: self.read_stored(key, rows) for key, rows in requests.items()}
        if self._pool is None or self._pool[0] != os.getpid():  # threads do not survive a fork
            self._pool = (os.getpid(), ThreadPoolExecutor(max_workers=len(self.decoders)))
        frames = self._pool[1].map(self.read_stored, requests, requests.values())
        return dict(zip(requests, frames, strict=True))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_pool": None}


class CachedFrames(OnDemandFrames):
    """Reads frames from memory-mapped files in `folder`; missing files are made when this is created.

    Args:
        rows (`DatasetRows`): The dataset.
        keys (`list[str]`): Image and depth features to read.
        folder (`Path`): Where the files are.
        room (`Callable[[int], int]`, *optional*): Given the bytes that are missing, how many may be written;
            all if omitted.

    Attributes:
        files (`dict[str, FrameFiles]`): Cache by key.
        n_cached (`int`): Episodes that all files hold.
        nbytes (`int`): Size of these files.
    """

    def __init__(
        self, rows: DatasetRows, keys: list[str], folder: Path, room: Callable[[int], int] | None = None
    ):
        super().__init__(rows, keys)
        self.rows = rows
        bounds = rows.episode_starts, rows.episode_stops
        self.files = {
            key: FrameFiles(folder, key, decoder.fingerprint(), bounds, decoder.decode)
            for key, decoder in self.decoders.items()
        }
        self.n_cached = self._count_cached()
        if self.n_cached < rows.n_episodes:
            self._fill(room)
            self.n_cached = self._count_cached()
        self.nbytes = sum(files.nbytes for files in self.files.values())

    def _count_cached(self) -> int:
        return min(files.n_episodes for files in self.files.values())

    def _fill(self, room: Callable[[int], int] | None) -> None:
        """Write raw frames of all episodes; if they have no room, packed ones of as many as fit."""
        rows, packed, wanted = self.rows, False, self.rows.n_episodes
        sizes = {key: decoder.decode(range(1)).nbytes for key, decoder in self.decoders.items()}
        if room is not None and self._count_fitting(sum(sizes.values()), room, packed) < wanted:
            packed = True
            firsts = rows.episode_starts[cache_order(rows.n_episodes)[:SAMPLED_FRAMES]].tolist()
            for key, decoder in self.decoders.items():
                seen = [decoder.decode(range(row, row + 1))[0] for row in firsts]
                sizes[key] = np.mean([len(pack_frame(frame)) for frame in seen])
            wanted = self._count_fitting(sum(sizes.values()), room, packed)
            # The free space changes all the time: a few more episodes are not worth a file.
            if wanted < min(GROWTH * self.n_cached, rows.n_episodes):
                return
        for key, files in self.files.items():
            files.fill(wanted, sizes[key], packed)

    def _count_fitting(self, frame_bytes: float, room: Callable[[int], int], packed: bool) -> int:
        """How many episodes, in the cache's order, have room beside those that are cached."""
        lengths = self.rows.episode_stops - self.rows.episode_starts
        sizes = np.cumsum(lengths[cache_order(len(lengths))]) * frame_bytes
        stored = sum(files.count_bytes(packed) for files in self.files.values())
        room_bytes = stored + room(int(sizes[-1]) - stored)
        return int(np.searchsorted(sizes, room_bytes, side="right"))

    def read_stored(self, key: str, rows: range) -> np.ndarray:
        """Frames as `FrameDecoder.decode` gives them, a read-only view if they are cached."""
        episode = self.rows.episode_of(rows.start)
        files = self.files[key]
        return files.read(episode, rows) if files.holds(episode) else super().read_stored(key, rows)

    def read_many_stored(self, requests: dict[str, range]) -> dict[str, np.ndarray]:
        """`read_stored` of several features; threads help only where frames are decoded."""
        first = next(iter(requests.values()))
        if len(first) and all(self.files[key].holds(self.rows.episode_of(first.start)) for key in requests):
            return {key: self.read_stored(key, rows) for key, rows in requests.items()}
        return super().read_many_stored(requests)


def open_frames(
    rows: DatasetRows, keys: list[str], frame_cache: str = "auto", episodes: Sequence[int] | None = None
) -> OnDemandFrames:
    """Choose and open the frame reader of a dataset.

    Args:
        rows (`DatasetRows`): The dataset; frames of a `stream` are not cached.
        keys (`list[str]`): Image and depth features to read.
        frame_cache (`str`): `"off"` decodes on demand; a folder holds the cache; `"auto"` caches under
            `$FORESIGHT_CACHE` or `~/.cache/foresight`, where all datasets together may take 32 GiB and half
            of the free space, after those that nobody uses are deleted. If raw frames do not fit, they are
            packed without loss, and what does not fit then is decoded on demand.
        episodes (`Sequence[int]`, *optional*): Those that will be read (default: all).

    Raises:
        ValueError: If a file of the dataset is damaged, or the cache cannot be written; names it.
    """
    chosen = range(rows.n_episodes) if episodes is None else episodes
    if frame_cache in ("off", "False") or rows.stream or not keys:  # YAML takes a bare `off` for false
        on_demand = OnDemandFrames(rows, keys)
        for decoder in on_demand.decoders.values() if not rows.stream else ():
            decoder.check_files(chosen)
        return on_demand
    base = cache_base() if frame_cache == "auto" else Path(frame_cache).expanduser()
    folder = open_cache_folder(base, "frames", rows.root)
    room = functools.partial(make_room, base) if frame_cache == "auto" else None
    cached = CachedFrames(rows, keys, folder, room)
    if cached.n_cached < rows.n_episodes:
        logger.warning(
            "dataset %s: 'auto' has room for the decoded frames of %d of %d episodes in %s (%.1f GB); the "
            "others are decoded on demand. Set frame_cache to a folder to cache all.",
            *(rows.name, cached.n_cached, rows.n_episodes, folder, cached.nbytes / 1e9),
        )
        for key, decoder in cached.decoders.items():
            if others := [episode for episode in chosen if not cached.files[key].holds(episode)]:
                decoder.check_files(others)
    return cached
