"""Finished episodes of an evaluation: in files until it ends, then in its results. It resumes, and it grows.

The files of an interrupted evaluation are in `OUTPUT.partial`; the same command resumes from them. A command
for more episodes also continues from finished results.
"""

# No import of PyTorch at the top: every simulator process imports the command, which imports this file.
import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from datasets_scripts.storage.atomic import read_json, write_json
from datasets_scripts.storage.episode_job import EVALUATION, PARAMETERS, EpisodeJob
from datasets_scripts.storage.settings_changes import name_changes
from training.evaluation.simulated.timing import Sessions

__all__ = ["check_growth", "claim_evaluation", "episode_file", "evaluation_job", "read_finished", "reopen"]


def evaluation_job(output: Path, facts: Mapping) -> EpisodeJob:
    """Where the finished episodes of an evaluation are kept; only one with equal facts resumes it.

    `facts` has what `describe_checkpoint` gives as `checkpoint`, and not the number of episodes.
    """
    return EpisodeJob(output, EVALUATION, _comparable(facts))


def _comparable(facts: Mapping) -> dict:
    """The facts as JSON has them, with the policy by its weights and settings: a folder may move."""
    known = facts["checkpoint"]
    policy = f"{known['path']}@{known['revision']}"
    if digest := known["weights_sha256"]:
        settings = known.get("settings_sha256")  # results of older versions have none
        policy = f"weights {digest[:12]}" + (f", settings {settings[:12]}" if settings else "")
    return json.loads(json.dumps({**facts, "checkpoint": policy}))


def read_finished(job: EpisodeJob) -> dict | None:
    """The results in the output of an evaluation; `None` if it has none yet.

    Raises:
        ValueError: If they are of another evaluation, or of none: they would be lost.
    """
    if not job.output.exists():
        return None
    remedy = f"choose another --output, or delete {job.output}"
    results = read_json(job.output, remedy)
    try:
        known = {name: results[name] for name in job.parameters}
        if "tasks" in known:  # the results have more about tasks and seeds
            known["tasks"] = list(known["tasks"])
            known["seeds"] = {name: known["seeds"][name] for name in job.parameters["seeds"]}
        known = _comparable(known)
        if job.parameters["checkpoint"].startswith(f"{known['checkpoint']}, "):  # older: weights alone
            known["checkpoint"] = job.parameters["checkpoint"]
    except (KeyError, TypeError):
        raise ValueError(f"{job.output} exists and holds no results of this benchmark; {remedy}") from None
    if known != job.parameters:
        changed = name_changes(known, job.parameters)
        raise ValueError(f"{job.output} holds an evaluation with other parameters ({changed}); {remedy}")
    return results


def check_growth(finished: int, wanted: int, option: str, place: Path) -> None:
    """Refuses fewer episodes than an evaluation has finished in `place`: the others would be lost.

    Args:
        finished, wanted (`int`): Episodes of each task, or chains.
        option (`str`): The flag that gives their number.
        place (`Path`): Results, or the folder of finished episodes.
    """
    if finished > wanted:
        raise ValueError(
            f"{place} has finished more than {option} {wanted}: take {option} {finished} or more, choose "
            f"another --output, or delete {place}"
        )


@contextlib.contextmanager
def claim_evaluation(job: EpisodeJob) -> Iterator[None]:
    """Opens and locks the folder of finished episodes; an end, or an error before the first, removes it."""
    with job.claim():
        try:
            yield
        except BaseException:
            if not any(job.partial.glob("[0-9]*.json")):
                shutil.rmtree(job.partial)  # nothing is lost
            raise
    # The parameters last: without them nobody knows what a folder that a kill left is.
    for path in job.partial.iterdir():
        if path.name != PARAMETERS:
            path.unlink()
    shutil.rmtree(job.partial, ignore_errors=True)


def episode_file(task: str, seed: int) -> str:
    """Name of the file of a finished episode, whatever the other tasks and starts are."""
    return f"{seed}-{task.replace('/', '-')}.json"


def reopen(folder: Path, results: Mapping, name_file: Callable[[Mapping], str]) -> None:
    """Puts the episodes of finished results back into the folder of finished episodes, to add others.

    Args:
        folder (`Path`): Of an evaluation that is claimed; files that are there stay.
        results (`Mapping`): Of [`read_finished`].
        name_file (`Callable`): Facts of an episode -> name of its file.
    """
    Sessions.reopen(folder, results)
    for facts in results["episodes"]:
        if not (path := folder / name_file(facts)).exists():
            write_json(path, facts)
