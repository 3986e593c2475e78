"""From a benchmark's own files to a LeRobot v3 dataset: what the converters share.

Episodes are converted side by side, each into a folder of `OUTPUT.partial/` that appears only when it is
whole; the dataset is put together beside them and renamed to OUTPUT at the very end. Running the same command
again continues what was interrupted and leaves a finished dataset alone.
"""

import argparse
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from datasets_scripts.columns import read_provenance, write_provenance
from datasets_scripts.storage.assemble import Layout, assemble_dataset, check_dataset, video_sizes
from datasets_scripts.storage.resumable import claim_folder, refuse_other, work_on_all
from datasets_scripts.storage.shards import read_facts, write_shard

__all__ = [
    "Archive",
    "Demonstration",
    "convert",
    "converter_parser",
    "image_feature",
    "report",
    "vector_feature",
]


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """One episode, as it goes into the dataset.

    Args:
        instruction (`str`): What is done.
        videos (`Mapping[str, np.ndarray]`): By column `(F, H, W, 3)` uint8 RGB, or `(F, H, W)` float32
            metres.
        columns (`Mapping[str, np.ndarray]`): Other columns, `(F, size)` float32.
        facts (`Mapping`): Where it came from, for `meta/foresight.json`.
    """

    instruction: str
    videos: Mapping[str, np.ndarray]
    columns: Mapping[str, np.ndarray]
    facts: Mapping


class Archive(Protocol):
    """Somebody else's files, checked when opened. It goes to worker processes, so it keeps no open file.

    Attributes:
        layout (`Layout`): Columns of the dataset.
        parameters (`dict`): What the result depends on, as JSON: two archives with equal ones give the same.
        lengths (`Sequence[int]`): Frames of every episode.
        cameras (`dict`): Facts by camera for `meta/foresight.json`: depth, intrinsics.
        conventions (`dict`): What was done to the values, in words.
    """

    layout: Layout
    parameters: dict
    lengths: Sequence[int]
    cameras: dict
    conventions: dict

    def read(self, episode: int) -> Demonstration:
        """Reads an episode; a `ValueError` names the file at fault."""
        ...


def convert(archive: Archive, output: Path, workers: int = 1) -> dict[str, int]:
    """Make the dataset, or continue or confirm it.

    Args:
        archive (`Archive`): What is converted.
        output (`Path`): Folder of the finished dataset.
        workers (`int`): Processes; with 1 everything happens in this one. The result does not depend on it,
            up to the compression noise of the RGB videos.

    Returns:
        `dict`: `episodes`, `frames`, `tasks`, `bytes`.

    Raises:
        ValueError: If a file of the archive is damaged, or the output belongs to something else.
        RuntimeError: If a worker dies.
        OSError: If the disk is full; what is finished is kept.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        return _confirm(output, archive)
    partial = output.with_name(output.name + ".partial")
    with claim_folder(partial, archive.parameters):
        _make(output, partial, archive, workers)
    return _confirm(output, archive)


def _make(output: Path, partial: Path, archive: Archive, workers: int) -> None:
    """Converts the episodes that are not done yet, then puts the dataset together."""

    def shard_of(episode: int) -> Path:
        return partial / "episodes" / f"{episode:06d}"

    lengths = archive.lengths
    missing = [episode for episode in range(len(lengths)) if read_facts(shard_of(episode)) is None]
    for episode in missing:
        shutil.rmtree(shard_of(episode), ignore_errors=True)
    done = sum(lengths) - sum(lengths[episode] for episode in missing)
    with tqdm(total=sum(lengths), initial=done, desc="convert", unit="frame") as bar:
        jobs = [(episode, shard_of(episode)) for episode in missing]
        for facts in work_on_all(_convert_one, jobs, workers, _start, (archive,)):
            bar.update(facts["n_frames"])
    facts = [read_facts(shard_of(episode)) for episode in range(len(lengths))]
    if None in facts:
        raise OSError(f"{facts.count(None)} episodes in {partial} are not whole; run the same command again")
    scratch = Path(tempfile.mkdtemp(prefix="dataset-", dir=partial))
    try:
        root = scratch / "dataset"
        assemble_dataset(root, archive.layout, shard_of, facts)
        write_provenance(root, _provenance(archive, facts, root))
        output.parent.mkdir(parents=True, exist_ok=True)
        os.replace(root, output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(partial, ignore_errors=True)


_archive: Archive | None = None


def _start(archive: Archive) -> None:
    """Hands the archive over once per process: its list of files may be long."""
    global _archive
    _archive = archive


def _convert_one(episode: int, shard: Path) -> dict:
    demonstration, layout = _archive.read(episode), _archive.layout
    facts = {"instruction": demonstration.instruction, "kept": dict(demonstration.facts)}
    return write_shard(
        shard, demonstration.videos, demonstration.columns, facts, layout.fps, layout.depth_max_m
    )


def _provenance(archive: Archive, facts: Sequence[dict], root: Path) -> dict:
    """Contents of `meta/foresight.json`."""
    return {
        "cameras": archive.cameras,
        "episodes": {str(episode): known["kept"] for episode, known in enumerate(facts)},
        "conversion": {
            "parameters": archive.parameters,
            "conventions": archive.conventions,
            "versions": {"lerobot": version("lerobot")},
            "video_bytes": video_sizes(root),
        },
    }


def _confirm(output: Path, archive: Archive) -> dict[str, int]:
    """Checks a finished dataset and leaves it alone."""
    provenance = read_provenance(output) if output.is_dir() else {}
    if "conversion" not in provenance:
        raise ValueError(f"{output} exists and was not made by this script; choose another --output")
    conversion = provenance["conversion"]
    refuse_other(conversion["parameters"], archive.parameters, f"a finished dataset in {output}", output)
    check_dataset(output, len(archive.lengths), conversion["video_bytes"])
    info = json.loads((output / "meta/info.json").read_text())
    return {
        "episodes": info["total_episodes"],
        "frames": info["total_frames"],
        "tasks": info["total_tasks"],
        "bytes": sum(path.stat().st_size for path in output.rglob("*") if path.is_file()),
    }


def image_feature(height: int, width: int) -> dict:
    """LeRobot feature of an RGB video; H.264 stores even sizes only."""
    if height % 2 or width % 2:
        raise ValueError(f"images are {width}x{height} px; video needs an even width and height")
    return {"dtype": "video", "shape": (height, width, 3), "names": ["height", "width", "channels"]}


def vector_feature(names: Sequence[str]) -> dict:
    """LeRobot feature of a float32 vector with named entries."""
    return {"dtype": "float32", "shape": (len(names),), "names": list(names)}


def converter_parser(description: str, example: str, source_help: str) -> argparse.ArgumentParser:
    """Command-line options that all converters have."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"example:\n  {example}\nRun it again after an interruption to continue.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--source", type=Path, required=True, help=source_help)
    add("--output", type=Path, required=True, help="folder of the dataset to make")
    add("--limit", type=int, help="convert the first so many episodes only, for a try")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    return parser


def report(output: Path, summary: Mapping[str, int]) -> None:
    """Prints what there is now."""
    print(
        f"{output}: {summary['episodes']} episodes, {summary['frames']} frames, {summary['tasks']} "
        f"instructions, {summary['bytes'] / 1e6:.1f} MB"
    )
