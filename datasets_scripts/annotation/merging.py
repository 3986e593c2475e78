"""The old dataset with the new columns: labels of episodes are joined to a LeRobot dataset."""

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from lerobot.datasets.compute_stats import aggregate_stats
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.io_utils import cast_stats_to_numpy, write_info, write_stats
from lerobot.datasets.utils import DEFAULT_VIDEO_PATH

from datasets_scripts.annotation.episode import Annotation
from datasets_scripts.columns import (
    depth_feature,
    depth_key,
    find_depth_key,
    find_image_key,
    picture_size,
    points_features,
    points_key,
    points_visible_key,
)
from datasets_scripts.inspection.dataset_card import write_card
from datasets_scripts.inspection.quality import find_flags
from datasets_scripts.storage.atomic import write_whole_file
from datasets_scripts.storage.dataset_copy import copy_dataset
from datasets_scripts.storage.dataset_folder import append_columns, video_sizes
from datasets_scripts.storage.episode_job import EpisodeJob
from datasets_scripts.storage.provenance import (
    encode_flags,
    read_provenance,
    write_provenance,
)
from datasets_scripts.storage.rows import DatasetRows
from datasets_scripts.storage.shards import read_array
from datasets_scripts.storage.video_writing import join_videos, lerobot_depth_encoder

__all__ = ["assemble"]


def assemble(
    root: Path,
    rows: DatasetRows,
    annotation: Annotation,
    job: EpisodeJob,
    facts: Mapping[int, dict],
    skipped: Sequence[dict],
) -> None:
    """Writes the annotated dataset.

    Args:
        root (`Path`): Folder to fill.
        rows (`DatasetRows`): The old dataset.
        annotation (`Annotation`): What is added.
        job (`EpisodeJob`): Where the shards are, by their episodes' numbers in the old dataset.
        facts (`Mapping[int, dict]`): Facts of the episodes to keep, by the same number, in order.
        skipped (`Sequence[dict]`): Episodes that could not be read: `episode`, `file` and `reason`.

    Raises:
        OSError: If the disk is full.
        ValueError: If a file of the old dataset is damaged; names it.
    """
    kept = list(facts)
    copy_dataset(rows, root, kept)

    def shard(episode: int) -> Path:
        return job.shard(kept[episode])

    if annotation.estimates_depth:
        add_depth(root, annotation, shard, list(facts.values()))
    _add_tracks(root, rows, annotation, shard)
    provenance = _provenance(rows, annotation, shard, facts)
    provenance["annotation"] = {
        "parameters": job.parameters,
        "versions": {name: version(name) for name in ("lerobot_policy_foresight", "lerobot")},
        "skipped": list(skipped),
        "other_sources": _sources(facts)[1:],  # versions differ where several machines worked
        "source_episode": [] if len(kept) == rows.n_episodes else kept,
        "video_bytes": video_sizes(root),
    }
    write_provenance(root, provenance)
    write_card(root)


def add_depth(
    root: Path, annotation: Annotation, shard: Callable[[int], Path], facts: Sequence[dict]
) -> None:
    """Adds the depth videos of all episodes to a dataset that has none for these cameras.

    Args:
        root (`Path`): Dataset folder that nobody reads yet.
        annotation (`Annotation`): Its cameras and farthest depth.
        shard (`Callable`): Folder of an episode.
        facts (`Sequence[dict]`): Of all episodes: `n_frames` and the `stats` of the new columns.
    """
    meta = LeRobotDatasetMetadata(root.name, root=root)
    meta.info.video_path = meta.info.video_path or DEFAULT_VIDEO_PATH  # none where all images are pictures
    columns: list[dict[str, Any]] = [{} for _ in facts]
    for camera in annotation.cameras:
        key = depth_key(camera)
        pictures = meta.features[find_image_key(meta.features, camera)]
        meta.info.features[key] = depth_feature(*picture_size(pictures))
        paths = [shard(episode) / f"{key}.mp4" for episode in range(len(facts))]
        places = join_videos(meta, key, paths, [known["n_frames"] for known in facts])
        meta.features[key]["info"]["depth_unit"] = "m"
        meta.update_video_info(key, lerobot_depth_encoder(annotation.depth_max_m))
        for column, place, known in zip(columns, places, facts, strict=True):
            column |= place | {f"stats/{key}/{name}": value for name, value in known["stats"][key].items()}
    _add_episode_columns(root, columns)
    stats = aggregate_stats([cast_stats_to_numpy(known["stats"]) for known in facts])
    # LeRobot's order is that of a set, another one in every process: the same dataset has the same bytes.
    write_stats(dict(sorted({**(meta.stats or {}), **stats}.items())), root)
    write_info(meta.info, root)


