"""Depth and track columns of a LeRobot v3 dataset: names, dtypes, units, checks, storage, provenance.

This file is the contract between those who make labels (`simulate.py`, `annotate.py`) and those who read them
(`training/windows/dataset.py`, the viewer, the cards). It knows files and arrays, and nothing of models or
simulators.

| key | dtype, shape per frame | meaning |
| --- | --- | --- |
| `observation.images.<camera>` | LeRobot video `(H, W, 3)` | RGB as recorded |
| `observation.depth.<camera>` | LeRobot depth video `(H, W, 1)` | metres along the optical axis |
| `observation.points.<camera>` | float16 `(n*3,)` | n tracked points: x, y as image fractions, z in metres |
| `observation.points_visible.<camera>` | bool `(n,)` | false when occluded, outside the image, or padding |

x and y are `(column + 0.5) / width` and `(row + 0.5) / height`, so they do not depend on the resolution; they
may leave [0, 1]. Point j is the same physical point through the whole episode. The label keys start with
`observation.` because LeRobot drops every other column on its way to a policy; a policy must take them out of
its inputs (`is_label_key`), since LeRobot would show a depth map as a camera and points as robot state.

Points are flat 1-D columns because LeRobot's split and merge tools fail on 2-D ones, and they are appended by
`append_columns` rather than recorded, because LeRobot computes ten statistics per element of a recorded
column.
"""

import contextlib
import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

IMAGE_PREFIX = "observation.images."
DEPTH_PREFIX = "observation.depth."
POINTS_PREFIX = "observation.points."
POINTS_VISIBLE_PREFIX = "observation.points_visible."

INFO_PATH = Path("meta/info.json")
PROVENANCE_PATH = Path("meta/foresight.json")
PROVENANCE_VERSION = 1

# LeRobot's depth video maps zero, NaN and everything nearer than 1 cm to its lowest code, 0.01 m.
DEPTH_FLOOR_M = 0.011
# Values this close to the declared maximum are saturated: "at least this far".
DEPTH_LIMIT_MARGIN_M = 0.01
# No camera of a robot sees half of its pixels farther than this; millimetres of any real scene do.
IMPLAUSIBLE_MEDIAN_M = 100.0
# What linking says where it cannot: another file system, one without links, too many of them.
NO_LINK = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK)


def image_key(camera: str) -> str:
    """Key of a camera's RGB stream."""
    return IMAGE_PREFIX + camera


def find_image_key(features: Mapping[str, Mapping[str, Any]], camera: str) -> str | None:
    """Find a camera's RGB stream: `observation.images.<camera>`, or the column of just this name.

    Args:
        features (`Mapping[str, Mapping]`): Features of the dataset (`meta.features`).
        camera (`str`): Name of the camera, or of its column where that has no prefix (`image`).

    Returns:
        `str | None`: The key, or `None` when there is no such camera.
    """
    for key in (image_key(camera), camera):
        if key in features and features[key]["dtype"] in ("image", "video"):
            return key if not is_depth_feature(features[key]) else None
    return None


def depth_key(camera: str) -> str:
    """Key under which this project stores a camera's depth."""
    return DEPTH_PREFIX + camera


def points_key(camera: str) -> str:
    """Key of the tracked points seen by a camera."""
    return POINTS_PREFIX + camera


def points_visible_key(camera: str) -> str:
    """Key of the visibility of a camera's tracked points."""
    return POINTS_VISIBLE_PREFIX + camera


def depth_feature(height: int, width: int) -> dict:
    """LeRobot feature of one depth video stream.

    Args:
        height (`int`): Rows of the depth map in pixels.
        width (`int`): Columns of the depth map in pixels.

    Returns:
        `dict`: Feature for `LeRobotDataset.create`; LeRobot adds the unit and the quantisation limits to its
        `info`.
    """
    return {
        "dtype": "video",
        "shape": (height, width, 1),
        "names": ["height", "width", "channels"],
        "info": {"is_depth_map": True},
    }


