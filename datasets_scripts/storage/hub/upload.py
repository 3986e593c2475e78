"""Upload files to a repository of the Hugging Face Hub in one commit: all of them, or none.

The Hub's client repeats failed uploads itself, but not the requests that list files or make repositories,
commits and tags (`retry_request`).
"""

import json
import sys
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from datasets_scripts.storage.hub.download import (
    LOG_IN,
    TRANSPORT_ERRORS,
    HubError,
    error_chain,
    explain_hub_errors,
    find_refusals,
)

__all__ = [
    "check_repository",
    "commit_files",
    "find_differences",
    "make_repo",
    "move_tag",
    "remote_files",
    "require_token",
    "retry_request",
]

PAUSES_S = (1, 2, 4, 8, 16, 32)
LONGEST_PAUSE_S = 300  # that the Hub may ask for
# 409 and 412: somebody else changed the repository meanwhile, so the second attempt sees another state.
TRANSIENT = {408, 409, 412, 429, 500, 502, 503, 504}
# Half an answer is not JSON.
TRANSIENT_ERRORS = (*TRANSPORT_ERRORS, ConnectionError, TimeoutError, json.JSONDecodeError)


def require_token(who: str) -> None:
    """Raise a `ValueError` without a plausible token; `who` needs it."""
    token = get_token()
    if token is None:
        raise ValueError(f"{who} needs a token that may write: {LOG_IN}")
    if not (token.isascii() and token.isprintable()):
        raise ValueError(f"{who} needs a token, and what is set has characters that no token has: {LOG_IN}")


def check_repository(repo_id: str, repo_type: str, public: bool, option: str = "--repo-id") -> bool:
    """Whether a repository is private or new; refused if it is of another type, or public by surprise.

    Args:
        repo_id (`str`): `owner/name`.
        repo_type (`str`): `model`, `dataset` or `space`.
        public (`bool`): Whether everybody may see what will be there.
        option (`str`): The flag that names the repository, for the messages.

    Raises:
        ValueError: As the first line says; names the remedy.
    """
    api = HfApi()

    def exists(kind: str) -> bool:
        return retry_request(lambda: api.repo_exists(repo_id, repo_type=kind))

    if not exists(repo_type):
        if any(exists(other) for other in {"model", "dataset", "space"} - {repo_type}):
            raise ValueError(f"{repo_id} exists and is not a {repo_type}: choose another {option}")
        return True
    private = retry_request(lambda: api.repo_info(repo_id, repo_type=repo_type)).private
    if not (private or public):
        raise ValueError(
            f"{repo_id} is public: add --public if everybody may see this, or choose another {option}"
        )
    return private


def make_repo(repo_id: str, repo_type: str, private: bool) -> None:
    """Create a repository if it is missing, and check that this token may write to it.

    An existing repository stays as private or public as it is.

    Raises:
        HubError: If the token may not, or the Hub cannot be reached.
    """
    api = HfApi()
    with explain_hub_errors(repo_id, repo_type):
        retry_request(lambda: api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True))
        retry_request(lambda: api.auth_check(repo_id, repo_type=repo_type, write=True))


def remote_files(repo_id: str, repo_type: str, revision: str = "main") -> dict[str, RepoFile]:
    """Files of a commit, branch or tag by their path in the repository."""
    options = {"recursive": True, "revision": revision, "repo_type": repo_type}
    with explain_hub_errors(repo_id, repo_type):
        tree = retry_request(lambda: list(HfApi().list_repo_tree(repo_id, **options)))
    return {file.path: file for file in tree if isinstance(file, RepoFile)}


