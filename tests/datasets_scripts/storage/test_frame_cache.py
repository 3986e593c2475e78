import errno
import shutil

import pytest

from datasets_scripts.storage import frame_cache
from datasets_scripts.storage.dataset_rows import DatasetRows
from datasets_scripts.storage.frame_cache import CachedFrames, OnDemandFrames, open_frames
from tests.synthetic import make_dataset
from training.config import load_config

KEYS = ["observation.images.main", "observation.images.wrist"]


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    return make_dataset(
        tmp_path_factory.mktemp("video") / "ds", frames=[6, 5], size=(32, 40), depth=False, tracks=False
    )


def test_changed_videos_are_decoded_again_and_the_old_file_goes(facts, tmp_path):
    root, cache = shutil.copytree(facts.root, tmp_path / "ds"), str(tmp_path / "cache")
    first = open_frames(DatasetRows(root), KEYS, cache).files
    assert open_frames(DatasetRows(root), KEYS, cache).files == first
    video = next((root / "videos" / "observation.images.main").rglob("*.mp4"))
    video.touch()
    second = open_frames(DatasetRows(root), KEYS, cache).files
    assert second["observation.images.main"] != first["observation.images.main"]
    assert second["observation.images.wrist"] == first["observation.images.wrist"]
    assert not first["observation.images.main"].exists()


def test_a_finished_cache_is_read_where_nothing_can_be_written(facts, tmp_path, monkeypatch):
    first = open_frames(DatasetRows(facts.root), KEYS, str(tmp_path)).files

    def read_only(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(frame_cache, "FileLock", read_only)
    assert open_frames(DatasetRows(facts.root), KEYS, str(tmp_path)).files == first


def test_full_disk_leaves_no_cache_file_and_says_what_to_do(facts, tmp_path, monkeypatch):
    def full_disk(decoder, file):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(frame_cache, "_write_frames", full_disk)
    with pytest.raises(ValueError, match="no room for the frame cache.*'off'"):
        open_frames(DatasetRows(facts.root), KEYS, str(tmp_path))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_auto_decodes_on_demand_when_the_cache_would_be_too_large(facts, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FORESIGHT_CACHE", str(tmp_path))
    monkeypatch.setattr(frame_cache, "AUTO_CACHE_BYTES", 1000)
    rows = DatasetRows(facts.root)
    assert isinstance(open_frames(rows, KEYS), OnDemandFrames) and "decoding on demand" in caplog.text
    monkeypatch.setattr(frame_cache, "AUTO_CACHE_BYTES", 10**9)
    assert isinstance(open_frames(rows, KEYS), CachedFrames)


def test_off_means_off_in_yaml_too(facts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    option = load_config(None, ["--data.frame_cache", "off"]).data.frame_cache
    assert isinstance(open_frames(DatasetRows(facts.root), KEYS, option), OnDemandFrames)
    assert not list(tmp_path.iterdir())
