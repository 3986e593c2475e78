"""Which windows form the batch of a step: a pure function of (seed, step).

No state is kept between steps, so a run resumes exactly by starting the sampler at another step, and the
global batch of a step is the same for any number of ranks: each takes its slice.
"""

import functools
from collections.abc import Iterator, Sequence

import numpy as np

__all__ = ["WindowSampler"]

SCHEDULE_BLOCK = 8192  # positions over which a mixture's shares are kept exactly


class WindowSampler:
    """Batches of `(index, draw)` for `ForesightWindows` or `ConcatWindows`.

    Every epoch is its own permutation of the windows, derived from the seed. `draw` says how often the window
    was handed out before; with it, augmentation differs between epochs. In a mixture each dataset keeps its
    own permutations and epochs, and a fixed schedule of shuffled blocks decides whose turn it is, so shares
    hold over every 8192 windows.

    It is a batch sampler: `DataLoader(windows, batch_sampler=sampler, collate_fn=collate_windows)`. It
    already splits batches over ranks, so do not let Accelerate `prepare` that loader: it would split again.

    Args:
        sizes (`int` or `Sequence[int]`): Windows of each dataset, in the order of `ConcatWindows`.
        batch_size (`int`): Size of the *global* batch of one step; `world_size` must divide it.
        seed (`int`): Seed of permutations and schedule.
        mixture (`str` or `Sequence[float]`): `"natural"` takes windows as they are, each once per epoch;
            `"sqrt"` takes datasets in proportion to the square root of their sizes; numbers are explicit
            weights.
        rank, world_size (`int`): This process, and the number of processes.
        start_step (`int`): Step of the first batch that iteration yields.
        steps (`int`, *optional*): Step at which iteration ends, not counted from `start_step`; endless if
            omitted.

    Raises:
        ValueError: If a size or weight is not positive, or the batch cannot be divided.
    """

    def __init__(
        self,
        sizes: int | Sequence[int],
        batch_size: int,
        seed: int = 0,
        mixture: str | Sequence[float] = "natural",
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        steps: int | None = None,
    ):
        self.sizes = [int(size) for size in np.atleast_1d(sizes)]
        if min(self.sizes) < 1:
            raise ValueError(f"every dataset needs at least one window; sizes are {self.sizes}")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"a global batch of {batch_size} windows cannot be divided among {world_size} processes; "
                f"choose a multiple of {world_size}"
            )
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.start_step, self.steps = start_step, steps
        self._offsets = np.cumsum([0, *self.sizes])
        weights = self._weights(mixture)
        # A "natural" mixture is one big dataset: one permutation over all windows, exact epochs.
        self._pools = [sum(self.sizes)] if weights is None else self.sizes
        self._quota = None if weights is None else _apportion(weights, SCHEDULE_BLOCK)
        self._permutation = functools.lru_cache(maxsize=2 * len(self._pools) + 2)(self._make_permutation)
        self._schedule = functools.lru_cache(maxsize=2)(self._make_schedule)

    def _weights(self, mixture: str | Sequence[float]) -> np.ndarray | None:
        if mixture == "natural":
            return None
        if mixture == "sqrt":
            return np.sqrt(self.sizes)
        if isinstance(mixture, str):
            raise ValueError(f"mixture is '{mixture}'; use 'natural', 'sqrt' or a list of weights")
        weights = np.asarray(mixture, dtype=np.float64)
        if weights.shape != (len(self.sizes),) or not (np.isfinite(weights) & (weights > 0)).all():
            raise ValueError(
                f"mixture weights {list(mixture)} must be {len(self.sizes)} positive numbers, one per dataset"
            )
        return weights

    @property
    def shares(self) -> list[float]:
        """Share of each dataset in the batches."""
        counts = np.array(self.sizes if self._quota is None else self._quota)
        return (counts / counts.sum()).tolist()

    def batch_indices(self, step: int) -> list[tuple[int, int]]:
        """`(index, draw)` of this rank's windows at one step; all ranks in order have the global batch."""
        return [self._window(position) for position in self.positions(step)]

    def positions(self, step: int) -> range:
        """Places of this rank's windows at one step in the endless stream of windows."""
        share = self.batch_size // self.world_size
        first = step * self.batch_size + self.rank * share
        return range(first, first + share)

    def locate(self, position: int) -> tuple[int, int, int]:
        """Pool (dataset, or 0 for all of a natural mixture), its epoch and the place in it at a position."""
        pool = 0
        if self._quota is not None:
            block, within = divmod(position, SCHEDULE_BLOCK)
            turns, turn_counts = self._schedule(block)
            pool = int(turns[within])
            position = block * int(self._quota[pool]) + int(turn_counts[within])
        return pool, *divmod(position, self._pools[pool])

    def _window(self, position: int) -> tuple[int, int]:
        """Window and draw at a position of the endless stream of windows."""
        pool, draw, place = self.locate(position)
        return int(self._offsets[pool]) + self.pick(pool, draw, place), draw

    def pick(self, pool: int, epoch: int, place: int) -> int:
        """The window of a pool at a place of its epoch."""
        return int(self._permutation(pool, epoch)[place])

    def _make_permutation(self, pool: int, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, 0, pool, epoch)).permutation(self._pools[pool])

    def _make_schedule(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Whose turn it is in a block, and how many turns that dataset had before in the block."""
        turns = np.repeat(np.arange(len(self._quota)), self._quota)
        turns = np.random.default_rng((self.seed, 1, block)).permutation(turns)
        counts = np.empty_like(turns)
        for pool, quota in enumerate(self._quota):
            counts[turns == pool] = np.arange(quota)
        return turns, counts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.start_step
        while self.steps is None or step < self.steps:
            yield self.batch_indices(step)
            step += 1

    def __len__(self) -> int:
        if self.steps is None:
            raise TypeError("an endless WindowSampler has no length; give it `steps`")
        return max(0, self.steps - self.start_step)


def _apportion(weights: np.ndarray, total: int) -> np.ndarray:
    """Whole shares of `total` by weight (largest remainders), at least one each."""
    exact = weights / weights.sum() * total
    shares = np.maximum(np.floor(exact).astype(np.int64), 1)
    order = np.argsort(-(exact - np.floor(exact)), kind="stable")
    for i in range(max(0, total - int(shares.sum()))):
        shares[order[i % len(order)]] += 1
    while shares.sum() > total:  # the minimum of one may overshoot: the largest gives
        shares[shares.argmax()] -= 1
    return shares
