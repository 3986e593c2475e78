"""The shuffled order of windows whose files do not all fit on the disk: a pure function of seed and epoch.

Windows that need the same files form a shard. Every epoch shuffles the shards, cuts them into blocks whose
files fit a budget, and shuffles the windows of each block. So a batch holds windows of all shards of a block,
each window comes once an epoch, and a run resumes at any step by computing where it is.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from datasets_scripts.storage.streaming.streamed_rows import StreamedRows
from training.windows.dataset import ForesightWindows
from training.windows.settings import split_episodes

__all__ = ["BlockShuffle", "Shard", "build_shards", "split_by_files"]

SHARDS_PER_BLOCK = 16


@dataclasses.dataclass(frozen=True)
class Shard:
    """Windows `start` to `stop` (exclusive) of a dataset or mixture, and the files that hold them."""

    start: int
    stop: int
    files: frozenset[Path]


def build_shards(
    windows: ForesightWindows, sizes: Mapping[Path, int], block_bytes: float, start: int = 0
) -> list[Shard]:
    """Cuts the windows of a stream where files end: shards of a sixteenth of a block, or one set of files.

    Args:
        windows (`ForesightWindows`): Of a `StreamedRows`.
        sizes (`Mapping[Path, int]`): Bytes of its files.
        block_bytes (`float`): Largest size of a block's files.
        start (`int`): Number of its first window in a mixture.

    Raises:
        ValueError: If the files of one episode do not fit into a block; says what would.
    """
    shards: list[Shard] = []
    first, stop, files = start, start, frozenset()
    stops = windows.window_stops + start
    for run in windows.rows.runs_of(windows.columns.frame_keys, windows.episodes):
        own = frozenset(windows.rows.files_of(windows.episodes[run[0]], windows.columns.frame_keys))
        if (needed := sum(sizes[path] for path in own)) > block_bytes:
            raise ValueError(
                f"data.streaming_disk_gb is too small for dataset {windows.rows.name}: the files of episode "
                f"{windows.episodes[run[0]]} take {needed / 1e9:.3g} GB, and {block_bytes / 1e9:.3g} GB are "
                f"for what is read together: make it {1.01 * needed / block_bytes:.3g} times as large"
            )
        if files and sum(sizes[path] for path in files | own) > block_bytes / SHARDS_PER_BLOCK:
            shards.append(Shard(first, stop, files))
            first, files = stop, frozenset()
        files, stop = files | own, int(stops[run[-1]])
    return [*shards, Shard(first, stop, files)]


class BlockShuffle:
    """Order of the windows of all shards.

    Args:
        shards (`Sequence[Shard]`): Without gaps, in the order of their windows.
        sizes (`Mapping[Path, int]`): Bytes of their files.
        block_bytes (`float`): Largest size of a block's files.
        seed (`Sequence[int]`): Seeds of this order.
    """

    def __init__(
        self, shards: Sequence[Shard], sizes: Mapping[Path, int], block_bytes: float, seed: Sequence[int]
    ):
        self.shards, self.sizes, self.block_bytes, self.seed = list(shards), sizes, block_bytes, tuple(seed)
        self._cut = functools.lru_cache(maxsize=3)(self._cut_epoch)
        self._shuffled = functools.lru_cache(maxsize=2)(self._shuffle_block)

    def __len__(self) -> int:
        return self.shards[-1].stop - self.shards[0].start

    def window(self, epoch: int, place: int) -> int:
        """The window at a place of an epoch."""
        block = self.block(epoch, place)
        _, stops = self._cut(epoch)
        first = int(stops[block - 1]) if block else 0
        return int(self._shuffled(epoch, block)[place - first])

    def block(self, epoch: int, place: int) -> int:
        """The block that holds a place of an epoch."""
        return int(np.searchsorted(self._cut(epoch)[1], place, side="right"))

    def files(self, epoch: int, block: int) -> list[Path]:
        """Files of a block; after the last of an epoch comes the first of the next."""
        blocks, _ = self._cut(epoch)
        if block == len(blocks):
            return self.files(epoch + 1, 0)
        return sorted(frozenset().union(*(self.shards[i].files for i in blocks[block])))

    def n_blocks(self, epoch: int) -> int:
        """Number of blocks of an epoch."""
        return len(self._cut(epoch)[0])

    def windows_of(self, epoch: int, block: int) -> np.ndarray:
        """All windows of a block, ascending: int64 `(windows,)`."""
        return np.sort(self._shuffled(epoch, block))

    def downloaded_bytes(self, epoch: int) -> int:
        """Bytes that an epoch needs, files of several blocks counted again."""
        blocks, _ = self._cut(epoch)
        return sum(self.sizes[path] for block in range(len(blocks)) for path in self.files(epoch, block))

    def _cut_epoch(self, epoch: int) -> tuple[list[list[int]], np.ndarray]:
        """Shards of every block of an epoch, and the places at which the blocks end."""
        order = np.random.default_rng((*self.seed, epoch)).permutation(len(self.shards)).tolist()
        blocks, files, total = [[]], set(), 0
        for i in order:
            added = sum(self.sizes[path] for path in self.shards[i].files - files)
            if blocks[-1] and total + added > self.block_bytes:
                blocks.append([])
                files, total = set(), 0
                added = sum(self.sizes[path] for path in self.shards[i].files)
            blocks[-1].append(i)
            files |= self.shards[i].files
            total += added
        counts = [sum(self.shards[i].stop - self.shards[i].start for i in block) for block in blocks]
        return blocks, np.cumsum(counts)

    def _shuffle_block(self, epoch: int, block: int) -> np.ndarray:
        chosen = (self.shards[i] for i in self._cut(epoch)[0][block])
        windows = np.concatenate([np.arange(shard.start, shard.stop) for shard in chosen])
        return np.random.default_rng((*self.seed, epoch, block)).permutation(windows)


def split_by_files(
    rows: StreamedRows, keys: Sequence[str], val_fraction: float, seed: int = 0
) -> tuple[list[int], list[int]]:
    """Training and validation episodes as of `split_episodes`, held out file by file.

    Episodes drawn one by one lie in all files, so that each validation would download the dataset. Whole
    files are held out until there are as many episodes as wanted; the last one is split only where nothing
    would be left to train on.
    """
    held = len(split_episodes(rows.n_episodes, val_fraction, seed)[1])
    runs = rows.runs_of(keys, np.arange(rows.n_episodes))
    order = np.random.default_rng(seed).permutation(len(runs))
    episodes = [episode for i in order for episode in runs[i]]
    ends = np.cumsum([len(runs[i]) for i in order])
    whole = int(ends[np.searchsorted(ends, held)]) if held else 0
    held = whole if whole < rows.n_episodes else held
    return sorted(episodes[held:]), sorted(episodes[:held])
