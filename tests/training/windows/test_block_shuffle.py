from pathlib import Path

import numpy as np
import pytest

from training.windows.block_shuffle import BlockShuffle, Shard
from training.windows.stream_plan import StreamedSampler

SHARDS, WINDOWS, BATCH = 12, 5, 6  # windows of a shard
FILES = [Path(f"file-{i}") for i in range(SHARDS)]
SIZES = dict.fromkeys(FILES, 10) | {Path("data"): 4}
SEED = (7, 2, 0)


@pytest.fixture
def order():
    shards = [
        Shard(i * WINDOWS, (i + 1) * WINDOWS, frozenset({FILES[i], Path("data")})) for i in range(SHARDS)
    ]
    return BlockShuffle(shards, SIZES, 44, SEED)


def windows(order, epoch):
    return [order.window(epoch, place) for place in range(len(order))]


def test_an_epoch_has_each_window_once_in_an_order_of_its_own(order):
    first, second = windows(order, 0), windows(order, 1)
    assert sorted(first) == sorted(second) == list(range(SHARDS * WINDOWS))
    assert first != second


def test_a_block_fits_the_budget_and_mixes_the_windows_of_its_shards(order):
    assert order.n_blocks(0) == 3
    for block in range(3):
        files = order.files(0, block)
        assert sum(SIZES[path] for path in files) <= 44
        span = [windows(order, 0)[place] for place in range(len(order)) if order.block(0, place) == block]
        assert sorted(span) == order.windows_of(0, block).tolist()
        assert {FILES[window // WINDOWS] for window in span} == set(files) - {Path("data")}
        changes = np.count_nonzero(np.diff(np.array(span) // WINDOWS))
        assert changes > 2 * len(files), "neighbors are mostly of different files"
    assert order.files(0, 3) == order.files(1, 0)
    assert order.downloaded_bytes(0) == SHARDS * 10 + 3 * 4, (
        "a file that three blocks share comes three times"
    )


def test_a_sampler_resumes_in_a_block_and_ranks_share_its_batches(order):
    size = SHARDS * WINDOWS

    def sampler(**options):
        return StreamedSampler([order], size, BATCH, steps=20, **options)

    whole = list(sampler())
    assert [window for batch in whole[:10] for window, _ in batch] == windows(order, 0)
    assert whole[13:] == list(sampler(start_step=13))
    halves = [list(sampler(rank=rank, world_size=2)) for rank in range(2)]
    assert whole == [left + right for left, right in zip(*halves, strict=True)]


def test_datasets_of_a_weighted_mixture_have_orders_of_their_own(order):
    sampler = StreamedSampler([order, order], [60, 60], BATCH, mixture=[1, 1])
    items = [item for step in range(30) for item in sampler.batch_indices(step)]
    for first in (0, 60):
        epoch = [window for window, draw in items if draw == 0 and first <= window < first + 60]
        assert epoch == [first + window for window in windows(order, 0)]
