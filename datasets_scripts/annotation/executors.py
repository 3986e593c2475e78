"""Spreads the shards of an annotation over processes and machines through datatrove.

A task makes the shards of its share of the episodes that are not there yet; one merge follows. The shards
themselves say what is done, so a run that was stopped, or lost some of its tasks, is started again by the
same command, here or with another executor, and any number of tasks.
"""

import argparse
import dataclasses
import functools
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets_scripts.annotation.job import AnnotationJob, make_shards, merge, prepare
from datasets_scripts.annotation.push import push_dataset

__all__ = ["EXECUTORS", "Resources", "add_options", "run_tasks"]

EXECUTORS = ("local", "slurm", "ray")


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a run may use; fields are the options of the command line.

    Args:
        tasks (`int`, *optional*): Shares of the episodes; a task opens the dataset and its models once.
        workers (`int`, *optional*): Tasks at the same time; by default all, `local`: one per core.
        cpus_per_task (`int`): Cores of a task (`slurm`, `ray`).
        mem_per_cpu_gb (`int`): Memory of each of them (`slurm`, `ray`).
        gpus_per_task (`int`): GPUs of a task (`slurm`, `ray`).
        partition (`str`, *optional*): Of Slurm.
        time (`str`): Limit of a task under Slurm, `HH:MM:SS`.
        sbatch (`tuple[str, ...]`): More options of `sbatch`, such as `account=robots`.

    Raises:
        ValueError: If a number is not positive or an option has no value; names it.
    """

    tasks: int | None = None
    workers: int | None = None
    cpus_per_task: int = 2
    mem_per_cpu_gb: int = 4
    gpus_per_task: int = 0
    partition: str | None = None
    time: str = "24:00:00"
    sbatch: tuple[str, ...] = ()

    def __post_init__(self):
        least_of = {"tasks": 1, "workers": 1, "cpus_per_task": 1, "mem_per_cpu_gb": 1, "gpus_per_task": 0}
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
        for option in self.sbatch:
            if "=" not in option:
                raise ValueError(f"--sbatch {option}: write NAME=VALUE, such as --sbatch account=robots")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--executor` and the fields of `Resources` but `workers`, which every command has."""
    add = parser.add_argument_group("many processes and machines").add_argument
    add("--executor", choices=EXECUTORS, help="run through datatrove (default: processes of this command)")
    add("--tasks", type=int, help="shares of the episodes (slurm and ray need it; local: --workers)")
    add("--cpus-per-task", type=int, default=Resources.cpus_per_task, help="slurm, ray (%(default)s)")
    add("--mem-per-cpu-gb", type=int, default=Resources.mem_per_cpu_gb, help="slurm, ray (%(default)s)")
    add("--gpus-per-task", type=int, default=Resources.gpus_per_task, help="slurm, ray (%(default)s)")
    add("--partition", help="slurm")
    add("--time", default=Resources.time, help="slurm: limit of a task (%(default)s)")
    add("--sbatch", action="append", default=[], metavar="NAME=VALUE", help="slurm: more options of sbatch")


