"""The files of a dataset elsewhere: on the Hub, in a bucket, or in another folder."""

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError

from datasets_scripts.storage.dataset_rows import find_folder
from datasets_scripts.storage.hub.download import (
    DOWNLOADS_AT_ONCE,
    HubError,
    explain_hub_errors,
    find_refusals,
    read_revision,
)

__all__ = ["RemoteFile", "RemoteFiles"]

HUB_DATASETS = "hf://datasets/"
PARTS = ("meta/", "data/", "videos/")
# What tells two states of a file apart, by file system: Hub and bucket, S3, Google Cloud, Azure, a folder.
VERSIONS = ("xet_hash", "blob_id", "ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified")
RETRY_WAITS_S = (1, 2, 4, 8, 16, 32, 64)  # two minutes: a training outlives a short failure of the network


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """Size in bytes, and what changes when the file does."""

    size: int
    version: str


class RemoteFiles:
    """The files of a dataset as they are when this is opened; later changes are noticed and refused.

    Args:
        name (`str`): Folder, Hub id (`owner/name`, `owner/name@revision`), or an URL that fsspec knows
            (`s3://bucket/folder`, `hf://buckets/owner/name`).

    Attributes:
        url (`str`): Where the files are; of the Hub, with the commit.
        commit (`str`, *optional*): That of the Hub.
        files (`dict[str, RemoteFile]`): By place (`videos/observation.images.main/chunk-000/file-000.mp4`).
        digest (`str`): The same for the same files.

    Raises:
        ValueError: If there is no such dataset, or a package for the URL is missing.
        HubError: If it cannot be reached.
    """

    def __init__(self, name: str):
        self.name = name
        self.url, self.commit = _resolve(name)
        with self._explained():
            try:
                self._files, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
            except ImportError as error:
                raise ValueError(f"dataset {name}: {error}") from None
            found = self._files.find(self._root, detail=True)
        start = len(self._root.rstrip("/")) + 1
        places = {path[start:]: info for path, info in found.items()}
        self.files = {
            place: RemoteFile(int(info["size"] or 0), _version(info))
            for place, info in sorted(places.items())
            if place.startswith(PARTS)
        }
        if not self.files:
            raise ValueError(f"dataset {name}: {self.url} has no LeRobot dataset (meta, data, videos)")
        content = repr([(place, *dataclasses.astuple(file)) for place, file in self.files.items()])
        self.digest = hashlib.sha256(content.encode()).hexdigest()[:16]

    def download(self, place: str, target: Path) -> None:
        """Copies one file; tries again for two minutes if the network fails.

        Raises:
            ValueError: If the file does not exist any more, or has changed; names it.
            HubError: If it cannot be reached.
        """
        for wait_s in (*RETRY_WAITS_S, None):
            try:
                self._download_once(place, target)
                return
            except (FileNotFoundError, EntryNotFoundError):
                raise ValueError(
                    f"dataset {self.name}: the file {place} has vanished from {self.url} since it was "
                    "opened; put it back, then continue with --resume"
                ) from None
            except (ValueError, PermissionError):
                raise
            except Exception as error:  # each file system has its own
                final = any(400 <= no.response.status_code < 500 for no in find_refusals(error))
                if wait_s is None or (final and not _is_busy(error)):
                    with self._explained():
                        raise
            time.sleep(wait_s)

    def _download_once(self, place: str, target: Path) -> None:
        path, known = f"{self._root.rstrip('/')}/{place}", self.files[place]
        if self.commit is None:  # otherwise what is there never changes
            info = self._files.info(path)
            now = RemoteFile(int(info["size"]), _version(info))
            if now != known:
                raise ValueError(
                    f"dataset {self.name}: the file {place} of {self.url} has changed since it was opened "
                    f"({known.size} bytes then, {now.size} now); put the old one back, or start a new run"
                )
        self._files.get_file(path, str(target))
        if (found := target.stat().st_size) != known.size:
            raise ConnectionError(f"{place} came with {found} of {known.size} bytes")

    def download_metadata(self, folder: Path) -> None:
        """Copies the files of `meta` into a folder."""
        targets = {place: folder / place[5:] for place in self.files if place.startswith("meta/")}
        for target in targets.values():
            target.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(DOWNLOADS_AT_ONCE) as pool:
            list(pool.map(self.download, targets, targets.values()))

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns errors of the file system into one line."""
        if self.url.startswith(HUB_DATASETS):
            with explain_hub_errors(self.url.removeprefix(HUB_DATASETS).partition("@")[0]):
                yield
            return
        try:
            yield
        except (ValueError, HubError):
            raise
        except FileNotFoundError:
            raise ValueError(f"dataset {self.name}: there is nothing at {self.url}") from None
        except Exception as error:  # each file system has its own
            cause = f"{type(error).__name__}: {error}"
            raise HubError(f"dataset {self.name}: {self.url} cannot be read ({cause})") from None


def _resolve(name: str) -> tuple[str, str | None]:
    """URL of a dataset, and its commit on the Hub."""
    name = name.removeprefix(HUB_DATASETS).rstrip("/")
    if "://" in name:
        return name, None
    if (folder := find_folder(name)) is not None:
        return f"file://{folder.as_posix()}", None  # as_uri would escape characters, which fsspec keeps
    repo_id, _, revision = name.partition("@")
    with explain_hub_errors(repo_id):
        found = read_revision(lambda name: HfApi().dataset_info(repo_id, revision=name), revision)
    return f"{HUB_DATASETS}{repo_id}@{found.sha}", found.sha


def _version(info: dict) -> str:
    return next((str(info[name]) for name in VERSIONS if info.get(name)), "")


def _is_busy(error: Exception) -> bool:
    return any(no.response.status_code in (408, 429) for no in find_refusals(error))
