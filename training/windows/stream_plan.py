"""How the windows of a streamed run share the disk: which files are there when, and which come next."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from datasets_scripts.storage.streaming.prefetch import Prefetcher
from datasets_scripts.storage.streaming.streamed_rows import StreamedRows
from training.windows.block_shuffle import BlockShuffle, build_shards
from training.windows.dataset import ForesightWindows
from training.windows.mixture import ConcatWindows
from training.windows.sampler import WindowSampler

__all__ = ["StreamPlan", "StreamedBatches", "StreamedSampler"]

NEAR_SHARE = 1 / 8  # of the disk, for windows that are measured during training
READ_AHEAD = 2  # batches that torch's data loader asks each of its processes for
SPARE_BATCHES = 2

Block = tuple[int, int, int]  # pool of the sampler, its epoch, and the block of the epoch


class StreamPlan:
    """Orders of the windows of `train`, and `near` of both: windows of few files, for measurements.

    Half of the room is for the block that is read, half for the next. The files of validation windows that
    are measured during training stay.

    Args:
        train, val (`ConcatWindows`): Windows of `StreamedRows` with one store.
        mixture (`str` or `list[float]`), seed (`int`): As of the sampler.

    Attributes:
        orders (`list[BlockShuffle]`): For the sampler.

    Raises:
        ValueError: If the room is too small, or a file is missing; names it.
    """

    def __init__(
        self, train: ConcatWindows, val: ConcatWindows | None, mixture: str | Sequence[float], seed: int
    ):
        self._owners: dict[Path, StreamedRows] = {}
        for windows in (*train.datasets, *(val.datasets if val else ())):
            for run in windows.rows.runs_of(windows.columns.frame_keys, windows.episodes):
                files = windows.rows.files_of(windows.episodes[run[0]], windows.columns.frame_keys)
                self._owners |= dict.fromkeys(files, windows.rows)
        self._sizes = {path: rows.bytes_of(path) for path, rows in self._owners.items()}
        limit, near = train.datasets[0].rows.store.limit_bytes, []
        for windows, number in ((train, 3), (val, 4)) if val else ((train, 3),):
            near.append(self._order(windows.datasets, NEAR_SHARE * limit, (seed, number)))
            windows.near = near[-1].windows_of(0, 0)
        self._kept = near[1].files(0, 0) if val else []
        pools = [train.datasets] if mixture == "natural" else [[part] for part in train.datasets]
        block_bytes = (limit - sum(self._sizes[path] for path in self._kept)) / 2 / len(pools)
        self.orders = [self._order(pool, block_bytes, (seed, 2, i)) for i, pool in enumerate(pools)]

    def _order(self, datasets: Sequence[ForesightWindows], block_bytes: float, seed: tuple) -> BlockShuffle:
        shards, start = [], 0
        for windows in datasets:
            shards += build_shards(windows, self._sizes, block_bytes, start)
            start += len(windows)
        return BlockShuffle(shards, self._sizes, block_bytes, seed)

    def describe(self) -> str:
        """What will be downloaded, for people."""
        blocks = sum(order.n_blocks(0) for order in self.orders)
        total = sum(order.downloaded_bytes(0) for order in self.orders)
        return (
            f"streaming {len(self._sizes)} files, {sum(self._sizes.values()) / 1e9:.3g} GB on this disk; an "
            f"epoch takes {total / 1e9:.3g} GB in {blocks} blocks, windows are shuffled within each"
        )

    def files(self, blocks: Iterable[Block]) -> list[Path]:
        """Files of some blocks."""
        found = (path for pool, *place in blocks for path in self.orders[pool].files(*place))
        return list(dict.fromkeys(found))

    def files_ahead(self, blocks: Collection[Block]) -> list[Path]:
        """Files of the blocks whose turn it is, and of those that follow."""
        soon = [(pool, epoch, block + 1) for pool, epoch, block in blocks]
        return list(dict.fromkeys([*self.files(blocks), *self._kept, *self.files(soon)]))

    def fetch(self, path: Path, keep: frozenset[Path]) -> None:
        """Downloads a file unless there is no room beside `keep`."""
        self._owners[path].fetch(path, keep)


class StreamedSampler(WindowSampler):
    """`WindowSampler` of streamed windows.

    Args:
        orders (`Sequence[BlockShuffle]`): Of a [`StreamPlan`].
        *args, **options: As of `WindowSampler`.
    """

    def __init__(self, orders: Sequence[BlockShuffle], *args, **options):
        super().__init__(*args, **options)
        self.orders = orders

    def pick(self, pool: int, epoch: int, place: int) -> int:
        """The window of a pool at a place of its epoch."""
        return self.orders[pool].window(epoch, place)


class StreamedBatches:
    """The batches of a sampler, while the files of the next block are downloaded in the background.

    Only one process per machine needs this; the files are for all.

    Args:
        plan (`StreamPlan`): The files.
        sampler (`StreamedSampler`): With the orders of the plan.
        workers (`int`): Processes of the data loader.

    Raises:
        ValueError, HubError: From iteration, as soon as a file of this block or the next is not to be had.
    """

    def __init__(self, plan: StreamPlan, sampler: StreamedSampler, workers: int):
        self.plan, self.sampler = plan, sampler
        # For so many batches the slowest process may still read a block that is left.
        self._settled = READ_AHEAD * workers + SPARE_BATCHES

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        prefetcher = Prefetcher(self.plan.fetch)
        current: dict[int, Block] = {}  # by pool; one with little weight may be in few batches
        left: dict[Block, int] = {}  # and the step at which nobody reads it any more
        for step, batch in enumerate(self.sampler, self.sampler.start_step):
            if prefetcher.error is not None:
                raise prefetcher.error
            seen = self._blocks(step)
            now = current | {block[0]: block for block in seen}
            gone = {*current.values(), *seen} - {*now.values()}
            kept = {block: end for block, end in left.items() if end > step}
            if now != current or kept != left:
                left = kept | dict.fromkeys(gone, step + self._settled)
                current = now
                # At once, as a short block may be over before the one before it is not read any more.
                prefetcher.ask_for(self.plan.files_ahead(now.values()), self.plan.files(left))
            yield batch

    def _blocks(self, step: int) -> list[Block]:
        """Blocks that hold the windows of this rank's batch, in the order of the windows."""
        orders, found = self.sampler.orders, map(self.sampler.locate, self.sampler.positions(step))
        return [(pool, epoch, orders[pool].block(epoch, place)) for pool, epoch, place in found]

    def __len__(self) -> int:
        return len(self.sampler)