def _add_episode_columns(root: Path, columns: Sequence[dict[str, Any]]) -> None:
    """Adds columns to `meta/episodes`, given the values of each episode."""
    for path in sorted((root / "meta/episodes").glob("*/*.parquet")):
        table = pq.read_table(path)
        new = [columns[episode] for episode in table.column("episode_index").to_pylist()]
        names = list(new[0]) if new else []
        # LeRobot's remove_feature leaves these columns of what it removed.
        table = table.drop_columns([name for name in names if name in table.column_names])
        for name in names:
            table = table.append_column(name, pa.array([values[name] for values in new]))
        with write_whole_file(path) as temporary:
            pq.write_table(table, temporary, compression="snappy")


def _add_tracks(root: Path, rows: DatasetRows, annotation: Annotation, shard: Callable[[int], Path]) -> None:
    camera = annotation.cameras[0]
    height, width = picture_size(rows.features[find_image_key(rows.features, camera)])
    append_columns(
        root,
        points_features(camera, annotation.n_points, height, width),
        {
            points_key(camera): lambda episode: read_array(shard(episode), "points"),
            points_visible_key(camera): lambda episode: read_array(shard(episode), "visible"),
        },
    )


def _provenance(
    rows: DatasetRows, annotation: Annotation, shard: Callable[[int], Path], facts: Mapping[int, dict]
) -> dict[str, Any]:
    """What is known of the labels, beside what the old dataset has on record."""
    old = read_provenance(rows.root)
    cameras = dict(old.get("cameras", {}))
    sources = _sources(facts)[0]
    for camera in annotation.cameras:
        if annotation.estimates_depth:
            depth = {
                "source": annotation.to_dict()["depth"],
                "depth_max_m": annotation.depth_max_m,
            } | sources["depth"]
            cameras[camera] = cameras.get(camera, {}) | {"depth": depth}
        else:
            depth = {"source": "sensor", "column": find_depth_key(rows.features, camera)}
            cameras[camera] = {"depth": depth} | cameras.get(camera, {})
    first = annotation.cameras[0]
    cameras[first]["tracks"] = sources["tracks"] | {
        "source": annotation.tracks,
        "n_points": annotation.n_points,
        "moving_fraction": 0.25,
        "seed": annotation.seed,
    }
    episodes = {}
    for episode, (source, known) in enumerate(facts.items()):
        of_episode = dict(old.get("episodes", {}).get(str(source), {}))
        for camera, measured in known["cameras"].items():
            of_episode[camera] = of_episode.get(camera, {}) | measured
        of_episode[first]["moving"] = encode_flags(read_array(shard(episode), "moving"))
        episodes[str(episode)] = of_episode | {"flags": find_flags(of_episode)}
    kept = {name: value for name, value in old.items() if name not in ("version", "annotation")}
    return kept | {"cameras": cameras, "episodes": episodes}


def _sources(facts: Mapping[int, dict]) -> list[dict]:
    """What the labels were made with, each once."""
    found: list[dict] = []
    for known in facts.values():
        if known["sources"] not in found:
            found.append(known["sources"])
    return found
