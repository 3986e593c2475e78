"""Folders of the cache, one per dataset: held while a process reads them, or deleted when room is needed.

A process that reads a folder holds a shared lock on a file in it, until it ends in whatever way. Only a
folder that nobody holds is deleted, the one opened longest ago first. Where the file system has no such
locks, nothing is deleted.
"""

import contextlib
import hashlib
import os
import re
import shutil
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["CACHE_BYTES", "FOR_ALL_USERS", "cache_base", "make_room", "open_cache_folder"]

CACHE_BYTES = 32 * 2**30  # of all datasets together, unless the user names the folder
FOR_ALL_USERS = 0o666  # mode of locks: several users may share a cache
HELD_FILE = "in-use"
CACHED_KINDS = ("frames", "rows")  # streams beside them have a limit of their own

_held: dict[Path, int] = {}  # open files of this process, by folder


def cache_base() -> Path:
    """Where datasets are cached by default: `$FORESIGHT_CACHE` or `~/.cache/foresight`."""
    return Path(os.environ.get("FORESIGHT_CACHE") or "~/.cache/foresight").expanduser()


def open_cache_folder(base: Path, kind: str, root: Path) -> Path:
    """Make and hold the folder `kind` of the dataset at `root`.

    Raises:
        ValueError: If the folder cannot be made; says what to set.
    """
    label = re.sub(r"[^\w.-]+", "_", root.name)
    folder = base / kind / f"{label}-{hashlib.sha256(str(root).encode()).hexdigest()[:8]}"
    try:
        _hold(folder)
    except OSError as error:
        raise ValueError(
            f"the cache folder {folder} cannot be made ({error.strerror}); set FORESIGHT_CACHE (or, for "
            "pictures, frame_cache) to another folder, or frame_cache to 'off' to decode on demand"
        ) from error
    return folder


def _hold(folder: Path) -> None:
    """Keep a folder from being deleted while this process lives, and note that it is used now."""
    path = folder / HELD_FILE
    while folder not in _held:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists() and not os.access(folder, os.W_OK):
            return  # a finished cache on a disk that cannot be written to
        handle = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
        if fcntl is not None:
            with contextlib.suppress(OSError):  # no locks there
                fcntl.flock(handle, fcntl.LOCK_SH)
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            _held[folder] = handle
        else:  # it was deleted while we waited for the lock
            os.close(handle)
    with contextlib.suppress(OSError):  # another user's
        os.utime(path)


def make_room(base: Path, needed: int) -> int:
    """Delete folders of [`open_cache_folder`] that nobody holds until `needed` bytes fit, or none is left.

    Nothing else is deleted, whatever lies in `base`: the user chose it.

    Returns:
        `int`: Bytes that may be written: the cache may take `CACHE_BYTES`, and half of the disk space that is
        free without it.
    """
    held = [path for kind in CACHED_KINDS for path in (base / kind).glob(f"*/{HELD_FILE}")]
    sizes = {path.parent: _count_bytes(path.parent) for path in held}
    total = sum(sizes.values())

    def room() -> int:
        return min(CACHE_BYTES, (shutil.disk_usage(base).free + total) // 2) - total

    for folder in sorted(sizes, key=_last_use):
        if room() >= needed:
            break
        if _delete_unless_held(folder):
            total -= sizes[folder]
    return max(0, room())


def _count_bytes(folder: Path) -> int:
    found = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # another process deletes or renames it
            found += path.stat().st_size
    return found


def _last_use(folder: Path) -> float:
    with contextlib.suppress(OSError):
        return (folder / HELD_FILE).stat().st_mtime
    return 0.0


def _delete_unless_held(folder: Path) -> bool:
    """Delete a folder if nobody holds it; whoever opens it meanwhile makes it again."""
    if folder in _held or fcntl is None:
        return False
    with contextlib.suppress(OSError):  # held, or not ours
        handle = os.open(folder / HELD_FILE, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            aside = folder.rename(folder.with_name(f".{folder.name.lstrip('.')}.{os.getpid()}"))
            shutil.rmtree(aside)
            return True
        finally:
            os.close(handle)
    return False