def points_features(camera: str, n_points: int, height: int, width: int) -> dict[str, dict]:
    """LeRobot features of a camera's tracked points and their visibility.

    Args:
        camera (`str`): Camera the points are seen by.
        n_points (`int`): Points per episode, equal for all episodes (shorter ones are padded, invisible).
        height (`int`): Rows of the image the tracks were made on; recorded as a fact, the values do not
            depend on it.
        width (`int`): Columns of that image.

    Returns:
        `dict[str, dict]`: The two features by key, ready for `append_columns`.

    Raises:
        ValueError: If `n_points` is smaller than 2 (LeRobot stores one-element columns as scalars).
    """
    if n_points < 2:
        raise ValueError(f"n_points is {n_points}; a track column needs at least 2 points")
    facts = {"camera": camera, "resolution": [height, width]}
    return {
        points_key(camera): {
            "dtype": "float16",
            "shape": (3 * n_points,),
            "names": None,
            "info": {"layout": "n,3", "units": "x/width,y/height,m", **facts},
        },
        points_visible_key(camera): {
            "dtype": "bool",
            "shape": (n_points,),
            "names": None,
            "info": {"layout": "n", "units": "true=visible", **facts},
        },
    }


def picture_size(feature: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of a camera's pictures; some older datasets name the channels first."""
    shape = tuple(feature["shape"])
    return shape[1:] if shape[0] in (1, 3) else shape[:2]


def is_depth_feature(feature: Mapping[str, Any]) -> bool:
    """Whether LeRobot marks this feature as a depth map (its current and its older spelling)."""
    info = feature.get("info") or {}
    older = feature.get("video_info") or {}
    marks = (info.get("is_depth_map"), info.get("video.is_depth_map"), older.get("video.is_depth_map"))
    return any(bool(mark) for mark in marks)


def is_label_key(key: str, feature: Mapping[str, Any] | None = None) -> bool:
    """Whether a column is a label (depth, points, visibility) and so never an input of a policy."""
    if key.startswith((DEPTH_PREFIX, POINTS_PREFIX, POINTS_VISIBLE_PREFIX)):
        return True
    return feature is not None and is_depth_feature(feature)


def find_depth_key(features: Mapping[str, Mapping[str, Any]], camera: str) -> str | None:
    """Find the depth stream that belongs to a camera.

    What counts is LeRobot's `is_depth_map` mark, not the name: `observation.images.<camera>_depth` as
    recorded by LeRobot's depth cameras is found, an RGB picture of depth under the same name is not.

    Args:
        features (`Mapping[str, Mapping]`): Features of the dataset (`meta.features`).
        camera (`str`): Name of the RGB camera.

    Returns:
        `str | None`: The key, or `None` when the camera has no depth.
    """
    names = (depth_key(camera), f"{IMAGE_PREFIX}{camera}_depth", f"{IMAGE_PREFIX}{camera}.depth")
    return next((name for name in names if name in features and is_depth_feature(features[name])), None)


def depth_limit_m(feature: Mapping[str, Any]) -> float:
    """Declared far limit of a depth feature in metres (`inf` when the storage does not saturate)."""
    info = feature.get("info") or {}
    limit = info.get("video.depth_max", info.get("depth_max"))
    return math.inf if limit is None else float(limit)


def clean_depth(depth_m: Any, limit_m: float = math.inf) -> Any:
    """Set what is no measurement to zero, the one sign of "invalid" used from here on.

    Args:
        depth_m (`np.ndarray` or `torch.Tensor`): Metres, any shape, as read from a dataset.
        limit_m (`float`): Far limit of the storage (`depth_limit_m`); values within 1 cm of it are saturated.

    Returns:
        Same type and shape, float32: metres, 0 where the value was at most 1.1 cm, saturated, or not finite.
    """
    if isinstance(depth_m, np.ndarray):
        depth_m = depth_m.astype(np.float32, copy=False)
        # What is not finite is in no range either.
        valid = (depth_m > DEPTH_FLOOR_M) & (depth_m < limit_m - DEPTH_LIMIT_MARGIN_M)
        return np.where(valid, depth_m, np.float32(0))
    depth_m = depth_m.float()
    valid = (depth_m > DEPTH_FLOOR_M) & (depth_m < limit_m - DEPTH_LIMIT_MARGIN_M)
    return depth_m.where(valid, depth_m.new_zeros(()))


def check_depth_range(depth_m: Any, key: str, limit_m: float = math.inf) -> None:
    """Refuse depth that cannot be metres.

    Millimetres stored as metres show in two ways: as values in the hundreds where the storage keeps them, and
    as frames that are saturated everywhere where LeRobot's depth video clipped them at its far limit.

    Args:
        depth_m (`np.ndarray` or `torch.Tensor`): Depth of one or more frames as read, before `clean_depth`.
        key (`str`): Column it came from, for the message.
        limit_m (`float`): Far limit of the storage (`depth_limit_m`).

    Raises:
        ValueError: If the values are implausible as metres; names the column, the range seen and the remedy.
    """
    values = np.asarray(depth_m, dtype=np.float32)
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        raise ValueError(f"depth column '{key}' holds no finite value; remove it or annotate it again")
    seen = f"values from {finite.min():.3g} to {finite.max():.3g}"
    remedy = (
        "record uint16 frames as millimetres or float32 frames as metres, or set the right 'depth_unit' "
        "in the feature's info in meta/info.json"
    )
    if finite.min() < 0:
        raise ValueError(f"depth column '{key}' has {seen}; depth in metres cannot be negative: {remedy}")
    measured = finite[finite > DEPTH_FLOOR_M]
    if measured.size and np.median(measured) > IMPLAUSIBLE_MEDIAN_M:
        raise ValueError(
            f"depth column '{key}' has {seen}, median {np.median(measured):.4g}; "
            f"this looks like millimetres read as metres: {remedy}"
        )
    saturated = float(np.mean(finite >= limit_m - DEPTH_LIMIT_MARGIN_M))
    if saturated > 0.99:
        raise ValueError(
            f"depth column '{key}' is at its far limit of {limit_m:g} m in {saturated:.1%} of the pixels; "
            f"this looks like millimetres stored as metres: {remedy}, then record the depth again"
        )


def pack_points(points: np.ndarray) -> np.ndarray:
    """Flatten tracks for storage.

    Args:
        points (`np.ndarray`): `(F, n, 3)` float: x, y image fractions, z metres.

    Returns:
        `np.ndarray`: `(F, n*3)` float16.

    Raises:
        ValueError: If the shape is another, or a value is not finite in float16 (larger than 65504).
    """
    if points.ndim != 3 or points.shape[-1] != 3:
        raise ValueError(f"points have shape {points.shape}; expected (frames, points, 3)")
    with np.errstate(over="ignore"):  # what becomes infinite is refused below
        packed = points.astype(np.float16).reshape(len(points), -1)
    if not np.isfinite(packed).all():
        raise ValueError("points hold values that are not finite in float16; clip or drop those tracks first")
    return packed


def unpack_points(packed: np.ndarray) -> np.ndarray:
    """Undo `pack_points`: `(F, n*3)` float16 -> `(F, n, 3)` float32 (x, y image fractions, z metres)."""
    return np.asarray(packed).astype(np.float32).reshape(len(packed), -1, 3)


def load_features(root: str | Path) -> dict[str, dict]:
    """Features of a local LeRobot dataset, read from `meta/info.json`.

    Raises:
        ValueError: If the file is missing or damaged; names it.
    """
    return load_info(root)["features"]


def append_columns(
    root: str | Path,
    features: Mapping[str, Mapping[str, Any]],
    values: Mapping[str, Callable[[int], np.ndarray]],
) -> None:
    """Add flat columns to every data file of a local LeRobot v3 dataset, without statistics.

    One row group per episode, zstd, written beside the old file and renamed over it; the features enter
    `meta/info.json` last, so that a dataset never promises a column it lacks. Running it again after an
    interruption continues: files that already carry all the columns are left alone, so `values` must be the
    same function of the episode. LeRobot's own schema metadata is dropped, as it would contradict the new
    columns.

    Args:
        root (`str` or `Path`): Dataset folder.
        features (`Mapping[str, Mapping]`): LeRobot features of the new columns; `shape` must be
            one-dimensional.
        values (`Mapping[str, Callable]`): For each key a function from episode index to `(frames, *shape)`
            values.

    Raises:
        ValueError: If a key exists with another definition, values have a wrong shape, or a file is damaged.
    """
    root = Path(root)
    info = load_info(root)
    features = json.loads(json.dumps(features))  # the form info.json keeps: tuples become lists
    if set(values) != set(features):
        raise ValueError(f"append_columns got features {sorted(features)} but values for {sorted(values)}")
    for key, feature in features.items():
        if "/" in key or len(feature["shape"]) != 1:
            raise ValueError(
                f"column '{key}' of shape {feature['shape']}: keys have no '/', shapes one dimension"
            )
        if info["features"].get(key, feature) != feature:
            raise ValueError(
                f"dataset {root} already has a column '{key}' with another definition "
                f"({info['features'][key]['dtype']} {info['features'][key]['shape']}); "
                "remove it first with lerobot's remove_feature, or write to a new dataset"
            )
    for path in data_files(root):
        _append_to_file(path, features, values)
    info["features"].update(features)
    write_json_atomic(root / INFO_PATH, info)


def data_files(root: str | Path) -> list[Path]:
    """Data files of a LeRobot v3 dataset in the order of their frames.

    Raises:
        ValueError: If there are none.
    """
    paths = sorted((Path(root) / "data").glob("*/*.parquet"))
    if not paths:
        raise ValueError(f"dataset {root} has no data files (data/chunk-*/file-*.parquet); is it complete?")
    return paths


def dataset_files(root: str | Path) -> list[Path]:
    """All files of a dataset by their place in its folder, in order, hidden ones left out.

    Folders that are symbolic links are followed, as LeRobot does: videos may lie on another disk.
    """
    places = []
    for folder, inner, names in os.walk(root, followlinks=True):
        inner[:] = [name for name in inner if not name.startswith(".")]
        places += [Path(folder, name).relative_to(root) for name in names if not name.startswith(".")]
    return sorted(places)


def _append_to_file(
    path: Path, features: Mapping[str, Mapping[str, Any]], values: Mapping[str, Callable[[int], np.ndarray]]
) -> None:
    """Rewrite one parquet file with the new columns; keep it untouched if it has them all."""
    try:
        source = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"cannot read data file {path}: {error}; download or create the dataset again"
        ) from error
    with source:
        present = set(source.schema_arrow.names)
        if set(features) <= present:
            return
        new_keys = [key for key in features if key not in present]
        with replacing(path) as temporary:
            writer = None
            try:
                for episode_index, table in iterate_episodes(source):
                    for key in new_keys:
                        column = _as_column(
                            key, features[key], values[key](episode_index), table.num_rows, episode_index
                        )
                        table = table.append_column(key, column)
                    if writer is None:
                        # Points of a still scene repeat from row to row, which zstd sees and a dictionary
                        # does not.
                        plain = [key for key in table.column_names if key not in features]
                        writer = pq.ParquetWriter(
                            temporary, table.schema, compression="zstd", use_dictionary=plain
                        )
                    writer.write_table(table)
            finally:
                if writer is not None:
                    writer.close()


