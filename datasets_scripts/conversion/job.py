"""What the converters share: from a benchmark's own files to a LeRobot v3 dataset."""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import numpy as np

from datasets_scripts.columns import check_n_points
from datasets_scripts.command_line import count_cores
from datasets_scripts.simulation.exact_labels import describe_cameras, describe_tracks
from datasets_scripts.storage.dataset_folder import count_dataset, video_sizes
from datasets_scripts.storage.episode_job import EpisodeJob, EpisodeWork
from datasets_scripts.storage.provenance import write_provenance
from datasets_scripts.storage.shards import Layout, assemble_dataset, write_shard
from datasets_scripts.tracks.track_columns import append_tracks

__all__ = ["Archive", "Demonstration", "LabelOptions", "convert", "converter_parser", "print_summary"]


@dataclasses.dataclass(frozen=True)
class LabelOptions:
    """How labels are made from a simulator.

    Args:
        n_points (`int`): Tracked points per episode.
        seed (`int`): Of the choice of points.
        depth_max_m (`float`): Farthest depth kept.
    """

    n_points: int = 1250
    seed: int = 0
    depth_max_m: float = 4.0

    def __post_init__(self):
        check_n_points(self.n_points, "--n-points")


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """One episode.

    Args:
        instruction (`str`): The task in words.
        videos (`Mapping[str, np.ndarray]`): By column `(F, H, W, 3)` uint8 RGB, or `(F, H, W)` float32
            meters.
        columns (`Mapping[str, np.ndarray]`): Other columns, `(F, size)` float32.
        facts (`Mapping`): Its origin, for `meta/foresight.json`.
        tracks (`tuple`, *optional*): What `ExactLabels.make_tracks` gives.
    """

    instruction: str
    videos: Mapping[str, np.ndarray]
    columns: Mapping[str, np.ndarray]
    facts: Mapping
    tracks: tuple[Mapping[str, np.ndarray], Mapping] | None = None


class Archive(Protocol):
    """A benchmark's files, checked when opened. Workers get a copy, so it keeps no file open.

    Attributes:
        layout (`Layout`): Columns of the dataset.
        parameters (`dict`): What the result depends on, as JSON; equal ones give the same dataset.
        lengths (`Sequence[int]`): Frames of every episode.
        cameras (`dict`): Facts by camera for `meta/foresight.json`: depth, intrinsics.
        conventions (`dict`): Meaning of the values, in words.
        labels (`LabelOptions`, *optional*): If its demonstrations have exact tracks.
    """

    layout: Layout
    parameters: dict
    lengths: Sequence[int]
    cameras: dict
    conventions: dict
    labels: LabelOptions | None

    def read(self, episode: int) -> Demonstration:
        """Read an episode; a `ValueError` names the file at fault."""
        ...


def convert(archive: Archive, output: Path, workers: int = 1) -> dict[str, int]:
    """Make the dataset, resume an unfinished run of it, or check a finished one.

    Args:
        archive (`Archive`): What is converted.
        output (`Path`): Folder of the finished dataset.
        workers (`int`): Processes. The result does not depend on it, up to noise of the RGB videos.

    Returns:
        `dict`: `episodes`, `frames`, `tasks`, `bytes`.

    Raises:
        ValueError: If a file of the archive is damaged, or the output belongs to something else.
        RuntimeError: If a worker dies.
        OSError: If the disk is full; finished episodes are kept.
    """
    output = Path(output)
    job = EpisodeJob(output, "conversion", archive.parameters)
    if not job.is_finished:
        with job.claim():
            work = EpisodeWork(_convert_one, functools.partial(_start_worker, archive))
            job.make_shards(dict(enumerate(archive.lengths)), work, workers, "convert")
            facts = job.read_shards(range(len(archive.lengths)))
            job.write_dataset(lambda root: _assemble(root, archive, job.shard, list(facts.values())))
    job.read_finished()
    return count_dataset(output)


_archive: Archive | None = None


def _start_worker(archive: Archive) -> None:
    # Once per process and not per episode, as its list of files may be long.
    global _archive
    _archive = archive


def _convert_one(episode: int, shard: Path) -> dict:
    demonstration, layout = _archive.read(episode), _archive.layout
    arrays, facts = demonstration.tracks or ({}, {})
    facts = {**facts, "instruction": demonstration.instruction, "kept": dict(demonstration.facts)}
    arrays = {**demonstration.columns, **arrays}
    return write_shard(shard, demonstration.videos, arrays, facts, layout.fps, layout.depth_max_m)


def _assemble(root: Path, archive: Archive, shard_of: Callable[[int], Path], facts: Sequence[dict]) -> None:
    assemble_dataset(root, archive.layout, shard_of, facts)
    cameras, labels = archive.cameras, archive.labels
    episodes = {str(episode): known["kept"] for episode, known in enumerate(facts)}
    if labels is not None:
        cameras = describe_cameras(facts[0]["intrinsics"], labels.depth_max_m, labels.n_points, labels.seed)
        view, camera = next(iter(cameras.items()))
        size = (camera["intrinsics"]["height"], camera["intrinsics"]["width"])
        append_tracks(root, view, labels.n_points, size, shard_of)
        for episode, known in enumerate(facts):
            episodes[str(episode)][view] = describe_tracks(known, shard_of(episode))
    provenance = {
        "cameras": cameras,
        "episodes": episodes,
        "conversion": {
            "parameters": archive.parameters,
            "conventions": archive.conventions,
            "versions": {"lerobot": version("lerobot")},
            "video_bytes": video_sizes(root),
        },
    }
    write_provenance(root, provenance)


def converter_parser(description: str, example: str, source_help: str) -> argparse.ArgumentParser:
    """Command-line options of all converters."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"example:\n  {example}\nRun it again after an interruption to resume.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--source", type=Path, required=True, help=source_help)
    add("--output", type=Path, required=True, help="folder of the dataset to make")
    add("--limit", type=int, help="convert only this many episodes, for a try")
    add("--workers", type=int, default=count_cores(), help="processes (default: one per core)")
    return parser


def print_summary(output: Path, summary: Mapping[str, int]) -> None:
    """Print the counts that [`convert`] gives."""
    print(
        f"{output}: {summary['episodes']} episodes, {summary['frames']} frames, {summary['tasks']} "
        f"instructions, {summary['bytes'] / 1e6:.1f} MB"
    )
