"""Download a LeRobot dataset from the Hugging Face Hub: data at once, videos when they are needed.

Files lie in LeRobot's own cache, so LeRobot finds them there and nothing is downloaded twice.
"""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import get_token, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from lerobot.datasets.dataset_metadata import CODEBASE_VERSION
from lerobot.utils.constants import HF_LEROBOT_HUB_CACHE

from datasets_scripts.storage.dataset_folder import load_features

__all__ = [
    "LOG_IN",
    "TRANSPORT_ERRORS",
    "HubError",
    "HubFiles",
    "error_chain",
    "explain_hub_errors",
    "find_refusals",
    "is_hub_id",
    "open_hub_dataset",
    "read_revision",
]

# The client lets errors of its HTTP library through: httpx in huggingface_hub 1, httpx2 in huggingface_hub 2.
_HTTP_LIBRARIES = [
    importlib.import_module(name) for name in ("httpx", "httpx2") if importlib.util.find_spec(name)
]
HTTP_ERRORS = tuple(library.HTTPError for library in _HTTP_LIBRARIES)
TRANSPORT_ERRORS = tuple(library.TransportError for library in _HTTP_LIBRARIES)

DOWNLOADS_AT_ONCE = 8
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def is_hub_id(name: str | Path) -> bool:
    """Whether a name has the form of a repository on the Hub, `owner/name`; asks nobody."""
    try:
        validate_repo_id(str(name))
    except HFValidationError:
        return False
    return "/" in str(name)


class HubError(RuntimeError):
    """The Hub cannot be reached or refuses."""


@dataclasses.dataclass(frozen=True)
class HubFiles:
    """The files of one commit of a dataset."""

    repo_id: str  # owner/name
    revision: str  # the commit, so that later downloads match the first

    def fetch(self, places: Sequence[str]) -> None:
        """Download files (`videos/observation.images.main/chunk-000/file-000.mp4`) in parallel.

        Raises:
            ValueError: If the dataset has no such file; names it.
            HubError: If the Hub cannot be reached.
        """
        with ThreadPoolExecutor(DOWNLOADS_AT_ONCE) as pool:
            list(pool.map(self._fetch_one, places))

    def _fetch_one(self, place: str) -> None:
        with explain_hub_errors(self.repo_id):
            try:
                hf_hub_download(self.repo_id, place, **_dataset_options(self.revision))
            except RemoteEntryNotFoundError:
                raise ValueError(f"dataset {self.repo_id} lacks the file {place} on the Hub") from None


def open_hub_dataset(name: str, videos: bool = True) -> tuple[Path, HubFiles]:
    """Download a dataset; returns its folder in LeRobot's cache, and its files on the Hub.

    Args:
        name (`str`): `owner/name`, or `owner/name@revision` for a branch, tag or commit. Without a revision,
            LeRobot's format tag is used, or the main branch if there is no such tag.
        videos (`bool`): Whether to download the videos now; otherwise `HubFiles.fetch` does.

    Raises:
        ValueError: If there is no such dataset, this token may not read it, or it is not LeRobot v3.
        HubError: If the Hub cannot be reached and the dataset is not in the cache.
    """
    repo_id, _, revision = name.partition("@")
    with explain_hub_errors(repo_id):
        root = Path(read_revision(lambda name: _download_metadata(repo_id, name), revision))
        try:
            load_features(root)  # refuses another format before more is downloaded
        except ValueError as error:  # its message names the folder in the cache
            wording = str(error).replace(str(root), f"dataset {repo_id}").replace("OWNER/NAME", repo_id)
            raise ValueError(wording) from None
        wanted = ["data/*", *(["videos/*"] if videos else [])]
        snapshot_download(repo_id, allow_patterns=wanted, **_dataset_options(root.name))
    return root, HubFiles(repo_id, root.name)


def read_revision[T](read: Callable[[str], T], revision: str | None) -> T:
    """What `read` gives for the revision of a dataset that is wanted.

    Args:
        read (`Callable[[str], T]`): Given a branch, tag or commit.
        revision (`str`, *optional*): The wanted one. Without, LeRobot's format tag is taken, or the main
            branch if there is no such tag.

    Raises:
        RevisionNotFoundError, LocalEntryNotFoundError: If there is none, on the Hub or in the cache.
    """
    if revision:
        return read(revision)
    try:
        return read(CODEBASE_VERSION)
    except (RevisionNotFoundError, LocalEntryNotFoundError):
        return read("main")


def _download_metadata(repo_id: str, revision: str) -> str:
    """Folder of a revision in LeRobot's cache."""
    wanted = ["meta/*", "README.md"]  # the card names the license
    return snapshot_download(repo_id, allow_patterns=wanted, **_dataset_options(revision))


def _dataset_options(revision: str) -> dict:
    return {"repo_type": "dataset", "revision": revision, "cache_dir": HF_LEROBOT_HUB_CACHE}


@contextlib.contextmanager
def explain_hub_errors(repo_id: str, repo_type: str = "dataset") -> Iterator[None]:
    """Turn errors of the Hub's client into one line with the remedy, without addresses or tokens.

    Raises:
        ValueError: If the repository or a file of it does not exist for this token.
        HubError: If the Hub cannot be reached, refuses, or fails.
    """
    # `from None`: logs show a cause with the values of its variables, tokens among them.
    token = "this token may not see it" if get_token() else "no token is set"
    what = f"{repo_type} {repo_id}"
    try:
        yield
    except HubError:
        raise
    except GatedRepoError:
        raise ValueError(f"{what} is gated: accept its terms on its page, then {LOG_IN}") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"the Hub has no {what}, or it is private and {token}: check the name, or {LOG_IN}"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"{what} has no such revision on the Hub; leave it out, or name one") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, *HTTP_ERRORS, ConnectionError, RuntimeError) as error:
        raise HubError(_describe_error(what, error)) from None


def error_chain(error: BaseException) -> list[BaseException]:
    """An error and its causes."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    return chain


def find_refusals(error: BaseException) -> list[HfHubHTTPError]:
    """The Hub's answers among an error and its causes."""
    return [cause for cause in error_chain(error) if isinstance(cause, HfHubHTTPError)]


def _describe_error(what: str, error: Exception) -> str:
    """Message of an error of the Hub's client, with the remedy."""
    chain, refusals = error_chain(error), find_refusals(error)
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in chain):
        return (
            f"{what} is not in the cache, or not all of it, and HF_HUB_OFFLINE forbids downloads: "
            "unset it, or name a folder"
        )
    answers = [refusal.response.status_code for refusal in refusals]
    if 401 in answers:
        return f"the Hub refuses the token for {what} (HTTP 401), it may have expired: {LOG_IN}"
    if 403 in answers:
        return (
            f"this token may not do that with {what} (HTTP 403): {LOG_IN}, with a token that has the role "
            "write and belongs to its owner"
        )
    if answers and answers[0] < 500 and answers[0] not in (408, 429):
        reason = refusals[0].server_message or "no reason given"
        return f"the Hub refuses that with {what} (HTTP {answers[0]}: {reason})"
    cause = f"HTTP {answers[0]}" if answers else f"{type(chain[-1]).__name__}: {chain[-1]}"
    return (
        f"the Hub cannot be reached for {what} ({cause}): check the connection and run the same command again"
    )
