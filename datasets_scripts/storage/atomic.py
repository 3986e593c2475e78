"""Write files and folders whole or not at all: under a temporary name that is then renamed."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["remove_leftovers", "share_file", "write_json", "write_whole_file", "write_whole_folder"]

# Errors of linking: another file system, one without links, too many of them.
NO_LINK = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK)
SUFFIX = ".tmp"


@contextlib.contextmanager
def write_whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file in the same folder; on success it replaces `path`, otherwise it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=SUFFIX)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp makes private files
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def write_whole_folder(
    path: str | Path, beside: Path | None = None, shared: bool = False, replace: bool = False
) -> Iterator[Path]:
    """Give an empty folder; on success it is renamed to `path`, on any error it is removed.

    Args:
        path (`str` or `Path`): The folder to make; unless it is replaced, it must be missing or empty when
            the block ends.
        beside (`Path`, *optional*): Where it grows, on the same file system; beside `path` by default.
        shared (`bool`): Other processes may make the same folder; the first one stays.
        replace (`bool`): A folder that is there is deleted when the new one is whole.

    Raises:
        OSError: If the disk is full, or (unless `shared` or `replace`) `path` has contents.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=beside or path.parent, prefix=f".{path.name}.", suffix=SUFFIX))
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp makes private folders
        if replace and path.exists():
            old = tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=SUFFIX)
            os.replace(path, old)
            os.replace(folder, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(folder, path)
    except OSError as error:
        if not (shared and error.errno in (errno.ENOTEMPTY, errno.EEXIST)):
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary folders of killed processes; nobody else may be writing in `folder`."""
    for leftover in folder.glob(f".*{SUFFIX}"):
        shutil.rmtree(leftover, ignore_errors=True)


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file; a reader sees the old or the new one, never half of it."""
    with write_whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def share_file(path: Path, target: Path) -> None:
    """Hard-link a file to another name; copy it where the file system has no links."""
    try:
        os.link(path.resolve(), target)  # the Hub's cache has symbolic links
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        shutil.copyfile(path, target)
