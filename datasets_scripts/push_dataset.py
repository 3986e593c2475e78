"""A finished dataset goes to the Hugging Face Hub, where LeRobot finds it by its name."""

import contextlib
from collections.abc import Collection
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import RevisionNotFoundError
from lerobot.datasets.dataset_metadata import CODEBASE_VERSION

from datasets_scripts.columns import dataset_files, read_provenance
from datasets_scripts.dataset_card import write_card
from datasets_scripts.hub_source import explain_hub_errors

__all__ = ["check_push", "push_dataset"]


def check_push(repo_id: str, output: Path, private: bool | None = None) -> None:
    """Finds out before long work whether a dataset can be pushed, and makes its repository.

    Args:
        repo_id (`str`): `owner/name`.
        output (`Path`): The dataset, which need not exist yet.
        private (`bool`, *optional*): Of a repository that is made; the Hub's default is public, or what an
            organisation has chosen.

    Raises:
        ValueError: If there is no token, or the repository holds files of another dataset.
        HubError: If the token may not write there, or the Hub cannot be reached.
    """
    if get_token() is None:
        raise ValueError(
            "--push-to-hub needs a token that may write: log in with `hf auth login`, or set HF_TOKEN"
        )
    api = HfApi()
    with explain_hub_errors(repo_id):
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        api.auth_check(repo_id, repo_type="dataset", write=True)  # the repository may be somebody else's
        there = api.list_repo_files(repo_id, repo_type="dataset")
    _refuse_strangers(repo_id, there, _places(output) if output.exists() else [])


def push_dataset(root: Path, repo_id: str) -> str:
    """Uploads a dataset into its repository; run again after an interruption, it continues.

    Args:
        root (`Path`): The finished dataset; its `README.md` becomes the card, and will name the repository.
        repo_id (`str`): Repository that `check_push` has made.

    Returns:
        `str`: Address of the dataset's page.

    Raises:
        ValueError: If the repository holds files that are none of this dataset.
        HubError: If the Hub refuses, or cannot be reached.
    """
    api = HfApi()
    with explain_hub_errors(repo_id):
        _refuse_strangers(repo_id, api.list_repo_files(repo_id, repo_type="dataset"), _places(root))
        if "annotation" in read_provenance(root):
            write_card(root, repo_id)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=root,
            repo_type="dataset",
            ignore_patterns=[".*", "**/.*"],
            commit_message="Annotated dataset",
        )
        # LeRobot opens the commit that carries the tag of its format.
        with contextlib.suppress(RevisionNotFoundError):
            api.delete_tag(repo_id, tag=CODEBASE_VERSION, repo_type="dataset")
        api.create_tag(repo_id, tag=CODEBASE_VERSION, repo_type="dataset")
    return f"{api.endpoint}/datasets/{repo_id}"


def _places(root: Path) -> list[str]:
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
