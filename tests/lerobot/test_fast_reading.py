"""Items that the policy has read its own way are LeRobot's, and nothing else is read that way."""

import shutil

import pyarrow.parquet as pq
import pytest
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.dataset_reader import DatasetReader
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_policy
from torch.utils.data import DataLoader

from lerobot_policy_foresight import ForesightConfig
from lerobot_policy_foresight.fast_reading import MARK, FastItems, check_same, read_fast
from tests.lerobot.miniature import small_model
from tests.synthetic import make_dataset

LENGTHS = [6, 5, 7]
WINDOW = [step / 20 for step in range(-2, 4)]
CAMERAS = ["images.main", "images.wrist", "depth.main", "depth.wrist"]
KEYS = [f"observation.{key}" for key in (*CAMERAS, "state", "points.main", "points_visible.main")]
USED = [key for key in KEYS if "wrist" not in key] + ["action"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    sizes = {"main": (32, 40), "wrist": (16, 24)}
    return make_dataset(
        tmp_path_factory.mktemp("videos") / "ds", frames=LENGTHS, cameras=sizes, state_dim=3
    ).root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """No tracks, and a state of one entry, which LeRobot stores as a number."""
    settings = {"use_videos": False, "size": (16, 24), "tracks": False}
    return make_dataset(tmp_path_factory.mktemp("pictures") / "ds", frames=LENGTHS, **settings).root


def opened(root, windows=WINDOW, **settings) -> LeRobotDataset:
    """The dataset with windows of all it holds, as `lerobot-train` opens it."""
    features = LeRobotDatasetMetadata("local/synthetic", root=root).features
    deltas = {key: windows for key in features if key.startswith(("observation", "action"))}
    return LeRobotDataset(
        "local/synthetic",
        root=root,
        delta_timestamps=deltas if windows else None,
        return_uint8=True,
        **settings,
    )


def assert_same_items(fast: LeRobotDataset, stock: LeRobotDataset, caplog, every: int = 1) -> None:
    """All items, of all that the fast ones have; not because LeRobot read them all."""
    for i in range(0, len(stock), every):
        check_same(fast[i], stock[i])
    assert isinstance(getattr(fast.meta, MARK)._items, FastItems) and not caplog.records


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"depth_output_unit": "m", "episodes": [0, 2]},
        {"windows": [0.0]},
        {"windows": None, "image_transforms": lambda frames: frames.flip(-1)},
    ],
)
@pytest.mark.parametrize("kind", ["videos", "pictures"])
def test_every_item_is_the_stock_readers(kind, settings, request, caplog):
    root = request.getfixturevalue(kind)
    fast, stock = (opened(root, **settings) for _ in range(2))
    read_fast(fast.meta, list(fast.features))
    assert_same_items(fast, stock, caplog)
    assert set(fast[0]) == set(stock[0])
    check_same(fast[-1], stock[len(stock) - 1])


def test_frames_decoded_on_demand_are_the_same(videos, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FORESIGHT_CACHE", str(tmp_path))
    fast, stock = (opened(videos) for _ in range(2))
    read_fast(fast.meta, list(fast.features), frame_cache="off")
    assert_same_items(fast, stock, caplog, every=5)
    assert not list(tmp_path.iterdir())


def test_worker_processes_read_that_way_too_and_only_what_is_used(videos):
    fast, stock = (opened(videos) for _ in range(2))
    read_fast(fast.meta, USED)
    # The first window begins before its episode, the second ends after it.
    loader = DataLoader(fast, sampler=[0, 5, 9], num_workers=1, multiprocessing_context="spawn")
    for i, batch in zip((0, 5, 9), loader, strict=True):
        item = {key: value[0] for key, value in batch.items()}
        assert "observation.images.wrist" not in item and set(USED) <= set(item)
        check_same(item, stock[i])


def test_unknown_columns_mean_all_columns(videos):
    # Under --rename_map the policy's names are not the dataset's.
    fast = opened(videos)
    read_fast(fast.meta, ["observation.images.front"])
    assert set(KEYS) <= set(fast[0])


def test_a_policy_marks_its_dataset_and_no_other(videos):
    for asked in (True, False):
        dataset, other = opened(videos), opened(videos)
        model = small_model(binary_action_indices=[])
        policy = make_policy(
            ForesightConfig(device="cpu", fast_reading=asked, cameras={"main": KEYS[0]}, **model),
            ds_meta=dataset.meta,
        )
        assert hasattr(dataset.meta, MARK) == asked and not hasattr(other.meta, MARK)
        assert set(policy.batches.columns) == set(USED)
        assert ("observation.images.wrist" in dataset[0]) != asked
        assert set(KEYS) <= set(other[0])


def other_values(monkeypatch, dataset):
    """LeRobot delivers something else than before."""
    stock = DatasetReader._query_videos
    changed = lambda *asked: {key: frames + 1 for key, frames in stock(*asked).items()}  # noqa: E731
    monkeypatch.setattr(DatasetReader, "_query_videos", changed)
    return "'observation.images.main' would not be"


def other_names(monkeypatch, dataset):
    """LeRobot keeps a setting elsewhere."""
    monkeypatch.delattr(dataset.reader, "_return_uint8")
    monkeypatch.setattr(DatasetReader, "_query_videos", lambda *asked: {})
    return "_return_uint8"


@pytest.mark.parametrize("change", [other_values, other_names])
def test_a_lerobot_that_has_changed_reads_itself(videos, monkeypatch, caplog, change):
    dataset = opened(videos)
    read_fast(dataset.meta, USED)
    message = change(monkeypatch, dataset)
    assert set(KEYS) - set(dataset.meta.video_keys) <= set(dataset[3])
    assert "LeRobot's own reader" in caplog.text and message in caplog.text
    dataset[4]
    assert len(caplog.records) == 1  # said once


def test_a_dataset_of_which_only_some_files_are_here_is_read_by_lerobot(videos, tmp_path, caplog):
    root = shutil.copytree(videos, tmp_path / "ds")  # as LeRobot downloads it for --dataset.episodes
    path = next((root / "data").rglob("*.parquet"))
    pq.write_table(pq.read_table(path).slice(0, LENGTHS[0]), path)
    dataset, stock = (opened(root, episodes=[0]) for _ in range(2))
    read_fast(dataset.meta, USED)
    check_same(dataset[2], stock[2])
    assert "LeRobot's own reader" in caplog.text and "incomplete" in caplog.text
