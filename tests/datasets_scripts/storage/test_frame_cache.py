import dataclasses
import errno
import io
import json
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot.configs import DepthEncoderConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from PIL import Image

from datasets_scripts.storage import frame_cache
from datasets_scripts.storage.cache import frame_files
from datasets_scripts.storage.cache.packed_frames import pack_frame
from datasets_scripts.storage.dataset_rows import DatasetRows
from datasets_scripts.storage.frame_cache import OnDemandFrames, open_frames
from datasets_scripts.storage.videos.writing import encode_rgb
from tests.synthetic import make_dataset
from training.config_reading import load_config
from training.windows import ForesightWindows, WindowConfig

KEYS = ["observation.images.main", "observation.images.wrist"]


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    return make_dataset(
        tmp_path_factory.mktemp("video") / "ds", frames=[6, 5], size=(32, 40), depth=False, tracks=False
    )


def cache_paths(root, cache) -> dict:
    files = open_frames(DatasetRows(root), KEYS, str(cache)).files
    return {key: known.paths for key, known in files.items()}


def test_changed_videos_are_decoded_again_and_the_old_file_goes(facts, tmp_path):
    root, cache = shutil.copytree(facts.root, tmp_path / "ds"), str(tmp_path / "cache")
    first = cache_paths(root, cache)
    assert cache_paths(root, cache) == first
    video = next((root / "videos" / "observation.images.main").rglob("*.mp4"))
    video.touch()
    second = cache_paths(root, cache)
    assert second["observation.images.main"] != first["observation.images.main"]
    assert second["observation.images.wrist"] == first["observation.images.wrist"]
    assert not first["observation.images.main"][0].exists()


