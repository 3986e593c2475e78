"""The episodes that a film of an evaluation shows: which, kept in files while it runs, and the video."""

# No import of PyTorch at the top: every simulator process imports the command, which imports this file.
import hashlib
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datasets_scripts.storage.atomic import write_whole_file
from datasets_scripts.storage.file_hash import hash_file
from training.evaluation.simulated.kept_episodes import episode_file

__all__ = ["Film", "describe_films", "write_film"]

MAX_FILMED = 20  # rollouts in one video


class Film:
    """Pictures and actions of the trials that the video may show, in files of the folder of episodes.

    These are the first trials of every task, and as many failures of each. Pictures of the others are dropped
    when they end.

    Attributes:
        always (`set`): The trials that are kept whatever their outcome.
    """

    def __init__(self, folder: Path, trials: Sequence[tuple[str, int]], tasks: int):
        self._folder, self._trials = folder, trials
        self._each, episodes = max(1, MAX_FILMED // tasks), len(trials) // tasks
        first = [trial for i, trial in enumerate(trials) if i % episodes < self._each]
        self.always = set(first[:MAX_FILMED])
        self._failures: Counter[str] = Counter()  # in this session

    def _path(self, trial: tuple[str, int]) -> Path:
        return (self._folder / episode_file(*trial)).with_suffix(".npz")

    def has(self, trial: tuple[str, int]) -> bool:
        """Whether its pictures are kept."""
        return zipfile.is_zipfile(self._path(trial))  # and not empty, after a power cut

    def lacks(self, episodes: Mapping[tuple[str, int], Any]) -> set[tuple[str, int]]:
        """Finished trials whose pictures the video needs and are not kept: they have to run again."""
        wanted = set(self.always)
        for task in dict(self._trials):
            failures = [trial for trial in self._trials if trial[0] == task and trial in episodes]
            failures = [trial for trial in failures if not episodes[trial].success]
            kept = [trial for trial in failures if self.has(trial)]
            lacking = [trial for trial in failures if trial not in kept]
            wanted.update(lacking[: max(0, self._each - len(kept))])
        return {trial for trial in wanted if trial in episodes and not self.has(trial)}

    def keep(self, episode) -> None:
        """Notes where an episode failed, writes what is kept of it, and frees its memory."""
        trial, episode.failed_at = (episode.task, episode.seed), episode.find_failure()
        self._failures[episode.task] += not episode.success
        if trial in self.always or (not episode.success and self._failures[episode.task] <= self._each):
            with write_whole_file(self._path(trial)) as temporary, temporary.open("wb") as file:
                arrays = {"frames": np.stack(episode.frames), "actions": np.stack(episode.actions)}
                np.savez_compressed(file, **arrays)
        episode.frames, episode.actions = [], []

    def load(self, episodes: Mapping[tuple[str, int], Any]) -> None:
        """Gives back pictures and actions to the episodes that the video shows."""
        turns: Counter[tuple[str, bool]] = Counter()
        ranked = []
        for number, trial in enumerate(self._trials):
            if self.has(trial):
                kind = (trial[0], episodes[trial].success)
                ranked.append((episodes[trial].success, turns[kind], number))
                turns[kind] += 1
        for *_, number in sorted(ranked)[:MAX_FILMED]:
            with np.load(self._path(self._trials[number])) as arrays:
                episode = episodes[self._trials[number]]
                episode.frames, episode.actions = list(arrays["frames"]), list(arrays["actions"])


def describe_films(places: Sequence[Path]) -> dict[str, str | None]:
    """By the place's name a digest of each film or recorded dataset, `None` if it is not there.

    By it results tell whether what is there is their own.
    """
    return {place.name: _digest(place) if place.exists() else None for place in places}


def _digest(place: Path) -> str:
    if place.is_file():
        return hash_file(place)[:16]
    files = sorted(path for path in place.rglob("*") if path.is_file())
    sizes = [f"{path.relative_to(place).as_posix()} {path.stat().st_size}" for path in files]
    return hashlib.sha256("\n".join(sizes).encode()).hexdigest()[:16]


def write_film(path: Path, episodes: list, name_tasks: bool, fps: float) -> None:
    """Writes the pictures of episodes side by side, each with its seed and, if wanted, the name of its task.

    Args:
        path (`Path`): Video to write, `.mp4`.
        episodes (`list[Episode]`): With their pictures.
        name_tasks (`bool`): Whether captions name the tasks.
        fps (`float`): Frames a second.
    """
    from training.evaluation.videos import rollout_grid, write_video

    # Long names of tasks are cut off, so they come last.
    captions = [f"{e.seed} {e.task.rpartition('/')[2] if name_tasks else ''}".strip() for e in episodes]
    write_video(
        path, rollout_grid([e.frames for e in episodes], captions, [e.failed_at for e in episodes]), fps
    )