def run_tasks(
    job: AnnotationJob, executor: str, resources: Resources, push_to: str | None = None
) -> dict | None:
    """Annotates through datatrove, whose logs go to `OUTPUT.logs`.

    Args:
        job (`AnnotationJob`): What to do.
        executor (`str`): `"local"`: processes of this machine. `"ray"`: the cluster that `RAY_ADDRESS` names.
            `"slurm"`: jobs are submitted, and this returns at once.
        resources (`Resources`): What may be used.
        push_to (`str`, *optional*): Repository that Slurm's last job pushes the dataset to; with the others
            it is here when this returns.

    Returns:
        `dict | None`: The summary of the merge; `None` with Slurm, whose last job merges.

    Raises:
        ValueError: If the dataset cannot be annotated so, an episode failed, or a package, program or option
            is missing; says which.
    """
    job = dataclasses.replace(
        job, output=job.output.expanduser().resolve(), dataset=_resolve_dataset(job.dataset)
    )
    _check_executor(executor, resources)
    prepare(job)
    logs = job.output.with_name(job.output.name + ".logs")
    make = functools.partial(_make_share, job)
    if executor == "slurm":
        _submit(make, functools.partial(_merge_and_push, job, push_to), resources, logs)
        return None
    if executor == "ray":
        from datatrove.executor import RayPipelineExecutor as Executor

        options = {
            "tasks": resources.tasks,
            "workers": resources.workers or -1,
            "cpus_per_task": resources.cpus_per_task,
            "mem_per_cpu_gb": resources.mem_per_cpu_gb,
            "gpus_per_task": resources.gpus_per_task,
        }
    else:
        from datatrove.executor import LocalPipelineExecutor as Executor

        workers = resources.workers or os.cpu_count() or 1
        options = {"tasks": resources.tasks or workers, "workers": workers}
    Executor([make], logging_dir=str(logs), skip_completed=False, **options).run()
    return merge(job)


def _make_share(job: AnnotationJob, data: Any, rank: int, world_size: int) -> None:
    """A task of the pipeline; datatrove's tasks may not have processes of their own."""
    make_shards(job, rank, world_size)


def _merge_and_push(job: AnnotationJob, push_to: str | None, data: Any, rank: int, world_size: int) -> None:
    """The last task."""
    merge(job)
    if push_to:
        push_dataset(job.output, push_to)


def _submit(make: Callable, finish: Callable, resources: Resources, logs: Path) -> None:
    """Submits an array of tasks, and the merge that starts when they have ended.

    It starts after failed tasks too, and then names the episodes that are missing, rather than wait for ever.
    """
    from datatrove.executor import SlurmPipelineExecutor

    activate = Path(sys.prefix) / "bin" / "activate"
    common = {
        "time": resources.time,
        "partition": resources.partition,
        "cpus_per_task": resources.cpus_per_task,
        "mem_per_cpu_gb": resources.mem_per_cpu_gb,
        "sbatch_args": dict(option.split("=", 1) for option in resources.sbatch),
        "qos": None,
        "venv_path": str(activate) if activate.exists() else None,
        "skip_completed": False,
    }
    shards = SlurmPipelineExecutor(
        [make],
        tasks=resources.tasks,
        workers=resources.workers or -1,
        gpus_per_task=resources.gpus_per_task,
        job_name="annotate",
        logging_dir=str(logs / "shards"),
        **common,
    )
    SlurmPipelineExecutor(
        [finish],
        tasks=1,
        depends=shards,
        run_on_dependency_fail=True,
        job_name="annotate-merge",
        logging_dir=str(logs / "merge"),
        **common,
    ).run()


def _check_executor(executor: str, resources: Resources) -> None:
    """Finds out before work what an executor lacks."""
    if importlib.util.find_spec("datatrove") is None:
        raise ValueError(
            f"--executor {executor} needs datatrove: pip install 'lerobot_policy_foresight[annotate]'"
        )
    if executor == "ray" and importlib.util.find_spec("ray") is None:
        raise ValueError("--executor ray needs Ray on every machine: pip install 'datatrove[ray]'")
    if executor == "local":
        return
    if resources.tasks is None:
        raise ValueError(f"--executor {executor} needs --tasks: the number of shares of the episodes")
    if executor == "slurm":
        if shutil.which("sbatch") is None:
            raise ValueError("--executor slurm needs sbatch: run this on a machine that submits to Slurm")
        if resources.partition is None:
            raise ValueError("--executor slurm needs --partition; `sinfo` lists them")


def _resolve_dataset(dataset: str) -> str:
    """A folder by its full path, since other machines start elsewhere; a Hub id as it is."""
    path = Path(dataset).expanduser()
    return str(path.resolve()) if path.is_dir() else dataset
