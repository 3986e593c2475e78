"""Instructions are texts, found by their number; rows stay where they are."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datasets_scripts.storage.cache.row_table import ArrowColumn
from datasets_scripts.storage.dataset_folder import data_files
from datasets_scripts.storage.dataset_rows import TASKS, DatasetRows
from tests.synthetic import make_dataset
from training.windows import ForesightWindows, WindowConfig

TEXTS = ("open the drawer", "close the drawer")


@pytest.fixture
def root(tmp_path):
    return make_dataset(
        tmp_path / "dataset",
        episodes=3,
        frames=4,
        cameras=("main",),
        depth=False,
        tracks=False,
        use_videos=False,
    ).root


def write_tasks(root, table: pd.DataFrame, **options):
    table.to_parquet(root / TASKS, **options)


def renumber(root, numbers: dict[int, int]):
    (path,) = data_files(root)
    table = pq.read_table(path)
    position = table.column_names.index("task_index")
    column = pa.array(
        [numbers[i] for i in table["task_index"].to_pylist()], table.schema.field(position).type
    )
    pq.write_table(table.set_column(position, table.schema.field(position), column), path)


def trained_words(root) -> list[str]:
    config = WindowConfig(views=["main"], objectives=["action"], history_length=2, chunk_size=1)
    windows = ForesightWindows(root, config)
    return [windows[i]["task"] for i in range(0, len(windows), 2)]


TABLES = {
    "plain columns": lambda: pd.DataFrame({"task_index": [0, 1], "task": list(TEXTS)}),
    "texts as an index without a name": lambda: pd.DataFrame({"task_index": [0, 1]}, index=list(TEXTS)),
    "another order": lambda: pd.DataFrame(
        {"task_index": [1, 0]}, index=pd.Index(list(TEXTS[::-1]), name="task")
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_instructions_are_found_by_their_number(root, name):
    words = trained_words(root)
    assert set(words) == set(TEXTS)
    write_tasks(root, TABLES[name]())
    assert trained_words(root) == words


def test_numbers_may_have_gaps(root):
    words = trained_words(root)
    write_tasks(root, pd.DataFrame({"task_index": [5, 0]}, index=pd.Index(list(TEXTS[::-1]), name="task")))
    renumber(root, {0: 0, 1: 5})
    assert trained_words(root) == words


@pytest.mark.parametrize(
    "table",
    [
        pd.DataFrame({"task_index": [0, 1]}),
        pd.DataFrame({"task_index": [0, 0]}, index=pd.Index(list(TEXTS), name="task")),
        pd.DataFrame({"task_index": [0, 1], "task": [TEXTS[0], None]}),
        pd.DataFrame({"task": list(TEXTS)}),
    ],
    ids=["numbers alone", "one number twice", "no text", "no numbers"],
)
def test_a_table_without_a_text_per_number_is_refused_by_name(root, table):
    write_tasks(root, table)
    with pytest.raises(ValueError, match=r"tasks\.parquet must have one row per instruction"):
        DatasetRows(root)


def test_frames_of_an_instruction_that_does_not_exist_are_refused(root):
    renumber(root, {0: 0, 1: 7})
    with pytest.raises(ValueError, match=r"task_index \[7\], but .*tasks\.parquet does not"):
        DatasetRows(root)


@pytest.mark.parametrize("kind", [pa.float32(), pa.int64(), pa.float16(), pa.bool_()])
def test_a_row_without_a_value_does_not_move_the_rows_after_it(kind):
    rows = [[0, 1], None, [1, 0], [1, 1], None, [0, 0]]
    rows = [row and np.array(row, kind.to_pandas_dtype()) for row in rows]
    column = pa.chunked_array([pa.array(part, pa.list_(kind, 2)) for part in (rows[:4], rows[4:])])
    values = ArrowColumn(column).read(range(0, 6)).astype(float)
    missing = [0, 0] if kind == pa.bool_() else [np.nan, np.nan]
    np.testing.assert_equal(values, [[0, 1], missing, [1, 0], [1, 1], missing, [0, 0]])
    np.testing.assert_equal(ArrowColumn(column.slice(2)).read(range(1, 3)), values[3:5])
