"""Columns are converted once: numbers when a dataset is opened, tracks when they are read."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from datasets_scripts.columns import points_key, points_visible_key
from datasets_scripts.storage.cache import row_table
from datasets_scripts.storage.dataset_folder import data_files
from datasets_scripts.storage.dataset_rows import DatasetRows
from tests.synthetic import make_dataset

POINTS = points_key("main")


@pytest.fixture
def facts(tmp_path, monkeypatch):
    monkeypatch.setenv("FORESIGHT_CACHE", str(tmp_path / "cache"))
    root, options = tmp_path / "ds", {"cameras": ("main",), "depth": False, "file_per_episode": True}
    return make_dataset(root, frames=[3, 4, 2], size=(32, 32), **options)


def written(tmp_path) -> list[str]:
    return sorted(path.stem.partition("-")[2] for path in (tmp_path / "cache").rglob("*.arrow"))


def test_tracks_are_converted_file_by_file_when_they_are_read(facts, tmp_path):
    rows = DatasetRows(facts.root)
    assert written(tmp_path) == ["episodes", "numbers"] and len(data_files(facts.root)) == 3
    points = rows.column(POINTS).read(range(3, 7)).reshape(4, -1, 3)
    assert written(tmp_path) == ["episodes", "numbers", f"{POINTS}-0001"]
    expected = np.stack([facts.points(1, t) for t in range(4)])
    np.testing.assert_allclose(points, expected, atol=1e-3)
    across = rows.column(points_visible_key("main")).read(range(2, 9, 2))
    assert (across == np.stack([facts.visible(e, t) for e, t in ((0, 2), (1, 1), (1, 3), (2, 1))])).all()


def test_a_changed_data_file_is_converted_again(facts, tmp_path):
    DatasetRows(facts.root).column(POINTS).read(range(2))
    before = {path.name for path in (tmp_path / "cache").rglob("*.arrow")}
    path = data_files(facts.root)[0]
    table = pq.read_table(path)
    position = table.column_names.index(POINTS)
    pq.write_table(table.set_column(position, table.field(position), table[POINTS].take([1, 1, 1])), path)
    points = DatasetRows(facts.root).column(POINTS).read(range(3))
    assert (points == points[0]).all()
    assert not before & {path.name for path in (tmp_path / "cache").rglob("*.arrow")}


def test_a_column_that_is_damaged_is_named_when_it_is_read(facts):
    rows, path = DatasetRows(facts.root), data_files(facts.root)[2]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=rf"data file {path} is damaged"):
        rows.column(POINTS).read(range(7, 9))


def test_a_full_disk_leaves_no_file_and_says_what_to_set(facts, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(row_table, "table_cast", fail)
    with pytest.raises(ValueError, match="cannot be read: .*No space left on device; set FORESIGHT_CACHE"):
        DatasetRows(facts.root)
    assert written(tmp_path) == []
