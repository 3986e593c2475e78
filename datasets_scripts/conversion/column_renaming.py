"""Copy a LeRobot v3 dataset under column names that LeRobot's policies can use.

LeRobot gives a policy `observation.*` and `action` and drops every other column, so `lerobot-train` cannot
use a dataset with `image`, `state` and `actions`, and `lerobot-edit-dataset` cannot rename columns. This
renames them in data files, metadata, statistics and video folders. Videos are shared by hard link, or copied
to another file system, never encoded again. Re-encoding them in place may change both datasets.
"""

import difflib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from datasets_scripts.columns import (
    DEPTH_PREFIX,
    IMAGE_PREFIX,
    POINTS_PREFIX,
    POINTS_VISIBLE_PREFIX,
    find_depth_key,
    find_image_key,
    is_label_key,
)
from datasets_scripts.storage.atomic import share_file, write_json, write_whole_folder
from datasets_scripts.storage.dataset_copy import list_copied_files
from datasets_scripts.storage.dataset_folder import INFO_PATH, STATS_PATH, is_column_name, refuse_patterns
from datasets_scripts.storage.dataset_rows import DatasetRows
from datasets_scripts.storage.provenance import (
    EPISODE_FACTS_PATH,
    PROVENANCE_PATH,
    read_provenance,
    write_provenance,
)

__all__ = ["rename_columns"]

PREFIXES = (DEPTH_PREFIX, POINTS_PREFIX, POINTS_VISIBLE_PREFIX, IMAGE_PREFIX)
# Columns that LeRobot reads by name, and the name under which it returns the instruction.
FIXED = ("timestamp", "frame_index", "episode_index", "index", "task_index", "task")


def rename_columns(
    source: str | Path, output: str | Path, names: Mapping[str, str], linked_videos: Path | None = None
) -> dict[str, str]:
    """Write the dataset under new names; the old one stays unchanged.

    Depth and points of a renamed camera are renamed too, as they are found by its name.

    Args:
        source (`str` or `Path`): Dataset folder, or Hub id (downloaded by LeRobot).
        output (`str` or `Path`): Folder to make; it appears when it is whole.
        names (`Mapping[str, str]`): New names by old name.
        linked_videos (`Path`, *optional*): Folder into which videos of the dataset may be links.

    Returns:
        `dict[str, str]`: All renamed columns, including labels.

    Raises:
        ValueError: If the output exists, the dataset is damaged, a name is unknown, taken or not allowed, or
            another link leads out of the dataset.
        OSError: If the disk is full; nothing is left behind.
    """
    output = Path(output)
    if output.exists():
        raise ValueError(f"{output} exists already: name another folder for the renamed dataset")
    refuse_patterns(output)
    rows = DatasetRows(source)  # refuses a damaged dataset
    root, features = rows.root, rows.features
    names = _add_labels(features, names)
    _check_names(features, names)
    with write_whole_folder(output) as folder:
        for place in list_copied_files(rows, range(rows.n_episodes), linked_videos):
            _write_file(root / place, folder, place, names)
    return names


def _add_labels(features: Mapping[str, dict], names: Mapping[str, str]) -> dict[str, str]:
    """Add the labels of renamed cameras; raises a `ValueError` if labels would lose their camera."""
    labels = {}
    for old, new in names.items():
        camera = old.removeprefix(IMAGE_PREFIX)
        if find_image_key(features, camera) != old:
            continue
        points = [prefix + camera for prefix in (POINTS_PREFIX, POINTS_VISIBLE_PREFIX)]
        own = [key for key in (find_depth_key(features, camera), *points) if key in features]
        if own and not new.startswith(IMAGE_PREFIX):
            raise ValueError(f"'{new}' does not begin with '{IMAGE_PREFIX}': {own} would lose their camera")
        for key in own:
            prefix = next(prefix for prefix in PREFIXES if key.startswith(prefix + camera))
            labels[key] = prefix + new.removeprefix(IMAGE_PREFIX) + key.removeprefix(prefix + camera)
    for old, new in names.items():
        if is_label_key(old) and labels.get(old) != new:
            raise ValueError(f"'{old}' goes with its camera: rename '{IMAGE_PREFIX}...' instead")
    return dict(names) | labels


def _check_names(features: Mapping[str, dict], names: Mapping[str, str]) -> None:
    """Raise a `ValueError` about the first name that is unknown, taken or not allowed."""
    if not names:
        raise ValueError(f"nothing to rename; the columns are {', '.join(features)}")
    for old, new in names.items():
        if old not in features:
            close = difflib.get_close_matches(old, features, n=3) or list(features)
            raise ValueError(f"there is no column '{old}'; did you mean {' or '.join(close)}?")
        if old in FIXED:
            raise ValueError(f"'{old}' is LeRobot's own column, which it finds by this name")
        if not is_column_name(new) or new in FIXED:
            raise ValueError(
                f"'{old}' cannot be called '{new}': names have at most 200 bytes and no slash, are not '.' "
                "or '..', and are not LeRobot's own"
            )
        if (new in features and new not in names) or list(names.values()).count(new) > 1:
            raise ValueError(f"'{old}' cannot be called '{new}': there is another column of this name")


