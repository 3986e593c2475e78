"""Files of a Hub on this machine; skipped without the server of `tests/hub_server.py`."""

import re
import shutil

import pytest
from huggingface_hub import HfApi

from datasets_scripts.annotation.push import check_push, push_dataset
from datasets_scripts.storage.dataset_rows import BrokenEpisodeError, pin_commit
from datasets_scripts.storage.hub.download import HubError
from datasets_scripts.storage.streaming import remote_files
from datasets_scripts.storage.streaming.file_store import FileStore
from datasets_scripts.storage.streaming.streamed_rows import StreamedFrames, StreamedRows
from tests.hub_server import running_hub
from tests.synthetic import make_dataset

MAIN = "observation.images.main"
VIDEO = f"videos/{MAIN}/chunk-000/file-000.mp4"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote") / "data"
    return make_dataset(folder, 2, 3, cameras=("main",), size=(16, 32), depth=False, n_points=8).root


@pytest.fixture
def hub(recorded, monkeypatch):
    with running_hub(monkeypatch) as server:
        check_push("tester/data", recorded)
        push_dataset(recorded, "tester/data")
        monkeypatch.setattr(remote_files, "RETRY_WAITS_S", (0,))
        yield server


@pytest.fixture
def store(tmp_path):
    return FileStore(tmp_path / "streams", 10**7)


def test_a_dataset_of_the_hub_is_streamed_at_its_commit(recorded, hub, store):
    rows = StreamedRows("tester/data", store)
    assert re.fullmatch("hf://datasets/tester/data@[0-9a-f]{40}", rows.remote.url)
    HfApi().delete_file(VIDEO, "tester/data", repo_type="dataset")  # of the branch, not of the commit
    hub.add_fault(kind="drop", match="GET /__cdn__/", bytes=500)  # the connection breaks once
    StreamedFrames(rows, [MAIN]).read_stored(MAIN, range(2))
    assert (rows.root / VIDEO).read_bytes() == (recorded / VIDEO).read_bytes()
    assert rows.column("action").read(range(2)).shape == (2, 4)
    with pytest.raises(BrokenEpisodeError, match=f"the file {VIDEO} is missing or empty at hf://datasets/"):
        later = StreamedRows("tester/data@main", store)
        later.local(later.root / VIDEO)
    for name in ("tester/data", "hf://datasets/tester/data", "tester/data@main"):  # as a run that resumes
        again = StreamedRows(pin_commit(name, rows.commit), store)
        assert (again.remote.url, again.root, again.version) == (rows.remote.url, rows.root, rows.version)


@pytest.mark.parametrize(
    "name", [f"tester/data@{'0' * 40}", "outputs/data/set", "s3://tester/data@main", "data"]
)
def test_a_dataset_that_names_its_commit_or_has_none_is_opened_as_it_is_named(name):
    assert pin_commit(name, "1" * 40) == name and pin_commit("tester/data", None) == "tester/data"


def test_a_dataset_that_vanishes_from_the_hub_is_named(hub, store):
    rows = StreamedRows("hf://datasets/tester/data", store)
    HfApi().delete_repo("tester/data", repo_type="dataset")
    with pytest.raises((ValueError, HubError), match="dataset tester/data") as caught:
        rows.local(rows.root / VIDEO)
    assert "hf_test" not in str(caught.value)
    with pytest.raises(ValueError, match="the Hub has no dataset tester/data"):
        StreamedRows("tester/data", store)


def test_a_private_dataset_needs_a_token_that_may_read_it(recorded, hub, store, monkeypatch):
    HfApi().update_repo_settings("tester/data", private=True, repo_type="dataset")
    StreamedRows("tester/data", store)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(ValueError, match="the Hub has no dataset tester/data, or it is private"):
        StreamedRows("tester/data", store)
    shutil.rmtree(store.folder)
