"""Upload files to a repository of the Hugging Face Hub in one commit: all of them, or none.

The Hub's client repeats uploads and listings by itself, but no commits and tags. Before repeating a commit we
check the branch, so nothing is committed twice; one on top of somebody else's is refused by the Hub.
"""

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile

from datasets_scripts.storage.hub_download import (
    LOG_IN,
    TRANSPORT_ERRORS,
    HubError,
    error_chain,
    explain_hub_errors,
)

__all__ = [
    "commit_files",
    "differing",
    "make_repo",
    "move_tag",
    "patiently",
    "remote_files",
    "require_token",
]

PAUSES_S = (1, 2, 4, 8, 16, 32)
LONGEST_PAUSE_S = 300  # that the Hub may ask for
TRANSIENT = {408, 429, 500, 502, 503, 504}
CONFLICT = {409, 412}


def require_token(who: str) -> None:
    """Raises `ValueError` if there is no token, or something that can be none; `who` needs it."""
    token = get_token()
    if token is None:
        raise ValueError(f"{who} needs a token that may write: {LOG_IN}")
    if not (token.isascii() and token.isprintable()):
        raise ValueError(f"{who} needs a token, and what is set has characters that no token has: {LOG_IN}")


def make_repo(repo_id: str, repo_type: str, private: bool) -> None:
    """Makes a repository unless it is there, and finds out whether we may write into it.

    Args:
        repo_id (`str`): `owner/name`.
        repo_type (`str`): `model` or `dataset`.
        private (`bool`): Whether one that is made is; one that is there stays as it is.

    Raises:
        HubError: If the token may not, or the Hub cannot be reached.
    """
    api = HfApi()
    with explain_hub_errors(repo_id, repo_type):
        patiently(lambda: api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True))
        patiently(lambda: api.auth_check(repo_id, repo_type=repo_type, write=True))  # it may be another's


def remote_files(repo_id: str, repo_type: str, revision: str = "main") -> dict[str, RepoFile]:
    """Files of a commit, branch or tag by their place."""
    api = HfApi()
    with explain_hub_errors(repo_id, repo_type):
        tree = patiently(
            lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=revision, repo_type=repo_type))
        )
    return {file.path: file for file in tree if isinstance(file, RepoFile)}


def commit_files(
    repo_id: str,
    repo_type: str,
    files: Mapping[str, Path],
    message: str,
    revision: str = "main",
    delete: Collection[str] = (),
) -> str:
    """Uploads files and commits them at once; without a difference there is no commit.

    What was uploaded before an interruption is not uploaded again; until the commit nobody sees any of it.

    Args:
        repo_id (`str`): `owner/name` of a repository that is there.
        repo_type (`str`): `model` or `dataset`.
        files (`Mapping[str, Path]`): Place in the repository -> file.
        message (`str`): Title of the commit.
        revision (`str`): Branch.
        delete (`Collection[str]`): Places that the same commit empties.

    Returns:
        `str`: The commit that has exactly these files.

    Raises:
        HubError: If the Hub cannot be reached or refuses, or somebody else committed meanwhile; nothing of
            ours is to be seen then.
    """
    change = _Change(repo_id, repo_type, revision, files, delete, message)
    with explain_hub_errors(repo_id, repo_type):
        parent = change.head()
        if change.is_published(parent):
            return parent
        commit = patiently(lambda: change.send(parent))
        if wrong := list(differing(files, remote_files(repo_id, repo_type, commit))):
            raise HubError(
                f"commit {commit} of {repo_type} {repo_id} lacks {wrong[0]} as it is here: does a .gitignore "
                "there hide it?"
            )
    return commit