def _write_file(path: Path, output: Path, place: Path, names: Mapping[str, str]) -> None:
    """Write one file of the dataset, at the same place of the new one, with the new names."""
    kind = place.parts[0]
    parts = [names.get(part, part) for part in place.parts] if kind == "videos" else place.parts
    target = output.joinpath(*parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    if kind == "videos":
        share_file(path, target)
    elif kind == "data":
        _rename_in_parquet(path, target, names)
    elif place.parts[:2] == ("meta", "episodes"):
        _rename_in_parquet(path, target, names, parents=("stats", "videos"))
    elif place == PROVENANCE_PATH:
        provenance = read_provenance(path.parents[len(place.parts) - 1])
        write_provenance(output, _rename_provenance(provenance, names))
    elif place == EPISODE_FACTS_PATH:
        return  # written with the provenance
    elif rename := JSON_FILES.get(place):
        try:
            content = rename(json.loads(path.read_text()), names)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); download or make the dataset again") from error
        write_json(target, content)
    else:
        shutil.copyfile(path, target)


def _rename_in_parquet(
    path: Path, target: Path, names: Mapping[str, str], parents: tuple[str, ...] = ()
) -> None:
    """Rewrite a parquet file, row group by row group: LeRobot keeps one per episode.

    Columns have the names themselves, or with `parents` are called `PARENT/NAME/...`.
    """

    def rename(column: str) -> str:
        parent, *rest = column.split("/")
        if not parents:
            return names.get(column, column)
        return "/".join([parent, names.get(rest[0], rest[0]), *rest[1:]]) if parent in parents else column

    try:
        with pq.ParquetFile(path) as source:
            old = source.schema_arrow
            schema = pa.schema([field.with_name(rename(field.name)) for field in old])
            if notes := (old.metadata or {}).get(b"huggingface"):  # types for `datasets`
                content = json.loads(notes)
                content["info"]["features"] = _rename_keys(content["info"]["features"], names)
                schema = schema.with_metadata({"huggingface": json.dumps(content)})
            # Points of a still scene repeat from row to row, which zstd sees and a dictionary does not.
            flat = [field.name for field in schema if not pa.types.is_nested(field.type)]
            with pq.ParquetWriter(target, schema, compression="zstd", use_dictionary=flat) as writer:
                for group in range(source.num_row_groups):
                    columns = source.read_row_group(group).columns
                    rows = pa.Table.from_arrays(columns, schema=schema)
                    writer.write_table(rows, row_group_size=max(1, rows.num_rows))
    except pa.ArrowException as error:
        raise ValueError(f"{path} is damaged ({error}); download or make the dataset again") from error


def _rename_keys(content: dict, names: Mapping[str, str]) -> dict:
    return {names.get(key, key): value for key, value in content.items()}


def _rename_info(info: dict, names: Mapping[str, str]) -> dict:
    features = _rename_keys(info["features"], names)
    for feature in features.values():
        facts = feature.get("info") or {}
        if "camera" in facts:  # of points
            facts["camera"] = _rename_camera(facts["camera"], names)
    return info | {"features": features}


def _rename_provenance(provenance: dict, names: Mapping[str, str]) -> dict:
    """The provenance: facts by camera, and by video file."""

    def rename_cameras(group: dict) -> dict:
        group = {_rename_camera(camera, names): value for camera, value in group.items()}
        if "flags" in group:  # `<camera>/<word>`
            parts = [flag.rpartition("/") for flag in group["flags"]]
            group["flags"] = [f"{_rename_camera(camera, names)}/{word}" for camera, _, word in parts]
        return group

    episodes = provenance.get("episodes", {}).items()
    result = provenance | {
        "cameras": rename_cameras(provenance.get("cameras", {})),
        "episodes": {number: rename_cameras(facts) for number, facts in episodes},
    }
    for camera in result["cameras"].values():
        if "column" in camera.get("depth", {}):
            camera["depth"] = _rename_values(camera["depth"], "column", names)
    for kind, facts in provenance.items():
        if isinstance(facts, dict) and "video_bytes" in facts:
            sizes = {
                "/".join(names.get(part, part) for part in file.split("/")): size
                for file, size in facts["video_bytes"].items()
            }
            result[kind] = facts | {"video_bytes": sizes}
    return result


def _rename_values(facts: dict, name: str, names: Mapping[str, str]) -> dict:
    return facts | {name: names.get(facts[name], facts[name])}


def _rename_camera(camera: str, names: Mapping[str, str]) -> str:
    new = names.get(IMAGE_PREFIX + camera) or names.get(camera, camera)  # some cameras have no prefix
    return new.removeprefix(IMAGE_PREFIX)


JSON_FILES = {INFO_PATH: _rename_info, STATS_PATH: _rename_keys}
