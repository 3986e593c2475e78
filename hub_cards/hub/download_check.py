"""Downloads what was published and finds out whether it is the same, and gives the same."""

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import snapshot_download

from datasets_scripts.storage.hub_download import explain_hub_errors
from datasets_scripts.storage.hub_upload import patiently
from hub_cards.checks.loading import check_dataset
from hub_cards.sample import check_sample

__all__ = ["verify_download"]


def verify_download(repo_id: str, repo_type: str, commit: str, files: Mapping[str, Path]) -> None:
    """Downloads a commit into a fresh cache, compares every file, loads it and runs it.

    The client compares sizes only; a digest finds a flipped bit too. A model or an adapter must give the
    outputs of its `sample.safetensors`, a dataset its first and last frame.

    Args:
        repo_id (`str`): `owner/name`.
        repo_type (`str`): `model` or `dataset`.
        commit (`str`): Exactly this one.
        files (`Mapping[str, Path]`): Place -> file as it was sent.

    Raises:
        ValueError: If a file or an output differs; names it.
        HubError: If the Hub cannot be reached.
    """
    with tempfile.TemporaryDirectory(prefix="foresight-pull-") as cache:
        with explain_hub_errors(repo_id, repo_type):
            root = Path(
                patiently(
                    lambda: snapshot_download(repo_id, repo_type=repo_type, revision=commit, cache_dir=cache)
                )
            )
        for place, path in files.items():
            if not (root / place).is_file() or _digest(root / place) != _digest(path):
                raise ValueError(
                    f"{place} does not come back from {repo_id} as it was sent: run the same command again; "
                    "if it stays so, delete the file there and publish again"
                )
        if repo_type == "model":
            check_sample(root)
        elif problems := check_dataset(root):
            raise ValueError("\n".join(problems))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
