"""A run's folder and checkpoints: one run at a time, and what a resumed run finds."""

import contextlib
import dataclasses
import functools
import math
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException

from datasets_scripts.storage.atomic import (
    read_json,
    remove_leftovers,
    write_json,
    write_whole_folder,
)
from datasets_scripts.storage.dataset_folder import is_dataset_folder
from datasets_scripts.storage.dataset_rows import DatasetRows, dataset_name
from datasets_scripts.storage.file_hash import hash_file
from datasets_scripts.storage.settings_changes import flatten, name_changes
from training.config import RunConfig
from training.config_reading import load_config, save_config
from training.engines.machines import agree_on_checkpoint, agree_on_run, is_writer
from training.models.model_folder import DATASETS, summary_of
from training.run_data import describe_data, is_same_dataset

__all__ = [
    "FINISHED",
    "check_run_folder",
    "continued_settings",
    "describe_run_folder",
    "find_progress",
    "latest_checkpoint",
    "lock_run_folder",
    "read_known_data",
    "restore_checkpoint",
    "save_checkpoint",
]

PREFIX = "step-"
MANIFEST = "files.json"  # in a checkpoint: SHA-256 of its files
FINISHED = "finished"
# Settings that may change between sessions of a run, because they do not change what is computed.
MAY_CHANGE = (
    "output",
    "export",
    "data/num_workers",
    "data/frame_cache",
    "data/baseline_windows",
    "train/log_every",
    "train/checkpoint_every",
    "train/keep_checkpoints",
    "train/picture_every",
    "train/max_hours",
    "train/export_ema",
    "train/tracker",
)


@contextlib.contextmanager
def lock_run_folder(accelerator: Accelerator, folder: Path) -> Iterator[None]:
    """Makes the run folder and locks it, because a killed launcher can leave its training processes alive.

    Raises:
        ValueError: If another process is training there, or it holds a dataset.
    """
    if is_dataset_folder(folder):
        raise ValueError(f"--output is {folder}, which holds a dataset: choose another folder for the run")
    if not is_writer(accelerator):
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another process is training in {folder}: wait for it, or stop it") from None
    try:
        yield
    finally:
        lock.release()


def describe_run_folder(config: RunConfig, datasets: Sequence[DatasetRows]) -> None:
    """Writes the settings and the datasets of a new run into its folder, for [`check_run_folder`]."""
    output = Path(config.output)
    write_json(output / DATASETS, describe_data(config, datasets))
    save_config(config, output / "config.yaml")


def continued_settings(config: RunConfig) -> RunConfig:
    """The settings of a run that resumes: its base is of the commit at which it began, if it names none."""
    settings = Path(config.output) / "config.yaml"
    begun = load_config(settings, []) if settings.is_file() else config
    names_commit = re.fullmatch("[0-9a-f]{40}", config.init_revision or "")
    if not names_commit and begun.init_revision and config.init_from == begun.init_from:
        return dataclasses.replace(config, init_revision=begun.init_revision)
    return config


def read_known_data(output: Path) -> list[dict]:
    """What [`describe_run_folder`] wrote about the data of a run, if it did."""
    return read_json(output / DATASETS, kind=list) if (output / DATASETS).exists() else []


def check_run_folder(
    config: RunConfig, datasets: Sequence[DatasetRows], resume: bool
) -> str | tuple[Path, int] | None:
    """What the run folder holds: `None` (nothing), `FINISHED`, or the newest checkpoint and its step.

    All processes call it together; machines may have folders of their own.

    Raises:
        ValueError: If it holds another run, or this one and `resume` is false, or if only some machines have
            a run.
    """
    output = Path(config.output)
    if not agree_on_run(output / "config.yaml"):
        return None
    _check_same_run(config, datasets, resume)
    return find_progress(output, Path(config.export))


def find_progress(output: Path, export: Path) -> str | tuple[Path, int] | None:
    """How far a run is: `FINISHED`, or its newest checkpoint and step, if any; all processes call it."""
    finished = summary_of(export, output).exists() and export.exists()
    if gather_object([finished])[0]:  # the main process alone writes them
        return FINISHED
    return agree_on_checkpoint(functools.partial(latest_checkpoint, output / "checkpoints"))


def _check_same_run(config: RunConfig, datasets: Sequence[DatasetRows], resume: bool) -> None:
    """Refuses another run than the one in the run folder, and this one unless it may be resumed."""
    output = Path(config.output)
    if not resume:
        raise ValueError(
            f"{output} already holds a run: continue it with --resume, or choose another --output"
        )
    own = describe_data(config, datasets)
    known = read_known_data(output) or own
    # Older versions did not write what they validated on.
    counts = {len(own), len(config.data.datasets)}
    if len(known) not in counts or not all(map(is_same_dataset, known, own)):
        commits = [f"{one['name']} was at commit {one['commit']}" for one in known if one.get("commit")]
        raise ValueError(
            f"{output} was trained on other data than {', '.join(rows.name for rows in datasets)} has now "
            f"(see its {DATASETS}): choose another --output, or bring the data back"
            + (f" ({'; '.join(commits)}: give OWNER/NAME@COMMIT)" if commits else "")
        )
    if changed := name_changes(_comparable(load_config(output / "config.yaml", [])), _comparable(config)):
        raise ValueError(
            f"{output} holds a run with other settings ({changed}): choose another --output, or repeat the "
            "settings of its config.yaml"
        )


