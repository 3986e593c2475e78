"""Reading the batches of a step: in all processes, or in none."""

import contextlib
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from datasets_scripts.storage.hub.download import HubError

__all__ = ["iterate", "read_everywhere"]


def iterate(loader: DataLoader) -> Iterator:
    """The batches of a loader; a loader process that is killed is noticed when one is read.

    PyTorch has the main thread raise an error wherever it is, also in the middle of an update.
    """
    before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    batches = iter(loader)
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
    return batches


def read_everywhere(
    accelerator: Accelerator, batches: Iterator, parts: int, step: int, save: Callable[[], None] | None
) -> list:
    """The `parts` micro-batches of a step. If a process cannot read them, all save a checkpoint and stop.

    Args:
        accelerator (`Accelerator`): What trains; all processes call this together.
        batches (`Iterator`): Those of this process.
        parts (`int`): How many a step takes.
        step (`int`): Steps that are done.
        save (`Callable`, *optional*): Saves a checkpoint, in all processes; `None` if nothing was trained.

    Raises:
        ValueError: In every process; says what cannot be read.
    """
    found, problem = [], None
    try:
        found = [next(batches) for _ in range(parts)]
    except Exception as error:  # whatever libraries and loader processes raise: the others wait in `gather`
        problem = error
    is_read = torch.tensor([problem is None], device=accelerator.device)
    if accelerator.gather(is_read).all():
        return found
    reason = _explain(problem) if problem else "another process could not read its windows"
    if save:
        save()
    saved = f"The checkpoint of step {step} is saved" if save else "Nothing was trained since the start"
    raise ValueError(f"step {step + 1}: {reason}. {saved}; continue with --resume") from problem


def _explain(problem: Exception) -> str:
    """One line that says what went wrong, with the remedy for a killed loader process."""
    told, is_known = str(problem), isinstance(problem, (ValueError, OSError, HubError))
    if isinstance(problem, RuntimeError) and "DataLoader worker" in told and "Traceback" not in told:
        return (
            f"a loader process was killed, probably because the memory was full, or /dev/shm of a container "
            f"({told}): take fewer of them (num_workers), or give the machine more"
        )
    if not is_known:  # a fault of ours or of a library, which its place helps to find
        with contextlib.suppress(OSError):  # a closed terminal
            traceback.print_exception(problem, file=sys.stderr)
    if "Original Traceback" in told:  # of a loader process; its last line is the error
        last = told.rstrip().rpartition("\n")[2]
        return last.partition(": ")[2] if is_known else last
    return told if is_known else f"{type(problem).__name__}: {told}"
