"""Names, dtypes and checks of depth and track columns."""

import numpy as np
import pytest
import torch
from lerobot.datasets.dataset_tools import delete_episodes, merge_datasets, split_dataset
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from datasets_scripts import columns
from datasets_scripts.storage.dataset_folder import load_features
from tests.datasets_scripts.conftest import FRAMES, POINTS
from tests.synthetic import make_dataset


@pytest.fixture(scope="module")
def annotated(tmp_path_factory):
    """A dataset of videos with depth and tracks."""
    root = tmp_path_factory.mktemp("columns") / "annotated"
    options = {"cameras": ("main",), "size": (32, 40), "n_points": POINTS, "n_padding": 2}
    return make_dataset(root, frames=list(FRAMES), **options)


def test_points_survive_packing_within_float16():
    points = np.random.default_rng(0).uniform(0, 1, size=(3, POINTS, 3))
    packed = columns.pack_points(points)
    assert packed.dtype == np.float16
    assert packed.shape == (3, POINTS * 3)
    assert np.abs(columns.unpack_points(packed) - points).max() < 2**-11


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_points_that_float16_cannot_hold_are_refused(value):
    points = np.zeros((2, POINTS, 3))
    points[1, 2, 0] = value
    with pytest.raises(ValueError, match="not finite in float16"):
        columns.pack_points(points)


def test_depth_is_found_by_its_mark_not_by_its_name():
    depth = columns.depth_feature(4, 6)
    picture = {"dtype": "video", "shape": (4, 6, 3), "names": None}
    older = {**picture, "shape": (4, 6, 1), "video_info": {"video.is_depth_map": True}}
    assert columns.find_depth_key({"observation.depth.main": depth}, "main") == "observation.depth.main"
    recorded = {"observation.images.main_depth": depth}
    assert columns.find_depth_key(recorded, "main") == "observation.images.main_depth"
    assert columns.find_depth_key({"observation.images.main_depth": older}, "main") is not None
    assert columns.find_depth_key({"observation.images.main_depth": picture}, "main") is None
    assert columns.find_depth_key(recorded, "wrist") is None


def test_labels_are_told_from_inputs():
    assert columns.is_label_key("observation.points.main")
    assert columns.is_label_key("observation.points_visible.main")
    assert columns.is_label_key("observation.images.main_depth", columns.depth_feature(4, 6))
    assert not columns.is_label_key("observation.images.main", {"dtype": "video"})
    assert not columns.is_label_key("observation.state")


def test_invalid_depth_becomes_zero_in_arrays_and_tensors():
    depth = np.array([0.0, 0.01, 0.5, 2.0, 3.995, 4.0, np.nan, np.inf], dtype=np.float32)
    expected = [0, 0, 0.5, 2.0, 0, 0, 0, 0]
    assert columns.clean_depth(depth, 4.0).tolist() == expected
    cleaned = columns.clean_depth(torch.from_numpy(depth), 4.0)
    assert cleaned.dtype == torch.float32
    assert cleaned.tolist() == expected
    assert columns.clean_depth(depth)[5] == 4.0  # no limit declared


@pytest.mark.parametrize(
    ("depth", "limit", "message"),
    [
        (np.linspace(300, 4000, 50), np.inf, "looks like millimeters"),
        (np.full(50, 10.0), 10.0, "millimeters stored as meters"),
        (np.linspace(-1, 4, 50), np.inf, "cannot be negative"),
        (np.full(5, np.nan), np.inf, "no finite value"),
    ],
)
def test_implausible_depth_is_refused_by_name(depth, limit, message):
    with pytest.raises(ValueError, match=message) as error:
        columns.check_depth_range(depth, "observation.depth.front", limit)
    assert "observation.depth.front" in str(error.value)


def test_plausible_depth_passes():
    columns.check_depth_range(np.linspace(0, 4, 50), "observation.depth.main", 4.0)
    columns.check_depth_range(torch.zeros(3, 3), "observation.depth.main", 4.0)  # nothing measured is allowed


@pytest.mark.parametrize("sentinel", [-1, -999, -np.inf, np.inf, np.nan, 65.535, 65535, 3.4e38])
def test_a_value_that_stands_for_no_measurement_is_invalid_and_a_scene_at_60_m_is_not(sentinel):
    depth = np.array([59.9, 60.0, *[sentinel] * 5], np.float32)
    columns.check_depth_range(depth, "observation.depth.main")
    for cleaned in (columns.clean_depth(depth), columns.clean_depth(torch.from_numpy(depth))):
        assert cleaned.tolist() == [*depth[:2].tolist(), 0, 0, 0, 0, 0]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "uint32"])
def test_the_largest_integer_and_negative_ones_stand_for_no_measurement(dtype):
    limits = np.iinfo(dtype)
    low = [-1, limits.min] if limits.min else [0, 0]
    depth = np.array([0, 1, 254, *low, limits.max], dtype)
    erased = columns.erase_sentinels(depth)
    assert erased.tolist() == [0, 1, 254, 0, 0, 0] and erased.dtype == dtype


def test_the_largest_int16_stands_for_no_measurement_where_a_png_has_made_it_unsigned():
    depth = np.array([32766, 32767, 60_000], np.uint16)
    assert columns.erase_sentinels(depth).tolist() == [32766, 0, 60_000]


def test_annotated_dataset_passes_stock_split_delete_and_merge(annotated, tmp_path):
    dataset = LeRobotDataset("local/annotated", root=annotated.root)
    split = split_dataset(dataset, {"a": [0, 1], "b": [2]}, output_dir=tmp_path / "split")
    shorter = delete_episodes(dataset, [0], output_dir=tmp_path / "deleted", repo_id="local/deleted")
    merged = merge_datasets(
        list(split.values()), output_repo_id="local/merged", output_dir=tmp_path / "merged"
    )
    for made, episodes in ((shorter, (1, 2)), (merged, (0, 1, 2))):
        made = LeRobotDataset(made.repo_id, root=made.root, depth_output_unit="m")
        row = 0
        for episode in episodes:
            for t in range(FRAMES[episode]):
                item = made[row]
                points = item["observation.points.main"].numpy().reshape(-1, 3)
                assert np.abs(points - annotated.points(episode, t)).max() < 2e-3
                visible = annotated.visible(episode, t)
                assert (item["observation.points_visible.main"].numpy() == visible).all()
                depth = columns.clean_depth(item["observation.depth.main"][0].numpy(), 4.0)
                assert np.abs(depth - annotated.depth(episode, t, "main")).max() < 2e-3
                row += 1
        assert row == len(made)


def test_missing_columns_are_named_with_the_command_that_adds_them(pristine, annotated):
    columns.validate_columns(load_features(annotated.root), ["main"], need_depth=True, need_tracks=True)
    columns.validate_columns(load_features(pristine), ["main"])
    with pytest.raises(ValueError, match=r"observation\.depth\.main.*simulate\.py"):
        columns.validate_columns(load_features(pristine), ["main"], need_depth=True)
    with pytest.raises(ValueError, match=r"observation\.points\.main.*simulate\.py"):
        columns.validate_columns(load_features(pristine), ["main"], need_tracks=True)
    with pytest.raises(ValueError, match="no camera 'front'.*its cameras are main"):
        columns.validate_columns(load_features(annotated.root), ["front"])
    features = load_features(annotated.root)
    features["observation.points_visible.main"]["shape"] = [POINTS + 1]
    with pytest.raises(ValueError, match="'observation.points.main' of shape .* points need 3 values each"):
        columns.validate_columns(features, ["main"], need_tracks=True)
