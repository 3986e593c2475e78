"""A folder of bounded size for files that can be downloaded again."""

import contextlib
import glob
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from datasets_scripts.storage.cache.cache_folder import FOR_ALL_USERS

__all__ = ["FileStore"]

PART, LOCK = ".part", ".lock"
POLL_S = 0.2


class FileStore:
    """Files in a folder that all processes of the machine share; the least recently used make room for new.

    Files that are removed while a process reads them stay readable for it. What a killed process left is
    removed when room is needed.

    Args:
        folder (`Path`): The folder; files named `meta/...` in the folders in it do not count.
        limit_bytes (`int`): Largest size of all other files together, those being written included.

    Raises:
        ValueError: If the folder cannot be made or written, or the disk has not that much room.
    """

    def __init__(self, folder: Path, limit_bytes: int):
        self.folder, self.limit_bytes = folder, limit_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _no_folder(folder, error.strerror) from error
        if not os.access(folder, os.W_OK):
            raise _no_folder(folder, "it is not writable")
        room = shutil.disk_usage(folder).free + sum(size for _, size, _ in self._scan())
        if limit_bytes > room:
            raise ValueError(
                f"{folder} may take {limit_bytes / 1e9:.3g} GB for streaming, but its disk has room for "
                f"{room / 1e9:.3g} GB: lower data.streaming_disk_gb, or set FORESIGHT_CACHE to another disk"
            )

    def use(self, path: Path) -> bool:
        """Whether a file is there; notes that it is used."""
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        except PermissionError:  # another user's, which can be read
            pass
        return True

    def fetch(
        self,
        path: Path,
        n_bytes: int,
        write: Callable[[Path], None],
        keep: Collection[Path] | None = None,
    ) -> bool:
        """Makes a file of the folder if it is missing, once for all processes.

        Args:
            path (`Path`): The file.
            n_bytes (`int`): Room that it needs, what `write` needs in between included.
            write (`Callable`): Writes it under a temporary name, beside which it may leave others that
                begin with that name.
            keep (`Collection[Path]`, *optional*): Files that must not make room for this one.

        Returns:
            `bool`: Whether it is there; false only if there was no room beside `keep`.

        Raises:
            ValueError: If it alone needs more than the limit.
        """
        if self.use(path):
            return True
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path):
            if self.use(path):
                return True
            part = path.with_name(f".{path.name}.{n_bytes}{PART}")
            _remove_parts(path)
            try:
                if not self._reserve(part, n_bytes, keep):
                    return False
                write(part)
                os.replace(part, path)
            finally:
                _remove_parts(path)
        return True

    def _reserve(self, part: Path, n_bytes: int, keep: Collection[Path] | None) -> bool:
        """Creates `part`, which from then on counts `n_bytes`, once there is room."""
        if n_bytes > self.limit_bytes:
            raise ValueError(
                f"{part.parent.name}/{part.name.split('.')[1]} needs {n_bytes / 1e9:.3g} GB, more than "
                f"data.streaming_disk_gb={self.limit_bytes / 1e9:.3g}: raise it"
            )
        while True:
            with FileLock(self.folder / LOCK, mode=FOR_ALL_USERS):
                if self._make_room(n_bytes, keep or ()):
                    part.touch()
                    return True
            if keep is not None:
                return False
            time.sleep(POLL_S)  # other processes are filling it with what they need now

    def _make_room(self, n_bytes: int, keep: Collection[Path]) -> bool:
        files = list(self._scan())
        excess = sum(size for _, size, _ in files) + n_bytes - self.limit_bytes
        for path, size, _ in sorted(files, key=lambda file: file[2]):
            if excess <= 0:
                break
            if path.name.endswith(PART):
                removed = self._remove_abandoned(path)
            else:
                removed = path not in keep and _unlink(path)
            excess -= size if removed else 0
        return excess <= 0

    def _remove_abandoned(self, part: Path) -> bool:
        """Removes what a killed process was writing."""
        path = part.with_name(part.name.removeprefix(".").rsplit(".", 2)[0])
        with contextlib.suppress(Timeout), _lock(path, timeout=0):
            _remove_parts(path)
            return True
        return False

    def _scan(self) -> Iterator[tuple[Path, int, int]]:
        """Path, size and time of last use of all files that count."""
        for folder, inner, names in os.walk(self.folder):
            if "meta" in inner:
                inner.remove("meta")
            for name in names:
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    if name.endswith(PART):
                        yield path, int(name.rsplit(".", 2)[1]), status.st_mtime_ns
                    elif not name.startswith("."):
                        yield path, status.st_size, status.st_mtime_ns


def _remove_parts(path: Path) -> None:
    """Removes what was being written for a file; its lock must be held."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*{PART}*"):
        part.unlink(missing_ok=True)


def _lock(path: Path, timeout: float = -1) -> FileLock:
    """The lock of a file; with a negative timeout it waits forever."""
    return FileLock(path.with_name(f".{path.name}{LOCK}"), timeout=timeout, mode=FOR_ALL_USERS)


def _no_folder(folder: Path, reason: str) -> ValueError:
    return ValueError(
        f"streamed files cannot be kept in {folder} ({reason}): set FORESIGHT_CACHE to another folder"
    )


def _unlink(path: Path) -> bool:
    """Removes a file; Windows refuses while a process reads it."""
    try:
        path.unlink(missing_ok=True)
    except PermissionError:
        return False
    return True