def iterate_episodes(source: pq.ParquetFile) -> Iterator[tuple[int, pa.Table]]:
    """Yield `(episode index, rows)`, whatever the row groups of the file are."""
    pending: pa.Table | None = None
    for group in range(source.num_row_groups):
        table = source.read_row_group(group).replace_schema_metadata(None)
        if pending is not None:
            table = pa.concat_tables([pending, table])
        episodes = table.column("episode_index").to_numpy()
        starts = np.concatenate([[0], np.flatnonzero(np.diff(episodes)) + 1])
        for start, stop in zip(starts[:-1], starts[1:], strict=True):
            yield int(episodes[start]), table.slice(start, stop - start)
        pending = table.slice(starts[-1])  # the last episode may go on in the next row group
    if pending is not None and pending.num_rows:
        yield int(pending.column("episode_index")[0].as_py()), pending


def _as_column(
    key: str, feature: Mapping[str, Any], values: np.ndarray, n_rows: int, episode_index: int
) -> pa.Array:
    """Values of one episode as the Arrow array LeRobot would have written for this feature."""
    (size,) = feature["shape"]
    values = np.asarray(values)
    if values.shape != (n_rows, size):
        raise ValueError(
            f"column '{key}', episode {episode_index}: values have shape {values.shape}, "
            f"expected {(n_rows, size)}"
        )
    flat = pa.array(np.ascontiguousarray(values, dtype=feature["dtype"]).reshape(-1))
    return flat if size == 1 else pa.FixedSizeListArray.from_arrays(flat, size)


