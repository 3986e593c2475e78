"""Long work on many episodes that can be stopped anywhere and run again: what such commands share.

Unfinished work lies in a folder of its own beside the output, with the parameters that it belongs to. Every
episode is a folder there that appears only when it is whole, and the output is renamed to its place last.
"""

import errno
import functools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import FileLock, Timeout

from datasets_scripts.columns import write_json_atomic

__all__ = [
    "claim_folder",
    "lock_folder",
    "open_folder",
    "refuse_other",
    "resumable_command",
    "work_on_all",
]

PARAMETERS = "parameters.json"


def claim_folder(partial: Path, parameters: dict) -> AbstractContextManager:
    """Takes the folder of unfinished work for this run alone, and removes what a killed one left half done.

    Args:
        partial (`Path`): The folder, which is made if there is none.
        parameters (`dict`): What the work belongs to, as JSON has it.

    Returns:
        The lock that keeps other runs out, to be held while working.

    Raises:
        ValueError: If another run is at work there, or the folder belongs to something else.
    """
    open_folder(partial, parameters)
    lock = lock_folder(partial)
    for left_over in [*partial.glob("dataset-*"), *partial.glob("episodes/tmp-*")]:
        shutil.rmtree(left_over, ignore_errors=True)
    return lock


def open_folder(partial: Path, parameters: dict) -> None:
    """Makes the folder of unfinished work, or checks the one that is there; others may do so meanwhile.

    Raises:
        ValueError: If the folder belongs to something else.
    """
    path = partial / PARAMETERS
    if not path.exists():
        partial.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{partial.name}.", dir=partial.parent))
        try:
            scratch.chmod(0o755)  # mkdtemp makes private folders
            write_json_atomic(scratch / PARAMETERS, parameters)
            scratch.rename(partial)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # somebody else was faster
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    if not path.exists():
        raise ValueError(f"{partial} exists and is not an unfinished run of this script; move it away")
    try:
        earlier = json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"{path} is damaged; delete {partial} and start again") from None
    refuse_other(earlier, parameters, f"an unfinished run in {partial}", partial)


def lock_folder(partial: Path) -> AbstractContextManager:
    """The lock that keeps other runs out of a folder, taken.

    Raises:
        ValueError: If another run has it.
    """
    try:
        return FileLock(partial / "lock").acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another run is at work in {partial}: wait until it ends") from None


def refuse_other(earlier: dict, wanted: dict, what: str, folder: Path) -> None:
    """Raises a `ValueError` if work was done with other parameters; names the first that differs."""
    different = [name for name in wanted if earlier.get(name) != wanted[name]]
    if different:
        values = (earlier.get(different[0]), wanted[different[0]])
        there, here = (textwrap.shorten(str(value), 60, placeholder=" ...") for value in values)
        raise ValueError(
            f"there is {what} with other parameters ({', '.join(different)}: {there} there, {here} here); "
            f"choose another --output, or delete {folder}"
        )


def work_on_all(
    work: Callable[..., dict],
    jobs: Sequence[tuple],
    workers: int,
    start: Callable[..., None] | None = None,
    start_with: tuple = (),
) -> Iterator[dict]:
    """Does all jobs and yields their results as they finish.

    Args:
        work (`Callable`): What is done, with the arguments of a job.
        jobs (`Sequence[tuple]`): Arguments of each.
        workers (`int`): Processes, which are spawned; with 1 everything happens in this one.
        start (`Callable`, *optional*): Called once in every process, this one included, with `start_with`.
        start_with (`tuple`): Its arguments.

    Raises:
        RuntimeError: If a process dies.
    """
    if workers <= 1 or len(jobs) <= 1:
        if start is not None:
            start(*start_with)
        for job in jobs:
            yield work(*job)
        return
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)),
        mp_context=multiprocessing.get_context("spawn"),  # a forked OpenGL context would be shared
        initializer=_start_worker,
        initargs=(start, start_with),
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
        # Episodes under way are finished and kept, the others are not started.
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(start: Callable[..., None] | None, start_with: tuple) -> None:
    """Leaves Ctrl-C to the main process, which lets the episodes under way finish; ends when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if start is not None:
        start(*start_with)


def _end_with_parent() -> None:
    """Else the processes of a killed command would wait for work for ever, with their memory and GPU."""
    multiprocessing.parent_process().join()
    os._exit(1)


def resumable_command(main: Callable[[list[str] | None], None]) -> Callable[..., int]:
    """Makes of `main(argv)` an entry point that returns an exit code; errors are one line with the remedy."""

    @functools.wraps(main)
    def command(argv: list[str] | None = None) -> int:
        try:
            main(argv)
        except KeyboardInterrupt:
            print("interrupted; run the same command again to continue", file=sys.stderr)
            return 130
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            advice = "; free some space and run the same command again to continue" if full else ""
            print(f"error: {error}{advice}", file=sys.stderr)
            return 1
        except (ValueError, RuntimeError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 0

    return command
