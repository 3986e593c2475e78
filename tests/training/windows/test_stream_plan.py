"""Windows of a stream: the same as those of the folder, in bounded room."""

from pathlib import Path

import pytest
import torch

from datasets_scripts.storage.dataset_rows import DatasetRows
from datasets_scripts.storage.streaming.file_store import FileStore
from datasets_scripts.storage.streaming.streamed_rows import StreamedRows
from tests.synthetic import make_dataset
from training.windows import ConcatWindows, ForesightWindows, WindowConfig
from training.windows.block_shuffle import BlockShuffle, Shard, split_by_files
from training.windows.stream_plan import StreamedBatches, StreamedSampler, StreamPlan

EPISODES, FRAMES, BATCH = 8, 4, 4
VIDEOS = ["observation.images.main", "observation.depth.main"]
CONFIG = WindowConfig(views=["main"], history_length=2, flow_grid=(2, 3), flow_length=3, lookahead=True)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan") / "data"
    options = {"cameras": ("main",), "size": (16, 32), "n_points": 8, "file_per_episode": True}
    return make_dataset(folder, EPISODES, FRAMES, **options).root


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if isinstance(value, dict):
            assert_same(ours[key], value)
        else:
            assert torch.equal(ours[key], value) if isinstance(value, torch.Tensor) else ours[key] == value


def open_stream(recorded, folder, files_of_episodes: float):
    """Windows in a store with room for the files of some episodes; the store."""
    rows = StreamedRows(recorded, FileStore(folder, 10**9))
    each = sum(rows.bytes_of(path) for path in rows.files_of(0, VIDEOS))
    rows.store.limit_bytes = int(1.02 * files_of_episodes * each)
    return ForesightWindows(rows, CONFIG), rows.store


def size_on_disk(store) -> int:
    return sum(size for _, size, _ in store._scan())


def test_streamed_windows_are_those_of_the_folder_and_the_disk_stays_within_the_budget(recorded, tmp_path):
    windows, store = open_stream(recorded, tmp_path, files_of_episodes=8)
    store.limit_bytes //= 2  # half of the files
    local = ForesightWindows(DatasetRows(recorded), CONFIG)
    assert len(windows) == len(local) == EPISODES * (FRAMES - 2)
    for i in range(len(local)):
        assert_same(windows[i, 1], local[i, 1])
        assert size_on_disk(store) <= store.limit_bytes
    assert windows.action_dim == local.action_dim and windows.view_sizes == local.view_sizes
    for name, values in local.statistics["action"].items():
        assert windows.statistics["action"][name] == pytest.approx(values, abs=1e-5)


def test_the_next_block_is_there_before_its_windows_come(recorded, tmp_path):
    windows, store = open_stream(recorded, tmp_path, files_of_episodes=8)
    train = ConcatWindows([windows])
    plan = StreamPlan(train, None, "natural", seed=3)
    (order,) = plan.orders
    assert order.n_blocks(0) == 2
    sampler = StreamedSampler(plan.orders, len(train), BATCH, seed=3, steps=4)
    fetched, fetch = [], plan.fetch
    plan.fetch = lambda path, keep: (fetched.append(path), fetch(path, keep))
    seen = []
    for batch in StreamedBatches(plan, sampler, workers=0):
        seen += batch
        for item in batch:
            train[item]
            assert size_on_disk(store) <= store.limit_bytes
    assert sorted(seen) == [(i, 0) for i in range(len(train))]
    assert set(order.files(0, 0)) <= set(fetched)
    assert "2 blocks" in plan.describe()


def test_windows_to_measure_lie_in_few_files(recorded, tmp_path):
    windows, _ = open_stream(recorded, tmp_path, files_of_episodes=16)
    train = ConcatWindows([windows])
    StreamPlan(train, None, "natural", seed=3)
    assert len(train.near) == 2 * (FRAMES - 2)
    assert train.spread(2) == [train.near[0], train.near[2]]
    assert train.spread() == list(range(len(train)))


def test_too_little_room_is_refused_with_what_would_do(recorded, tmp_path):
    windows, _ = open_stream(recorded, tmp_path, files_of_episodes=4)
    with pytest.raises(ValueError, match=r"streaming_disk_gb is too small .* make it 1\.9\d times as large"):
        StreamPlan(ConcatWindows([windows]), None, "natural", seed=3)


