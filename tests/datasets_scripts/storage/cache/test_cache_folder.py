"""The cache stays below its size, and nobody loses what they read."""

import fcntl
import os

import pytest

from datasets_scripts.storage.cache import cache_folder
from datasets_scripts.storage.cache.cache_folder import make_room, open_cache_folder

SIZE = 1000


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Three datasets of 1000 bytes each, opened one after the other by processes that have ended."""
    monkeypatch.setattr(cache_folder, "_held", {})
    folders = [open_cache_folder(tmp_path, "frames", tmp_path / name) for name in ("old", "middle", "new")]
    for age, folder in zip((300, 200, 100), folders, strict=True):
        (folder / "frames.npy").write_bytes(bytes(SIZE))
        os.utime(folder / cache_folder.HELD_FILE, (1e9 - age, 1e9 - age))
        os.close(cache_folder._held.pop(folder))
    monkeypatch.setattr(cache_folder, "CACHE_BYTES", 3 * SIZE)
    return folders


def test_the_folders_opened_longest_ago_are_deleted_until_there_is_room(opened, tmp_path):
    assert make_room(tmp_path, 0) == 0 and all(folder.exists() for folder in opened)
    assert make_room(tmp_path, SIZE + 1) == 2 * SIZE
    assert [folder.exists() for folder in opened] == [False, False, True]
    assert not list(tmp_path.glob("*/.*"))


def test_what_a_process_reads_is_not_deleted(opened, tmp_path):
    old, middle, new = opened
    with (old / cache_folder.HELD_FILE).open() as of_another_process:
        fcntl.flock(of_another_process, fcntl.LOCK_SH)
        open_cache_folder(tmp_path, "frames", tmp_path / "new")  # by this process
        assert make_room(tmp_path, 3 * SIZE) == SIZE
    assert [folder.exists() for folder in (old, middle, new)] == [True, False, True]


def test_a_folder_that_is_used_again_is_the_last_to_go(opened, tmp_path):
    open_cache_folder(tmp_path, "frames", tmp_path / "old")
    os.close(cache_folder._held.pop(opened[0]))
    make_room(tmp_path, SIZE)
    assert [folder.exists() for folder in opened] == [True, False, True]


def test_nothing_is_deleted_that_the_cache_did_not_make(opened, tmp_path):
    others = [
        tmp_path / place for place in ("streams/data-1", "projects/thesis", "frames/notes", "rows/mine")
    ]
    for folder in others:
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(bytes(SIZE))
    make_room(tmp_path, 10 * SIZE)
    assert [folder.exists() for folder in opened] == [False] * 3
    assert all(sorted(path.name for path in folder.iterdir()) == ["file"] for folder in others)
