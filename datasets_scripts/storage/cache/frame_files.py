"""Decoded frames of one image or depth feature in memory-mapped files, each of some episodes.

They are raw (`.npy`), or packed (`.zst`) where raw ones have no room.

Episodes enter in one shuffled order, the same for every feature and process. So a cache that has no room for
all holds an even share of any choice of them, and grows when there is room; a file that is finished survives
an interruption. Within a file, episodes are in the order of the dataset: the videos are decoded from front to
back.
"""

import errno
import glob
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock
from tqdm.auto import tqdm

from datasets_scripts.storage.atomic import write_whole_file
from datasets_scripts.storage.cache.cache_folder import FOR_ALL_USERS
from datasets_scripts.storage.cache.packed_frames import PackedFrames, write_packed

__all__ = ["FrameFiles", "cache_order"]

BUILD_FRAMES = 128  # decoded at a time
SUFFIXES = {False: ".npy", True: ".zst"}  # of raw and packed files
FILE_BYTES = 4 * 2**30  # of a file, unless one episode takes more


def cache_order(n_episodes: int) -> np.ndarray:
    """Episodes in the order in which they enter the cache: int64 `(episodes,)`."""
    return np.random.default_rng(0).permutation(n_episodes)


class FrameFiles:
    """The cache of one feature.

    Attributes:
        packed (`bool`): Whether its files are packed.
        paths (`list[Path]`): Its files.
        n_episodes (`int`): How many episodes they hold.

    Args:
        folder (`Path`): Where the files are.
        key (`str`): The feature.
        state (`str`): Fingerprint of what is decoded; files of other states are deleted when one is written.
        bounds (`tuple[numpy.ndarray, numpy.ndarray]`): First row and row after the last one of every episode.
        decode (`Callable[[range], numpy.ndarray]`): Frames of some rows of one episode.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        state: str,
        bounds: tuple[np.ndarray, np.ndarray],
        decode: Callable[[range], np.ndarray],
    ):
        self.folder, self.key, self.state = folder, key, state
        self._starts, self._stops = bounds
        self._decode = decode
        self._order = cache_order(len(self._starts))
        self._slots = np.argsort(self._order)  # of every episode
        self._open: dict[int, tuple[np.ndarray | PackedFrames, np.ndarray]] = {}
        self.find()

    def find(self, packed: bool | None = None) -> int:
        """Look for finished files, packed or not, by default of the kind that holds more.

        Returns:
            `int`: How many episodes they hold, the first of the order.
        """
        chains = {kind: self._find_chain(kind) for kind in ((False, True) if packed is None else (packed,))}
        self.packed = max(chains, key=lambda kind: chains[kind][2])
        self.paths, self._firsts, self.n_episodes = chains[self.packed]
        self._open = {}
        return self.n_episodes

    def _find_chain(self, packed: bool) -> tuple[list[Path], list[int], int]:
        found, pattern = {}, rf"{re.escape(self.key)}-{self.state}(?:\.(\d+)-(\d+))?{SUFFIXES[packed]}"
        for path in self.folder.glob(f"*{SUFFIXES[packed]}"):
            if match := re.fullmatch(pattern, path.name):
                first, stop = (int(match[1]), int(match[2])) if match[1] else (0, len(self._starts))
                if stop > found.get(first, (0,))[0]:
                    found[first] = stop, path
        paths, firsts, n_episodes = [], [], 0
        while n_episodes in found:
            firsts.append(n_episodes)
            n_episodes, path = found[n_episodes]
            paths.append(path)
        return paths, firsts, n_episodes

    def fill(self, n_episodes: int, frame_bytes: float, packed: bool = False) -> None:
        """Write what is missing of the first `n_episodes` of the order; other processes wait meanwhile.

        Raises:
            ValueError: If the disk is full; says what to do.
        """
        while (known := self.find(packed)) < n_episodes:
            with FileLock(self.folder / f"{self.key}.lock", mode=FOR_ALL_USERS):
                if self.find(packed) > known:  # another process wrote it meanwhile
                    continue
                if not known:
                    self._delete_others()
                sizes = np.cumsum((self._stops - self._starts)[self._order[known:n_episodes]] * frame_bytes)
                stop = known + max(1, int(np.searchsorted(sizes, FILE_BYTES, side="right")))
                self._write(known, stop, int(sizes[stop - known - 1]))

    def _delete_others(self) -> None:
        """Delete files of other states and of the other kind; open maps keep their pages."""
        pattern = rf"{re.escape(self.key)}-([0-9a-f]{{16}})(\.\d+-\d+)?(\.npy|\.zst)"
        for path in self.folder.glob(f"{glob.escape(self.key)}-*"):
            match = re.fullmatch(pattern, path.name)
            if match and (match[1] != self.state or match[3] != SUFFIXES[self.packed]):
                path.unlink(missing_ok=True)

    def _write(self, first: int, stop: int, needed: int) -> None:
        whole = first == 0 and stop == len(self._starts)
        part = "" if whole else f".{first}-{stop}"
        path = self.folder / f"{self.key}-{self.state}{part}{SUFFIXES[self.packed]}"
        free = shutil.disk_usage(self.folder).free
        try:
            if needed > free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with write_whole_file(path) as temporary, temporary.open("wb") as file:
                (write_packed if self.packed else _write_raw)(file, self._decode_all(first, stop))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ValueError(
                f"no room for the frame cache of '{self.key}' in {self.folder}: it needs "
                f"{needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; set frame_cache "
                "(or FORESIGHT_CACHE) to a folder on another disk, or frame_cache to 'off'"
            ) from error

    def _decode_all(self, first: int, stop: int) -> Iterator[np.ndarray]:
        """Frames of some episodes of the order, in the order of the dataset."""
        episodes = np.sort(self._order[first:stop])
        total = int((self._stops - self._starts)[episodes].sum())
        with tqdm(total=total, desc=f"decoding {self.key}", unit="frame") as bar:
            for episode in episodes:
                start, end = int(self._starts[episode]), int(self._stops[episode])
                for row in range(start, end, BUILD_FRAMES):
                    frames = self._decode(range(row, min(row + BUILD_FRAMES, end)))
                    yield frames
                    bar.update(len(frames))

    def holds(self, episode: int) -> bool:
        """Whether an episode is in the cache."""
        return self._slots[episode] < self.n_episodes

    def read(self, episode: int, rows: range) -> np.ndarray:
        """Frames of an episode that the cache holds, to be read only."""
        file = int(np.searchsorted(self._firsts, self._slots[episode], side="right")) - 1
        if file not in self._open:
            bounds = [*self._firsts, self.n_episodes]
            held = np.sort(self._order[bounds[file] : bounds[file + 1]])
            lengths = (self._stops - self._starts)[held]
            # What to add to a row's number for its place in the file, by episode.
            shift = np.full(len(self._starts), -1, np.int64)
            shift[held] = np.cumsum(lengths) - lengths - self._starts[held]
            # A plain array over the map: slicing np.memmap itself costs several microseconds more.
            path = self.paths[file]
            opened = PackedFrames(path) if self.packed else np.asarray(np.load(path, mmap_mode="r"))
            self._open[file] = opened, shift
        frames, shift = self._open[file]
        add = int(shift[episode])
        return frames[rows.start + add : rows.stop + add : rows.step]

    @property
    def nbytes(self) -> int:
        """Size of the files."""
        return self.count_bytes(self.packed)

    def count_bytes(self, packed: bool) -> int:
        """Size of the files of one kind."""
        return sum(path.stat().st_size for path in self._find_chain(packed)[0])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}  # pickling a map would copy the whole file


def _write_raw(file: BinaryIO, parts: Iterable[np.ndarray]) -> None:
    """Write an `.npy` file. Plain writes: a full disk under a memory map would kill us."""
    total, form = 0, None
    for frames in parts:
        if form is None:
            form = np.lib.format.header_data_from_array_1_0(frames) | {"fortran_order": False}
            _write_header(file, form, 0)
        file.write(np.ascontiguousarray(frames).data)
        total += len(frames)
    file.seek(0)
    _write_header(file, form, total)


def _write_header(file: BinaryIO, form: dict, total: int) -> None:
    """A header of one length, whatever the number of frames."""
    shape = (total, *form["shape"][1:])
    np.lib.format.write_array_header_1_0(file, form | {"shape": shape})
