"""Find, check and extend the files of a LeRobot v3 dataset."""

import json
import math
import os
import re
import reprlib
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datasets_scripts.columns import is_depth_feature
from datasets_scripts.storage.atomic import read_json, write_json, write_whole_file

INFO_PATH = Path("meta/info.json")
STATS_PATH = Path("meta/stats.json")
RESTORE = "download the dataset again, or make it again with the script that made it"
LARGEST_VALUE = 2**31  # of sizes and rates


def is_dataset_folder(folder: str | Path) -> bool:
    """Whether a folder holds a LeRobot dataset: it has a `meta/info.json`."""
    return (Path(folder) / INFO_PATH).is_file()


def load_info(root: str | Path) -> dict:
    """Contents of `meta/info.json` of a local LeRobot dataset.

    Raises:
        ValueError: If the file is missing or damaged, of another version than v3, or has a value that makes
            no sense; names the file and the field.
    """
    path = Path(root) / INFO_PATH
    try:
        info = read_json(path)
    except FileNotFoundError:
        raise ValueError(f"{root} is not a LeRobot dataset: {INFO_PATH} is missing") from None
    if not isinstance(info.get("features"), dict):
        raise ValueError(f"{path} lists no features; download or create the dataset again")
    version = str(info.get("codebase_version", "v3")).removeprefix("v")
    if version.split(".")[0] != "3":
        remedy = "update lerobot_policy_foresight"
        if version.startswith(("1.", "2.")):
            remedy = (
                "convert it with `python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id=OWNER/NAME "
                "--push-to-hub=false` (--root=DIR for a folder)"
            )
        raise ValueError(f"{root} is a LeRobot dataset of version {version}, not 3: {remedy}")
    for problem in _find_info_problems(info):
        raise ValueError(f"{path}: {problem}; correct it, or download the dataset again")
    return info


def is_column_name(key: str) -> bool:
    """Whether a name can be that of a column, which becomes a folder of videos."""
    return key not in ("", ".", "..") and not set(key) & set("/\\\0") and len(key.encode()) <= 200


def _find_info_problems(info: Mapping[str, Any]) -> Iterator[str]:
    """Values that would become sizes, times, paths or program text, and cannot be right."""
    for name in ("fps", "chunks_size", "data_files_size_in_mb", "video_files_size_in_mb"):
        value, is_count = info.get(name, 1), name == "chunks_size"
        if not _is_number(value, whole=is_count) or not 0 < value < LARGEST_VALUE:
            yield f"{name} is {reprlib.repr(value)}, not a {'whole ' * is_count}number above 0"
    for name in ("total_frames", "total_episodes", "total_tasks"):
        if not _is_number(info.get(name, 0), whole=True) or info.get(name, 0) < 0:
            yield f"{name} is {reprlib.repr(info[name])}, not a count"
    for key, feature in info["features"].items():
        if not is_column_name(key):
            yield f"the column {reprlib.repr(key)} has a name that would become a path"
        if problem := _find_feature_problem(feature):
            yield f"the column {reprlib.repr(key)} {problem}"
        elif feature["dtype"] == "video" and info.get("video_path", "") is None:
            yield f"the column {reprlib.repr(key)} is a video, but there is no video_path"
    for name, folder in (("data_path", "data"), ("video_path", "videos")):
        template = info.get(name)
        if template is not None and not _is_template(template, folder):
            yield (
                f"{name} is {reprlib.repr(template)}, not a path inside of the dataset such as LeRobot's "
                "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
            )


def _find_feature_problem(feature: Any) -> str | None:
    """What is wrong with the definition of a column, if anything."""
    if not isinstance(feature, dict) or not isinstance(feature.get("dtype"), str):
        return "has no dtype"
    shape, is_picture = feature.get("shape"), feature["dtype"] in ("image", "video")
    if not isinstance(shape, list) or not all(_is_number(size, whole=True) and size > 0 for size in shape):
        return f"has the shape {reprlib.repr(shape)}, not a list of whole numbers above 0"
    if math.prod(shape) > LARGEST_VALUE or (is_picture and len(shape) != 3):
        return f"has the shape {reprlib.repr(shape)}" + ", not (height, width, channels)" * is_picture
    notes = [feature.get(name) or {} for name in ("info", "video_info")]
    if not all(isinstance(note, dict) for note in notes):
        return "has an info that is not an object"
    if is_depth_feature(feature):
        for name in ("depth_min", "depth_max", "shift"):
            for value in (note.get(known) for note in notes for known in (name, f"video.{name}")):
                if value is not None and not (_is_number(value) and 0 <= value < LARGEST_VALUE):
                    return f"has the {name} {reprlib.repr(value)}, not meters"
        if (unit := notes[0].get("depth_unit")) not in (None, "m", "mm"):
            return f"has the depth_unit {reprlib.repr(unit)}, not 'm' or 'mm'"
    return None


