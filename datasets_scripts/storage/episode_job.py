"""Make a dataset episode by episode: work of hours that can be stopped at any time and resumed.

Unfinished work and its parameters lie in `OUTPUT.partial`. Each finished episode is a folder there (a shard,
`shards.py`); the dataset is put together next to the shards and renamed to OUTPUT at the end.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout
from tqdm import tqdm

from datasets_scripts.command_line import list_some
from datasets_scripts.storage.atomic import (
    read_json,
    real_folder,
    remove_leftovers,
    write_json,
    write_whole_folder,
)
from datasets_scripts.storage.dataset_folder import check_dataset, refuse_patterns
from datasets_scripts.storage.provenance import read_provenance
from datasets_scripts.storage.settings_changes import name_changes
from datasets_scripts.storage.shards import read_shard_summary

__all__ = [
    "EVALUATION",
    "PARAMETERS",
    "EpisodeJob",
    "EpisodeWork",
    "check_limit",
    "work_on_all",
]

PARAMETERS, SHARE_LOCK = "parameters.json", "share-{}.lock"
EVALUATION = "evaluation"  # kind of the jobs that make no dataset


@dataclasses.dataclass(frozen=True)
class EpisodeJob:
    """One dataset, or one evaluation, made episode by episode."""

    output: Path
    kind: str  # section of `meta/foresight.json` with the `parameters` and `video_bytes`
    parameters: dict  # JSON values that determine the result; only a run with equal ones resumes it

    def __post_init__(self):
        object.__setattr__(self, "output", real_folder(self.output))

    @property
    def partial(self) -> Path:
        """Folder of unfinished work."""
        return self.output.with_name(self.output.name + ".partial")

    @property
    def is_finished(self) -> bool:
        """Whether the output exists; `read_finished` checks that it is this dataset."""
        return self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir()))

    def shard(self, episode: int) -> Path:
        """Folder of an episode."""
        return self.partial / "episodes" / f"{episode:06d}"

    def open(self) -> None:
        """Make the folder of unfinished work, or check that the existing one is of this job."""
        if self.kind != EVALUATION:  # which LeRobot does not read
            refuse_patterns(self.partial)
        path = self.partial / PARAMETERS
        if not path.exists():
            with write_whole_folder(self.partial, shared=True) as folder:
                write_json(folder / PARAMETERS, self.parameters)
        if not path.exists():
            raise ValueError(f"{self.partial} is not an unfinished run of this script; move it away")
        earlier = read_json(path, f"delete {self.partial} and start again")
        self._check_parameters(earlier, f"an unfinished run in {self.partial}", self.partial)

    def lock(self) -> BaseFileLock:
        """Lock the folder of unfinished work; raises a `ValueError` if another run holds the lock."""
        try:
            return FileLock(self.partial / "lock").acquire(timeout=0)
        except Timeout:
            raise ValueError(f"another run is at work in {self.partial}: wait until it ends") from None

    @contextlib.contextmanager
    def join(self, share: int) -> Iterator[None]:
        """Open the folder of unfinished work for one share of it; other processes make the others.

        Raises:
            ValueError: If another process is making this share.
        """
        self.open()
        with self._hold(self.partial / SHARE_LOCK.format(share)):
            yield

    @contextlib.contextmanager
    def _hold(self, path: Path) -> Iterator[None]:
        try:
            held = FileLock(path).acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"a share of this work is being made in {self.partial} ({path.name}): wait until it ends"
            ) from None
        with held:
            yield

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """Open and lock the folder of unfinished work, and remove leftovers of killed runs."""
        self.open()
        with self.lock():
            for path in self.partial.glob(SHARE_LOCK.format("*")):  # their unfinished shards are in use
                with self._hold(path):
                    pass
            remove_leftovers(self.partial)
            remove_leftovers(self.partial / "episodes")
            yield

    def make_shards(
        self, lengths: Mapping[int, int], work: "EpisodeWork", workers: int = 1, label: str | None = None
    ) -> None:
        """Make the missing shards, with a progress bar; raises what `work.make` raises.

        Args:
            lengths (`Mapping[int, int]`): Size of every wanted episode in units of `work.unit`.
            work (`EpisodeWork`): How a shard is made.
            workers (`int`): Processes; with 1 everything happens in this one.
            label (`str`, *optional*): Title of the progress bar.

        Raises:
            RuntimeError: If a worker dies.
        """
        missing = [episode for episode in lengths if work.read(self.shard(episode)) is None]
        for episode in missing:
            shutil.rmtree(self.shard(episode), ignore_errors=True)  # damaged, or out of date
        total = sum(lengths.values())
        done = total - sum(lengths[episode] for episode in missing)
        jobs = [(episode, self.shard(episode)) for episode in missing]
        with tqdm(total=total, initial=done, desc=label, unit=work.unit) as bar:
            for facts in work_on_all(work.make, jobs, workers, work.start):
                bar.set_postfix(work.notes(facts), refresh=False)
                bar.update(facts["n_frames"] if work.unit == "frame" else 1)

    def read_shards(
        self, episodes: Sequence[int], read: Callable[[Path], dict | None] = read_shard_summary
    ) -> dict:
        """Facts of all episodes by number; raises a `ValueError` if one is missing."""
        facts = {episode: read(self.shard(episode)) for episode in episodes}
        if missing := [episode for episode, known in facts.items() if known is None]:
            raise ValueError(
                f"{len(missing)} of {len(facts)} episodes are missing ({list_some(missing, most=10)}): "
                "run the same command again to make them"
            )
        return facts

    def write_dataset(self, write: Callable[[Path], None]) -> None:
        """Put the dataset together (`write` fills an empty folder), and remove the shards."""
        with write_whole_folder(self.output, beside=self.partial) as folder:
            write(folder)
        shutil.rmtree(self.partial, ignore_errors=True)

    def read_finished(self) -> dict[str, Any]:
        """Check the finished dataset quickly; returns its provenance.

        Raises:
            ValueError: If it is damaged, has other parameters, or was not made by this script.
        """
        provenance = read_provenance(self.output) if self.output.is_dir() else {}
        if self.kind not in provenance:
            raise ValueError(f"{self.output} exists and was not made by this script; choose another --output")
        made = provenance[self.kind]
        self._check_parameters(made["parameters"], f"a finished dataset in {self.output}", self.output)
        check_dataset(self.output, len(provenance["episodes"]), made["video_bytes"])
        return provenance

    def _check_parameters(self, earlier: dict, what: str, folder: Path) -> None:
        """Refuse work that was done with other parameters."""
        known = {name: earlier.get(name) for name in self.parameters}
        if known != self.parameters:
            changed = name_changes(known, self.parameters)
            raise ValueError(
                f"there is {what} with other parameters ({changed}); choose another --output, or delete "
                f"{folder}"
            )


@dataclasses.dataclass(frozen=True)
class EpisodeWork:
    """How the shards of a job are made."""

    make: Callable[[int, Path], dict]  # (episode, folder to make) -> facts
    start: Callable[[], None] | None = None  # called once in every process
    read: Callable[[Path], dict | None] = read_shard_summary  # gives `None` for a shard that has to be made
    unit: str = "frame"  # what the progress bar counts
    notes: Callable[[dict], dict] = lambda facts: {}  # what the progress bar shows of the facts


def check_limit(limit: int | None) -> None:
    """Refuse a `--limit` of episodes below 1; raises a `ValueError`."""
    if limit is not None and limit < 1:
        raise ValueError(f"--limit is {limit}; it must be at least 1")


def work_on_all(
    work: Callable[..., dict], jobs: Sequence[tuple], workers: int, start: Callable[[], None] | None = None
) -> Iterator[dict]:
    """Do all jobs, and yield their results as they finish.

    Args:
        work (`Callable`): Called with the arguments of each job.
        jobs (`Sequence[tuple]`): Arguments of each job.
        workers (`int`): Spawned processes; with 1 everything happens in this one.
        start (`Callable`, *optional*): Called once in every process that works.

    Raises:
        RuntimeError: If a process dies.
    """
    if workers <= 1 or len(jobs) <= 1:
        if start is not None:
            start()
        for job in jobs:
            yield work(*job)
        return
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)),
        mp_context=multiprocessing.get_context("spawn"),  # a forked OpenGL context would be shared
        initializer=_start_worker,
        initargs=(start,),
    )
    try:
        futures = [pool.submit(work, *job) for job in jobs]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process died, most likely of too little memory or of a rendering library; run the same "
            "command again with fewer --workers"
        ) from error
    finally:
        # Running episodes are finished and kept, the others are not started.
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(start: Callable[[], None] | None) -> None:
    """Leave Ctrl-C to the main process, which lets running episodes finish; end when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if start is not None:
        start()


def _end_with_parent() -> None:
    """Otherwise the processes of a killed command would wait forever, with their memory and GPU."""
    multiprocessing.parent_process().join()
    os._exit(1)
