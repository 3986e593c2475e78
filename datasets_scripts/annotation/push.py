"""Push a finished dataset to the Hugging Face Hub, where LeRobot finds it by its name."""

from collections.abc import Collection
from pathlib import Path

from huggingface_hub import HfApi
from lerobot.datasets.dataset_metadata import CODEBASE_VERSION

from datasets_scripts.command_line import list_some
from datasets_scripts.inspection.dataset_card import write_card
from datasets_scripts.storage.dataset_folder import dataset_files
from datasets_scripts.storage.hub.download import explain_hub_errors
from datasets_scripts.storage.hub.upload import (
    check_repository,
    commit_files,
    make_repo,
    move_tag,
    remote_files,
    require_token,
)
from datasets_scripts.storage.provenance import read_provenance

__all__ = ["check_push", "push_dataset"]


def check_push(repo_id: str, output: Path, private: bool = True) -> None:
    """Check before long work that a dataset, which may not exist yet, can be pushed; create its repository.

    Raises:
        ValueError: If there is no token, or the repository is public by surprise, of another type, or holds
            files of another dataset.
        HubError: If the token may not write there, or the Hub cannot be reached.
    """
    require_token("--push-to-hub")
    with explain_hub_errors(repo_id, "dataset"):
        check_repository(repo_id, "dataset", public=not private, option="--push-to-hub")
    make_repo(repo_id, "dataset", private)
    _check_remote_files(repo_id, _list_files(output))


def push_dataset(root: Path, repo_id: str) -> str:
    """Upload a finished dataset in one commit; returns the address of its page.

    A second call resumes an interrupted one. The dataset's `README.md` becomes the card and names the
    repository, which `check_push` has made. Raises as `check_push`.
    """
    _check_remote_files(repo_id, _list_files(root))
    if "annotation" in read_provenance(root):
        write_card(root, repo_id)
    files = _list_files(root)
    commit = commit_files(repo_id, "dataset", files, "Annotated dataset")
    move_tag(repo_id, "dataset", CODEBASE_VERSION, commit)  # LeRobot opens the commit that carries it
    return f"{HfApi().endpoint}/datasets/{repo_id}"


def _list_files(root: Path) -> dict[str, Path]:
    return {place.as_posix(): root / place for place in dataset_files(root)}


def _check_remote_files(repo_id: str, ours: Collection[str]) -> None:
    """Refuse a repository with files that are not ours: LeRobot would read two datasets as one."""
    others = sorted(set(remote_files(repo_id, "dataset")) - set(ours) - {".gitattributes", "README.md"})
    if others:
        raise ValueError(
            f"the repository {repo_id} holds files that are not of this dataset ({list_some(others, 1)}): "
            "push to another name, or delete them there"
        )
