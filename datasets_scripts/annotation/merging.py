"""Join the labels of episodes to a copy of the old dataset."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from lerobot.datasets.compute_stats import aggregate_stats
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.io_utils import cast_stats_to_numpy, write_info, write_stats
from lerobot.datasets.utils import DEFAULT_VIDEO_PATH

from datasets_scripts.annotation.settings import Annotation
from datasets_scripts.columns import depth_feature, depth_key, find_depth_key, find_image_key, picture_size
from datasets_scripts.inspection.dataset_card import write_card
from datasets_scripts.inspection.quality import find_flags, merge_facts
from datasets_scripts.storage.atomic import write_whole_file
from datasets_scripts.storage.dataset_copy import copy_dataset
from datasets_scripts.storage.dataset_folder import episode_files, video_sizes
from datasets_scripts.storage.dataset_rows import DatasetRows
from datasets_scripts.storage.episode_job import EpisodeJob
from datasets_scripts.storage.provenance import (
    encode_flags,
    find_intrinsics,
    read_provenance,
    write_provenance,
)
from datasets_scripts.storage.shards import read_array
from datasets_scripts.storage.videos.writing import join_videos
from datasets_scripts.tracks.track_columns import append_tracks
from datasets_scripts.tracks.track_selection import MOVING_FRACTION

__all__ = ["assemble"]

PASS_FILES = ("earlier", "video_bytes")  # of an annotation that is described in a later one


def assemble(
    root: Path,
    rows: DatasetRows,
    annotation: Annotation,
    job: EpisodeJob,
    facts: Mapping[int, dict],
    skipped: Sequence[dict],
    linked_videos: Path | None = None,
) -> None:
    """Write the annotated dataset to an empty folder.

    Args:
        root (`Path`): Folder to fill.
        rows (`DatasetRows`): The old dataset.
        annotation (`Annotation`): What is added.
        job (`EpisodeJob`): The shards, by the episodes' numbers in the old dataset.
        facts (`Mapping[int, dict]`): Facts of the episodes to keep, by the same numbers, in order.
        skipped (`Sequence[dict]`): Episodes that cannot be read: `episode`, `file` and `reason`.
        linked_videos (`Path`, *optional*): Folder into which the old dataset's videos may be links.
    """
    kept = list(facts)
    copy_dataset(rows, root, kept, linked_videos)
    shards = [job.shard(episode) for episode in kept]
    if annotation.estimates_depth:
        _add_depth(root, annotation, shards, list(facts.values()))
    camera = annotation.cameras[0]
    size = picture_size(rows.features[find_image_key(rows.features, camera)])
    append_tracks(root, camera, annotation.n_points, size, shards.__getitem__)
    provenance = _build_provenance(rows, annotation, shards, facts)
    before = read_provenance(rows.root).get("annotation", {})
    earlier = [*before.get("earlier", []), {k: v for k, v in before.items() if k not in PASS_FILES}]
    provenance["annotation"] = {
        **({"earlier": earlier} if before else {}),  # of passes before this one, the first one first
        "parameters": job.parameters,
        "versions": {name: version(name) for name in ("lerobot_policy_foresight", "lerobot")},
        "skipped": list(skipped),
        "other_sources": _list_sources(facts)[1:],  # versions may differ between machines
        "source_episode": [] if len(kept) == rows.n_episodes else kept,
        "video_bytes": video_sizes(root),
    }
    write_provenance(root, provenance)
    write_card(root)


def _add_depth(root: Path, annotation: Annotation, shards: Sequence[Path], facts: Sequence[dict]) -> None:
    """Add the depth videos of all episodes, and their statistics."""
    meta = LeRobotDatasetMetadata(root.name, root=root)
    meta.info.video_path = meta.info.video_path or DEFAULT_VIDEO_PATH  # none if all images are pictures
    columns: list[dict[str, Any]] = [{} for _ in facts]
    for camera in annotation.cameras:
        key = depth_key(camera)
        pictures = meta.features[find_image_key(meta.features, camera)]
        meta.info.features[key] = depth_feature(*picture_size(pictures))
        paths = [shard / f"{key}.mp4" for shard in shards]
        lengths = [known["n_frames"] for known in facts]
        places = join_videos(meta, key, paths, lengths, annotation.depth_max_m)
        for column, place, known in zip(columns, places, facts, strict=True):
            column |= place | {f"stats/{key}/{name}": value for name, value in known["stats"][key].items()}
    _add_episode_columns(root, columns)
    stats = (meta.stats or {}) | aggregate_stats([cast_stats_to_numpy(known["stats"]) for known in facts])
    write_stats(dict(sorted(stats.items())), root)  # LeRobot's order differs from process to process
    write_info(meta.info, root)


def _add_episode_columns(root: Path, columns: Sequence[dict[str, Any]]) -> None:
    """Add columns to `meta/episodes`, given the values of each episode."""
    for path in episode_files(root):
        table = pq.read_table(path)
        new = [columns[episode] for episode in table.column("episode_index").to_pylist()]
        names = list(new[0]) if new else []
        # LeRobot's remove_feature leaves the columns of a removed feature here.
        table = table.drop_columns([name for name in names if name in table.column_names])
        for name in names:
            table = table.append_column(name, pa.array([values[name] for values in new]))
        with write_whole_file(path) as temporary:
            pq.write_table(table, temporary, compression="snappy")


def _build_provenance(
    rows: DatasetRows, annotation: Annotation, shards: Sequence[Path], facts: Mapping[int, dict]
) -> dict[str, Any]:
    """The old dataset's provenance with that of the new labels."""
    old = read_provenance(rows.root)
    cameras = dict(old.get("cameras", {}))
    sources, *others = _list_sources(facts)
    for camera in annotation.cameras:
        known = cameras.get(camera, {})
        if lens := find_intrinsics(old, rows.features, camera):
            known = {"intrinsics": lens} | known
        if annotation.estimates_depth:
            depth = {"source": annotation.to_dict()["depth"], "depth_max_m": annotation.depth_max_m}
            cameras[camera] = known | {"depth": depth | sources["depth"] | _list_others(others, "depth")}
        else:
            depth = {"source": "sensor", "column": find_depth_key(rows.features, camera)}
            cameras[camera] = {"depth": depth} | known
    first = annotation.cameras[0]
    cameras[first]["tracks"] = sources["tracks"] | {
        "source": annotation.tracks,
        "n_points": annotation.n_points,
        "moving_fraction": MOVING_FRACTION,
        "seed": annotation.seed,
        **_list_others(others, "tracks"),
    }
    episodes = {}
    for episode, (source, known) in enumerate(facts.items()):
        merged = merge_facts(old.get("episodes", {}).get(str(source), {}), known["cameras"])
        merged[first]["moving"] = encode_flags(read_array(shards[episode], "moving"))
        episodes[str(episode)] = merged | {"flags": find_flags(merged)}
    kept = {name: value for name, value in old.items() if name not in ("version", "annotation")}
    return kept | {"cameras": cameras, "episodes": episodes}


def _list_others(sources: Sequence[Mapping], kind: str) -> dict[str, list]:
    """`other_models` of a kind of label: what other machines used, whose licenses count too."""
    return {"other_models": [source[kind] for source in sources]} if sources else {}


def _list_sources(facts: Mapping[int, dict]) -> list[dict]:
    """Distinct models that the labels were made with."""
    found: list[dict] = []
    for known in facts.values():
        if known["sources"] not in found:
            found.append(known["sources"])
    return found