def _comparable(config: RunConfig) -> dict:
    """Flat settings that decide what a run computes; datasets may move, so only their names count."""
    fields = dataclasses.asdict(config)
    for source in fields["data"]["datasets"]:
        source["path"] = dataset_name(source["path"])
    if fields["data"]["validation"]:
        fields["data"]["validation"] = dataset_name(fields["data"]["validation"])
    return {key: value for key, value in flatten(fields).items() if key not in MAY_CHANGE}


def latest_checkpoint(folder: Path, at_most: float = math.inf) -> tuple[Path, int] | None:
    """The newest whole checkpoint of a run folder and its step; warns about damaged ones that are newer."""
    for step, path in sorted(_find_checkpoints(folder).items(), reverse=True):
        if step > at_most:
            continue
        if (damage := _find_damage(path)) is None:
            return path, step
        warnings.warn(f"checkpoint {path} is left out: its {damage}", stacklevel=2)
    return None


def _find_checkpoints(folder: Path) -> dict[int, Path]:
    """Checkpoints by step; other names beside them are not ours."""
    pattern = re.compile(rf"{PREFIX}(\d{{7,}})", re.ASCII)
    matches = ((pattern.fullmatch(path.name), path) for path in folder.glob(f"{PREFIX}*") if path.is_dir())
    return {int(match[1]): path for match, path in matches if match}


def _find_damage(checkpoint: Path) -> str | None:
    """The first file of a checkpoint that is not as it was written, and its fault; `None` if it is whole."""
    if not (checkpoint / MANIFEST).exists() and (checkpoint / "optimizer.bin").exists():
        return None  # of a version that wrote no digests
    try:
        digests = read_json(checkpoint / MANIFEST)
        if not digests:
            return f"{MANIFEST} lists no files"
        for name, digest in digests.items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if hash_file(checkpoint / name) != digest:
                return f"{name} is damaged"
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


def save_checkpoint(accelerator: Accelerator, output: Path, step: int, keep: int) -> None:
    """Writes model, optimizer, scheduler and random states; all processes call it together.

    A folder named `step-...` is whole when it appears, and its manifest shows later damage. All but the
    newest `keep` are deleted, and newer ones that are damaged.

    Raises:
        OSError: If it cannot be written; the checkpoint before it is still there.
    """
    folder, writer = output / "checkpoints", is_writer(accelerator)
    final = folder / f"{PREFIX}{step:07d}"
    if writer:
        remove_leftovers(folder)
    try:
        with write_whole_folder(final, replace=True) if writer else contextlib.nullcontext() as partial:
            names = gather_object([partial])  # of the writer on this machine, or on all
            partial = partial or next(name for name in names[accelerator.process_index :: -1] if name)
            accelerator.save_state(str(partial))
            accelerator.wait_for_everyone()
            if writer:
                files = sorted(path for path in partial.rglob("*") if path.is_file())
                write_json(
                    partial / MANIFEST, {str(path.relative_to(partial)): hash_file(path) for path in files}
                )
    # Each writer reports a full disk differently; that of shards by no `Exception`.
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        raise OSError(
            f"checkpoint of step {step} could not be written to {folder}: {error}. Free space and continue "
            "with --resume from the checkpoint before it"
        ) from error
    if writer:
        found = _find_checkpoints(folder)
        kept = sorted(number for number in found if number <= step)[-keep:]
        # A run resumes before those that are damaged, or that another machine lacks: these are whole.
        newer = [number for number in found if number > step and _find_damage(found[number]) is None]
        for number in found.keys() - kept - set(newer):
            shutil.rmtree(found[number], ignore_errors=True)  # a link to another disk stays
    accelerator.wait_for_everyone()


def restore_checkpoint(accelerator: Accelerator, checkpoint: Path) -> None:
    """Loads what [`save_checkpoint`] wrote; all processes call it together.

    Raises:
        ValueError: If it cannot be loaded; names it and the remedy.
    """
    try:
        accelerator.load_state(str(checkpoint))
    except ValueError:
        raise
    # Accelerate, torch and safetensors raise their own types; that of shards is no `Exception`.
    except (Exception, CheckpointException) as error:
        remedy = "Delete this folder and repeat with --resume, which then takes the checkpoint before it"
        if (checkpoint / MANIFEST).exists():  # its digests have been compared
            remedy = (
                "Its files are as they were written, so keep it: continue with the number of processes, the "
                "launcher's options and the versions of libraries that wrote it"
            )
        raise ValueError(f"checkpoint {checkpoint} cannot be loaded: {error}. {remedy}") from error
