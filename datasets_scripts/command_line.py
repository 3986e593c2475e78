"""What the commands share: exit codes, errors in one line, usable cores, lists of names, devices.

Simulator processes import the command again, so nothing here imports PyTorch at the top.
"""

import argparse
import errno
import functools
import os
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = [
    "EXPECTED_ERRORS",
    "count_cores",
    "entry_point",
    "list_some",
    "pick_device",
    "read_pair",
    "split_names",
]

# What a user can mend: files, options, missing libraries. Anything else is a bug, and keeps its traceback.
EXPECTED_ERRORS = (OSError, ValueError, RuntimeError)
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def entry_point[**P](
    resumes: bool = False, errors: tuple[type[Exception], ...] = EXPECTED_ERRORS
) -> Callable[[Callable[P, int | None]], Callable[P, int]]:
    """Decorator of a command's `main`: it prints errors as one line, and returns an exit code.

    The code is that of `main` (0 for `None`), 1 after an error, and 130 after Ctrl-C.

    Args:
        resumes (`bool`): Whether the same command, run again, keeps what was done so far.
        errors (`tuple`): Exceptions to print; the others are raised.
    """

    def decorate(main: Callable[P, int | None]) -> Callable[P, int]:
        @functools.wraps(main)
        def command(*args: P.args, **kwargs: P.kwargs) -> int:
            try:
                return main(*args, **kwargs) or 0
            except KeyboardInterrupt:
                advice = "; run the same command again to resume" if resumes else ""
                print(f"interrupted{advice}", file=sys.stderr)
                return 130
            except errors as error:
                is_full = getattr(error, "errno", None) in FULL_DISK
                advice = "; free some space and run the same command again" if is_full else ""
                # Some libraries write paragraphs.
                print(f"error: {' '.join(str(error).split())}{advice}", file=sys.stderr)
                return 1

        return command

    return decorate


def count_cores() -> int:
    """Cores that this process may use; Slurm, `taskset` and containers give it some of the machine's."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def split_names(text: str) -> list[str]:
    """The names in a comma-separated list, without blanks around them and without empty ones."""
    return [name.strip() for name in text.split(",") if name.strip()]


def read_pair(text: str) -> tuple[str, str]:
    """Type of an option `NAME=VALUE`; the value may be empty."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, value


def list_some(names: Iterable, most: int = 3) -> str:
    """`a, b, c and 4 more`, in the order that is given."""
    shown = list(map(str, names))
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more


def pick_device(device: str | None = None) -> "torch.device":
    """The device of this name; `None` and `"auto"` are a GPU if there is one, otherwise the CPU.

    Raises:
        ValueError: If there is no such device.
    """
    import torch

    if device in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device '{device}': use auto, cpu, cuda or cuda:1") from error
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no device '{device}': PyTorch sees {torch.cuda.device_count()} GPUs")
    return picked