def _is_number(value: Any, whole: bool = False) -> bool:
    """Whether a JSON value is a finite number; `True` is not one."""
    if isinstance(value, float) and not whole:
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _is_template(template: Any, folder: str) -> bool:
    """Whether a path inside `folder` results: text and plain fields, so that no input makes it long."""
    try:
        fields = list(string.Formatter().parse(template))
        path = PurePosixPath(template)
    except (ValueError, TypeError):
        return False
    return (
        path.parts[:1] == (folder,)
        and ".." not in path.parts
        and not set(template) & set("\\\0")
        and all(
            (name is None or name in ("chunk_index", "file_index") or (name == "video_key" and not spec))
            and re.fullmatch(r"(0?\d{1,2})?d?", spec or "")
            and conversion is None
            for _, name, spec, conversion in fields
        )
    )


def refuse_patterns(root: Path) -> None:
    """Refuse a dataset's path that LeRobot's reader, which expands it, would not find or take for others."""
    if marks := [mark for mark in ("[", "*", "?", "::") if mark in str(root.resolve())]:
        raise ValueError(
            f"{root} has '{marks[0]}' in its path, which LeRobot takes for a pattern: rename the folder"
        )


def load_features(root: str | Path) -> dict[str, dict]:
    """Features of a local LeRobot dataset; errors are those of `load_info`."""
    return load_info(root)["features"]


def data_files(root: str | Path) -> list[Path]:
    """Data files of a LeRobot v3 dataset in the order of their frames.

    Raises:
        ValueError: If there are none.
    """
    paths = sorted((Path(root) / "data").glob("*/*.parquet"))
    if not paths:
        raise ValueError(f"dataset {root} has no data files (data/chunk-*/file-*.parquet); is it complete?")
    return paths


def episode_files(root: str | Path) -> list[Path]:
    """Files of `meta/episodes` of a LeRobot v3 dataset in the order of their episodes; maybe none."""
    return sorted((Path(root) / "meta" / "episodes").glob("*/*.parquet"))


def dataset_files(root: str | Path, linked: Path | None = None) -> list[Path]:
    """Sorted relative paths of all files of a folder but hidden ones: what may be copied or sent.

    A link to a file of the folder counts as that file; links to its folders are not entered.

    Args:
        root (`str` or `Path`): A dataset, or another folder.
        linked (`Path`, *optional*): Links into this folder are left out instead of refused.

    Raises:
        ValueError: If a link leads out of the folder, or something is not a file; names it.
    """
    places = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if not name.startswith(".")]
        visible = [Path(folder, name) for name in names if not name.startswith(".")]
        links = [path for name in inner if (path := Path(folder, name)).is_symlink()]
        for path in [*visible, *links]:
            if linked is None or not _leads_into(path, [linked]) or _leads_into(path, _own_folders(root)):
                check_inside(root, path)
                places += [path.relative_to(root)] if path in visible else []
    return sorted(places)


def check_inside(root: str | Path, path: Path) -> None:
    """Refuse a path whose links lead out of the folder `root`, and what is neither file nor folder.

    The Hub's cache keeps the files of its snapshots in `blobs`, two folders above.

    Raises:
        ValueError: Names the path, and where it leads.
    """
    target = Path(os.path.realpath(path))
    if not _leads_into(path, _own_folders(root)):
        raise ValueError(
            f"{path} leads out of its folder, to {target}, and would be copied or sent: put the file "
            "itself there, or remove it (for a dataset's videos on another disk, see --linked-videos)"
        )
    if not (target.is_file() or target.is_dir()):
        raise ValueError(f"{path} is not a file, or a link that leads nowhere: remove it")


def _own_folders(root: str | Path) -> list[Path]:
    folder = Path(os.path.realpath(root))
    return [folder, *(p.with_name("blobs") for p in folder.parents if p.name == "snapshots")]


def _leads_into(path: Path, folders: Iterable[Path]) -> bool:
    target = Path(os.path.realpath(path))
    return any(target.is_relative_to(os.path.realpath(folder)) for folder in folders)


