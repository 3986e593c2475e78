"""A large synthetic dataset, written fast: constant small pictures, hard-linked videos, real tables."""

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datasets_scripts.columns import depth_key, image_key, points_features, points_key, points_visible_key
from datasets_scripts.storage.atomic import read_json, share_file, write_json, write_whole_folder
from datasets_scripts.storage.dataset_folder import INFO_PATH
from datasets_scripts.storage.provenance import encode_flags, write_provenance
from datasets_scripts.storage.videos.writing import (
    encode_depth,
    encode_rgb,
    lerobot_depth_encoder,
    lerobot_rgb_encoder,
)

CAMERAS = ("main", "wrist")
SIZE_PX, FPS, DEPTH_MAX_M = 32, 20, 4.0
NUMBERS = {"action": 7, "observation.state": 8}
DATA_FILES = 20


def make_dataset(root: Path, frames: int, episodes: int, video_files: int, n_points: int) -> None:
    """Write the synthetic dataset: LeRobot records one episode, whose rows and files are then multiplied."""
    with write_whole_folder(root, replace=True) as folder:
        length = frames // episodes
        template = _record_template(folder / "template")
        info = read_json(template / INFO_PATH)
        info |= {"total_frames": length * episodes, "total_episodes": episodes}
        info["splits"] = {"train": f"0:{episodes}"}
        info["features"] |= points_features(CAMERAS[0], n_points, SIZE_PX, SIZE_PX)
        per_file = -(-episodes // video_files)
        _write_episodes(folder, template, length, episodes, per_file)
        _write_videos(folder, info, length * per_file, -(-episodes // per_file))
        _write_data(folder, length, episodes, n_points)
        for name in ("tasks.parquet", "stats.json"):
            os.replace(template / "meta" / name, folder / "meta" / name)
        write_json(folder / INFO_PATH, info)
        facts = {"n_points": n_points, "n_moving": 9, "moving": encode_flags(np.arange(n_points) % 7 == 0)}
        figures = dict.fromkeys(("flicker_m", "off_depth", "speed_m_s", "visible", "valid_depth"), 0.125)
        known = {str(e): {CAMERAS[0]: facts | figures, "flags": []} for e in range(episodes)}
        write_provenance(folder, {"cameras": {CAMERAS[0]: {"tracks": {"source": "none"}}}, "episodes": known})
        shutil.rmtree(template)


def _record_template(root: Path) -> Path:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    axes = ["height", "width", "channels"]
    features = {key: {"dtype": "float32", "shape": (size,), "names": None} for key, size in NUMBERS.items()}
    for camera in CAMERAS:
        shape = (SIZE_PX, SIZE_PX)
        features[image_key(camera)] = {"dtype": "video", "shape": (*shape, 3), "names": axes}
        depth = {"dtype": "video", "shape": (*shape, 1), "names": axes, "info": {"is_depth_map": True}}
        features[depth_key(camera)] = depth
    encoders = {"rgb_encoder": lerobot_rgb_encoder(), "depth_encoder": lerobot_depth_encoder(DEPTH_MAX_M)}
    dataset = LeRobotDataset.create("local/startup", FPS, features, root=root, **encoders)
    frame = {key: np.zeros(size, np.float32) for key, size in NUMBERS.items()}
    for camera in CAMERAS:
        frame[image_key(camera)] = np.full((SIZE_PX, SIZE_PX, 3), 90, np.uint8)
        frame[depth_key(camera)] = np.full((SIZE_PX, SIZE_PX, 1), 1.0, np.float32)
    for _ in range(4):
        dataset.add_frame(frame | {"task": "do nothing"})
    dataset.save_episode(parallel_encoding=False)
    dataset.finalize()
    return root


def _write_episodes(folder: Path, template: Path, length: int, episodes: int, per_file: int) -> None:
    """`meta/episodes` with all statistics, as LeRobot writes it."""
    (source,) = (template / "meta" / "episodes").glob("*/*.parquet")
    row, numbers = pq.read_table(source), np.arange(episodes)
    values = {
        "episode_index": numbers,
        "length": np.full(episodes, length),
        "dataset_from_index": numbers * length,
        "dataset_to_index": (numbers + 1) * length,
        "data/file_index": numbers * DATA_FILES // episodes,
    }
    for camera in CAMERAS:
        for key in (image_key(camera), depth_key(camera)):
            start_s = numbers % per_file * length / FPS
            values[f"videos/{key}/file_index"] = numbers // per_file
            values[f"videos/{key}/from_timestamp"] = start_s
            values[f"videos/{key}/to_timestamp"] = start_s + length / FPS
    table = row.take(pa.array(np.zeros(episodes, np.int64)))
    for name, column in values.items():
        i = table.schema.get_field_index(name)
        table = table.set_column(i, name, pa.array(column, table.schema.field(i).type))
    path = folder / "meta/episodes/chunk-000/file-000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(table, path, row_group_size=10)  # LeRobot's buffer


def _write_videos(folder: Path, info: dict, frames: int, files: int) -> None:
    """One file per kind, under all names."""
    rgb = encode_rgb((np.full((SIZE_PX, SIZE_PX, 3), 90, np.uint8) for _ in range(frames)), FPS)
    depth = encode_depth(np.full((frames, SIZE_PX, SIZE_PX), 1.0, np.float32), FPS, DEPTH_MAX_M)
    for content, keys in ((rgb, map(image_key, CAMERAS)), (depth, map(depth_key, CAMERAS))):
        first = None
        for key in keys:
            for file in range(files):
                name = info["video_path"].format(video_key=key, chunk_index=0, file_index=file)
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if first is None:
                    path.write_bytes(content)
                    first = path
                else:
                    share_file(first, path)


def _write_data(folder: Path, length: int, episodes: int, n_points: int) -> None:
    """Data files of one row group per episode."""
    rng, (points, visible) = (
        np.random.default_rng(0),
        (points_key(CAMERAS[0]), points_visible_key(CAMERAS[0])),
    )

    def lists(values: np.ndarray) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])

    writer, number = None, None
    for episode in range(episodes):
        rows = np.arange(length)
        columns = {key: lists(rng.normal(size=(length, size)).astype("f4")) for key, size in NUMBERS.items()}
        columns |= {
            "timestamp": (rows / FPS).astype(np.float32),
            "frame_index": rows,
            "episode_index": np.full(length, episode),
            "index": episode * length + rows,
            "task_index": np.zeros(length, np.int64),
            points: lists(np.tile(rng.uniform(size=3 * n_points).astype(np.float16), (length, 1))),
            visible: lists(np.ones((length, n_points), bool)),
        }
        table = pa.table(columns)
        if number != (number := episode * DATA_FILES // episodes):
            if writer:
                writer.close()
            path = folder / f"data/chunk-000/file-{number:03d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            plain = [name for name in table.column_names if name not in (points, visible)]
            writer = pq.ParquetWriter(path, table.schema, compression="zstd", use_dictionary=plain)
        writer.write_table(table)
    writer.close()
