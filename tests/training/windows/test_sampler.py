import itertools

import numpy as np
import pytest

from training.windows.sampler import SCHEDULE_BLOCK, WindowSampler

WINDOWS, BATCH = 23, 6


def stream(sampler, steps, start=0):
    return list(itertools.chain.from_iterable(sampler.batch_indices(step) for step in range(start, steps)))


def test_every_epoch_hands_out_each_window_once_in_another_order():
    items = stream(WindowSampler(WINDOWS, BATCH, seed=4), steps=12)
    first, second = items[:WINDOWS], items[WINDOWS : 2 * WINDOWS]
    assert sorted(index for index, _ in first) == list(range(WINDOWS))
    assert sorted(index for index, _ in second) == list(range(WINDOWS))
    assert {draw for _, draw in first} == {0} and {draw for _, draw in second} == {1}
    orders = [[index for index, _ in epoch] for epoch in (first, second)]
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])


def test_order_depends_on_the_seed_and_on_nothing_else():
    assert stream(WindowSampler(WINDOWS, BATCH, seed=1), 9) == stream(
        WindowSampler(WINDOWS, BATCH, seed=1), 9
    )
    assert stream(WindowSampler(WINDOWS, BATCH, seed=1), 9) != stream(
        WindowSampler(WINDOWS, BATCH, seed=2), 9
    )


@pytest.mark.parametrize("mixture", ["natural", "sqrt", [0.2, 0.7, 0.1]])
def test_starting_at_a_step_equals_having_come_there(mixture):
    def sampler(start):
        return WindowSampler([40, 9, 300], BATCH, seed=5, mixture=mixture, start_step=start, steps=30)

    whole, resumed = list(sampler(0)), list(sampler(17))
    assert whole[17:] == resumed
    assert len(sampler(0)) == 30 and len(sampler(17)) == 13


@pytest.mark.parametrize("world_size", [2, 3, 6])
@pytest.mark.parametrize("mixture", ["natural", "sqrt"])
def test_ranks_together_have_the_batch_of_one_process(world_size, mixture):
    for step in (0, 3, 11):
        alone = WindowSampler([WINDOWS, 50], BATCH, mixture=mixture).batch_indices(step)
        parts = [
            WindowSampler([WINDOWS, 50], BATCH, mixture=mixture, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        assert alone == [item for part in parts for item in part.batch_indices(step)]


def test_mixture_shares_follow_the_weights_within_a_block():
    sampler = WindowSampler([100, 2500], 64, mixture="sqrt")  # sqrt: 10 to 50
    indices = np.array([index for index, _ in stream(sampler, SCHEDULE_BLOCK // 64)])
    assert (indices < 100).mean() == pytest.approx(10 / 60, abs=1e-4) == sampler.shares[0]
    explicit = WindowSampler([100, 2500], 64, mixture=[3, 1])
    indices = np.array([index for index, _ in stream(explicit, SCHEDULE_BLOCK // 64)])
    assert (indices < 100).mean() == pytest.approx(0.75, abs=1e-4) == explicit.shares[0]
    assert WindowSampler([100, 300], 64).shares == [0.25, 0.75]


def test_each_dataset_of_a_mixture_is_drawn_without_replacement_across_blocks():
    sizes = [7, 3000]
    items = stream(WindowSampler(sizes, 64, mixture=[1, 1]), 2 * SCHEDULE_BLOCK // 64)
    for low, high in [(0, 7), (7, 3007)]:
        own = [(index, draw) for index, draw in items if low <= index < high]
        size = high - low
        for epoch in range(len(own) // size):
            part = own[epoch * size : (epoch + 1) * size]
            assert sorted(index for index, _ in part) == list(range(low, high))
            assert {draw for _, draw in part} == {epoch}


def test_datasets_alternate_within_a_block():
    items = stream(WindowSampler([500, 500], 10, mixture=[1, 1]), 20)
    first = np.array([index < 500 for index, _ in items])
    assert 60 < first.sum() < 140  # not one dataset first and then the other


def test_wrong_arguments_are_explained():
    with pytest.raises(ValueError, match="cannot be divided among 4 processes"):
        WindowSampler(WINDOWS, BATCH, world_size=4)
    with pytest.raises(ValueError, match="one per dataset"):
        WindowSampler([5, 6], BATCH, mixture=[1.0])
    with pytest.raises(ValueError, match="'natural', 'sqrt'"):
        WindowSampler([5, 6], BATCH, mixture="cube")
    with pytest.raises(ValueError, match="at least one window"):
        WindowSampler([5, 0], BATCH)
