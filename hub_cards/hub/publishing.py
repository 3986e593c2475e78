"""Publish a folder on the Hub: refuse what must not be sent, send the rest in one commit, compare it."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id
from tqdm import tqdm

from datasets_scripts.command_line import list_some
from datasets_scripts.storage.atomic import read_json
from datasets_scripts.storage.hub.download import explain_hub_errors
from datasets_scripts.storage.hub.upload import (
    check_repository,
    commit_files,
    find_differences,
    make_repo,
    move_tag,
    remote_files,
    require_token,
    retry_request,
)
from hub_cards.checks.folder import KIND_FILES, check_folder, find_kind
from hub_cards.hub.download_check import verify_download
from hub_cards.hub.staging import list_files, pin_base, staged_folder

__all__ = ["HubTarget", "publish"]

# Stricter than git: git would refuse a name only after the commit was made.
GIT_NAME = re.compile(r"(?!.*(?:\.\.|//|/\.|\.lock(?:/|$)))\w(?:[\w./+-]*[\w+-])?", re.ASCII)
FILES_OF_THE_HUB = {".gitattributes"}  # in every repository


@dataclasses.dataclass(frozen=True)
class HubTarget:
    """Where a folder is published.

    Args:
        repo_id (`str`): `owner/name`.
        revision (`str`): Branch, created from `main` if it is new.
        tag (`str`, *optional*): Name for the commit.
        public (`bool`): Whether everybody may see the repository; a private one becomes public.
        replace (`bool`): Whether the commit deletes files of the branch that the folder does not hold.

    Raises:
        ValueError: If a name is not valid.
    """

    repo_id: str
    revision: str = "main"
    tag: str | None = None
    public: bool = False
    replace: bool = False

    def __post_init__(self):
        try:
            validate_repo_id(self.repo_id)
            valid = self.repo_id.count("/") == 1
        except HFValidationError:
            valid = False
        if not valid:
            raise ValueError("--repo-id must be owner/name, made of letters, digits, - _ and .")
        for option, name in {"--revision": self.revision, "--tag": self.tag}.items():
            if name is not None and not GIT_NAME.fullmatch(name):
                raise ValueError(
                    f"{option} {name!r} is not a valid git name: use letters, digits, - _ . and /"
                )


def publish(
    folder: str | Path,
    target: HubTarget,
    *,
    with_code: bool = False,
    dry_run: bool = False,
    pull: bool = False,
) -> str | None:
    """Publish a folder and print what happens. The folder itself does not change.

    Args:
        folder (`str` or `Path`): Model, adapter or LeRobot dataset, with its card.
        target (`HubTarget`): Repository, branch and tag.
        with_code (`bool`): Whether to send the Python files of a model too (`trust_remote_code=True`).
        dry_run (`bool`): Whether to stop after the checks and the list of files.
        pull (`bool`): Whether to download the commit and compare it (`hub_cards/hub/download_check.py`).

    Returns:
        `str`: The commit; `None` for a dry run.

    Raises:
        ValueError: If the folder, its card or the rights are refused; one line per problem.
        HubError: If the Hub cannot be reached, or refuses.
    """
    folder = Path(folder)
    kind = find_kind(folder)
    if kind is None:
        raise ValueError(
            f"{folder} holds no {', '.join(KIND_FILES)}: give the folder of a model that train.py exports, "
            "or of a dataset"
        )
    if with_code and kind != "model":
        raise ValueError(f"--code is for models, and {folder} is {kind}: publish an adapter's base with it")
    repo_type = "dataset" if kind == "dataset" else "model"
    with staged_folder(folder, target.repo_id, kind, with_code) as stage:
        if kind == "adapter":
            pin_base(stage, target.public, dry_run)
        if problems := check_folder(stage):
            raise ValueError("\n".join(problem.replace(str(stage), str(folder)) for problem in problems))
        files = list_files(stage, kind)
        _print_files(files, f"{repo_type} {target.repo_id}, branch {target.revision}")
        if dry_run:
            return None
        commit = _send_files(files, target, repo_type)
        if kind == "dataset" and target.revision == "main":
            version = read_json(stage / "meta" / "info.json")["codebase_version"]
            move_tag(target.repo_id, repo_type, version, commit)
        prefix = "datasets/" if repo_type == "dataset" else ""
        print(f"published: {HfApi().endpoint}/{prefix}{target.repo_id}/commit/{commit}")
        if pull:
            verify_download(target.repo_id, repo_type, commit, files)
            print(f"downloaded and compared: {len(files)} files and their outputs are the same")
    return commit


def _print_files(files: Mapping[str, Path], heading: str) -> None:
    sizes = {place: path.stat().st_size for place, path in files.items()}
    print(f"{heading}: {len(files)} files, {tqdm.format_sizeof(sum(sizes.values()), 'B')}")
    for place, size in sizes.items():
        print(f"  {tqdm.format_sizeof(size, 'B'):>9}  {place}")


def _send_files(files: Mapping[str, Path], target: HubTarget, repo_type: str) -> str:
    """Commit the files; whatever might forbid the commit is checked before the first file is sent."""
    if constants.HF_HUB_OFFLINE:
        raise ValueError("HF_HUB_OFFLINE forbids publishing: unset it")
    require_token("publishing")
    api, repo_id = HfApi(), target.repo_id
    card = files["README.md"].read_text()
    with explain_hub_errors(repo_id, repo_type):
        was_private = check_repository(repo_id, repo_type, target.public)
        _check_metadata(card, repo_type)
    make_repo(repo_id, repo_type, private=was_private)  # private until it is complete
    with explain_hub_errors(repo_id, repo_type):
        if target.revision != "main":
            retry_request(
                lambda: api.create_branch(repo_id, branch=target.revision, repo_type=repo_type, exist_ok=True)
            )
        known = remote_files(repo_id, repo_type, target.revision)
        strangers = sorted(known.keys() - files.keys() - FILES_OF_THE_HUB)
        if strangers and not target.replace:
            raise ValueError(
                f"{repo_id} holds files that this folder does not ({list_some(sorted(strangers))}): add "
                "--replace to delete them in the same commit, or choose another --repo-id"
            )
        _check_tag(files, target, repo_type, changed=bool(strangers))
        heading = re.search(r"^# (.+)$", card, re.MULTILINE)
        title = heading.group(1)[:70] if heading else "Publish"
        commit = commit_files(repo_id, repo_type, files, title, target.revision, strangers)
        if target.tag:
            move_tag(repo_id, repo_type, target.tag, commit)
        if target.public and was_private:
            retry_request(lambda: api.update_repo_settings(repo_id, private=False, repo_type=repo_type))
    return commit


def _check_tag(files: Mapping[str, Path], target: HubTarget, repo_type: str, changed: bool) -> None:
    """Refuse a tag that names a commit with other files than ours."""
    if not target.tag:
        return
    refs = retry_request(lambda: HfApi().list_repo_refs(target.repo_id, repo_type=repo_type))
    taken = next((ref.target_commit for ref in refs.tags if ref.name == target.tag), None)
    if taken and (changed or find_differences(files, remote_files(target.repo_id, repo_type, taken))):
        raise ValueError(
            f"tag {target.tag} of {target.repo_id} names another commit ({taken}): choose another --tag"
        )


def _check_metadata(card: str, repo_type: str) -> None:
    """Ask the Hub whether it accepts the card's metadata, before there is a repository."""
    url, content = f"{HfApi().endpoint}/api/validate-yaml", {"content": card, "repoType": repo_type}

    def ask():
        response = get_session().post(url, json=content, headers=build_hf_headers())
        if response.status_code != 400:
            hf_raise_for_status(response)
        return response.json()

    if errors := retry_request(ask).get("errors"):
        reasons = "; ".join(" ".join(str(error.get("message")).split()) for error in errors)
        raise ValueError(f"the Hub rejects the card's metadata: {reasons}: correct README.md")
