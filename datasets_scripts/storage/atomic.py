"""Write files and folders whole or not at all, under a temporary name that is then renamed; read JSON.

Work of hours first asks [`check_place`] and [`refuse_contents`] whether its results can be written at its
end.
"""

import contextlib
import errno
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "check_place",
    "read_json",
    "refuse_contents",
    "remove_leftovers",
    "share_file",
    "write_json",
    "write_whole_file",
    "write_whole_folder",
]

# Errors of linking: another file system, one without links, too many of them.
NO_LINK = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK)
NO_SYNC = (errno.EINVAL, errno.ENOTSUP)  # of syncing a folder on some network file systems
SUFFIX, REPLACED = ".tmp", ".replaced"


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
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def write_whole_folder(
    path: str | Path, beside: Path | None = None, shared: bool = False, replace: bool = False
) -> Iterator[Path]:
    """Yield an empty folder; on success it is renamed to `path`, on any error it is removed.

    Args:
        path (`str` or `Path`): The folder to make; unless `replace`, it must be missing or empty when the
            block ends.
        beside (`Path`, *optional*): Parent of the temporary folder, on the same file system (default: that of
            `path`).
        shared (`bool`): Whether other processes may make the same folder; the first one stays.
        replace (`bool`): Whether the new folder, once whole, takes the place of one that exists. No other
            process may be writing the same folder: what a killed one left is removed.

    Raises:
        ValueError: If `path` is a mount point (unless `replace`).
        OSError: If the disk is full, or (unless `shared` or `replace`) `path` has contents.
    """
    path = Path(path) if replace else real_folder(Path(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    if replace:
        remove_leftovers(path.parent, glob.escape(path.name))
    folder = Path(tempfile.mkdtemp(dir=beside or path.parent, prefix=f".{path.name}.", suffix=SUFFIX))
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp makes private folders
        for part in (*folder.rglob("*"), folder):
            _sync(part)
        with _set_aside(path) if replace else contextlib.nullcontext():
            os.replace(folder, path)
        _sync(path.parent)
    except OSError as error:
        if not (shared and error.errno in (errno.ENOTEMPTY, errno.EEXIST)):
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def real_folder(path: Path) -> Path:
    """The folder that a path names, also through a link: a link cannot be replaced by a folder.

    Raises:
        ValueError: If it is a mount point, which cannot be replaced either.
    """
    path = path.resolve() if path.is_symlink() else path
    if os.path.ismount(path):
        raise ValueError(f"{path} is a mount point, which cannot be replaced: name a folder inside of it")
    return path


def _sync(path: Path) -> None:
    """Wait until a file or a folder's list is on the disk: after a power cut no name must lack content."""
    if path.is_symlink():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def _set_aside(path: Path) -> Iterator[None]:
    """Move what is at `path` away; it is removed on success and comes back on an error."""
    old = path.with_name(f".{path.name}{REPLACED}")
    if not os.path.lexists(path):
        yield
        return
    os.replace(path, old)
    try:
        yield
    except BaseException:
        os.replace(old, path)
        raise
    if old.is_symlink():
        old.unlink()
    else:
        shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove temporary folders of killed processes; nobody else may be writing in `folder`.

    A folder that was about to be replaced when its process was killed gets its name back.
    """
    for old in folder.glob(f".{name}{REPLACED}"):
        path = old.with_name(old.name.removeprefix(".").removesuffix(REPLACED))
        if not os.path.lexists(path):
            os.replace(old, path)
        else:
            shutil.rmtree(old, ignore_errors=True)
    for leftover in folder.glob(f".{name}.{8 * '?'}{SUFFIX}"):
        shutil.rmtree(leftover, ignore_errors=True)


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file; a reader sees the old or the new one, never half of it."""
    with write_whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, remedy: str = "download or create it again", kind: type = dict) -> Any:
    """Contents of a JSON file; raises a `ValueError` that names it if it is damaged, or of another kind."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, kind):
            raise ValueError(f"it holds a {type(content).__name__}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from None
    return content


def check_place(path: Path, option: str, suffix: str = "") -> None:
    """Refuses a place at which no file can be written, or a name that does not end in `suffix`.

    Raises:
        ValueError: If a folder is there, or a file where a parent would be; names the option that gave the
            path.
    """
    if path.is_dir():
        raise ValueError(f"{option} is {path}, which is a folder: give the name of a file")
    if suffix and path.suffix != suffix:
        raise ValueError(f"{option} is {path}; its name must end in {suffix}")
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if not existing.is_dir():
        raise ValueError(f"{option} is {path}, but {existing} is a file: choose another place")


def refuse_contents(
    folder: Path, option: str, is_ours: Callable[[Path], bool] = lambda folder: False
) -> None:
    """Refuses to replace a folder with contents, except one that `is_ours`.

    Raises:
        ValueError: Names the folder and the option that gave it.
    """
    folder = real_folder(folder)
    if not folder.is_dir():
        check_place(folder, option)
        if folder.exists():
            raise ValueError(f"{option} is {folder}, which is a file: give the name of a folder")
    elif any(folder.iterdir()) and not is_ours(folder):
        raise ValueError(
            f"{option} is {folder}, which has contents that would be lost: choose another folder, or move "
            "them away"
        )


def share_file(path: Path, target: Path) -> None:
    """Hard-link a file to another name; copy it where the file system has no links."""
    try:
        os.link(path.resolve(), target)  # the Hub's cache has symbolic links
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        shutil.copyfile(path, target)
