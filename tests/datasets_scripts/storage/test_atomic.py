"""Files appear whole or not at all."""

import json
import os
from pathlib import Path

import pytest

from datasets_scripts.storage import atomic
from datasets_scripts.storage.episode_job import EpisodeJob


def test_replacing_keeps_the_old_file_on_errors(tmp_path):
    path = tmp_path / "file.json"
    atomic.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        atomic.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def make_folder(path, text: str):
    path.mkdir()
    (path / "file").write_text(text)
    return path


def test_a_new_folder_takes_the_place_of_the_old_one(tmp_path):
    path = make_folder(tmp_path / "a[1]", "old")
    leftover = make_folder(tmp_path / ".a[1].killed00.tmp", "half")
    other = make_folder(tmp_path / ".a[1].b.running0.tmp", "of another folder")
    with atomic.write_whole_folder(path, replace=True) as folder:
        (folder / "file").write_text("new")
        assert (path / "file").read_text() == "old" and not leftover.exists()
    assert (path / "file").read_text() == "new"
    assert sorted(tmp_path.iterdir()) == sorted([path, other])


def test_a_link_is_replaced_and_not_followed(tmp_path):
    target = make_folder(tmp_path / "target", "old")
    (tmp_path / "link").symlink_to(target)
    with atomic.write_whole_folder(tmp_path / "link", replace=True) as folder:
        (folder / "file").write_text("new")
    assert (tmp_path / "link" / "file").read_text() == "new" and not (tmp_path / "link").is_symlink()
    assert (target / "file").read_text() == "old"


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_is_made_where_a_link_points(tmp_path, exists):
    (tmp_path / "disk").mkdir()
    target = tmp_path / "disk" / "out"
    if exists:
        target.mkdir()
    (tmp_path / "link").symlink_to(target)
    with atomic.write_whole_folder(tmp_path / "link") as folder:
        assert folder.parent == target.parent, "the bytes go to the other disk"
        (folder / "file").write_text("new")
    assert (target / "file").read_text() == "new" and (tmp_path / "link").is_symlink()
    assert EpisodeJob(tmp_path / "link", "annotation", {}).partial == tmp_path / "disk" / "out.partial"


def test_a_mount_point_is_refused_before_work(tmp_path, monkeypatch):
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path)
    with pytest.raises(ValueError, match="is a mount point, which cannot be replaced: name a folder inside"):
        EpisodeJob(tmp_path, "annotation", {})
    with pytest.raises(ValueError, match="is a mount point"):
        atomic.refuse_contents(tmp_path, "--export")


def test_the_old_folder_stays_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    path, rename = make_folder(tmp_path / "model", "old"), os.replace

    def fail_for_the_new_one(source, target):
        if str(source).endswith(atomic.SUFFIX):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fail_for_the_new_one)
    with (
        pytest.raises(OSError, match="no"),
        atomic.write_whole_folder(path, replace=True) as folder,
    ):
        (folder / "file").write_text("new")
    assert (path / "file").read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_whose_replacement_was_killed_gets_its_name_back(tmp_path):
    make_folder(tmp_path / f".model{atomic.REPLACED}", "old")
    atomic.remove_leftovers(tmp_path)
    assert (tmp_path / "model" / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
