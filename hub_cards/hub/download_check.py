"""Download what was published and check that files and outputs are the same."""

import filecmp
import tempfile
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import snapshot_download

from datasets_scripts.storage.hub.download import explain_hub_errors
from datasets_scripts.storage.hub.upload import retry_request
from hub_cards.checks.dataset import check_dataset
from hub_cards.checks.sample import check_sample

__all__ = ["verify_download"]


def verify_download(repo_id: str, repo_type: str, commit: str, files: Mapping[str, Path]) -> None:
    """Download a commit into a fresh cache, compare every file byte by byte, load it and run it.

    huggingface_hub itself compares only sizes. A model or an adapter must give the outputs of its
    `sample.safetensors`, a dataset its first and last frame.

    Raises:
        ValueError: If a file or an output differs; names it.
        HubError: If the Hub cannot be reached.
    """
    with tempfile.TemporaryDirectory(prefix="foresight-pull-") as cache:
        options = {"repo_type": repo_type, "revision": commit, "cache_dir": cache}
        with explain_hub_errors(repo_id, repo_type):
            root = Path(retry_request(lambda: snapshot_download(repo_id, **options)))
        for place, path in files.items():
            if not (root / place).is_file() or not filecmp.cmp(root / place, path, shallow=False):
                raise ValueError(
                    f"{place} does not come back from {repo_id} as it was sent: run the same command again; "
                    "if that does not help, delete the file there and publish again"
                )
        if repo_type == "model":
            check_sample(root)
        elif problems := check_dataset(root):
            raise ValueError("\n".join(problems))
