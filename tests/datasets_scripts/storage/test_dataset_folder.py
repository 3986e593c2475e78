"""Files of a dataset are found and get columns."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from datasets_scripts.storage import dataset_folder
from datasets_scripts.storage.dataset_rows import DatasetRows
from tests.datasets_scripts.conftest import FRAMES

SCORE = {"observation.points.main": {"dtype": "float16", "shape": (4,), "names": None}}


def score(episode: int) -> np.ndarray:
    return (np.arange(FRAMES[episode] * 4).reshape(-1, 4) + 100 * episode).astype(np.float16)


def test_appended_column_reads_back_with_stock_lerobot(plain):
    dataset_folder.append_columns(plain, SCORE, {"observation.points.main": score})
    dataset = LeRobotDataset("local/plain", root=plain)
    expected = np.concatenate([score(episode) for episode in range(len(FRAMES))])
    for index in (0, 4, 5, 17):
        item = dataset[index]
        assert item["observation.points.main"].tolist() == expected[index].tolist()
        assert "action" in item
    assert "observation.points.main" not in dataset.meta.stats
    groups = pq.ParquetFile(dataset_folder.data_files(plain)[0])
    assert [groups.metadata.row_group(i).num_rows for i in range(groups.num_row_groups)] == list(FRAMES)


def test_appending_again_changes_nothing(plain):
    dataset_folder.append_columns(plain, SCORE, {"observation.points.main": score})
    path = dataset_folder.data_files(plain)[0]
    before = path.read_bytes(), path.stat().st_mtime_ns
    dataset_folder.append_columns(plain, SCORE, {"observation.points.main": score})
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_interrupted_append_leaves_the_dataset_as_it_was_and_can_be_repeated(plain):
    before = {path: path.read_bytes() for path in plain.rglob("*") if path.is_file()}

    def failing(episode: int) -> np.ndarray:
        if episode == 1:
            raise OSError(28, "No space left on device")
        return score(episode)

    with pytest.raises(OSError, match="No space left"):
        dataset_folder.append_columns(plain, SCORE, {"observation.points.main": failing})
    assert {path: path.read_bytes() for path in plain.rglob("*") if path.is_file()} == before
    dataset_folder.append_columns(plain, SCORE, {"observation.points.main": score})
    assert "observation.points.main" in dataset_folder.load_features(plain)


def test_append_finishes_when_only_the_data_files_were_written(plain):
    info = (plain / dataset_folder.INFO_PATH).read_bytes()
    dataset_folder.append_columns(plain, SCORE, {"observation.points.main": score})
    (plain / dataset_folder.INFO_PATH).write_bytes(info)  # as if stopped between data and info.json

    def unused(episode: int) -> np.ndarray:
        raise AssertionError("the file already has the column")

    dataset_folder.append_columns(plain, SCORE, {"observation.points.main": unused})
    assert dataset_folder.load_features(plain)["observation.points.main"]["shape"] == [4]


def test_append_follows_episodes_whatever_the_row_groups_are(plain):
    path = dataset_folder.data_files(plain)[0]
    pq.write_table(pq.read_table(path), path, row_group_size=4)  # as LeRobot's tools may leave it
    dataset_folder.append_columns(plain, SCORE, {"observation.points.main": score})
    stored = pq.read_table(path)["observation.points.main"].combine_chunks()
    expected = np.concatenate([score(episode) for episode in range(len(FRAMES))])
    assert (stored.flatten().to_numpy().reshape(-1, 4) == expected).all()


def test_column_with_another_definition_is_refused(plain):
    dataset_folder.append_columns(plain, SCORE, {"observation.points.main": score})
    other = {"observation.points.main": {"dtype": "float16", "shape": (6,), "names": None}}
    with pytest.raises(ValueError, match="already has a column 'observation.points.main'"):
        dataset_folder.append_columns(plain, other, {"observation.points.main": score})


def test_values_of_the_wrong_shape_name_the_episode(plain):
    with pytest.raises(ValueError, match="episode 0: values have shape"):
        dataset_folder.append_columns(
            plain, SCORE, {"observation.points.main": lambda episode: np.zeros((3, 4), np.float16)}
        )


def test_damaged_data_file_is_named(plain):
    path = dataset_folder.data_files(plain)[0]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=path.name):
        dataset_folder.append_columns(plain, SCORE, {"observation.points.main": score})


@pytest.mark.parametrize("content", [None, '{"features": {', "[]", '{"features": {}}'])
def test_a_finished_dataset_whose_info_is_damaged_can_be_made_again(plain, content):
    info = plain / dataset_folder.INFO_PATH
    dataset_folder.check_dataset(plain, len(FRAMES), {})
    info.unlink()
    if content is not None:
        info.write_text(content)
    with pytest.raises(ValueError, match="missing or damaged .* run the same command again") as caught:
        dataset_folder.check_dataset(plain, len(FRAMES), {})
    assert str(info) in str(caught.value) and f"delete {plain} and" in str(caught.value)


def test_folder_without_a_dataset_is_named(tmp_path):
    with pytest.raises(ValueError, match="is not a LeRobot dataset"):
        dataset_folder.load_features(tmp_path)


@pytest.mark.parametrize("place", ["notes.txt", "meta/more", "videos/other.mp4", "data/chunk-000"])
def test_a_link_out_of_a_folder_is_refused_by_name(tmp_path, place):
    root, secret = tmp_path / "data", tmp_path / "secret"
    (root / place).parent.mkdir(parents=True)
    secret.mkdir()
    for target in (secret, secret / "key", secret / "missing"):
        (secret / "key").touch()
        (root / place).symlink_to(target)
        with pytest.raises(ValueError, match=f"{place} leads out of its folder, to {target}"):
            dataset_folder.dataset_files(root)
        assert dataset_folder.dataset_files(root, linked=secret) == []
        (root / place).unlink()


def test_links_inside_a_folder_are_files_and_circles_end(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").touch()
    (tmp_path / "same").symlink_to("inner/file")
    for name in ("one", "two"):
        (tmp_path / "inner" / name).symlink_to(".")
        (tmp_path / name).symlink_to(tmp_path)
    assert list(map(str, dataset_folder.dataset_files(tmp_path))) == ["inner/file", "same"]
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(ValueError, match="round is not a file, or a link that leads nowhere"):
        dataset_folder.dataset_files(tmp_path)


def test_a_snapshot_of_the_hub_is_a_folder_of_links(tmp_path):
    root = tmp_path / "snapshots" / "abc"
    root.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0").touch()
    (root / "file").symlink_to("../../blobs/0")
    assert list(map(str, dataset_folder.dataset_files(root))) == ["file"]
    (tmp_path / "key").touch()
    (tmp_path / "blobs" / "1").symlink_to("../key")
    (root / "other").symlink_to("../../blobs/1")
    with pytest.raises(ValueError, match="other leads out of its folder"):
        dataset_folder.dataset_files(root)


def test_schema_metadata_of_lerobot_is_dropped(plain):
    dataset_folder.append_columns(plain, SCORE, {"observation.points.main": score})
    schema = pq.read_schema(dataset_folder.data_files(plain)[0])
    assert not schema.metadata
    assert schema.field("observation.points.main").type == pa.list_(pa.float16(), 4)


def change_info(root, **changes):
    path = root / dataset_folder.INFO_PATH
    info = json.loads(path.read_text())
    camera, action = info["features"]["observation.images.main"], info["features"]["action"]
    for name, value in changes.items():
        if name in ("shape", "dtype"):
            action[name] = value
        elif name == "column":
            info["features"][value] = dict(action)
        elif name == "camera":
            camera.update(value)
        else:
            info[name] = value
    path.write_text(json.dumps(info))


NOT_FINITE = ("nan", "inf")
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
NO_PATHS = [
    *("/tmp/{video_key}.mp4", "../{video_key}.mp4", "videos/../../{video_key}.mp4", "{video_key}/a.mp4"),
    *("videos/{video_key:>3000000000}", "videos/{chunk_index:999d}", "videos/{chunk_index:{file_index}}"),
    *("videos/{video_key.__class__}", "videos/{video_key[0]}", "videos/{video_key!r}", "videos/{episode}"),
    *("videos/{", "videos/{}", "", 7, ["videos"], "videos\\..\\{video_key}"),
]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({"video_path": path}, "video_path is") for path in NO_PATHS),
        ({"video_path": None}, "'observation.images.main' is a video, but there is no video_path"),
        *(({"data_path": path}, "data_path is") for path in (VIDEO, "/data/{chunk_index}", "data/..")),
        *(({"fps": fps}, "fps is") for fps in (0, -1, "30", None, True, [30], 1e99, *map(float, NOT_FINITE))),
        *(({"chunks_size": size}, "chunks_size is") for size in (0, -1, 2.5, "1000", 10**400)),
        *(({"total_frames": count}, "total_frames is") for count in (-1, "18", 1.5)),
        *(({"shape": shape}, "'action' has the shape") for shape in ([-4], [0], [2**40], "4", [4.5], None)),
        *(({"camera": {"shape": shape}}, "not .height, width, channels.") for shape in ([32], [32, 40])),
        ({"dtype": 5}, "'action' has no dtype"),
        *(({"column": name}, "would become a path") for name in ("a/b", "..", "", "../x", "a\\b", "x" * 300)),
        ({"camera": {"info": [1]}}, "info that is not an object"),
        (
            {"camera": {"info": {"is_depth_map": True, "depth_unit": "cm"}}},
            "depth_unit 'cm', not 'm' or 'mm'",
        ),
        (
            {"camera": {"info": {"is_depth_map": True, "video.depth_max": "far"}}},
            "depth_max 'far', not meters",
        ),
        ({"features": [1]}, "lists no features"),
    ],
)
def test_values_of_the_metadata_that_cannot_be_right_are_named(tmp_path, pristine, changes, message):
    shutil.copytree(pristine / "meta", tmp_path / "meta")
    change_info(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        dataset_folder.load_features(tmp_path)
    assert "meta/info.json" in str(caught.value) and len(str(caught.value)) < 600


def test_metadata_that_others_write_is_read(tmp_path, pristine):
    shutil.copytree(pristine / "meta", tmp_path / "meta")
    change_info(tmp_path, fps=29.97, video_path="videos/{video_key}/{chunk_index}-{file_index:06d}.mp4")
    assert dataset_folder.load_info(tmp_path)["fps"] == 29.97
    (tmp_path / "meta/info.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="info.json is damaged"):
        dataset_folder.load_info(tmp_path)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"action": ', "[1]"])
def test_damaged_statistics_are_named(plain, content):
    (plain / dataset_folder.STATS_PATH).write_text(content)
    with pytest.raises(ValueError, match="meta/stats.json is damaged|cannot be read"):
        DatasetRows(plain)


@pytest.mark.parametrize("name", ["total_frames", "total_episodes"])
def test_counts_that_disagree_with_the_data_are_refused(plain, name):
    change_info(plain, **{name: 2})
    with pytest.raises(ValueError, match=rf"meta/info.json says {name} 2, but there are \d+"):
        DatasetRows(plain)