def append_columns(
    root: str | Path,
    features: Mapping[str, Mapping[str, Any]],
    values: Mapping[str, Callable[[int], np.ndarray]],
) -> None:
    """Add flat columns to every data file of a local LeRobot v3 dataset, without statistics.

    Writes one row group per episode, compressed with zstd. The features enter `meta/info.json` last, so a
    dataset never promises a column it lacks. A second call after an interruption leaves finished files
    unchanged, so `values` must give the same values again. LeRobot's schema metadata is dropped: it would
    contradict the new columns.

    Args:
        root (`str` or `Path`): Dataset folder.
        features (`Mapping[str, Mapping]`): LeRobot features of the new columns, one-dimensional.
        values (`Mapping[str, Callable]`): For each key a function from episode index to `(frames, *shape)`
            values.

    Raises:
        ValueError: If a key exists with another definition, values have a wrong shape, or a file is damaged.
    """
    root = Path(root)
    info = load_info(root)
    features = json.loads(json.dumps(features))  # as in info.json: tuples become lists
    for key, feature in features.items():
        present = info["features"].get(key, feature)
        if present != feature:
            raise ValueError(
                f"dataset {root} already has a column '{key}' with another definition "
                f"({present['dtype']} {present['shape']}); remove it first with lerobot's remove_feature, or "
                "write to a new dataset"
            )
    for path in data_files(root):
        _append_to_file(path, features, values)
    info["features"].update(features)
    write_json(root / INFO_PATH, info)


def _append_to_file(
    path: Path, features: Mapping[str, Mapping[str, Any]], values: Mapping[str, Callable[[int], np.ndarray]]
) -> None:
    """Rewrite one parquet file with the columns that it lacks."""
    try:
        source = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"cannot read data file {path}: {error}; download or create the dataset again"
        ) from error
    with source:
        present = source.schema_arrow.names
        new_keys = [key for key in features if key not in present]
        if not new_keys:
            return
        writer = None
        with write_whole_file(path) as temporary:
            try:
                for episode, table in iterate_episodes(source):
                    for key in new_keys:
                        column = _build_column(
                            key, features[key], values[key](episode), table.num_rows, episode
                        )
                        table = table.append_column(key, column)
                    if writer is None:
                        # Points of a still scene repeat from row to row: zstd sees it, a dictionary does not.
                        options = {"compression": "zstd", "use_dictionary": present}
                        writer = pq.ParquetWriter(temporary, table.schema, **options)
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
        pending = table.slice(starts[-1])  # the next row group may continue the last episode
    if pending is not None and pending.num_rows:
        yield int(pending.column("episode_index")[0].as_py()), pending


def _build_column(
    key: str, feature: Mapping[str, Any], values: np.ndarray, n_rows: int, episode: int
) -> pa.Array:
    """Values of one episode as the Arrow array that LeRobot would write for this feature."""
    (size,) = feature["shape"]
    values = np.asarray(values)
    if values.shape != (n_rows, size):
        raise ValueError(
            f"column '{key}', episode {episode}: values have shape {values.shape}, expected {(n_rows, size)}"
        )
    flat = pa.array(np.ascontiguousarray(values, dtype=feature["dtype"]).reshape(-1))
    return flat if size == 1 else pa.FixedSizeListArray.from_arrays(flat, size)


def count_dataset(root: Path) -> dict[str, int]:
    """`episodes`, `frames`, `tasks` and `bytes` of a local LeRobot dataset."""
    info = load_info(root)
    counts = {name: info[f"total_{name}"] for name in ("episodes", "frames", "tasks")}
    return counts | {"bytes": sum(path.stat().st_size for path in root.rglob("*") if path.is_file())}


def video_sizes(root: Path) -> dict[str, int]:
    """Bytes of every video file by its relative path; kept in the provenance."""
    return {str(path.relative_to(root)): path.stat().st_size for path in sorted(root.glob("videos/**/*.mp4"))}


def check_dataset(root: Path, n_episodes: int, video_bytes: Mapping[str, int]) -> None:
    """Quick check that a finished dataset is still complete: counts, data files' footers, `video_sizes`.

    Raises:
        ValueError: Names the file that is missing or damaged and the remedy.
    """
    remedy = f"delete {root} and run the same command again"
    try:
        info = read_json(root / INFO_PATH)
        n_found, n_frames = info["total_episodes"], info["total_frames"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{root / INFO_PATH} is missing or damaged ({error}); {remedy}") from error
    if n_found != n_episodes:
        raise ValueError(f"{root} holds {n_found} episodes, not {n_episodes}; {remedy}")
    n_rows = 0
    for path in data_files(root):
        try:
            n_rows += pq.read_metadata(path).num_rows
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"data file {path} is damaged ({error}); {remedy}") from error
    if n_rows != n_frames:
        raise ValueError(f"the data files of {root} hold {n_rows} of {n_frames} frames; {remedy}")
    for name, size in video_bytes.items():
        path = root / name
        found = path.stat().st_size if path.exists() else None
        if found != size:
            raise ValueError(f"video file {path} has {found or 'no'} bytes instead of {size}; {remedy}")
