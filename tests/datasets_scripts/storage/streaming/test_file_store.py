import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from datasets_scripts.storage.streaming.file_store import FileStore

LIMIT = 100


@pytest.fixture
def store(tmp_path):
    return FileStore(tmp_path / "store", LIMIT)


def size_on_disk(store) -> int:
    return sum(path.stat().st_size for path in store.folder.rglob("*") if path.is_file())


def fetch(store, name, size, keep=None):
    path = store.folder / "data" / name
    return path, store.fetch(path, size, lambda target: target.write_bytes(bytes(size)), keep)


def test_the_least_recently_used_files_make_room(store):
    first, second = (fetch(store, name, 40)[0] for name in "ab")
    os.utime(first, ns=(1, 3))
    os.utime(second, ns=(1, 2))
    third, found = fetch(store, "c", 40)
    assert found and first.exists() and third.exists() and not second.exists()
    assert size_on_disk(store) == 80


def test_files_that_are_needed_do_not_make_room(store):
    kept = {fetch(store, name, 40)[0] for name in "ab"}
    path, found = fetch(store, "c", 40, keep=kept)
    assert not found and not path.exists() and all(other.exists() for other in kept)


def test_a_file_larger_than_the_limit_is_refused(store):
    with pytest.raises(ValueError, match=r"data/a needs 1.01e-07 GB, more than data.streaming_disk_gb"):
        fetch(store, "a", LIMIT + 1)


def test_a_limit_beyond_the_disk_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"store may take 1e\+15 GB.*lower data.streaming_disk_gb"):
        FileStore(tmp_path / "store", 10**24)


def test_a_folder_that_cannot_be_made_is_refused_with_what_to_set(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be kept in .*file/store .*set FORESIGHT_CACHE"):
        FileStore(tmp_path / "file" / "store", LIMIT)


def test_files_of_another_user_are_read(store, monkeypatch):
    path, _ = fetch(store, "a", 40)
    locks = [lock for lock in store.folder.rglob(".*") if lock.name.endswith(".lock")]
    assert [lock.stat().st_mode & 0o777 for lock in locks] == [0o666] * 2, "the folder's and the file's"

    def refuse(path):
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(os, "utime", refuse)
    assert store.use(path) and fetch(store, "a", 40)[1]


def test_a_file_is_made_once_for_all_and_counts_while_it_is_made(store):
    path, written = store.folder / "a", []

    def write(target):
        written.append(target)
        assert not fetch(store, "other", LIMIT - 59, keep=())[1], "60 of 100 bytes are promised"
        target.write_bytes(bytes(60))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(lambda _: store.fetch(path, 60, write), range(2)))
    assert len(written) == 1 and size_on_disk(store) == 60


def test_what_fails_leaves_nothing(store):
    def fail(target):
        target.write_bytes(bytes(5))
        raise OSError("no route to host")

    with pytest.raises(OSError, match="no route"):
        store.fetch(store.folder / "a", 60, fail)
    assert size_on_disk(store) == 0


def test_what_a_killed_process_was_writing_makes_room(store):
    program = (
        "import os, sys; from pathlib import Path; "
        "from datasets_scripts.storage.streaming.file_store import FileStore; "
        "store = FileStore(Path(sys.argv[1]), 100); "
        "store.fetch(store.folder / 'a', 60, lambda part: (part.write_bytes(bytes(30)), os._exit(0)))"
    )
    subprocess.run([sys.executable, "-c", program, str(store.folder)], check=True)
    assert size_on_disk(store) == 30
    assert fetch(store, "b", 90)[1] and size_on_disk(store) == 90
