"""Add 3D tracks to a LeRobot v3 dataset that was recorded with a depth camera; no weights, no GPU.

Episodes are worked on side by side, each into a folder of `OUTPUT.partial/` that appears only when it is
whole; the dataset is put together beside them and renamed to OUTPUT at the very end. Running the same command
again continues what was interrupted and leaves a finished dataset alone. Videos are shared with the old
dataset by hard link, never encoded again; whoever re-encodes them in place may change those of both.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets_scripts.annotate_episode import (
    ARRAYS,
    DEPTHS,
    TRACKS,
    Annotation,
    annotate_shard,
    dataset_cameras,
    read_facts,
)
from datasets_scripts.columns import (
    append_columns,
    data_files,
    dataset_files,
    encode_flags,
    find_depth_key,
    image_key,
    picture_size,
    points_features,
    points_key,
    points_visible_key,
    read_provenance,
    share_file,
    write_provenance,
)
from datasets_scripts.dataset_rows import DatasetRows
from datasets_scripts.resumable import claim_folder, refuse_other, resumable_command, work_on_all


def annotate(dataset: str, output: Path, annotation: Annotation, workers: int = 1) -> dict:
    """Make the annotated dataset, or continue or confirm it.

    Args:
        dataset (`str`): Folder, or Hub id (downloaded by LeRobot).
        output (`Path`): Folder of the annotated dataset.
        annotation (`Annotation`): What to add.
        workers (`int`): Processes; with 1 everything happens in this one. The result does not depend on it.

    Returns:
        `dict`: `episodes`, `frames`, `moving` (share of points), `still_episodes` (without motion).

    Raises:
        ValueError: If the dataset cannot be annotated so, or the output belongs to other parameters.
        RuntimeError: If a worker dies.
        OSError: If the disk is full; what is finished is kept.
    """
    rows = DatasetRows(dataset)
    parameters = annotation.to_dict() | {"dataset": rows.root.name, "source_sha256": _fingerprint(rows)}
    if output.exists():
        return _confirm(output, parameters)
    annotation.check(rows)
    partial = output.with_name(output.name + ".partial")
    with claim_folder(partial, parameters):
        _make(output, partial, rows, annotation, parameters, workers)
    return _confirm(output, parameters)


def _make(
    output: Path, partial: Path, rows: DatasetRows, annotation: Annotation, parameters: dict, workers: int
) -> None:
    """Works on the episodes that are not done yet, then puts the dataset together."""

    def shard_of(episode: int) -> Path:
        return partial / "episodes" / f"{episode:06d}"

    (partial / "episodes").mkdir(exist_ok=True)
    missing = [episode for episode in range(rows.n_episodes) if read_facts(shard_of(episode)) is None]
    for episode in missing:
        shutil.rmtree(shard_of(episode), ignore_errors=True)
    lengths = rows.episode_stops - rows.episode_starts
    with tqdm(total=len(rows), initial=len(rows) - int(lengths[missing].sum()), unit="frame") as bar:
        jobs = [(annotation, episode, shard_of(episode)) for episode in missing]
        for facts in work_on_all(_annotate_one, jobs, workers, _start, (rows,)):
            bar.update(facts["n_frames"])
    facts = [read_facts(shard_of(episode)) for episode in range(rows.n_episodes)]
    scratch = Path(tempfile.mkdtemp(prefix="dataset-", dir=partial))
    try:
        _assemble(scratch / "dataset", rows, annotation, parameters, shard_of, facts)
        os.replace(scratch / "dataset", output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(partial, ignore_errors=True)


_rows: DatasetRows | None = None


def _start(rows: DatasetRows) -> None:
    """Opens the dataset once per process."""
    global _rows
    import cv2

    cv2.setNumThreads(1)  # episodes run side by side
    _rows = rows


def _annotate_one(annotation: Annotation, episode: int, shard: Path) -> dict:
    return annotate_shard(_rows, annotation, episode, shard)


def _assemble(root: Path, rows: DatasetRows, annotation: Annotation, parameters, shard_of, facts) -> None:
    """The old dataset with the new columns."""
    for place in dataset_files(rows.root):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        share = share_file if place.parts[0] == "videos" else shutil.copyfile
        share(rows.root / place, root / place)
    camera = annotation.cameras[0]
    height, width = picture_size(rows.features[image_key(camera)])

    def values(name: str):
        def read(episode: int) -> np.ndarray:
            with np.load(shard_of(episode) / ARRAYS) as arrays:
                return arrays[name]

        return read

    append_columns(
        root,
        points_features(camera, annotation.n_points, height, width),
        {points_key(camera): values("points"), points_visible_key(camera): values("visible")},
    )
    provenance = read_provenance(rows.root)
    cameras, episodes = provenance.get("cameras", {}), provenance.get("episodes", {})
    for name in annotation.cameras:
        column = find_depth_key(rows.features, name)
        cameras[name] = {"depth": {"source": "sensor", "column": column}} | cameras.get(name, {})
    cameras[camera]["tracks"] = {
        "source": annotation.tracks,
        "n_points": annotation.n_points,
        "moving_fraction": 0.25,
        "seed": annotation.seed,
    }
    for episode, known in enumerate(facts):
        moving = {"moving": encode_flags(values("moving")(episode))}
        kept = {key: known[key] for key in ("n_points", "n_moving", "has_motion", "visible_share")}
        episodes[str(episode)] = episodes.get(str(episode), {}) | {camera: kept | moving}
    write_provenance(
        root,
        {k: v for k, v in provenance.items() if k != "version"}
        | {"cameras": cameras, "episodes": episodes, "annotation": {"parameters": parameters}},
    )


def _fingerprint(rows: DatasetRows) -> str:
    """Of the dataset that is annotated: sizes of its files and bounds of its episodes."""
    videos = [place for place in dataset_files(rows.root) if place.suffix == ".mp4"]
    files = [*(path.relative_to(rows.root) for path in data_files(rows.root)), *videos]
    sizes = [(place.as_posix(), (rows.root / place).stat().st_size) for place in files]
    return hashlib.sha256(json.dumps([sizes, rows.episode_starts.tolist()]).encode()).hexdigest()[:16]


def _confirm(output: Path, parameters: dict) -> dict:
    """Check a finished dataset and leave it alone."""
    provenance = read_provenance(output) if output.is_dir() else {}
    if "annotation" not in provenance:
        raise ValueError(f"{output} exists and was not made by this script; choose another --output")
    earlier = provenance["annotation"]["parameters"]
    refuse_other(earlier, parameters, f"a finished dataset in {output}", output)
    rows = DatasetRows(output)  # complains about what is missing or damaged
    for key in rows.meta.video_keys:
        rows.video_segments(key)
    facts = [provenance["episodes"][str(e)][parameters["cameras"][0]] for e in range(rows.n_episodes)]
    points = sum(known["n_points"] for known in facts)
    return {
        "episodes": rows.n_episodes,
        "frames": len(rows),
        "moving": sum(known["n_moving"] for known in facts) / max(1, points),
        "still_episodes": [e for e, known in enumerate(facts) if not known["has_motion"]],
    }


def build_parser() -> argparse.ArgumentParser:
    """Command-line options."""
    parser = argparse.ArgumentParser(
        description="Add 3D tracks to a LeRobot v3 dataset that has depth.",
        epilog="example:\n  python datasets_scripts/annotate.py --dataset YOU/DATASET "
        "--output outputs/annotated\nRun it again after an interruption to continue.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--dataset", required=True, help="folder or Hub id of a LeRobot v3 dataset")
    add("--output", type=Path, required=True, help="folder of the dataset to make")
    add(
        "--cameras",
        help="comma-separated, the first one gets the tracks (default: all with depth)",
    )
    add("--depth", choices=DEPTHS, default="sensor", help="a depth column of the dataset (%(default)s)")
    add("--tracks", choices=TRACKS, default="lucas-kanade", help="tracker (%(default)s)")
    add("--n-points", type=int, default=1250, help="most points per episode (%(default)s)")
    add("--seed", type=int, default=0, help="seed of the choice of points (%(default)s)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    return parser


@resumable_command
def main(argv: list[str] | None = None) -> None:
    """Entry point; returns the exit code."""
    args = build_parser().parse_args(argv)
    features = DatasetRows(args.dataset).features
    cameras = [name.strip() for name in (args.cameras or "").split(",") if name.strip()]
    cameras = cameras or [name for name in dataset_cameras(features) if find_depth_key(features, name)]
    if not cameras:
        known = ", ".join(dataset_cameras(features)) or "no camera"
        raise ValueError(f"no camera of {args.dataset} has depth ({known}): record it with a depth camera")
    annotation = Annotation(tuple(cameras), args.depth, args.tracks, args.n_points, args.seed)
    summary = annotate(args.dataset, args.output, annotation, args.workers)
    still = summary["still_episodes"]
    print(
        f"{args.output}: {summary['episodes']} episodes, {summary['frames']} frames, tracks of camera "
        f"{cameras[0]}, {summary['moving']:.0%} of the points moving"
        + (f"; nothing moves in episodes {still[:10]}" if still else "")
    )


if __name__ == "__main__":
    sys.exit(main())