def validate_columns(
    dataset: str | Path | Mapping[str, Mapping[str, Any]],
    cameras: Sequence[str],
    need_depth: bool = False,
    need_tracks: bool = False,
) -> None:
    """Check that a dataset has what a run needs, before anything slow starts.

    Args:
        dataset (`str`, `Path` or `Mapping`): Dataset folder, or its features.
        cameras (`Sequence[str]`): Cameras used; tracks are required for the first one, which is the flow
            view.
        need_depth (`bool`): Whether every camera needs a depth stream.
        need_tracks (`bool`): Whether the first camera needs points and their visibility.

    Raises:
        ValueError: Names the first missing column and the command that adds it.
    """
    if isinstance(dataset, Mapping):
        name, features = "DATASET", dataset
    else:
        name, features = str(dataset), load_features(dataset)
    pictures = [key for key in features if features[key]["dtype"] in ("image", "video")]
    known = [key.removeprefix(IMAGE_PREFIX) for key in pictures if not is_depth_feature(features[key])]
    for camera in cameras:
        if find_image_key(features, camera) is None:
            raise ValueError(
                f"the dataset has no camera '{camera}' (no column '{image_key(camera)}'); its cameras are "
                f"{', '.join(known) or 'none'}: name one of them in the configuration"
            )
    missing = [depth_key(camera) for camera in cameras if need_depth and not find_depth_key(features, camera)]
    if need_tracks:
        wanted = (points_key(cameras[0]), points_visible_key(cameras[0]))
        missing += [key for key in wanted if key not in features]
    if missing:
        raise ValueError(
            f"the dataset {name} lacks the column '{missing[0]}'; `python datasets_scripts/annotate.py` adds "
            "points to a dataset with depth, `simulate.py` makes MetaWorld datasets that have both. To train "
            "on this one, leave out what needs it: the objectives depth and future (depth) or flow (points) "
            "(--model.objectives '[action, progress]')"
        )


