"""Simulate MetaWorld demonstrations with exact depth and exact 3D tracks, as a LeRobot v3 dataset.

Episodes are recorded side by side in worker processes, each into a folder of `OUTPUT.partial/` that appears
only when it is whole; the dataset is assembled beside them and renamed to OUTPUT at the very end. Running the
same command again continues what was interrupted and leaves a finished dataset alone.
"""

import argparse
import contextlib
import functools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from datasets_scripts.columns import (
    append_columns,
    encode_flags,
    points_features,
    read_provenance,
    write_provenance,
)
from datasets_scripts.simulation.metaworld import QUALITIES, MetaWorldSim, check_cameras, resolve_tasks
from datasets_scripts.simulation.recording import Recording, point_values, record_shard
from datasets_scripts.storage.assemble import assemble_dataset, check_dataset, video_sizes
from datasets_scripts.storage.resumable import claim_folder, refuse_other, resumable_command, work_on_all
from datasets_scripts.storage.shards import ARRAYS, read_facts


def simulate(recording: Recording, output: Path, workers: int = 1) -> dict[str, float]:
    """Make the dataset, or continue or confirm it.

    Args:
        recording (`Recording`): What to record.
        output (`Path`): Folder of the finished dataset.
        workers (`int`): Processes; with 1 everything happens in this one. The result does not depend on it,
            up to the compression noise of the RGB videos (x264 is not always repeatable to the bit).

    Returns:
        `dict`: `episodes`, `frames`, `attempts`, `failures`, `record_s`, `assemble_s`, `bytes`.

    Raises:
        ValueError: If the output, or an unfinished run of it, belongs to other parameters or is damaged.
        RuntimeError: If the expert or the simulator fails.
        OSError: If the disk is full; what is finished is kept.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        return _confirm(output, recording)
    partial = output.with_name(output.name + ".partial")
    with claim_folder(partial, recording.to_dict()):
        return _make(output, partial, recording, workers)


def _make(output: Path, partial: Path, recording: Recording, workers: int) -> dict[str, float]:
    """Records the episodes that are not done yet, then puts the dataset together."""
    started = time.monotonic()

    def shard_of(episode: int) -> Path:
        return partial / "episodes" / f"{episode:06d}"

    missing = []
    for episode in range(recording.n_episodes):
        if read_facts(shard_of(episode)) is None:
            shutil.rmtree(shard_of(episode), ignore_errors=True)
            missing.append(episode)
    failures = 0
    with tqdm(
        total=recording.n_episodes,
        initial=recording.n_episodes - len(missing),
        desc="simulate",
        unit="episode",
    ) as bar:
        for facts in _record_all(recording, [(episode, shard_of(episode)) for episode in missing], workers):
            failures += facts["attempts"] - 1
            bar.set_postfix(failed_tries=failures, refresh=False)
            bar.update()
    recorded = time.monotonic()
    facts = [read_facts(shard_of(episode)) for episode in range(recording.n_episodes)]
    whole = [known for known in facts if known is not None]
    if len(whole) != len(facts):
        raise OSError(
            f"{len(facts) - len(whole)} episodes in {partial} are not whole; run the same command again"
        )
    scratch = Path(tempfile.mkdtemp(prefix="dataset-", dir=partial))
    try:
        _assemble(scratch / "dataset", recording, shard_of, whole)
        output.parent.mkdir(parents=True, exist_ok=True)
        os.replace(scratch / "dataset", output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(partial, ignore_errors=True)
    summary = _summary(output, recording)
    return summary | {"record_s": recorded - started, "assemble_s": time.monotonic() - recorded}


def _record_all(recording: Recording, jobs: list[tuple[int, Path]], workers: int) -> Iterator[dict]:
    """Record episodes and yield their facts as they finish."""
    try:
        yield from work_on_all(functools.partial(_record_one, recording), jobs, workers)
    finally:
        _close_simulator()


_open_simulators: dict[tuple, MetaWorldSim] = {}


def _record_one(recording: Recording, episode: int, shard: Path) -> dict:
    """Record one episode in this process, with the simulator of the last episode if the task is the same."""
    key = (recording.task_of(episode), recording.cameras, recording.image_size, recording.quality)
    if key not in _open_simulators:
        _close_simulator()
        task, cameras, size, quality = key
        _open_simulators[key] = MetaWorldSim(task, cameras, size, quality)
    return record_shard(_open_simulators[key], recording, episode, shard)


def _close_simulator() -> None:
    while _open_simulators:
        _open_simulators.popitem()[1].close()


def _assemble(
    root: Path, recording: Recording, shard_of: Callable[[int], Path], facts: Sequence[dict]
) -> None:
    """Writes the dataset from shards: recorded columns, points, provenance."""
    assemble_dataset(root, recording.layout(), shard_of, facts)
    flow_camera = recording.cameras[0]
    new = points_features(flow_camera, recording.n_points, recording.image_size, recording.image_size)
    append_columns(root, new, point_values(shard_of, flow_camera))
    write_provenance(root, _provenance(recording, facts, shard_of, root))


def _provenance(
    recording: Recording, facts: Sequence[dict], shard_of: Callable[[int], Path], root: Path
) -> dict[str, Any]:
    """Contents of `meta/foresight.json` for a simulated dataset."""
    flow_camera = recording.cameras[0]
    cameras: dict[str, dict] = {}
    for camera in recording.cameras:
        cameras[camera] = {
            "depth": {"source": "mujoco depth buffer, exact", "depth_max_m": recording.depth_max},
            "intrinsics": facts[0]["intrinsics"][camera],
        }
    cameras[flow_camera]["tracks"] = {
        "source": "mujoco rigid bodies, exact",
        "n_points": recording.n_points,
        "moving_fraction": 0.25,
        "seed": recording.seed,
    }
    episodes = {}
    for episode, known in enumerate(facts):
        with np.load(shard_of(episode) / ARRAYS) as arrays:
            moving = arrays["moving"]
        tracks = {
            "n_points": known["n_points"],
            "n_moving": known["n_moving"],
            "moving": encode_flags(moving),
        }
        episodes[str(episode)] = {
            flow_camera: tracks,
            **{name: known[name] for name in ("task", "seed", "attempts", "has_motion")},
        }
    attempts = dict.fromkeys(recording.tasks, 0)
    for known in facts:
        attempts[known["task"]] += known["attempts"]
    return {
        "cameras": cameras,
        "episodes": episodes,
        "simulation": {
            "parameters": recording.to_dict(),
            "attempts": attempts,
            "versions": {name: version(name) for name in ("metaworld", "mujoco", "lerobot")},
            "video_bytes": video_sizes(root),
        },
    }


def _confirm(output: Path, recording: Recording) -> dict[str, float]:
    """Check a finished dataset and leave it alone."""
    provenance = read_provenance(output)
    if "simulation" not in provenance:
        raise ValueError(f"{output} exists and was not made by this script; choose another --output")
    earlier = provenance["simulation"]["parameters"]
    refuse_other(earlier, recording.to_dict(), f"a finished dataset in {output}", output)
    check_dataset(output, recording.n_episodes, provenance["simulation"]["video_bytes"])
    return _summary(output, recording) | {"record_s": 0.0, "assemble_s": 0.0}


def _summary(output: Path, recording: Recording) -> dict[str, float]:
    info = json.loads((output / "meta/info.json").read_text())
    attempts = sum(read_provenance(output)["simulation"]["attempts"].values())
    return {
        "episodes": recording.n_episodes,
        "frames": info["total_frames"],
        "attempts": attempts,
        "failures": attempts - recording.n_episodes,
        "bytes": sum(path.stat().st_size for path in output.rglob("*") if path.is_file()),
    }


def build_parser() -> argparse.ArgumentParser:
    """Command-line options."""
    parser = argparse.ArgumentParser(
        description="Simulate MetaWorld demonstrations with depth and 3D tracks as a LeRobot v3 dataset.",
        epilog="example:\n  python datasets_scripts/simulate.py --tasks drawer-open-v3 --episodes 50 "
        "--output outputs/drawer\nRun it again after an interruption to continue.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Recording(tasks=("drawer-open-v3",))
    add = parser.add_argument
    add(
        "--tasks", required=True, help="tasks or groups, comma-separated: drawer-open-v3,easy,medium,hard,all"
    )
    add("--episodes", type=int, default=default.episodes, help="episodes per task (default: %(default)s)")
    add("--output", type=Path, required=True, help="folder of the dataset to make")
    add("--image-size", type=int, default=default.image_size, help="side of the images in px (%(default)s)")
    add(
        "--stride",
        type=int,
        default=default.stride,
        help="80 Hz steps per stored frame (%(default)s: 20 fps)",
    )
    add("--seed", type=int, default=default.seed, help="seed of starts, noise and points (%(default)s)")
    add("--noise", type=float, default=default.noise, help="noise on the expert's actions (%(default)s)")
    add(
        "--detour",
        type=int,
        default=default.detour,
        help="frames at the start, at most, of a random motion instead of the expert's (%(default)s)",
    )
    add("--n-points", type=int, default=default.n_points, help="tracked points per episode (%(default)s)")
    add("--cameras", default=",".join(default.cameras), help="the first one gets the tracks (%(default)s)")
    add(
        "--depth-max", type=float, default=default.depth_max, help="farthest depth kept, metres (%(default)s)"
    )
    add(
        "--max-steps",
        type=int,
        default=default.max_steps,
        help="80 Hz steps the expert may take (%(default)s)",
    )
    add("--retries", type=int, default=default.retries, help="new starts after a failure (%(default)s)")
    add("--quality", choices=QUALITIES, default=default.quality, help="rendering (%(default)s)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    return parser


@resumable_command
def main(argv: list[str] | None = None) -> None:
    """Entry point; returns the exit code."""
    args = build_parser().parse_args(argv)
    recording = Recording(
        tasks=tuple(resolve_tasks(args.tasks)),
        episodes=args.episodes,
        image_size=args.image_size,
        stride=args.stride,
        seed=args.seed,
        noise=args.noise,
        detour=args.detour,
        n_points=args.n_points,
        cameras=tuple(check_cameras([name.strip() for name in args.cameras.split(",") if name.strip()])),
        depth_max=args.depth_max,
        max_steps=args.max_steps,
        retries=args.retries,
        quality=args.quality,
    )
    summary = simulate(recording, args.output, args.workers)
    with contextlib.suppress(BrokenPipeError):
        print(
            f"{args.output}: {summary['episodes']} episodes, {summary['frames']} frames, "
            f"{summary['bytes'] / 1e6:.1f} MB; "
            f"{summary['failures']} of {summary['attempts']} tries failed and were left out; "
            f"recording {summary['record_s']:.0f} s, assembling {summary['assemble_s']:.0f} s"
        )


if __name__ == "__main__":
    sys.exit(main())
