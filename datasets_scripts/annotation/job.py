"""Annotate a dataset in three steps that can be spread over processes and machines, and repeated.

`prepare` checks everything that can be checked before work, `make_shards` makes the labels of some episodes,
and `merge` puts the dataset together. Repeating a step leaves finished work unchanged.
"""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path

from datasets_scripts.annotation.episode import LabelMaker, annotate_shard, check_readable, read_current_facts
from datasets_scripts.annotation.merging import assemble
from datasets_scripts.annotation.settings import Annotation
from datasets_scripts.columns import find_depth_key, find_image_key
from datasets_scripts.storage.dataset_copy import list_copied_files
from datasets_scripts.storage.dataset_folder import data_files, load_info
from datasets_scripts.storage.dataset_rows import RESTORE, BrokenEpisodeError, DatasetRows, parse_episodes
from datasets_scripts.storage.episode_job import EpisodeJob, EpisodeWork, check_limit
from datasets_scripts.storage.provenance import flagged_episodes
from datasets_scripts.storage.videos.frame_decoding import FrameDecoder

__all__ = ["AnnotationJob", "annotate", "check", "make_shards", "merge", "open_job", "prepare"]


@dataclasses.dataclass(frozen=True)
class AnnotationJob:
    """An annotation as plain values, which can be sent to another machine.

    Args:
        dataset (`str`): Folder, or Hub id.
        output (`Path`): Folder of the annotated dataset.
        annotation (`Annotation`): What to add.
        episodes (`str`, *optional*): Episodes such as `0:100,205` (default: all).
        limit (`int`, *optional*): Most episodes.
        skip_broken (`bool`): Whether to leave out, and record, episodes that cannot be read.
        device (`str`): Device of learned sources: `"cuda"`, `"cuda:1"`, `"cpu"`, or `"auto"`.
        batch_size (`int`, *optional*): Frames per batch of depth models that take single frames.
        linked_videos (`Path`, *optional*): Folder into which videos of the dataset may be links; no other
            link may lead out of the dataset.
    """

    dataset: str
    output: Path
    annotation: Annotation
    episodes: str | None = None
    limit: int | None = None
    skip_broken: bool = False
    device: str = "auto"
    batch_size: int | None = None
    linked_videos: Path | None = None


def annotate(job: AnnotationJob, workers: int = 1) -> dict:
    """Do all three steps, and return the summary ([`OpenJob.confirm`]).

    Args:
        job (`AnnotationJob`): The annotation; no other run may work on the same output.
        workers (`int`): Processes; with 1 everything happens in this one. The result does not depend on it.

    Raises:
        ValueError: If the dataset cannot be annotated this way, a file is damaged, or the output belongs to
            other parameters.
        RuntimeError: If a worker dies.
        OSError: If the disk is full; what is finished is kept.
    """
    work = open_job(job)
    if not work.shards.is_finished:
        work.check()
        with work.shards.claim():
            work.make_shards(work.episodes, workers)
            work.merge()
    return work.confirm()


def check(job: AnnotationJob) -> "OpenJob":
    """Check everything that can be checked before work; writes nothing. Raises as `annotate`."""
    work = open_job(job)
    if work.shards.is_finished:
        work.confirm()
    else:
        work.check()
    return work


def prepare(job: AnnotationJob) -> None:
    """Check, and make the folder of unfinished work. Raises as `annotate`."""
    work = check(job)
    if not work.shards.is_finished:
        work.shards.open()