def commit_files(
    repo_id: str,
    repo_type: str,
    files: Mapping[str, Path],
    message: str,
    revision: str = "main",
    delete: Collection[str] = (),
) -> str:
    """Upload files and commit them together; without a difference there is no commit.

    What was uploaded before an interruption is not uploaded again; until the commit nobody sees any of it.

    Args:
        repo_id (`str`): `owner/name` of an existing repository.
        repo_type (`str`): `model` or `dataset`.
        files (`Mapping[str, Path]`): Path in the repository -> file.
        message (`str`): Title of the commit.
        revision (`str`): Branch.
        delete (`Collection[str]`): Paths that the same commit deletes.

    Returns:
        `str`: The commit that has exactly these files.

    Raises:
        HubError: If the Hub cannot be reached or refuses, or somebody else committed meanwhile; then none of
            our files is in the branch.
    """
    api = HfApi()
    # Shared by all attempts: they remember what was uploaded.
    operations = [CommitOperationDelete(path) for path in delete]
    operations += [CommitOperationAdd(place, path) for place, path in files.items()]
    parents: list[str] = []

    def send_commit() -> str:
        parents.append(api.repo_info(repo_id, repo_type=repo_type, revision=revision).sha)
        there = remote_files(repo_id, repo_type, parents[-1])
        # True at the second attempt when the first commit landed and only its answer was lost.
        if not set(delete) & set(there) and not find_differences(files, there):
            return parents[-1]
        if parents[0] != parents[-1]:
            raise HubError(
                f"somebody else committed to {repo_type} {repo_id} meanwhile; nothing of ours is in it: look "
                "at what came, then run the same command again"
            )
        options = {"repo_type": repo_type, "revision": revision, "parent_commit": parents[0]}
        commit = api.create_commit(repo_id, operations, commit_message=message, **options).oid
        if wrong := find_differences(files, remote_files(repo_id, repo_type, commit)):
            raise HubError(
                f"commit {commit} of {repo_type} {repo_id} lacks {wrong[0]} as it is here: does a .gitignore "
                "there hide it?"
            )
        return commit

    with explain_hub_errors(repo_id, repo_type):
        return retry_request(send_commit)


def find_differences(files: Mapping[str, Path], there: Mapping[str, RepoFile]) -> list[str]:
    """Paths of ours that the Hub lacks or has with other contents, by size and digest."""
    return [place for place, path in files.items() if not _has_content(there.get(place), path)]


def _has_content(known: RepoFile | None, path: Path) -> bool:
    if known is None or known.size != path.stat().st_size:
        return False
    if known.lfs is not None:
        with path.open("rb") as file:
            return sha_fileobj(file).hex() == known.lfs.sha256
    return git_hash(path.read_bytes()) == known.blob_id


def move_tag(repo_id: str, repo_type: str, tag: str, commit: str) -> None:
    """Make a tag point to a commit, wherever it pointed before.

    Raises:
        HubError: If the Hub cannot be reached or refuses.
    """
    api = HfApi()

    def move() -> None:
        tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id, repo_type=repo_type).tags}
        if tags.get(tag) == commit:
            return
        if tag in tags:
            api.delete_tag(repo_id, tag=tag, repo_type=repo_type)
        api.create_tag(repo_id, tag=tag, revision=commit, repo_type=repo_type)

    with explain_hub_errors(repo_id, repo_type):
        retry_request(move)


def retry_request[T](request: Callable[[], T]) -> T:
    """Send a request that may be repeated, again after errors that may pass; raises its last error.

    The pauses grow; the Hub may ask for longer ones.
    """
    for pause_s in PAUSES_S:
        try:
            return request()
        except Exception as error:
            if not _is_transient(error):
                raise
            _wait(pause_s, error)
    return request()


def _wait(pause_s: float, error: Exception) -> None:
    refusals = [refusal.response for refusal in find_refusals(error)]
    asked = [response.headers.get("Retry-After", "") for response in refusals]
    pause_s = min(max([pause_s, *(float(text) for text in asked if text.isdigit())]), LONGEST_PAUSE_S)
    what = f"the connection to the Hub failed ({type(error_chain(error)[-1]).__name__})"
    if refusals:
        what = f"the Hub answered HTTP {refusals[0].status_code}"
    print(f"{what}; trying again in {pause_s:g} s", file=sys.stderr)
    time.sleep(pause_s)


def _is_transient(error: Exception) -> bool:
    """Whether trying again may help."""
    if refusals := find_refusals(error):
        return any(refusal.response.status_code in TRANSIENT for refusal in refusals)
    return any(
        isinstance(cause, TRANSIENT_ERRORS) and not isinstance(cause, OfflineModeIsEnabled)
        for cause in error_chain(error)
    )
