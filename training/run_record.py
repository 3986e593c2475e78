"""What a figure was measured with: versions, hardware, commit, command. Paths of the machine are left out."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from datasets_scripts.command_line import count_cores

__all__ = ["describe_run", "portable_command", "portable_path", "resume_command"]

ROOT = Path(__file__).resolve().parents[1]
PROJECT = "lerobot_policy_foresight"
PACKAGES = ("torch", "transformers", "lerobot", "metaworld", "hf-libero", "robosuite", "mujoco", PROJECT)


def _versions() -> dict[str, str]:
    """Versions of Python, of this project and of the installed libraries that decide a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _hardware() -> dict:
    """Processor model, usable cores, PyTorch's threads, and the GPU if there is one."""
    import torch

    found = {"cpu": _cpu_model(), "cores": count_cores(), "torch_threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """Commit of the checkout this code runs from, with `+changes` if files differ; `None` outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return None  # installed into some other project's checkout
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def portable_path(path: str | Path, start: str | Path | None = None) -> str:
    """A path as it may be published: relative to `start`, or its last part.

    By default it is relative to the working directory if it lies inside; with a `start`, one step up is
    allowed too. Relative paths and Hub ids do not change unless `start` is given.
    """
    path = Path(path)
    if not path.is_absolute() and start is None:
        return path.as_posix()
    relative = os.path.relpath(path.resolve(), Path(start or ".").resolve())
    # Further up is another place of the machine.
    outside = ".." if start is None else os.path.join("..", "..")
    return path.name if relative.startswith(outside) else Path(relative).as_posix()


def portable_command(script: str, arguments: list[str]) -> str:
    """The command line of a script of the project with absolute paths shortened.

    `script` is what follows `python`: `training/evaluate.py`, or `-m experiments.ablation`.
    """

    def shorten(argument: str) -> str:
        name, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        return name + equals + (portable_path(value) if os.path.isabs(value) else value)

    # `accelerate launch` tells its children what it decided; its own options are not among the arguments.
    launcher = ["accelerate", "launch"] if "ACCELERATE_MIXED_PRECISION" in os.environ else ["python"]
    return shlex.join([*launcher, *script.split(), *map(shorten, arguments)])


def _own_script() -> str:
    """What this process runs, as `portable_command` takes it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:  # of `python -m`, which finds packages that a script in a folder does not
        return f"-m {spec.name.removesuffix('.__main__')}"
    return portable_path(Path(sys.argv[0]).resolve(), ROOT) if sys.argv[0] else "-"


def describe_run(script: str | None = None, arguments: list[str] | None = None) -> dict:
    """Command, date (UTC), commit, versions and hardware of this process, ready for JSON.

    `script` and its `arguments` are the command; by default the one that this process runs.
    """
    return {
        "command": portable_command(
            script or _own_script(), sys.argv[1:] if arguments is None else arguments
        ),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git_commit(),
        "versions": _versions(),
        "hardware": _hardware(),
    }


def resume_command(launcher: Sequence[str] | None = None) -> str:
    """The command that started this process, with its launcher or another one, and with `--resume`."""
    if launcher:
        return shlex.join([*launcher, *sys.argv, *(["--resume"] if "--resume" not in sys.argv else [])])
    own = [sys.executable, *sys.argv]
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process().parent().cmdline()
        if parent[-len(sys.argv[1:]) :] == sys.argv[1:] and sys.argv[1:]:
            own = parent
    name = Path(own[0]).name
    own = own[1:] if name.startswith("python") and os.access(own[1], os.X_OK) else own  # a script of its own
    return shlex.join([*own, *(["--resume"] if "--resume" not in own else [])])
