"""Datasets under other names: the same content for the stock reader, and no incomplete copies."""

import errno
import os
import shutil

import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from datasets_scripts.conversion.column_renaming import rename_columns
from datasets_scripts.rename_columns import main
from datasets_scripts.storage.provenance import moving_flags, read_provenance
from tests.synthetic import make_dataset

HUMANOID = {"image": "observation.images.front", "state": "observation.state", "actions": "action"}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Videos, depth and tracks under this project's names."""
    return make_dataset(tmp_path_factory.mktemp("rename") / "data", frames=[5, 7], size=(32, 40))


@pytest.fixture(scope="module")
def humanoid(tmp_path_factory):
    """Pictures in the data files, and names that LeRobot's policies do not know."""
    return make_dataset(
        tmp_path_factory.mktemp("rename") / "humanoid",
        frames=[5, 7],
        cameras={"image": (24, 32)},
        image_prefix="",
        depth=False,
        tracks=False,
        use_videos=False,
        action_key="actions",
        state_key="state",
    )


def assert_same_items(old, new, names):
    """Every item of the new dataset is that of the old one, under the new names."""
    before, after = (LeRobotDataset("local/synthetic", root=root) for root in (old, new))
    assert len(before) == len(after) and after.meta.total_episodes == before.meta.total_episodes
    for i in (0, len(before) // 2, len(before) - 1):
        one, other = before[i], after[i]
        assert {names.get(key, key) for key in one} == set(other)
        for key, value in one.items():
            found = other[names.get(key, key)]
            assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value
    for key, stats in before.meta.stats.items():
        for name, value in stats.items():
            assert (after.meta.stats[names.get(key, key)][name] == value).all()
    assert {names.get(key, key) for key in before.meta.features} == set(after.meta.features)


def test_pictures_state_and_actions_get_the_names_that_policies_see(humanoid, tmp_path):
    pairs = [f"{old}={new}" for old, new in HUMANOID.items()]
    output = tmp_path / "new"
    assert main(["--dataset", str(humanoid.root), "--output", str(output), "--rename", *pairs]) == 0
    assert_same_items(humanoid.root, output, HUMANOID)


def test_labels_go_with_their_camera_and_videos_are_shared(labelled, tmp_path):
    output = tmp_path / "new"
    names = rename_columns(labelled.root, output, {"observation.images.main": "observation.images.image"})
    assert names["observation.points_visible.main"] == "observation.points_visible.image"
    assert_same_items(labelled.root, output, names)
    features = LeRobotDataset("local/synthetic", root=output).meta.features
    assert features["observation.points.image"]["info"]["camera"] == "image"
    provenance = read_provenance(output)
    assert moving_flags(provenance, 0, "image", labelled.n_points).tolist() == labelled.moving(0).tolist()
    assert set(provenance["cameras"]) == {"image"}
    for old in labelled.root.glob("videos/**/*.mp4"):
        place = [names.get(part, part) for part in old.relative_to(labelled.root).parts]
        assert output.joinpath(*place).samefile(old)
    # Back again, although LeRobot's camera "image" is part of the word "images".
    back = rename_columns(output, tmp_path / "back", {"observation.images.image": "observation.images.main"})
    assert back["observation.depth.image"] == "observation.depth.main"


def test_labels_go_with_a_camera_without_prefix(tmp_path):
    facts = make_dataset(
        tmp_path / "old",
        frames=[3],
        cameras={"image": (32, 40), "side": (32, 40)},
        image_prefix="",
        use_videos=False,
    )
    names = rename_columns(facts.root, tmp_path / "new", {"image": "observation.images.front"})
    assert names["observation.depth.image"] == "observation.depth.front"
    assert_same_items(facts.root, tmp_path / "new", names)
    provenance = read_provenance(tmp_path / "new")
    assert moving_flags(provenance, 0, "front", facts.n_points).tolist() == facts.moving(0).tolist()


def test_linked_videos_are_copied_if_their_folder_is_named(labelled, tmp_path):
    shutil.copytree(labelled.root, tmp_path / "old")
    (tmp_path / "old" / "videos").rename(tmp_path / "disk")
    (tmp_path / "old" / "videos").symlink_to(tmp_path / "disk")
    with pytest.raises(ValueError, match="old/videos leads out of its folder"):
        rename_columns(tmp_path / "old", tmp_path / "new", {"action": "act"})
    rename_columns(tmp_path / "old", tmp_path / "new", {"action": "act"}, tmp_path / "disk")
    assert_same_items(labelled.root, tmp_path / "new", {"action": "act"})


def test_two_columns_exchange_their_names(labelled, tmp_path):
    main, wrist = "observation.images.main", "observation.images.wrist"
    names = rename_columns(labelled.root, tmp_path / "new", {main: wrist, wrist: main})
    assert_same_items(labelled.root, tmp_path / "new", names)


def test_videos_are_copied_where_they_cannot_be_shared(labelled, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", refuse)
    rename_columns(labelled.root, tmp_path / "new", {"action": "act"})
    videos = list(labelled.root.glob("videos/**/*.mp4"))
    assert videos
    for old in videos:
        new = tmp_path / "new" / old.relative_to(labelled.root)
        assert new.read_bytes() == old.read_bytes() and not new.samefile(old)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"observation.image.main": "x"}, "did you mean observation.images.main"),
        ({"action": "observation.state"}, "another column of this name"),
        ({"action": "x", "observation.state": "x"}, "another column of this name"),
        ({"action": "a/b"}, "no slash"),
        ({"action": "a\\b"}, "no slash"),
        ({"observation.images.main": ".."}, "would lose their camera|are not '.'"),
        ({"action": "."}, "are not '.'"),
        ({"timestamp": "time"}, "LeRobot's own"),
        ({"action": "task"}, "LeRobot's own"),
        ({"observation.images.main": "image"}, "would lose their camera"),
        ({"observation.depth.main": "observation.depth.top"}, "goes with its camera"),
        ({}, "nothing to rename"),
    ],
)
def test_bad_names_are_refused_before_anything_is_written(labelled, tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        rename_columns(labelled.root, tmp_path / "new", names)
    assert not list(tmp_path.iterdir())


def test_an_existing_output_is_refused(labelled, tmp_path, capsys):
    options = ["--dataset", str(labelled.root), "--output", str(tmp_path), "--rename", "action=act"]
    assert main(options) == 1
    assert "exists already" in capsys.readouterr().err


def test_a_failure_leaves_nothing(labelled, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("datasets_scripts.conversion.column_renaming.share_file", full)
    with pytest.raises(OSError, match="No space"):
        rename_columns(labelled.root, tmp_path / "new", {"action": "act"})
    assert not list(tmp_path.iterdir())
