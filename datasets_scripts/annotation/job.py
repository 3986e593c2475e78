"""Annotating a dataset as three steps that can be spread over processes and machines, and run again.

`prepare` checks what can be checked before any work, `make_shards` makes the labels of some episodes, and
`merge` puts the dataset together. Each step may be run again at any time: what is done is left unchanged.
"""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path

from datasets_scripts.annotation.episode import (
    Annotation,
    LabelMaker,
    annotate_shard,
    check_readable,
    current_facts,
)
from datasets_scripts.annotation.merging import assemble
from datasets_scripts.storage.dataset_folder import data_files, load_info
from datasets_scripts.storage.episode_job import EpisodeJob, EpisodeWork
from datasets_scripts.storage.provenance import flagged_episodes
from datasets_scripts.storage.rows import RESTORE, BrokenEpisodeError, DatasetRows, parse_episodes

__all__ = ["AnnotationJob", "annotate", "check", "confirm", "make_shards", "merge", "open_job", "prepare"]


@dataclasses.dataclass(frozen=True)
class AnnotationJob:
    """What is to be done; plain values, so that it can be sent to another machine.

    Args:
        dataset (`str`): Folder, or Hub id.
        output (`Path`): Folder of the annotated dataset.
        annotation (`Annotation`): What to add.
        episodes (`str`, *optional*): Which episodes, such as `0:100,205`; all by default.
        limit (`int`, *optional*): At most so many of them.
        skip_broken (`bool`): Leave out episodes that cannot be read, and record them.
        device (`str`): Of learned sources: `"cuda"`, `"cuda:1"`, `"cpu"`, or `"auto"`.
        batch_size (`int`, *optional*): Frames at once, for sources that work frame by frame.
    """

    dataset: str
    output: Path
    annotation: Annotation
    episodes: str | None = None
    limit: int | None = None
    skip_broken: bool = False
    device: str = "auto"
    batch_size: int | None = None


def annotate(job: AnnotationJob, workers: int = 1) -> dict:
    """All three steps; no other run may be at work on the same output.

    Args:
        job (`AnnotationJob`): What to do.
        workers (`int`): Processes; with 1 everything happens in this one. The result does not depend on it.

    Returns:
        `dict`: As [`merge`].

    Raises:
        ValueError: If the dataset cannot be annotated so, a file is damaged, or the output belongs to other
            parameters.
        RuntimeError: If a worker dies.
        OSError: If the disk is full; what is finished is kept.
    """
    work = open_job(job)
    if not work.shards.is_finished:
        work.check()
        with work.shards.claim():
            _make(work, work.episodes, workers)
            _merge(work)
    return confirm(work)


def check(job: AnnotationJob) -> "Work":
    """Checks everything that can be checked before work; writes nothing.

    Raises:
        ValueError: If the dataset cannot be annotated so, or the output belongs to other parameters.
    """
    work = open_job(job)
    if work.shards.is_finished:
        confirm(work)
    else:
        work.check()
    return work


def prepare(job: AnnotationJob) -> None:
    """Checks as [`check`], and makes the folder of unfinished work.

    Raises:
        ValueError: As [`check`].
    """
    work = check(job)
    if not work.shards.is_finished:
        work.shards.open()


