"""Checkpoints that are whole or absent, and stopping in good order."""

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from transformers.processing_utils import ProcessorMixin

__all__ = [
    "StopRequest",
    "latest_checkpoint",
    "own_run_folder",
    "replace_folder",
    "save_checkpoint",
    "write_export",
]

PREFIX = "step-"


@contextlib.contextmanager
def own_run_folder(accelerator: Accelerator, folder: Path) -> Iterator[None]:
    """Makes the run folder and keeps other runs out of it: two would overwrite each other's checkpoints.

    Killing a launcher can leave the training below it alive, so this does happen. The lock goes with its
    process.

    Raises:
        ValueError: If another process is training there.
    """
    if not accelerator.is_main_process:
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


def latest_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The newest complete checkpoint of a run folder and its step."""
    found = {int(p.name.removeprefix(PREFIX)): p for p in folder.glob(f"{PREFIX}*") if p.is_dir()}
    if not found:
        return None
    step = max(found)
    return found[step], step


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, keep: int) -> Path:
    """Writes model, optimiser, scheduler and random states; all processes call it together.

    A checkpoint is written under a temporary name and renamed when every process has finished, so that a
    folder named `step-...` is always whole. Older ones beyond `keep` are deleted afterwards.
    """
    final = folder / f"{PREFIX}{step:07d}"
    partial = folder / f".{final.name}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
    except (OSError, RuntimeError, SafetensorError) as error:  # each writer has its own word for a full disk
        raise OSError(
            f"checkpoint of step {step} could not be written to {folder}: {error}. Free space and go on "
            "with --resume from the checkpoint before it"
        ) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        replace_folder(partial, final)
        for old in sorted(folder.glob(f"{PREFIX}*"))[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def replace_folder(new: Path, target: Path) -> None:
    """Puts a finished folder in the place of another one, which is gone only when the new one stands."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        os.replace(target, old)
    os.replace(new, target)
    shutil.rmtree(old, ignore_errors=True)


def write_export(
    target: Path,
    processor: ProcessorMixin,
    write: Callable[[Path], None],
    complete: Callable[[Path], None] | None = None,
) -> None:
    """Writes model and processor for `from_pretrained`; `target` appears only when it is whole.

    Args:
        target (`Path`): Where to.
        processor (`ForesightProcessor`): Of the model.
        write (`Callable`): Writes the model into the folder it is given.
        complete (`Callable`, *optional*): Adds to that folder when model and processor are in it.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write(partial)
        processor.save_pretrained(partial)
        if complete is not None:
            complete(partial)
        replace_folder(partial, target)
    except (OSError, RuntimeError, SafetensorError) as error:  # as in `save_checkpoint`
        raise OSError(
            f"the model could not be written to {target}: {error}. Free space and repeat with --resume"
        ) from error


class StopRequest:
    """Turns SIGINT and SIGTERM into a wish that the loop reads between steps; a second one stops at once.

    Args:
        accelerator (`Accelerator`): All its processes stop at the same step, whichever got the signal.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.signal = accelerator, 0
        self._before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, frame) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def __bool__(self) -> bool:
        if self.accelerator.num_processes > 1:
            wish = torch.tensor([self.signal], device=self.accelerator.device)
            self.signal = int(self.accelerator.gather(wish).max())
        return self.signal != 0

    def close(self) -> None:
        """Gives the signals back to whoever had them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """What a shell expects of a program ended by a signal."""
        return 128 + self.signal
