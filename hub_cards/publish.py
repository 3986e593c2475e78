"""Publishes a model, an adapter or a dataset on the Hugging Face Hub: checked, in one commit, or not at all.

A folder that hub_cards/check.py refuses is not sent. A new repository is private unless you say --public.
After an interruption run the same command again: what has arrived is not sent again, and what is published
already is not committed twice.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id

from datasets_scripts.storage.atomic import share_file, write_json
from datasets_scripts.storage.dataset_folder import dataset_files
from datasets_scripts.storage.provenance import read_provenance
from hub_cards.check import check_folder
from training.run_facts import portable_path

__all__ = ["main", "publish"]

EXAMPLE = """examples:
  python hub_cards/publish.py outputs/quickstart/model --repo-id YOU/DRAWER-POLICY --dry-run
  python hub_cards/publish.py outputs/quickstart/model --repo-id YOU/DRAWER-POLICY --tag v1 --pull
  python hub_cards/publish.py outputs/annotated --repo-id YOU/DATASET --public"""
KINDS = {"adapter_config.json": "adapter", "config.json": "model", "meta/info.json": "dataset"}
# Stricter than git, which would find out when the commit is there and its tag cannot be.
REFERENCE = re.compile(r"(?!.*(?:\.\.|//|/\.|\.lock(?:/|$)))\w(?:[\w./+-]*[\w+-])?", re.ASCII)
OF_THE_HUB = {".gitattributes"}  # in every repository
COPIED_BYTES = 1 << 20  # smaller files are copied, for some are rewritten; larger ones get a second name


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    public: bool = False,
    revision: str = "main",
    tag: str | None = None,
    code: bool = False,
    replace: bool = False,
    dry_run: bool = False,
    pull: bool = False,
) -> str | None:
    """Publishes a folder; says what it does on standard output.

    Args:
        folder (`str` or `Path`): Model, adapter or LeRobot dataset, with its card. It stays as it is.
        repo_id (`str`): `owner/name`.
        public (`bool`): Whether everybody may see the repository; a private one becomes public.
        revision (`str`): Branch, made from `main` if it is new.
        tag (`str`, *optional*): Name for the commit.
        code (`bool`): Whether a model brings the Python files that run it (`trust_remote_code=True`).
        replace (`bool`): Whether the commit removes what the branch holds and the folder does not.
        dry_run (`bool`): Whether to stop after checks and list of files; nothing is sent then.
        pull (`bool`): Whether to download what was published and compare it (`hub_cards/hub/pull.py`).

    Returns:
        `str`: The commit; nothing for a dry run.

    Raises:
        ValueError: If the folder, its card, the name or the rights will not do; one line per problem.
        HubError: If the Hub cannot be reached, or refuses.
    """
    # Here and below, because they load LeRobot or transformers: --help answers at once.
    from datasets_scripts.storage.hub_upload import move_tag
    from hub_cards.cards.evidence import read_json
    from hub_cards.hub.pull import verify_download
    from hub_cards.sample import SAMPLE, write_sample

    folder = Path(folder)
    kind = next((kind for name, kind in KINDS.items() if (folder / name).is_file()), None)
    if kind is None:
        raise ValueError(
            f"{folder} holds no {', '.join(KINDS)}: give the folder of a model that train.py exports, or of "
            "a dataset"
        )
    if code and kind != "model":
        raise ValueError(f"--code is for models, and {folder} is {kind}: publish an adapter's base with it")
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        repo_id = ""
    if repo_id.count("/") != 1:
        raise ValueError("--repo-id is owner/name, of letters, digits, - _ and .")
    for option, name in {"--revision": revision, "--tag": tag}.items():
        if name is not None and not REFERENCE.fullmatch(name):
            raise ValueError(f"{option} {name!r} is no name for git: letters, digits, - _ . and / make one")
    repo_type = "dataset" if kind == "dataset" else "model"
    with _staged(folder, repo_id, kind, code) as stage:
        if kind == "adapter":
            _pin_base(stage, public, dry_run)
        if problems := check_folder(stage):
            raise ValueError("\n".join(problem.replace(str(stage), str(folder)) for problem in problems))
        if kind != "dataset" and not (stage / SAMPLE).is_file():
            write_sample(stage)
        files = {place.as_posix(): stage / place for place in _places(stage)}
        _list(files, f"{repo_type} {repo_id}, branch {revision}")
        if dry_run:
            return None
        commit = _send(repo_id, repo_type, files, public, revision, tag, replace)
        if kind == "dataset" and revision == "main":
            move_tag(repo_id, repo_type, read_json(stage / "meta" / "info.json")["codebase_version"], commit)
        prefix = "datasets/" if repo_type == "dataset" else ""
        print(f"published: {HfApi().endpoint}/{prefix}{repo_id}/commit/{commit}")
        if pull:
            verify_download(repo_id, repo_type, commit, files)
            print(f"downloaded and compared: {len(files)} files and what they give are the same")
    return commit


@contextmanager
def _staged(folder: Path, repo_id: str, kind: str, code: bool) -> Iterator[Path]:
    """The folder as it will be on the Hub: what is checked is what is sent."""
    from datasets_scripts.inspection.dataset_card import write_card
    from modeling_foresight.exporting import add_code

    beside = folder.resolve().parent  # there, large files need no copy
    where = beside if os.access(beside, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".publish-", dir=where) as name:
        stage = Path(name)
        for place in _places(folder):
            (stage / place).parent.mkdir(parents=True, exist_ok=True)
            large = (folder / place).stat().st_size > COPIED_BYTES
            (share_file if large else shutil.copyfile)(folder / place, stage / place)
        card = stage / "README.md"
        if kind == "dataset":
            if card.is_file() and {"annotation", "simulation"} & read_provenance(folder).keys():
                write_card(stage, repo_id)
        elif card.is_file():
            card.write_text(_address(card.read_text(), folder, repo_id, code))
        if code:
            with suppress(FileNotFoundError, ValueError, TypeError):  # what lacks then, the check will say
                add_code(stage)
        yield stage


def _places(folder: Path) -> list[Path]:
    """What belongs to a repository: no hidden files but the results for machines, no compiled code."""
    places = [place for place in dataset_files(folder) if "__pycache__" not in place.parts]
    return sorted([*places, *(path.relative_to(folder) for path in folder.glob(".eval_results/*.yaml"))])


def _address(card: str, folder: Path, repo_id: str, code: bool) -> str:
    """The card with examples that load from the Hub, not from the place it was written for.

    That place is where the card's first example has its processor from; of a pretrained model, the model.
    """
    examples, heading, rest = card.partition("\n## How it was trained\n")  # there, commands are a record
    named = [
        re.search(rf'Auto{what}\.from_pretrained\("([^"]+)"', examples) for what in ("Processor", "Model")
    ]
    places = {"model", portable_path(folder), str(folder), *[found[1] for found in named if found][:1]}
    here = "|".join(map(re.escape, places))
    load = r"--policy\.path=|from_pretrained\((?:base, )?\"|\.yaml --init_from "
    card = re.sub(rf"({load})(?:{here})(?=[\s\"`])", rf"\g<1>{repo_id}", examples) + heading + rest
    if code:
        card = re.sub(r"^import modeling_foresight .*\n\n?", "", card, flags=re.MULTILINE)
        card = card.replace(
            f'from_pretrained("{repo_id}"', f'from_pretrained("{repo_id}", trust_remote_code=True'
        )
    return card


def _pin_base(stage: Path, public: bool, dry_run: bool) -> None:
    """Writes the commit of an adapter's base into what is published: a branch may move on.

    Raises:
        ValueError: If the base is a folder, is not on the Hub, or is private and the adapter is to be public.
    """
    from datasets_scripts.storage.hub_download import explain_hub_errors
    from datasets_scripts.storage.hub_upload import patiently
    from hub_cards.cards.evidence import is_folder, read_json
    from training.adapters import FACTS

    path = stage / "adapter_config.json"
    config = read_json(path)
    base, revision = config.get("base_model_name_or_path") or "", config.get("revision")
    if is_folder(base):
        raise ValueError(
            f"the adapter's base {base!r} is a folder of this machine: publish it (python "
            f"hub_cards/publish.py {base or 'BASE'} --repo-id YOU/BASE), write YOU/BASE into "
            "base_model_name_or_path of adapter_config.json, then the card anew with hub_cards/build.py"
        )
    if dry_run and constants.REGEX_COMMIT_OID.fullmatch(revision or ""):
        return
    with explain_hub_errors(base, "model"):
        info = patiently(lambda: HfApi().model_info(base, revision=revision))
    if public and info.private:
        raise ValueError(
            f"the adapter's base {base} is private: nobody could load the adapter: make its base public first"
        )
    write_json(path, config | {"revision": info.sha})
    if (stage / FACTS).is_file():
        facts = {"base_model": base, "base_revision": info.sha}
        write_json(stage / FACTS, read_json(stage / FACTS) | facts)
    card = stage / "README.md"
    if card.is_file():
        pinned = f'AutoModel.from_pretrained("{base}", revision="{info.sha}"'
        plain = rf'AutoModel\.from_pretrained\("{re.escape(base)}"(?:, revision="[^"]*")?'
        card.write_text(re.sub(plain, pinned, card.read_text()))
    print(f"base: {base} at commit {info.sha}")


def _list(files: dict[str, Path], where: str) -> None:
    sizes = {place: path.stat().st_size for place, path in files.items()}
    print(f"{where}: {len(files)} files, {_size(sum(sizes.values()))}")
    for place, size in sizes.items():
        print(f"  {_size(size):>9}  {place}")


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            break
        size, unit = size / 1000, {"B": "kB", "kB": "MB", "MB": "GB"}[unit]
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def _send(
    repo_id: str,
    repo_type: str,
    files: dict[str, Path],
    public: bool,
    revision: str,
    tag: str | None,
    replace: bool,
) -> str:
    """Everything that might forbid the commit is found out before the first file goes."""
    from datasets_scripts.storage.hub_download import explain_hub_errors
    from datasets_scripts.storage.hub_upload import (
        commit_files,
        differing,
        make_repo,
        move_tag,
        patiently,
        remote_files,
        require_token,
    )

    if constants.HF_HUB_OFFLINE:
        raise ValueError("HF_HUB_OFFLINE forbids to publish: unset it")
    require_token("publishing")
    api = HfApi()
    with explain_hub_errors(repo_id, repo_type):
        exists, *others = (
            patiently(partial(api.repo_exists, repo_id, repo_type=one))
            for one in (repo_type, *({"model", "dataset", "space"} - {repo_type}))
        )
        if any(others) and not exists:
            raise ValueError(
                f"{repo_id} is on the Hub, and it is no {repo_type}: choose another --repo-id for this one"
            )
        was_private = not exists or patiently(partial(api.repo_info, repo_id, repo_type=repo_type)).private
        if not (was_private or public):
            raise ValueError(
                f"{repo_id} is public: say --public if everybody may see this, or choose another --repo-id"
            )
        _validate_card(files["README.md"].read_text(), repo_type)
    make_repo(repo_id, repo_type, private=was_private)  # what is not complete is nobody's to see
    with explain_hub_errors(repo_id, repo_type):
        if revision != "main":
            patiently(lambda: api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True))
        there = remote_files(repo_id, repo_type, revision)
        strangers = sorted(there.keys() - files.keys() - OF_THE_HUB)
        if strangers and not replace:
            more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
            raise ValueError(
                f"{repo_id} holds files that this folder does not ({strangers[0]}{more}): say --replace to "
                "remove them in the same commit, or choose another --repo-id"
            )
        if tag:
            refs = patiently(lambda: api.list_repo_refs(repo_id, repo_type=repo_type))
            taken = {one.name: one.target_commit for one in refs.tags}.get(tag)
            if taken and (strangers or [*differing(files, remote_files(repo_id, repo_type, taken))]):
                raise ValueError(
                    f"tag {tag} of {repo_id} names another commit ({taken}): choose another --tag"
                )
        commit = commit_files(repo_id, repo_type, files, _title(files), revision, strangers)
        if tag:
            move_tag(repo_id, repo_type, tag, commit)
        if public and was_private:
            patiently(lambda: api.update_repo_settings(repo_id, private=False, repo_type=repo_type))
    return commit


def _title(files: dict[str, Path]) -> str:
    """Of the commit: the heading of the card."""
    heading = re.search(r"^# (.+)$", files["README.md"].read_text(), re.MULTILINE)
    return heading.group(1)[:70] if heading else "Publish"


def _validate_card(card: str, repo_type: str) -> None:
    """Asks the Hub whether it takes the card's metadata, before there is a repository.

    Raises:
        ValueError: With what the Hub says of it.
    """
    from datasets_scripts.storage.hub_upload import patiently

    url, content = f"{HfApi().endpoint}/api/validate-yaml", {"content": card, "repoType": repo_type}

    def ask():
        response = get_session().post(url, json=content, headers=build_hf_headers())
        if response.status_code != 400:
            hf_raise_for_status(response)
        return response.json()

    if errors := patiently(ask).get("errors"):
        told = "; ".join(" ".join(str(error.get("message")).split()) for error in errors)
        raise ValueError(f"the Hub rejects the card's metadata: {told}: correct README.md")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="model, adapter or dataset with its card")
    parser.add_argument("--repo-id", required=True, metavar="OWNER/NAME", help="where to")
    parser.add_argument("--public", action="store_true", help="for everybody to see (default: private)")
    parser.add_argument("--revision", default="main", metavar="BRANCH", help="made if it is new")
    parser.add_argument("--tag", help="name for the commit, such as v1")
    parser.add_argument("--code", action="store_true", help="with the code, for trust_remote_code=True")
    parser.add_argument("--replace", action="store_true", help="remove what is there and not in the folder")
    parser.add_argument("--dry-run", action="store_true", help="check, list files and sizes, send nothing")
    parser.add_argument("--pull", action="store_true", help="download it afterwards, compare and run it")
    args = parser.parse_args(arguments)
    try:
        publish(**vars(args))
    except (ValueError, OSError, RuntimeError) as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
