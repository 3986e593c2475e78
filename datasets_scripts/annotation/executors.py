"""Spread the shards of an annotation over processes and machines through datatrove.

A task makes the missing shards of its share of the episodes; one merge follows. The same command resumes a
run that was stopped or lost some of its tasks, also with another executor or number of tasks.
"""

import argparse
import dataclasses
import functools
import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

from datasets_scripts.annotation.job import AnnotationJob, make_shards, merge, prepare
from datasets_scripts.annotation.push import push_dataset
from datasets_scripts.command_line import count_cores
from datasets_scripts.extras import install_advice

__all__ = ["EXECUTORS", "Resources", "add_options", "run_tasks"]

EXECUTORS = ("local", "slurm", "ray")


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a run may use: the options of `add_options`, and how many tasks run in parallel (`workers`).

    Raises:
        ValueError: If a number is too small or an option has no value; names it.
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
        for name in ("tasks", "workers", "cpus_per_task", "mem_per_cpu_gb", "gpus_per_task"):
            value, least = getattr(self, name), 0 if name == "gpus_per_task" else 1
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
        for option in self.sbatch:
            if "=" not in option:
                raise ValueError(f"--sbatch {option}: write NAME=VALUE, such as --sbatch account=robots")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add `--executor` and the fields of `Resources` but `workers`."""
    add = parser.add_argument_group("many processes and machines").add_argument
    add("--executor", choices=EXECUTORS, help="run through datatrove (default: processes of this command)")
    add("--tasks", type=int, help="shares of the episodes (slurm and ray need it; local: --workers)")
    add(
        "--cpus-per-task",
        type=int,
        default=Resources.cpus_per_task,
        help="slurm, ray: cores of a task (%(default)s)",
    )
    add(
        "--mem-per-cpu-gb",
        type=int,
        default=Resources.mem_per_cpu_gb,
        help="slurm, ray: memory per core, GB (%(default)s)",
    )
    add(
        "--gpus-per-task",
        type=int,
        default=Resources.gpus_per_task,
        help="slurm, ray: GPUs of a task (%(default)s)",
    )
    add("--partition", help="slurm: partition to submit to")
    add("--time", default=Resources.time, help="slurm: limit of a task (%(default)s)")
    add("--sbatch", action="append", default=[], metavar="NAME=VALUE", help="slurm: more options of sbatch")


def run_tasks(
    job: AnnotationJob, executor: str, resources: Resources, push_to: str | None = None
) -> dict | None:
    """Annotate through datatrove, which writes its logs to `OUTPUT.logs`.

    Args:
        job (`AnnotationJob`): The annotation.
        executor (`str`): `"local"` for processes of this machine, `"ray"` for the cluster that `RAY_ADDRESS`
            names, `"slurm"` to submit jobs and return.
        resources (`Resources`): What may be used.
        push_to (`str`, *optional*): Repository that Slurm's last job pushes the dataset to.

    Returns:
        `dict | None`: The summary of the merge; `None` with Slurm, whose last job merges.

    Raises:
        ValueError: If the dataset cannot be annotated this way, an episode failed, or a package, program or
            option is missing; says which.
    """
    # Other machines start in another folder.
    dataset = Path(job.dataset).expanduser()
    job = dataclasses.replace(
        job,
        output=job.output.expanduser().resolve(),
        dataset=str(dataset.resolve()) if dataset.is_dir() else job.dataset,
        linked_videos=job.linked_videos and job.linked_videos.expanduser().resolve(),
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

        options = _list_cluster_options(resources) | {"gpus_per_task": resources.gpus_per_task}
    else:
        from datatrove.executor import LocalPipelineExecutor as Executor

        workers = resources.workers or count_cores()
        options = {"tasks": resources.tasks or workers, "workers": workers}
    Executor([make], logging_dir=str(logs), skip_completed=False, **options).run()
    return merge(job)


def _make_share(job: AnnotationJob, data: Any, rank: int, world_size: int) -> None:
    """A task of the pipeline, with one worker: datatrove's tasks may not start processes."""
    make_shards(job, rank, world_size)


def _merge_and_push(job: AnnotationJob, push_to: str | None, data: Any, rank: int, world_size: int) -> None:
    """The last task of the pipeline."""
    merge(job)
    if push_to:
        push_dataset(job.output, push_to)


def _list_cluster_options(resources: Resources) -> dict[str, Any]:
    return {
        "tasks": resources.tasks,
        "workers": resources.workers or -1,
        "cpus_per_task": resources.cpus_per_task,
        "mem_per_cpu_gb": resources.mem_per_cpu_gb,
    }


def _submit(make: Any, finish: Any, resources: Resources, logs: Path) -> None:
    """Submit an array of tasks, and the merge that starts when they have ended.

    The merge starts after failed tasks too, and then names the missing episodes instead of waiting forever.
    """
    from datatrove.executor import SlurmPipelineExecutor

    activate = Path(sys.prefix) / "bin" / "activate"
    common = _list_cluster_options(resources) | {
        "time": resources.time,
        "partition": resources.partition,
        "sbatch_args": dict(option.split("=", 1) for option in resources.sbatch),
        "qos": None,
        "venv_path": str(activate) if activate.exists() else None,
        "skip_completed": False,
    }
    shards = SlurmPipelineExecutor(
        [make],
        gpus_per_task=resources.gpus_per_task,
        job_name="annotate",
        logging_dir=str(logs / "shards"),
        **common,
    )
    SlurmPipelineExecutor(
        [finish],
        depends=shards,
        run_on_dependency_fail=True,
        job_name="annotate-merge",
        logging_dir=str(logs / "merge"),
        **common | {"tasks": 1, "workers": -1},
    ).run()


def _check_executor(executor: str, resources: Resources) -> None:
    """Refuse an executor that lacks a package, a program or an option."""
    if importlib.util.find_spec("datatrove") is None:
        raise ValueError(f"--executor {executor} needs datatrove: {install_advice('annotate')}")
    if executor == "ray" and importlib.util.find_spec("ray") is None:
        raise ValueError("--executor ray needs Ray on every machine: pip install 'datatrove[ray]'")
    if executor != "local" and resources.tasks is None:
        raise ValueError(f"--executor {executor} needs --tasks: the number of shares of the episodes")
    if executor == "slurm" and shutil.which("sbatch") is None:
        raise ValueError("--executor slurm needs sbatch: run this on a machine that submits to Slurm")
    if executor == "slurm" and resources.partition is None:
        raise ValueError("--executor slurm needs --partition; `sinfo` lists them")
