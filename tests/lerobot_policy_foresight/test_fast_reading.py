"""What the policy has read its own way is what LeRobot reads, and nothing else is read that way."""

import shutil

import pyarrow.parquet as pq
import pytest
import torch
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.dataset_reader import DatasetReader
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_policy
from torch.utils.data import DataLoader, default_collate

from lerobot_policy_foresight import ForesightConfig
from lerobot_policy_foresight.fast_reading import MARK, FastItems, check_same, read_fast
from tests.lerobot_policy_foresight.miniature import small_model
from tests.synthetic import make_dataset

LENGTHS = [6, 5, 7]
WINDOW = [step / 20 for step in range(-2, 4)]
MAIN, WRIST = "observation.images.main", "observation.images.wrist"
LABELS = [f"observation.{name}.main" for name in ("depth", "points", "points_visible")]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """One point and a padding one, so that no draw decides which is followed."""
    settings = {"cameras": {"main": (32, 40), "wrist": (16, 24)}, "n_points": 2, "n_padding": 1}
    return make_dataset(tmp_path_factory.mktemp("videos") / "ds", frames=LENGTHS, **settings).root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    settings = {"use_videos": False, "size": (16, 24), "tracks": False}
    return make_dataset(tmp_path_factory.mktemp("pictures") / "ds", frames=LENGTHS, **settings).root


@pytest.fixture(scope="module")
def policy(videos):
    """Sees one of the two cameras."""
    return make_policy(config(), ds_meta=LeRobotDatasetMetadata("local/synthetic", root=videos))


def config(**options) -> ForesightConfig:
    return ForesightConfig(device="cpu", cameras={"main": MAIN}, **small_model(), **options)


def opened(root, windows=WINDOW, **settings) -> LeRobotDataset:
    """The dataset with the same windows of all it holds."""
    features = LeRobotDatasetMetadata("local/synthetic", root=root).features
    deltas = (
        {key: windows for key in features if key.startswith(("observation", "action"))} if windows else None
    )
    return LeRobotDataset(
        "local/synthetic", root=root, delta_timestamps=deltas, return_uint8=True, **settings
    )


def opened_for(policy, root, **settings) -> LeRobotDataset:
    """The dataset as `lerobot-train` opens it for a policy."""
    deltas = resolve_delta_timestamps(policy.config, LeRobotDatasetMetadata("local/synthetic", root=root))
    return LeRobotDataset(
        "local/synthetic", root=root, delta_timestamps=deltas, return_uint8=True, **settings
    )


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
def test_every_item_is_the_stock_readers(kind, settings, request):
    root = request.getfixturevalue(kind)
    stock = opened(root, **settings)
    fast = FastItems(opened(root, **settings).reader, list(stock.features), "auto")
    for i in range(len(stock)):
        check_same(fast[i], stock[i])
    assert set(fast[0]) == set(stock[0])
    check_same(fast[-1], stock[len(stock) - 1])


def test_frames_decoded_on_demand_are_the_same(videos, tmp_path, monkeypatch):
    monkeypatch.setenv("FORESIGHT_CACHE", str(tmp_path))
    stock = opened(videos)
    fast = FastItems(opened(videos).reader, list(stock.features), "off")
    for i in (0, 5, 9):
        check_same(fast[i], stock[i])
    assert not list(tmp_path.iterdir())


def test_worker_processes_make_the_samples_that_the_policy_makes_of_stock_items(policy, videos):
    fast, stock = (opened_for(policy, videos) for _ in range(2))
    read_fast(fast.meta, policy.batches)
    rows = [0, 5, 9]  # windows that begin before their episode, and end after it
    loader = DataLoader(fast, len(rows), sampler=rows, num_workers=1, multiprocessing_context="spawn")
    batch = next(iter(loader))
    assert not {MAIN, WRIST, *LABELS} & set(batch)
    ours = policy.batches.read(batch, None, None)
    items = default_collate([stock[i] for i in rows])
    items[MAIN] = items[MAIN] / 255  # as the loop of lerobot-train hands it over
    theirs = policy.batches.read(items, items["observation.state"], items["action"])
    assert set(ours) == set(theirs) > {"images", "depth", "state", "actions", "track", "frame_mask"}
    assert ours.pop("task") == theirs.pop("task")
    torch.testing.assert_close(ours, theirs)


def test_a_policy_marks_its_dataset_and_no_other(videos):
    for asked in (True, False):
        dataset, other = (LeRobotDataset("local/synthetic", root=videos) for _ in range(2))
        policy = make_policy(config(fast_reading=asked), ds_meta=dataset.meta)
        assert hasattr(dataset.meta, MARK) == asked and not hasattr(other.meta, MARK)
        assert set(policy.batches.columns) == {MAIN, "observation.state", "action", *LABELS}
        assert {MAIN, WRIST, *LABELS} <= set(other[0])


def test_a_dataset_that_is_only_looked_at_is_left_to_lerobot(policy, videos, caplog):
    """As by somebody who shows a policy the frames of the dataset that it was made for."""
    dataset, stock = (LeRobotDataset("local/synthetic", root=videos) for _ in range(2))
    read_fast(dataset.meta, policy.batches)
    check_same(dataset[2], stock[2])
    assert set(dataset[2]) == set(stock[2]) and not caplog.records
    train = opened_for(policy, videos)
    train.reader._meta = dataset.meta  # another reader of the same metadata
    assert "observation.foresight.frame_mask" in train[2] and MAIN in dataset[2]


def test_a_dataset_with_other_names_is_left_to_lerobot(policy, videos):
    meta = LeRobotDatasetMetadata("local/synthetic", root=videos)
    del meta.features[MAIN]  # as under --rename_map
    read_fast(meta, policy.batches)
    assert not hasattr(meta, MARK)


def other_values(monkeypatch, dataset):
    """LeRobot delivers something else than before."""
    stock = DatasetReader._query_videos
    changed = lambda *asked: {key: frames + 1 for key, frames in stock(*asked).items()}  # noqa: E731
    monkeypatch.setattr(DatasetReader, "_query_videos", changed)
    return f"'{MAIN}' would not be"


def other_names(monkeypatch, dataset):
    """LeRobot keeps a setting elsewhere."""
    monkeypatch.delattr(dataset.reader, "_return_uint8")
    monkeypatch.setattr(DatasetReader, "_query_videos", lambda *asked: {MAIN: 0})
    return "_return_uint8"


@pytest.mark.parametrize("change", [other_values, other_names])
def test_a_lerobot_that_has_changed_reads_itself(policy, videos, monkeypatch, caplog, change):
    dataset = opened_for(policy, videos)
    read_fast(dataset.meta, policy.batches)
    message = change(monkeypatch, dataset)
    assert {MAIN, "observation.points.main"} <= set(dataset[3])
    assert "LeRobot's own reader" in caplog.text and message in caplog.text
    dataset[4]
    assert len(caplog.records) == 1  # said once


def test_a_dataset_of_which_only_some_files_are_here_is_read_by_lerobot(policy, videos, tmp_path, caplog):
    root = shutil.copytree(videos, tmp_path / "ds")  # as LeRobot downloads it for --dataset.episodes
    path = next((root / "data").rglob("*.parquet"))
    pq.write_table(pq.read_table(path).slice(0, LENGTHS[0]), path)
    dataset, stock = (opened_for(policy, root, episodes=[0]) for _ in range(2))
    read_fast(dataset.meta, policy.batches)
    check_same(dataset[2], stock[2])
    assert "LeRobot's own reader" in caplog.text and "incomplete" in caplog.text
