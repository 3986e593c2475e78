"""Simulated demonstrations and episodes of a policy, with exact depth and tracks, as a LeRobot v3 dataset."""

import functools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from datasets_scripts.simulation.exact_labels import describe_cameras, describe_tracks
from datasets_scripts.simulation.recording import Recording, Simulator, record_shard, render_episode
from datasets_scripts.storage.atomic import write_whole_folder
from datasets_scripts.storage.dataset_folder import count_dataset, video_sizes
from datasets_scripts.storage.episode_job import EpisodeJob, EpisodeWork
from datasets_scripts.storage.provenance import write_provenance
from datasets_scripts.storage.shards import assemble_dataset, write_shard
from datasets_scripts.tracks.track_columns import append_tracks

__all__ = ["Rollout", "record_rollouts", "simulate"]


@dataclass(frozen=True)
class Rollout:
    """An episode that a policy has acted.

    Attributes:
        task, seed: Task of the simulator and start.
        actions (`np.ndarray`): `(F, A)` float32, as executed.
        outcome (`Mapping`): What is known of it, JSON: `success`, and where it failed, `failed_at`.
    """

    task: str
    seed: int
    actions: np.ndarray
    outcome: Mapping[str, Any]


def record_rollouts(
    recording: Recording, rollouts: Sequence[Rollout], output: str | Path, policy: Mapping[str, Any]
) -> None:
    """Replays a policy's episodes with all cameras and exact labels, and writes them as a dataset.

    Args:
        recording (`Recording`): Image size, stride, cameras and points; a dataset in `output` is replaced.
        rollouts (`Sequence[Rollout]`): At least one; the simulator repeats them exactly.
        output (`str` or `Path`): Folder of the dataset.
        policy (`Mapping`): Who acted, for the metadata.

    Raises:
        RuntimeError: If the simulator is missing or fails.
        OSError: If the disk is full.
    """
    layout, facts = recording.layout(), []
    with tempfile.TemporaryDirectory() as place:

        def shard_of(episode: int) -> Path:
            return Path(place) / f"{episode:06d}"

        try:
            for episode, rollout in enumerate(rollouts):
                sim = _open_simulator(recording, rollout.task)
                generator = np.random.default_rng((recording.seed, episode))
                videos, arrays, known = render_episode(
                    sim, recording, rollout.seed, rollout.actions, generator
                )
                known |= {"task": rollout.task, "instruction": sim.task_description, "seed": rollout.seed}
                known |= {"attempts": 1, "outcome": dict(rollout.outcome)}
                arrays |= {"action": rollout.actions}
                facts.append(
                    write_shard(shard_of(episode), videos, arrays, known, layout.fps, layout.depth_max_m)
                )
        finally:
            _close_simulator()
        with write_whole_folder(output, replace=True) as root:
            _assemble(root, recording, shard_of, facts, policy)


def simulate(recording: Recording, output: Path, workers: int = 1) -> dict[str, float]:
    """Make the dataset, resume an unfinished run of it, or check a finished one.

    Args:
        recording (`Recording`): What to record.
        output (`Path`): Folder of the finished dataset.
        workers (`int`): Processes. The result does not depend on it, up to the compression noise of the RGB
            videos (x264 is not always repeatable to the bit).

    Returns:
        `dict`: `episodes`, `frames`, `tasks`, `bytes`, `attempts`, `failures`, `record_s`, `assemble_s`.

    Raises:
        ValueError: If the output, or an unfinished run of it, belongs to other parameters or is damaged.
        RuntimeError: If the expert or the simulator fails.
        OSError: If the disk is full; finished episodes are kept.
    """
    output = Path(output)
    job = EpisodeJob(output, "simulation", recording.to_dict())
    started = recorded = time.monotonic()
    if not job.is_finished:
        with job.claim():
            _record_episodes(job, recording, workers)
            recorded = time.monotonic()
            facts = job.read_shards(range(recording.n_episodes))
            job.write_dataset(lambda root: _assemble(root, recording, job.shard, list(facts.values())))
    attempts = sum(job.read_finished()["simulation"]["attempts"].values())
    return count_dataset(output) | {
        "attempts": attempts,
        "failures": attempts - recording.n_episodes,
        "record_s": recorded - started,
        "assemble_s": time.monotonic() - recorded,
    }


def _record_episodes(job: EpisodeJob, recording: Recording, workers: int) -> None:
    """Record the episodes that are not done yet."""
    failures = 0

    def count_failures(facts: dict) -> dict[str, int]:
        nonlocal failures
        failures += facts["attempts"] - 1
        return {"failed_tries": failures}

    make = functools.partial(_record_one, recording)
    work = EpisodeWork(make, unit="episode", notes=count_failures)
    try:
        job.make_shards(dict.fromkeys(range(recording.n_episodes), 1), work, workers, "simulate")
    finally:
        _close_simulator()


_opened: tuple[Recording, str, Simulator] | None = None  # consecutive episodes of a task share it


def _open_simulator(recording: Recording, task: str) -> Simulator:
    global _opened
    if _opened is None or _opened[:2] != (recording, task):
        _close_simulator()
        _opened = (recording, task, recording.open_simulator(task))
    return _opened[2]


def _close_simulator() -> None:
    global _opened
    if _opened is not None:
        _opened[2].close()
    _opened = None


def _record_one(recording: Recording, episode: int, shard: Path) -> dict:
    return record_shard(_open_simulator(recording, recording.task_of(episode)), recording, episode, shard)


def _assemble(
    root: Path,
    recording: Recording,
    shard_of: Callable[[int], Path],
    facts: Sequence[dict],
    policy: Mapping[str, Any] | None = None,
) -> None:
    """Write the dataset from shards: recorded columns, points, provenance."""
    assemble_dataset(root, recording.layout(), shard_of, facts)
    append_tracks(root, recording.cameras[0], recording.n_points, (recording.image_size,) * 2, shard_of)
    provenance = _build_provenance(recording, facts, shard_of, root)
    if policy is not None:
        provenance["simulation"]["policy"] = dict(policy)
    write_provenance(root, provenance)


def _build_provenance(
    recording: Recording, facts: Sequence[dict], shard_of: Callable[[int], Path], root: Path
) -> dict[str, Any]:
    """Contents of `meta/foresight.json`."""
    episodes = {}
    attempts = dict.fromkeys(recording.tasks, 0)
    for episode, known in enumerate(facts):
        names = ("task", "seed", "attempts", "has_motion", "outcome")
        kept = {name: known[name] for name in names if name in known}
        tracks = describe_tracks(known, shard_of(episode))
        episodes[str(episode)] = {recording.cameras[0]: tracks, **kept}
        attempts[known["task"]] += known["attempts"]
    return {
        "cameras": describe_cameras(
            facts[0]["intrinsics"], recording.depth_max, recording.n_points, recording.seed
        ),
        "episodes": episodes,
        "simulation": {
            "parameters": recording.to_dict(),
            "attempts": attempts,
            "versions": {name: version(name) for name in recording.packages},
            "video_bytes": video_sizes(root),
        },
    }