def test_a_finished_cache_is_read_where_nothing_can_be_written(facts, tmp_path, monkeypatch):
    first = cache_paths(facts.root, tmp_path)

    def read_only(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(frame_files, "FileLock", read_only)
    assert cache_paths(facts.root, tmp_path) == first


def test_full_disk_leaves_no_cache_file_and_says_what_to_do(facts, tmp_path, monkeypatch):
    def full_disk(file, parts):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(frame_files, "_write_raw", full_disk)
    with pytest.raises(ValueError, match="no room for the frame cache.*'off'"):
        open_frames(DatasetRows(facts.root), KEYS, str(tmp_path))
    assert not list(tmp_path.rglob("*.npy*"))


def test_auto_packs_frames_without_room_and_decodes_the_rest(facts, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FORESIGHT_CACHE", str(tmp_path))
    rows, decoded = DatasetRows(facts.root), OnDemandFrames(DatasetRows(facts.root), KEYS)
    spans = (range(6), range(6, 11))
    # Of a frame of each camera; the first frames of both episodes are taken for all.
    firsts = [decoded.read_stored(key, range(row, row + 1))[0] for key in KEYS for row in (0, 6)]
    packed = sum(len(pack_frame(frame)) for frame in firsts) / 2
    assert packed < 0.5 * len(KEYS) * 3 * 32 * 40
    for budget, held in ((0, 0), (7 * packed, 1), (8 * packed, 2)):
        monkeypatch.setattr(frame_cache, "make_room", lambda base, needed, budget=budget: budget)
        frames = pickle.loads(pickle.dumps(open_frames(rows, KEYS)))
        assert frames.n_cached == held
        assert held == 0 or all(files.packed for files in frames.files.values())
        assert (f"room for the decoded frames of {held} of 2 episodes" in caplog.text) == (held < 2)
        for span in spans:
            for key, values in frames.read_many_stored(dict.fromkeys(KEYS, span)).items():
                assert (values == decoded.read_stored(key, span)).all()
    assert len(frames.files[KEYS[0]].paths) == 2


def test_off_means_off_in_yaml_too(facts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    option = load_config(None, ["--data.frame_cache", "off"]).data.frame_cache
    assert isinstance(open_frames(DatasetRows(facts.root), KEYS, option), OnDemandFrames)
    assert not list(tmp_path.iterdir())


def replace_pictures(root, key, rows, picture: bytes | None, place: str | None = None):
    """Other pictures in some rows of an image column."""
    (path,) = (root / "data").glob("*/*.parquet")
    table = pq.read_table(path)
    stored = table[key].to_pylist()
    for row in rows:
        stored[row] = {"bytes": picture, "path": place} if picture or place else None
    position = table.schema.get_field_index(key)
    field = table.field(position)
    pq.write_table(table.set_column(position, field, pa.array(stored, field.type)), path)


def encode_picture(pixels, kind="png") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures") / "ds"
    return make_dataset(
        root, frames=[3, 3, 3], cameras=("main",), size=(32, 40), tracks=False, use_videos=False
    )


@pytest.mark.parametrize("kind", ["images", "depth"])
@pytest.mark.parametrize("rows", [range(6, 9), [8], range(3)], ids=["last", "one frame", "first"])
def test_pictures_of_two_sizes_are_refused_by_column_and_episode(pictures, tmp_path, kind, rows):
    root, key = shutil.copytree(pictures.root, tmp_path / "ds"), f"observation.{kind}.main"
    other = np.zeros((40, 32, 3), np.uint8) if kind == "images" else np.ones((40, 32), np.float32)
    replace_pictures(root, key, rows, encode_picture(other, "png" if kind == "images" else "tiff"))
    with pytest.raises(ValueError, match=rf"'{key}' has pictures of \d+x\d+ px in episode [12], but"):
        open_frames(DatasetRows(root), [key], str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").rglob("*.npy"))
    frames = open_frames(DatasetRows(root), [key], "off")
    good = 3 if rows == range(3) else 0
    assert frames.read(key, range(good, good + 3)).shape[-2:] == (32, 40)
    with pytest.raises(ValueError, match="32x40 px in episode"):
        frames.read(key, range(rows[0], rows[0] + 1))


@pytest.mark.parametrize(
    ("key", "pixels", "kind"),
    [
        ("observation.images.main", np.full((32, 40), 900, np.uint16), "png"),
        ("observation.images.main", np.ones((32, 40), np.float32), "tiff"),
        ("observation.depth.main", np.ones((32, 40, 3), np.uint8), "png"),
    ],
)
def test_depth_among_pictures_and_pictures_among_depth_are_refused(pictures, tmp_path, key, pixels, kind):
    root = shutil.copytree(pictures.root, tmp_path / "ds")
    replace_pictures(root, key, [8], encode_picture(pixels, kind))
    with pytest.raises(ValueError, match=f"a picture of '{key}' among frames 6 to 8"):
        open_frames(DatasetRows(root), [key], str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("far", "sentinels", "kind"),
    [
        (np.uint16(60_000), [65535], "tiff"),
        (np.uint16(60_000), [65535], "png"),
        (np.int32(60_000), [-1, 32767, 65535, 2**31 - 1], "tiff"),
        (np.float32(60), [-1], "tiff"),
        (np.float32(60), [np.nan, np.inf, 65.535, 65535, 3e38], "tiff"),
    ],
)
def test_depth_pictures_keep_a_scene_at_60_m_and_lose_what_was_not_measured(
    pictures, tmp_path, far, sentinels, kind
):
    root, key = shutil.copytree(pictures.root, tmp_path / "ds"), "observation.depth.main"
    info = root / "meta/info.json"
    content = json.loads(info.read_text())
    content["features"][key]["info"].pop("depth_unit", None)  # then integers are millimeters
    info.write_text(json.dumps(content))
    pixels = np.full((32, 40), far)
    pixels[: len(sentinels)] = np.array(sentinels, dtype=far.dtype)[:, None]
    replace_pictures(root, key, range(9), encode_picture(pixels, kind))
    depth_m = open_frames(DatasetRows(root), [key], str(tmp_path / "cache")).read(key, range(9))
    assert (depth_m[:, : len(sentinels)] == 0).all() and (depth_m[:, len(sentinels) :] == 60).all()


def test_millimeters_in_one_episode_of_depth_in_meters_are_named(pictures, tmp_path):
    root, key = shutil.copytree(pictures.root, tmp_path / "ds"), "observation.depth.main"
    replace_pictures(root, key, [8], encode_picture(np.full((32, 40), 1500, np.float32), "tiff"))
    with pytest.raises(ValueError, match=f"episode 2: depth column '{key}' .* looks like millimeters"):
        open_frames(DatasetRows(root), [key], str(tmp_path / "cache"))


def test_a_depth_video_of_millimeters_keeps_60_m_and_loses_the_largest_integer(tmp_path):
    key = "observation.depth.main"
    feature = {"dtype": "video", "shape": (32, 40, 1), "names": None, "info": {"is_depth_map": True}}
    encoder = DepthEncoderConfig(depth_max=100.0)
    dataset = LeRobotDataset.create(
        "local/far", fps=10, features={key: feature}, root=tmp_path / "ds", depth_encoder=encoder
    )
    pixels = np.full((32, 40, 1), 60_000, np.uint16)
    pixels[:16] = 65535
    for _ in range(3):
        dataset.add_frame({key: pixels, "task": "look"})
    dataset.save_episode(parallel_encoding=False)
    dataset.finalize()
    depth_m = open_frames(DatasetRows(tmp_path / "ds"), [key], "off").read(key, range(3))
    assert (depth_m[:, :14] == 0).all() and np.abs(depth_m[:, 18:] - 60).max() < 0.1


def test_a_missing_picture_and_one_outside_of_the_dataset_are_named(pictures, tmp_path):
    root, key = shutil.copytree(pictures.root, tmp_path / "ds"), "observation.images.main"
    (tmp_path / "secret.png").write_bytes(encode_picture(np.zeros((32, 40, 3), np.uint8)))
    for place, reason in ((None, "its row is null"), ("../secret.png", "leads out of its folder")):
        replace_pictures(root, key, [4], None, place)
        with pytest.raises(ValueError, match=f"'{key}' among frames 3 to 5 cannot be decoded .*{reason}"):
            open_frames(DatasetRows(root), [key], str(tmp_path / "cache"))


@pytest.mark.parametrize("file", [0, 1])
def test_video_files_of_two_sizes_are_refused_unless_their_episode_is_left_out(tmp_path, file):
    facts = make_dataset(
        tmp_path / "ds",
        frames=[3, 3, 3],
        cameras=("main",),
        size=(32, 40),
        depth=False,
        tracks=False,
        file_per_episode=True,
    )
    path = sorted(facts.root.glob("videos/*/*/*.mp4"))[file]
    path.write_bytes(encode_rgb([np.zeros((40, 32, 3), np.uint8)] * 3, facts.fps))
    config = WindowConfig(views=["main"], objectives=["action"], history_length=2, frame_cache=str(tmp_path))
    with pytest.raises(ValueError, match="'observation.images.main' has pictures .* in episode 1, but"):
        ForesightWindows(facts.root, config)
    config = dataclasses.replace(config, frame_cache="off")
    with pytest.raises(ValueError, match=r"px in episode 1, but .* leave episodes out"):
        ForesightWindows(facts.root, config)
    others = [episode for episode in range(3) if episode != file]
    windows = ForesightWindows(facts.root, dataclasses.replace(config, episodes=others))
    assert all(window["images"]["main"].shape[-2:] == (32, 40) for window in windows)
