"""Recorded data for a trained policy: known or not, held-out episodes, windows that fit."""

import json
import shutil

import pytest

from datasets_scripts.storage.dataset_rows import DatasetRows
from tests.synthetic import make_dataset
from tests.tiny import tiny_config
from training.config import DataConfig, DatasetSource, RunConfig
from training.config_reading import save_config
from training.policy_data import find_held_out, find_source, fit_windows, is_trained_on, match_cameras
from training.run_data import dataset_identity

FPS = 20


def make_demos(root, **changes):
    sizes = {"episodes": 4, "frames": 8, "fps": FPS, "use_videos": False, "size": (24, 24)}
    return DatasetRows(make_dataset(root, **(sizes | {"state_dim": 4, "action_dim": 4} | changes)).root)


def policy_config(**changes):
    sizes = {"action_dim": 4, "binary_action_indices": (), "state_dim": 4, "binary_state_indices": ()}
    return tiny_config(**(sizes | {"fps": FPS} | changes))


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    return make_demos(tmp_path_factory.mktemp("recorded") / "demos")


@pytest.fixture
def run(demos, tmp_path):
    """The model folder of a run on `demos`, with what the run writes about its data."""
    source = DatasetSource(str(demos.root), frame_stride=2, strided_commands="sum")
    save_config(RunConfig(data=DataConfig(datasets=[source], val_fraction=0.25)), tmp_path / "config.yaml")
    (tmp_path / "datasets.json").write_text(json.dumps([dataset_identity(demos)]))
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


def copy_of(rows, place):
    shutil.copytree(rows.root, place)
    return DatasetRows(place)


def test_a_renamed_copy_is_the_data_it_was_trained_on_and_another_of_the_name_is_not(run, demos, tmp_path):
    renamed = copy_of(demos, tmp_path / "renamed")
    assert is_trained_on(run, renamed) is True
    assert find_held_out(run, policy_config(), renamed) == find_held_out(run, policy_config(), demos)
    namesake = make_demos(tmp_path / "elsewhere" / "demos", frames=9)
    assert is_trained_on(run, namesake) is None, "it may be the same, with more episodes"
    assert find_source(run, namesake) is None and find_held_out(run, policy_config(), namesake) is None
    assert is_trained_on(run, make_demos(tmp_path / "others", frames=9)) is False


def test_recordings_that_differ_in_their_values_alone_are_told_apart(demos, tmp_path):
    other = copy_of(demos, tmp_path / "demos")
    statistics = other.root / "meta" / "stats.json"
    statistics.write_text(statistics.read_text().replace("1", "2"))
    own, there = (dataset_identity(rows) for rows in (demos, other))
    assert own.pop("statistics_sha256") != there.pop("statistics_sha256") and own == there


def test_of_a_published_policy_its_card_tells_what_it_was_trained_on(demos, tmp_path):
    card = tmp_path / "evaluation" / "training.json"
    assert is_trained_on(tmp_path, demos) is None, "nothing is known"
    card.parent.mkdir()
    known = {"train_episodes": 3, **dataset_identity(demos)}
    card.write_text(json.dumps({"datasets": [known | {"name": "renamed"}]}))
    assert is_trained_on(tmp_path, demos) is True
    card.write_text(json.dumps({"datasets": [known | {"name": "renamed", "digest": "of another"}]}))
    assert is_trained_on(tmp_path, demos) is False
    card.write_text(json.dumps({"datasets": [{"name": "renamed"}]}))  # of an older version
    assert is_trained_on(tmp_path, demos) is None
    card.write_text(json.dumps({"datasets": [{"name": "demos"}]}))
    assert is_trained_on(tmp_path, demos) is True


def test_data_of_the_run_are_read_as_the_run_reads_them(run, demos):
    wanted, notes = fit_windows(run, policy_config(fps=FPS / 2), demos)
    assert (wanted.frame_stride, wanted.strided_commands, notes) == (2, "sum", [])
    assert wanted.random_shift == 0 and wanted.cameras == {"main": "main", "wrist": "wrist"}


def test_other_data_are_read_at_the_rate_of_the_policy_through_the_cameras_they_have(run, tmp_path):
    fast = make_demos(tmp_path / "fast", fps=4 * FPS, cameras=("front",), frames=30, state_key=None)
    wanted, notes = fit_windows(run, policy_config(), fast)
    assert (wanted.frame_stride, wanted.strided_commands) == (4, "sum")
    assert wanted.cameras == {"main": "front", "wrist": None} and wanted.state_key is None
    assert [note.split(";")[0] for note in notes] == [
        "The view “main” looks through the camera “front”.",
        "The dataset has no camera for the view “wrist”.",
        "The checkpoint reads a state of 4 numbers",
    ]
    assert fit_windows(run, policy_config(), fast, "wrist=front")[0].cameras["main"] is None
    assert fit_windows(run, policy_config(fps=None), fast)[0].frame_stride == 1


def test_a_rate_that_is_no_multiple_is_refused(run, tmp_path):
    slow = make_demos(tmp_path / "slow", fps=30)
    with pytest.raises(ValueError, match="slow has 30 frames per second, which is not a multiple of .* 20 "):
        fit_windows(run, policy_config(), slow)


def test_actions_of_another_size_are_not_compared(run, tmp_path):
    other = make_demos(tmp_path / "other", action_dim=6)
    wanted, notes = fit_windows(run, policy_config(), other)
    assert "action" not in wanted.objectives and "actions of 4 numbers" in " ".join(notes)


@pytest.mark.parametrize(
    ("given", "cameras", "expected"),
    [
        ("", ("main", "wrist"), {"main": "main", "wrist": "wrist"}),
        ("", ("wrist", "main"), {"main": "main", "wrist": "wrist"}),
        ("", ("top", "side", "back"), {"main": "top", "wrist": "side"}),
        ("", ("wrist", "top"), {"main": "top", "wrist": "wrist"}),
        ("", ("top",), {"main": "top", "wrist": None}),
        ("main=back", ("top", "side", "back"), {"main": "back", "wrist": "top"}),
        ("main = side, wrist=none", ("top", "side"), {"main": "side", "wrist": None}),
    ],
)
def test_cameras_are_matched_by_name_then_in_order_unless_told(given, cameras, expected):
    features = {f"observation.images.{camera}": {"dtype": "video"} for camera in cameras}
    features["observation.depth.main"] = {"dtype": "video", "info": {"is_depth_map": True}}
    assert match_cameras(["main", "wrist"], features, given) == expected