def make_shards(job: AnnotationJob, rank: int = 0, world_size: int = 1, workers: int = 1) -> None:
    """Makes the labels of a share of the episodes, a run of neighbours, that are not there yet.

    Other ranks may work beside it in the same folder, also on other machines.

    Args:
        job (`AnnotationJob`): What to do.
        rank (`int`): Which share.
        world_size (`int`): Number of shares.
        workers (`int`): Processes.

    Raises:
        ValueError: If a file is damaged, or the folder belongs to other parameters.
        RuntimeError: If a worker dies.
        OSError: If the disk is full; what is finished is kept.
    """
    work = open_job(job)
    if not work.shards.is_finished:
        work.shards.open()
        bounds = [len(work.episodes) * share // world_size for share in (rank, rank + 1)]
        _make(work, work.episodes[slice(*bounds)], workers, f"share {rank + 1} of {world_size}")


def merge(job: AnnotationJob) -> dict:
    """Puts the dataset together from the shards of all ranks.

    Returns:
        `dict`: As [`confirm`].

    Raises:
        ValueError: If an episode is missing, or a finished output is damaged or of other parameters.
        OSError: If the disk is full; what is finished is kept.
    """
    work = open_job(job)
    if not work.shards.is_finished:
        work.shards.open()
        with work.shards.lock():
            if not work.shards.is_finished:
                _merge(work)
    return confirm(work)


@dataclasses.dataclass(frozen=True)
class Work:
    """A job on its opened dataset.

    Args:
        job (`AnnotationJob`): What to do.
        rows (`DatasetRows`): The dataset.
        episodes (`list[int]`): Those that are wanted.
        shards (`EpisodeJob`): Where the work lies, by the episodes' numbers in the old dataset.
    """

    job: AnnotationJob
    rows: DatasetRows
    episodes: list[int]
    shards: EpisodeJob

    def check(self) -> list[int]:
        """Finds what would only show after hours of work; the episodes that can be read, as far as known.

        Raises:
            ValueError: If the job cannot be done; says why.
        """
        readable = []
        for episode in self.episodes:
            try:
                check_readable(self.rows, episode)
            except BrokenEpisodeError as error:
                if not self.job.skip_broken:
                    raise _suggest_skipping(error) from error
            else:
                readable.append(episode)
        if not readable:
            raise ValueError(f"no episode of dataset {self.rows.name} can be read; {RESTORE}")
        self.job.annotation.check(self.rows, readable)
        return readable

    def read(self, shard: Path) -> dict | None:
        """Facts of a finished episode; `None` if it has to be made."""
        return current_facts(self.rows, shard, self.job.skip_broken)


def open_job(job: AnnotationJob) -> Work:
    """Opens the dataset of a job.

    Raises:
        ValueError: If it cannot be opened, or the job does not fit it.
    """
    rows = DatasetRows(job.dataset, stream=True)
    if job.output.resolve().is_relative_to(rows.root.resolve()):
        raise ValueError(f"--output {job.output} lies inside the dataset {rows.name}; choose another folder")
    if job.limit is not None and job.limit < 1:
        raise ValueError(f"--limit is {job.limit}; it must be at least 1")
    if not rows.n_episodes:
        raise ValueError(f"dataset {rows.name} has no episodes")
    episodes = parse_episodes(job.episodes or ":", rows.n_episodes)[: job.limit]
    # Without the revision, which is a parameter of its own: an unfinished run whose branch has moved on
    # continues when its commit is named.
    name = rows.root.name if Path(job.dataset).expanduser().is_dir() else job.dataset.partition("@")[0]
    chosen = None if len(episodes) == rows.n_episodes else episodes
    parameters = job.annotation.to_dict() | {
        "episodes": chosen,
        "dataset": name,
        "source_sha256": _fingerprint(rows),
    }
    if rows.hub is not None:
        parameters["revision"] = rows.hub.revision
    return Work(job, rows, episodes, EpisodeJob(job.output, "annotation", parameters))


def _make(work: Work, episodes: list[int], workers: int, name: str | None = None) -> None:
    """Makes the shards that are missing among `episodes`."""
    lengths = work.rows.episode_stops - work.rows.episode_starts
    how = EpisodeWork(_annotate_one, _start_worker, (work.job, work.rows), work.read)
    try:
        work.shards.make_shards({episode: int(lengths[episode]) for episode in episodes}, how, workers, name)
    except BrokenEpisodeError as error:
        raise _suggest_skipping(error) from error


def _suggest_skipping(error: BrokenEpisodeError) -> ValueError:
    return ValueError(f"{error}; or leave such episodes out with --skip-broken")


_job: tuple[AnnotationJob, DatasetRows] | None = None


def _start_worker(job: AnnotationJob, rows: DatasetRows) -> None:
    """What a process works on."""
    global _job
    import cv2

    cv2.setNumThreads(1)  # episodes run side by side
    _job = (job, rows)
    _label_maker.cache_clear()


@functools.cache
def _label_maker() -> LabelMaker:
    """The sources, loaded at the first episode of a process: what is wrong with them is told from there."""
    job, rows = _job
    return LabelMaker(rows, job.annotation, job.device, job.batch_size)


def _annotate_one(episode: int, shard: Path) -> dict:
    return annotate_shard(_label_maker(), episode, shard, _job[0].skip_broken)


def _merge(work: Work) -> None:
    """Put the dataset together from the shards."""
    facts = work.shards.read_shards(work.episodes, work.read)
    skipped = [{"episode": e, **known["broken"]} for e, known in facts.items() if "broken" in known]
    facts = {episode: known for episode, known in facts.items() if "broken" not in known}
    if not facts:
        raise ValueError(f"no episode of dataset {work.rows.name} can be read: {skipped[0]['reason']}")
    work.rows.fetch_videos(list(facts))
    work.shards.write_dataset(
        lambda root: assemble(root, work.rows, work.job.annotation, work.shards, facts, skipped)
    )


def confirm(work: Work) -> dict:
    """Check a finished dataset and leave it unchanged.

    Returns:
        `dict`: `episodes`, `frames`, `moving` (share of points), `still_episodes` (without motion), `flagged`
        (episodes with a flag), `skipped` (episodes of the old dataset that could not be read).

    Raises:
        ValueError: If it is damaged, of other parameters, or was not made by this script.
    """
    provenance = work.shards.read_finished()
    episodes = provenance["episodes"]
    camera = work.job.annotation.cameras[0]
    facts = [episodes[str(episode)][camera] for episode in range(len(episodes))]
    points = sum(known["n_points"] for known in facts)
    return {
        "episodes": len(facts),
        "frames": load_info(work.job.output)["total_frames"],
        "moving": sum(known["n_moving"] for known in facts) / max(1, points),
        "still_episodes": [e for e, known in enumerate(facts) if not known["has_motion"]],
        "flagged": list(flagged_episodes(provenance)),
        "skipped": provenance["annotation"]["skipped"],
    }


def _fingerprint(rows: DatasetRows) -> str:
    """Of the dataset that is annotated: sizes of its data files, bounds of its episodes.

    Videos are told apart in the shard that was made of them: one that is repaired, or downloaded later, does
    not undo the work on the others.
    """
    sizes = [(path.relative_to(rows.root).as_posix(), path.stat().st_size) for path in data_files(rows.root)]
    return hashlib.sha256(json.dumps([sizes, rows.episode_starts.tolist()]).encode()).hexdigest()[:16]
