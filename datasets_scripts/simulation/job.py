"""Simulated demonstrations with exact depth and exact 3D tracks, as a LeRobot v3 dataset."""

import functools
import json
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets_scripts.columns import points_features, points_key, points_visible_key
from datasets_scripts.simulation.metaworld import MetaWorldSim
from datasets_scripts.simulation.recording import Recording, record_shard
from datasets_scripts.storage.dataset_folder import append_columns, video_sizes
from datasets_scripts.storage.episode_job import EpisodeJob, EpisodeWork
from datasets_scripts.storage.provenance import encode_flags, write_provenance
from datasets_scripts.storage.shards import assemble_dataset, read_array

__all__ = ["simulate"]


def simulate(recording: Recording, output: Path, workers: int = 1) -> dict[str, float]:
    """Make the dataset, or resume or confirm it.

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
    job = EpisodeJob(Path(output), "simulation", recording.to_dict())
    started = recorded = time.monotonic()
    if not job.is_finished:
        with job.claim():
            _record(job, recording, workers)
            recorded = time.monotonic()
            facts = job.read_shards(range(recording.n_episodes))
            job.write_dataset(lambda root: _assemble(root, recording, job.shard, list(facts.values())))
    summary = _summary(output, recording, job.read_finished())
    return summary | {"record_s": recorded - started, "assemble_s": time.monotonic() - recorded}


def _record(job: EpisodeJob, recording: Recording, workers: int) -> None:
    """Record the episodes that are not done yet."""
    failures = 0

    def count_failures(facts: dict) -> dict[str, int]:
        nonlocal failures
        failures += facts["attempts"] - 1
        return {"failed_tries": failures}

    make = functools.partial(_record_one, recording)
    try:
        job.make_shards(
            dict.fromkeys(range(recording.n_episodes), 1),
            EpisodeWork(make, unit="episode", notes=count_failures),
            workers,
            "simulate",
        )
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
    """Write the dataset from shards: recorded columns, points, provenance."""
    assemble_dataset(root, recording.layout(), shard_of, facts)
    camera = recording.cameras[0]
    new = points_features(camera, recording.n_points, recording.image_size, recording.image_size)
    values = {
        points_key(camera): lambda episode: read_array(shard_of(episode), "points"),
        points_visible_key(camera): lambda episode: read_array(shard_of(episode), "visible"),
    }
    append_columns(root, new, values)
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
        tracks = {
            "n_points": known["n_points"],
            "n_moving": known["n_moving"],
            "moving": encode_flags(read_array(shard_of(episode), "moving")),
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


def _summary(output: Path, recording: Recording, provenance: dict) -> dict[str, float]:
    info = json.loads((output / "meta/info.json").read_text())
    attempts = sum(provenance["simulation"]["attempts"].values())
    return {
        "episodes": recording.n_episodes,
        "frames": info["total_frames"],
        "attempts": attempts,
        "failures": attempts - recording.n_episodes,
        "bytes": sum(path.stat().st_size for path in output.rglob("*") if path.is_file()),
    }