def make_shards(job: AnnotationJob, rank: int = 0, world_size: int = 1, workers: int = 1) -> None:
    """Make the missing labels of one share of the episodes, a run of neighbors. Raises as `annotate`.

    Other ranks, also on other machines, may work on the other shares meanwhile.
    """
    work = open_job(job)
    if not work.shards.is_finished:
        bounds = [len(work.episodes) * share // world_size for share in (rank, rank + 1)]
        with work.shards.join(rank):
            work.make_shards(work.episodes[slice(*bounds)], workers, f"share {rank + 1} of {world_size}")


def merge(job: AnnotationJob) -> dict:
    """Put the dataset together from the shards of all ranks; returns and raises as `annotate`."""
    work = open_job(job)
    if not work.shards.is_finished:
        work.shards.open()
        with work.shards.lock():
            if not work.shards.is_finished:
                work.merge()
    return work.confirm()


@dataclasses.dataclass(frozen=True)
class OpenJob:
    """A job on its opened dataset."""

    job: AnnotationJob
    rows: DatasetRows
    episodes: list[int]  # the wanted ones
    shards: EpisodeJob  # by the episodes' numbers in the old dataset

    def check(self) -> list[int]:
        """Check the job before hours of work; returns the episodes that can be read, as far as known."""
        list_copied_files(self.rows, self.episodes, self.job.linked_videos)  # links out of it are refused
        readable = []
        for episode in self.episodes:
            try:
                check_readable(self.rows, episode, self.job.annotation.estimates_depth)
                readable.append(episode)
            except BrokenEpisodeError as error:
                if not self.job.skip_broken:
                    raise _suggest_skipping(error) from error
        if not readable:
            raise ValueError(f"no episode of dataset {self.rows.name} can be read; {RESTORE}")
        try:
            self.job.annotation.check(self.rows, readable, self.job.skip_broken)
        except BrokenEpisodeError as error:
            raise _suggest_skipping(error) from error
        return readable

    def make_shards(self, episodes: list[int], workers: int, label: str | None = None) -> None:
        """Make the shards that are missing among `episodes`."""
        lengths = (self.rows.episode_stops - self.rows.episode_starts)[episodes].tolist()
        start = functools.partial(_start_worker, self.job, self.rows)
        work = EpisodeWork(_annotate_one, start, self._read)
        try:
            self.shards.make_shards(dict(zip(episodes, lengths, strict=True)), work, workers, label)
        except BrokenEpisodeError as error:
            raise _suggest_skipping(error) from error

    def merge(self) -> None:
        """Put the dataset together from the shards."""
        facts = self.shards.read_shards(self.episodes, self._read)
        skipped = [{"episode": e, **known["broken"]} for e, known in facts.items() if "broken" in known]
        facts = {episode: known for episode, known in facts.items() if "broken" not in known}
        if not facts:
            raise ValueError(f"no episode of dataset {self.rows.name} can be read: {skipped[0]['reason']}")
        self.rows.fetch_videos(list(facts))
        parts = self.rows, self.job.annotation, self.shards, facts, skipped, self.job.linked_videos
        self.shards.write_dataset(lambda root: assemble(root, *parts))

    def confirm(self) -> dict:
        """Check a finished dataset.

        Returns:
            `dict`: `episodes`, `frames`, `moving` (share of points), `still_episodes` (without motion),
            `flagged` (episodes with a flag), `skipped` (episodes of the old dataset that cannot be read).

        Raises:
            ValueError: If it is damaged, has other parameters, or was not made by this script.
        """
        provenance = self.shards.read_finished()
        camera = self.job.annotation.cameras[0]
        episodes = provenance["episodes"]
        facts = [episodes[str(episode)][camera] for episode in range(len(episodes))]
        return {
            "episodes": len(facts),
            "frames": load_info(self.job.output)["total_frames"],
            "moving": sum(f["n_moving"] for f in facts) / max(1, sum(f["n_points"] for f in facts)),
            "still_episodes": [e for e, known in enumerate(facts) if not known["has_motion"]],
            "flagged": list(flagged_episodes(provenance)),
            "skipped": provenance["annotation"]["skipped"],
        }

    def _read(self, shard: Path) -> dict | None:
        """Facts of a finished episode; `None` if it has to be made."""
        return read_current_facts(self.rows, shard, self.job.skip_broken)


def open_job(job: AnnotationJob) -> OpenJob:
    """Open the dataset of a job; raises a `ValueError` if the job does not fit it."""
    rows = DatasetRows(job.dataset, stream=True)
    if job.output.resolve().is_relative_to(rows.root.resolve()):
        raise ValueError(f"--output {job.output} lies inside the dataset {rows.name}; choose another folder")
    check_limit(job.limit)
    if not rows.n_episodes:
        raise ValueError(f"dataset {rows.name} has no episodes")
    episodes = parse_episodes(":" if job.episodes is None else job.episodes, rows.n_episodes)[: job.limit]
    # The revision is a separate parameter, not part of the name: an unfinished run whose branch has moved
    # continues when its commit is named.
    is_folder = Path(job.dataset).expanduser().is_dir()
    parameters = job.annotation.to_dict() | {
        "episodes": None if len(episodes) == rows.n_episodes else episodes,
        "dataset": rows.root.name if is_folder else job.dataset.partition("@")[0],
        "source_sha256": _hash_source(rows, job.annotation),
    }
    if rows.hub is not None:
        parameters["revision"] = rows.hub.revision
    return OpenJob(job, rows, episodes, EpisodeJob(job.output, "annotation", parameters))


def _suggest_skipping(error: BrokenEpisodeError) -> ValueError:
    return ValueError(f"{error}; or leave such episodes out with --skip-broken")


_job: tuple[AnnotationJob, DatasetRows] | None = None


def _start_worker(job: AnnotationJob, rows: DatasetRows) -> None:
    """Store the job of this process."""
    global _job
    import cv2

    cv2.setNumThreads(1)  # episodes run in parallel
    _job = (job, rows)
    _load_label_maker.cache_clear()


@functools.cache
def _load_label_maker() -> LabelMaker:
    """The sources, loaded for the first episode of a process, where their errors are reported."""
    job, rows = _job
    return LabelMaker(rows, job.annotation, job.device, job.batch_size)


def _annotate_one(episode: int, shard: Path) -> dict:
    return annotate_shard(_load_label_maker(), episode, shard, _job[0].skip_broken)


def _hash_source(rows: DatasetRows, annotation: Annotation) -> str:
    """Hash of the data files' sizes, and of all that decides which frames and meters are read.

    The videos are recorded in each shard instead, so that repairing or downloading one later does not discard
    the work on the others.
    """
    sizes = [(path.relative_to(rows.root).as_posix(), path.stat().st_size) for path in data_files(rows.root)]
    find = (find_image_key,) if annotation.estimates_depth else (find_image_key, find_depth_key)
    keys = [key for camera in annotation.cameras for one in find if (key := one(rows.features, camera))]
    read = [FrameDecoder(rows, key).describe_reading() for key in keys]
    return hashlib.sha256(json.dumps([sizes, rows.fps, read]).encode()).hexdigest()[:16]