def test_validation_episodes_are_whole_files_and_a_missing_file_ends_the_start(recorded, tmp_path):
    windows, _ = open_stream(recorded, tmp_path, files_of_episodes=16)
    rows = windows.rows
    train, held_out = split_by_files(rows, windows.columns.frame_keys, 0.25, seed=1)
    assert len(held_out) == 2 and sorted(train + held_out) == list(range(EPISODES))
    packed = rows.runs_of
    rows.runs_of = lambda *_: [[0, 1, 2], [3, 4, 5], [6, 7]]  # several episodes in a file
    for share in (0.25, 0.5, 0.9):
        train, held_out = split_by_files(rows, windows.columns.frame_keys, share, seed=1)
        assert train and held_out and sorted(train + held_out) == list(range(EPISODES))
        if share < 0.9:  # otherwise nothing would be left
            assert all(set(run) <= set(train) or set(run) <= set(held_out) for run in rows.runs_of())
    rows.runs_of = packed
    missing = rows.files_of(7, VIDEOS)[1]
    rows.remote.files.pop(missing.relative_to(rows.root).as_posix())
    with pytest.raises(ValueError, match=r"videos/observation.*/file-007.mp4 is missing or empty"):
        StreamPlan(ConcatWindows([windows]), None, "natural", seed=3)


def test_a_file_that_is_not_to_be_had_ends_the_batches_before_it_is_needed(recorded, tmp_path, monkeypatch):
    windows, _ = open_stream(recorded, tmp_path, files_of_episodes=8)
    plan = StreamPlan(ConcatWindows([windows]), None, "natural", seed=3)
    asked, kept = [], []

    class Failing:
        error = None

        def __init__(self, fetch):
            pass

        def ask_for(self, files, still_read=()):
            asked.append(list(files))
            kept.append(set(still_read))
            self.error = ValueError("the file has vanished") if len(asked) == 2 else None

    monkeypatch.setattr("training.windows.stream_plan.Prefetcher", Failing)
    sampler = StreamedSampler(plan.orders, len(windows), 1, seed=3)
    read = []
    with pytest.raises(ValueError, match="the file has vanished"):
        for batch in StreamedBatches(plan, sampler, workers=0):
            read += batch
    (order,) = plan.orders
    half = len(windows) // 2
    assert half < len(read) < half + 5, "at once, and not a block later"
    assert set(asked[0]) == {*order.files(0, 0), *order.files(0, 1)}
    assert set(asked[1]) == {*order.files(0, 1), *order.files(0, 2)}
    assert kept == [set(), set(order.files(0, 0))], "loaders may still read it"


@pytest.mark.parametrize("mixture", ["natural", [0.8, 0.2]])
@pytest.mark.parametrize("workers", [0, 2, 8])
def test_short_blocks_are_asked_for_before_their_windows_come_and_kept_until_these_are_read(
    monkeypatch, workers, mixture
):
    pools, shards, windows, batch, steps = 1 if mixture == "natural" else 2, 12, 20, 8, 90
    asked = []

    class Recorder:
        error = None

        def __init__(self, fetch):
            pass

        def ask_for(self, files, still_read=()):
            asked.append((set(files), {*files, *still_read}))

    monkeypatch.setattr("training.windows.stream_plan.Prefetcher", Recorder)
    orders = []
    for pool in range(pools):
        files = [Path(f"{pool}-{i}") for i in range(shards)]
        cut = [Shard(i * windows, (i + 1) * windows, frozenset([file])) for i, file in enumerate(files)]
        orders.append(BlockShuffle(cut, dict.fromkeys(files, 1), 2, (pool,)))
    plan = StreamPlan.__new__(StreamPlan)  # without datasets
    plan.orders, plan._kept = orders, []
    sampler = StreamedSampler(orders, [shards * windows] * pools, batch, seed=0, mixture=mixture, steps=steps)
    needed, named, kept = [], [], []
    for step, _ in enumerate(StreamedBatches(plan, sampler, workers)):
        found = map(sampler.locate, sampler.positions(step))
        blocks = {(pool, epoch, orders[pool].block(epoch, place)) for pool, epoch, place in found}
        needed.append({path for pool, *block in blocks for path in orders[pool].files(*block)})
        named.append(asked[-1][0]), kept.append(asked[-1][1])
    read_late = 2 * workers + 1
    for step, files in enumerate(needed[1:], start=1):
        assert files <= named[step - 1] | needed[step - 1], f"step {step} waits for its files"
        for later in kept[step : step + read_late]:
            assert files <= later, f"files of step {step} may go while they are read"
    assert len(asked) > steps // 6, "five batches are a block"
    most = pools * (2 + -(-(read_late + 2) // 5) + 1)  # blocks of two files
    assert max(map(len, kept)) <= 2 * most, "what is read goes"