def read_provenance(root: str | Path) -> dict:
    """Contents of `meta/foresight.json`: how depth and tracks were made, each episode's moving flags.

    Returns:
        `dict`: Empty when the dataset has none (LeRobot's split, delete and merge tools do not copy it).

    Raises:
        ValueError: If the file is damaged or of a newer version.
    """
    path = Path(root) / PROVENANCE_PATH
    if not path.exists():
        return {}
    try:
        provenance = json.loads(path.read_text())
        if not isinstance(provenance, dict):
            raise ValueError("it holds no JSON object")
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}); annotate the dataset again or delete the file"
        ) from error
    if provenance.get("version", 0) > PROVENANCE_VERSION:
        raise ValueError(
            f"{path} has version {provenance['version']}, this code knows {PROVENANCE_VERSION}; "
            "update lerobot_policy_foresight"
        )
    return provenance


def write_provenance(root: str | Path, provenance: Mapping[str, Any]) -> None:
    """Write `meta/foresight.json` in one step, with the version of its layout."""
    write_json_atomic(Path(root) / PROVENANCE_PATH, {"version": PROVENANCE_VERSION, **provenance})


def encode_flags(flags: np.ndarray) -> str:
    """Boolean flags `(n,)` as the hexadecimal text kept in the provenance."""
    return np.packbits(np.asarray(flags, dtype=bool)).tobytes().hex()


