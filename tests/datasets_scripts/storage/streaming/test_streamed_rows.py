import pickle
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from datasets_scripts.storage.dataset_rows import BrokenEpisodeError, DatasetRows
from datasets_scripts.storage.hub.download import HubError
from datasets_scripts.storage.streaming import remote_files
from datasets_scripts.storage.streaming.file_store import FileStore
from datasets_scripts.storage.streaming.streamed_rows import StreamedFrames, StreamedRows
from tests.synthetic import make_dataset

EPISODES, FRAMES = 3, 4
MAIN = "observation.images.main"
VIDEO = f"videos/{MAIN}/chunk-000/file-001.mp4"
DATA = "data/chunk-000/file-001.parquet"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streamed") / "data"
    options = {"cameras": ("main",), "size": (16, 32), "depth": False, "n_points": 8}
    options["file_per_episode"] = True
    return make_dataset(folder, EPISODES, FRAMES, **options).root


@pytest.fixture
def source(recorded, tmp_path):
    return shutil.copytree(recorded, tmp_path / "my däta #1%20")  # an URL would escape each of these


@pytest.fixture
def store(tmp_path):
    return FileStore(tmp_path / "streams", 10**7)


def kept(rows) -> list[str]:
    paths = [path for part in ("data", "videos") for path in (rows.root / part).rglob("[!.]*.*")]
    return sorted(path.relative_to(rows.root).as_posix() for path in paths if path.is_file())


def test_values_are_those_of_the_folder_and_come_with_their_file_alone(source, store):
    rows, local = StreamedRows(source, store), DatasetRows(source)
    assert len(rows) == len(local) == EPISODES * FRAMES and not kept(rows)
    span = range(FRAMES, 2 * FRAMES, 2)
    for key, feature in local.features.items():
        if feature["dtype"] != "video":
            ours, theirs = rows.column(key).read(span), local.column(key).read(span)
            assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs), key
    assert kept(rows) == [DATA.replace("parquet", "arrow")]
    again = pickle.loads(pickle.dumps(rows))
    assert again.column("index").read(span).tolist() == list(span)


def test_statistics_are_those_of_the_rows(source, store):
    rows, local, chosen = StreamedRows(source, store), DatasetRows(source), np.array([0, 2])
    values = np.concatenate(
        [local.column("action").read(range(e * FRAMES, (e + 1) * FRAMES)) for e in chosen]
    )
    found = rows.read_statistics("action", chosen)
    for name in ("mean", "std", "min", "max"):
        np.testing.assert_allclose(found[name], getattr(values, name)(0), atol=1e-6)
    assert not kept(rows)


def test_a_file_that_is_removed_between_two_windows_is_downloaded_again(source, store):
    rows = StreamedRows(source, store)
    frames = StreamedFrames(rows, [MAIN])
    before = frames.read_stored(MAIN, range(2))
    shutil.rmtree(rows.root / "videos")
    assert np.array_equal(frames.read_stored(MAIN, range(2)), before)
    frames.read_stored(MAIN, range(FRAMES, FRAMES + 2))
    shutil.rmtree(rows.root / "videos")
    frames.read_stored(MAIN, range(2 * FRAMES, 2 * FRAMES + 2))
    open_files = frames.decoders[MAIN]._decoder_cache()._cache
    assert len(open_files) == 1, "removed files are closed"


@pytest.mark.parametrize("place", [VIDEO, DATA])
def test_a_file_that_vanishes_or_changes_is_named(source, store, place):
    rows = StreamedRows(source, store)
    path = rows.files_of(1, [MAIN])[place == VIDEO]
    with (source / place).open("ab") as file:
        file.write(b"more")
    with pytest.raises(BrokenEpisodeError, match=f"the file {place} of .* has changed"):
        rows.local(path)
    (source / place).unlink()
    with pytest.raises(BrokenEpisodeError, match=f"the file {place} has vanished from .*--resume"):
        rows.local(path)
    assert not kept(rows)
    later = StreamedRows(source, store)
    with pytest.raises(BrokenEpisodeError, match=f"the file {place} is missing or empty"):
        later.bytes_of(later.files_of(1, [MAIN])[place == VIDEO])


def test_a_data_file_with_other_rows_is_named(source, store):
    table = pq.read_table(source / DATA)
    pq.write_table(table.slice(1), source / DATA)
    rows = StreamedRows(source, store)
    with pytest.raises(BrokenEpisodeError, match=f"data file {DATA} .* do not count up from {FRAMES}"):
        rows.column("action").read(range(FRAMES, FRAMES + 1))
    (source / DATA).write_bytes(b"PAR1")
    with pytest.raises(BrokenEpisodeError, match=f"data file {DATA} cannot be used"):
        StreamedRows(source, store).column("action").read(range(FRAMES, FRAMES + 1))


def test_a_short_failure_of_the_network_is_waited_for(source, store, monkeypatch):
    monkeypatch.setattr(remote_files, "RETRY_WAITS_S", (0, 0))
    rows, failures = StreamedRows(source, store), [OSError("reset"), TimeoutError("late")]
    download = rows.remote._download_once

    def fail_twice(place, target):
        if failures:
            raise failures.pop()
        download(place, target)

    monkeypatch.setattr(rows.remote, "_download_once", fail_twice)
    assert rows.local(rows.files_of(0, [MAIN])[1]).stat().st_size > 0
    failures[:] = [OSError("reset")] * 3
    with pytest.raises(HubError, match=r"cannot be read \(OSError: reset\)"):
        rows.local(rows.files_of(1, [MAIN])[1])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("s3://bucket/data", "s3fs"),
        ("file:///none/at/all", "there is nothing at|has no LeRobot dataset"),
        ("./none", "neither a folder nor a Hub id"),
    ],
)
def test_what_cannot_be_opened_is_named(name, message, store):
    with pytest.raises(ValueError, match=message):
        StreamedRows(name, store)
