"""Find, check and extend the files of a LeRobot v3 dataset."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datasets_scripts.storage.atomic import write_json, write_whole_file

INFO_PATH = Path("meta/info.json")
STATS_PATH = Path("meta/stats.json")


def load_info(root: str | Path) -> dict:
    """Contents of `meta/info.json` of a local LeRobot dataset.

    Raises:
        ValueError: If the file is missing or damaged, or of another version than v3; names it.
    """
    path = Path(root) / INFO_PATH
    try:
        info = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{root} is not a LeRobot dataset: {INFO_PATH} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); download or create the dataset again") from error
    if not isinstance(info, dict) or "features" not in info:
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
    return info


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
            if linked is None or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(linked)):
                check_inside(root, path)
                places += [path.relative_to(root)] if path in visible else []
    return sorted(places)


def check_inside(root: str | Path, path: Path) -> None:
    """Refuse a path whose links lead out of the folder `root`, and what is neither file nor folder.

    The Hub's cache keeps the files of its snapshots in `blobs`, two folders above.

    Raises:
        ValueError: Names the path, and where it leads.
    """
    folder, target = Path(os.path.realpath(root)), Path(os.path.realpath(path))
    blobs = [parent.with_name("blobs") for parent in folder.parents if parent.name == "snapshots"]
    if not any(target.is_relative_to(allowed) for allowed in (folder, *blobs)):
        raise ValueError(
            f"{path} leads out of its folder, to {target}, and would be copied or sent: put the file "
            "itself there, or remove it (for a dataset's videos on another disk, see --linked-videos)"
        )
    if not (target.is_file() or target.is_dir()):
        raise ValueError(f"{path} is not a file, or a link that leads nowhere: remove it")


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
        info = json.loads((root / INFO_PATH).read_text())
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