@dataclasses.dataclass
class _Change:
    """Files that one commit adds to a branch, and places that it empties."""

    repo_id: str
    repo_type: str
    revision: str
    files: Mapping[str, Path]
    delete: Collection[str]
    message: str

    def __post_init__(self):
        # Kept over all attempts: they remember what was uploaded.
        self.operations = [CommitOperationDelete(place) for place in self.delete]
        self.operations += [CommitOperationAdd(place, path) for place, path in self.files.items()]

    def head(self) -> str:
        """The branch's newest commit."""
        ask = HfApi().repo_info
        return patiently(lambda: ask(self.repo_id, repo_type=self.repo_type, revision=self.revision).sha)

    def is_published(self, commit: str) -> bool:
        """Whether a commit has the files, and nothing at the places to empty."""
        there = remote_files(self.repo_id, self.repo_type, commit)
        return not set(self.delete) & set(there) and not list(differing(self.files, there))

    def send(self, parent: str) -> str:
        """Commit on top of `parent`; gives the commit, also one whose answer was lost."""
        try:
            return (
                HfApi()
                .create_commit(
                    self.repo_id,
                    self.operations,
                    commit_message=self.message,
                    repo_type=self.repo_type,
                    revision=self.revision,
                    parent_commit=parent,
                )
                .oid
            )
        except Exception as error:
            if not (_is_transient(error) or _answers(error) & CONFLICT) or (now := self.head()) == parent:
                raise
            if self.is_published(now):
                return now
            raise HubError(
                f"somebody else committed to {self.repo_type} {self.repo_id} meanwhile; nothing of ours is "
                "in it: look at what came, then run the same command again"
            ) from None


def differing(files: Mapping[str, Path], there: Mapping[str, RepoFile]) -> Iterator[str]:
    """Places where the Hub has other contents than ours, or none, by their digests."""
    for place, path in files.items():
        known = there.get(place)
        if known is None or known.size != path.stat().st_size:
            yield place
        elif known.lfs is not None:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != known.lfs.sha256:
                    yield place
        else:
            content = path.read_bytes()
            if hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() != known.blob_id:
                yield place


def move_tag(repo_id: str, repo_type: str, tag: str, commit: str) -> None:
    """Makes a tag point to a commit, wherever it pointed before.

    Raises:
        HubError: If the Hub cannot be reached or refuses.
    """
    api = HfApi()

    def target() -> str | None:
        tags = patiently(lambda: api.list_repo_refs(repo_id, repo_type=repo_type)).tags
        return next((one.target_commit for one in tags if one.name == tag), None)

    def move() -> None:  # may be repeated, wherever it was interrupted
        old = target()
        if old not in (None, commit):
            api.delete_tag(repo_id, tag=tag, repo_type=repo_type)
        if old != commit:
            api.create_tag(repo_id, tag=tag, revision=commit, repo_type=repo_type)

    with explain_hub_errors(repo_id, repo_type):
        patiently(move)


def patiently[T](request: Callable[[], T]) -> T:
    """Send a request again after growing pauses while the connection fails.

    Args:
        request (`Callable`): Whose second call does no harm.

    Returns:
        What the request returns. What it raises at last, or for another reason, is raised.
    """
    for pause in PAUSES_S:
        try:
            return request()
        except Exception as error:
            if not _is_transient(error):
                raise
            _wait(pause, error)
    return request()


def _wait(pause: float, error: Exception) -> None:
    asked = [
        float(cause.response.headers["Retry-After"])
        for cause in error_chain(error)
        if isinstance(cause, HfHubHTTPError) and cause.response.headers.get("Retry-After", "").isdigit()
    ]
    pause = min(max([pause, *asked]), LONGEST_PAUSE_S)
    answers = sorted(_answers(error))
    what = f"HTTP {answers[0]}" if answers else type(error_chain(error)[-1]).__name__
    print(f"the connection to the Hub failed ({what}); trying again in {pause:g} s", file=sys.stderr)
    time.sleep(pause)


def _answers(error: Exception) -> set[int]:
    return {cause.response.status_code for cause in error_chain(error) if isinstance(cause, HfHubHTTPError)}


def _is_transient(error: Exception) -> bool:
    """Whether trying again may help; half an answer is no JSON."""
    passing = (*TRANSPORT_ERRORS, ConnectionError, TimeoutError, json.JSONDecodeError)
    if answers := _answers(error):
        return bool(answers & TRANSIENT)
    return any(
        isinstance(cause, passing) and not isinstance(cause, OfflineModeIsEnabled)
        for cause in error_chain(error)
    )