def moving_flags(provenance: Mapping[str, Any], episode_index: int, camera: str, n_points: int) -> np.ndarray:
    """Which points of an episode were labelled as moving.

    Args:
        provenance (`Mapping`): What `read_provenance` gave.
        episode_index (`int`): Episode.
        camera (`str`): Camera of the tracks.
        n_points (`int`): Points of the column.

    Returns:
        `np.ndarray`: `(n_points,)` bool; all false when nothing is recorded for the episode.
    """
    facts = provenance.get("episodes", {}).get(str(episode_index), {}).get(camera, {})
    flags = np.zeros(n_points, dtype=bool)
    if "moving" in facts:
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(facts["moving"]), dtype=np.uint8))[:n_points]
        flags[: len(bits)] = bits.astype(bool)
    return flags


def flagged_episodes(
    provenance: Mapping[str, Any], cameras: Sequence[str] | None = None
) -> dict[int, list[str]]:
    """Episodes whose labels are doubtful, and why; `quality.py` says what the flags mean.

    Args:
        provenance (`Mapping`): What `read_provenance` gave.
        cameras (`Sequence[str]`, *optional*): Count the flags of these alone.

    Returns:
        `dict[int, list[str]]`: Flags (`<camera>/<word>`) by episode; without those that have none.
    """
    found = {}
    for episode, facts in provenance.get("episodes", {}).items():
        raised = facts.get("flags", [])
        if cameras is not None:
            raised = [flag for flag in raised if flag.rpartition("/")[0] in cameras]
        if raised:
            found[int(episode)] = list(raised)
    return found


def write_json_atomic(path: str | Path, content: Any) -> None:
    """Write a JSON file so that a reader sees the old or the new one, never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def share_file(path: Path, target: Path) -> None:
    """The same file under another name; a copy where the file system has no such thing."""
    try:
        os.link(path.resolve(), target)  # the Hub's cache has symbolic links
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        shutil.copyfile(path, target)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name in the same folder; rename it over `path` on success, remove it on any error."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp makes private files; a dataset is for everybody
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_info(root: str | Path) -> dict:
    """Contents of `meta/info.json` of a local LeRobot dataset.

    Raises:
        ValueError: If the file is missing or damaged, or of another version than v3; names it.
    """
    path = Path(root) / INFO_PATH
    try:
        info = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{root} is no LeRobot dataset: {INFO_PATH} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); download or create the dataset again") from error
    if not isinstance(info, dict) or "features" not in info:
        raise ValueError(f"{path} lists no features; download or create the dataset again")
    version = str(info.get("codebase_version", "v3")).removeprefix("v")
    if version.split(".")[0] != "3":
        old = version.startswith(("1.", "2."))
        remedy = (
            "convert it with `python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id=OWNER/NAME "
            "--push-to-hub=false` (--root=DIR for a folder)"
            if old
            else "update lerobot_policy_foresight"
        )
        raise ValueError(f"{root} is a LeRobot dataset of version {version}, not 3: {remedy}")
    return info
