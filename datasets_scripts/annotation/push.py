"""A finished dataset goes to the Hugging Face Hub, where LeRobot finds it by its name."""

from collections.abc import Collection
from pathlib import Path

from huggingface_hub import HfApi
from lerobot.datasets.dataset_metadata import CODEBASE_VERSION

from datasets_scripts.inspection.dataset_card import write_card
from datasets_scripts.storage.dataset_folder import dataset_files
from datasets_scripts.storage.hub_upload import commit_files, make_repo, move_tag, remote_files, require_token
from datasets_scripts.storage.provenance import read_provenance

__all__ = ["check_push", "push_dataset"]


def check_push(repo_id: str, output: Path, private: bool = True) -> None:
    """Finds out before long work whether a dataset can be pushed, and makes its repository.

    Args:
        repo_id (`str`): `owner/name`.
        output (`Path`): The dataset, which need not exist yet.
        private (`bool`): Whether a repository that is made is; one that is there stays as it is.

    Raises:
        ValueError: If there is no token, or the repository holds files of another dataset.
        HubError: If the token may not write there, or the Hub cannot be reached.
    """
    require_token("--push-to-hub")
    make_repo(repo_id, "dataset", private)
    there = remote_files(repo_id, "dataset")
    _refuse_strangers(repo_id, there, _list_places(output) if output.exists() else [])


def push_dataset(root: Path, repo_id: str) -> str:
    """Uploads a dataset into its repository in one commit; run again after an interruption, it continues.

    Args:
        root (`Path`): The finished dataset; its `README.md` becomes the card, and will name the repository.
        repo_id (`str`): Repository that `check_push` has made.

    Returns:
        `str`: Address of the dataset's page.

    Raises:
        ValueError: If the repository holds files that are none of this dataset.
        HubError: If the Hub refuses, or cannot be reached.
    """
    _refuse_strangers(repo_id, remote_files(repo_id, "dataset"), _list_places(root))
    if "annotation" in read_provenance(root):
        write_card(root, repo_id)
    files = {place: root / place for place in _list_places(root)}
    commit = commit_files(repo_id, "dataset", files, "Annotated dataset")
    move_tag(repo_id, "dataset", CODEBASE_VERSION, commit)  # LeRobot opens the commit that carries it
    return f"{HfApi().endpoint}/datasets/{repo_id}"


def _list_places(root: Path) -> list[str]:
    return [place.as_posix() for place in dataset_files(root)]


def _refuse_strangers(repo_id: str, there: Collection[str], ours: Collection[str]) -> None:
    """LeRobot would read files of two datasets as one; the Hub's own and a card may be there."""
    strangers = sorted(set(there) - set(ours) - {".gitattributes", "README.md"})
    if strangers:
        raise ValueError(
            f"the repository {repo_id} holds files that are none of this dataset ({strangers[0]}"
            + (f" and {len(strangers) - 1} more" if len(strangers) > 1 else "")
            + "): push to another name, or delete them there"
        )
