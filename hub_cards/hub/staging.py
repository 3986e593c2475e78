"""Copy a folder as it will be on the Hub to a temporary place, which is checked and sent."""

import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import HfApi, constants

from datasets_scripts.inspection.dataset_card import write_card
from datasets_scripts.storage.atomic import read_json, share_file, write_json
from datasets_scripts.storage.dataset_folder import check_inside, dataset_files
from datasets_scripts.storage.hub.download import explain_hub_errors
from datasets_scripts.storage.hub.upload import retry_request
from datasets_scripts.storage.provenance import read_provenance
from hub_cards.cards.measurements import is_folder
from hub_cards.checks.sample import SAMPLE_FILE, write_sample
from modeling_foresight.remote_code import add_code
from training.models.adapters import BASE_FILE
from training.run_record import portable_path

__all__ = ["list_files", "pin_base", "staged_folder"]

LARGE_FILE = 1 << 20  # bytes; smaller files are copied because some are rewritten, larger ones are linked

STAGE, LOCK = ".publish-", ".lock"


@contextmanager
def staged_folder(folder: Path, repo_id: str, kind: str, with_code: bool) -> Iterator[Path]:
    """A temporary folder with the files that will be published; the card's examples load from `repo_id`."""
    parent = folder.resolve().parent  # on the same disk, large files need no copy
    parent = parent if os.access(parent, os.W_OK) else Path(tempfile.gettempdir())
    _remove_leftovers(parent)
    with tempfile.TemporaryDirectory(prefix=STAGE, dir=parent) as name, FileLock(Path(name) / LOCK):
        stage = Path(name)
        for place in _published_places(folder):
            (stage / place).parent.mkdir(parents=True, exist_ok=True)
            large = (folder / place).stat().st_size > LARGE_FILE
            (share_file if large else shutil.copyfile)(folder / place, stage / place)
        card = stage / "README.md"
        if kind != "dataset" and card.is_file():
            card.write_text(_readdress_card(card.read_text(), folder, repo_id, with_code))
        elif card.is_file() and {"annotation", "simulation"} & read_provenance(folder).keys():
            write_card(stage, repo_id)
        if with_code:
            with suppress(FileNotFoundError, ValueError, TypeError):  # check_folder reports what is missing
                add_code(stage)
        yield stage


def _remove_leftovers(parent: Path) -> None:
    """Remove staged folders whose process was killed: nobody holds their lock."""
    for left in parent.glob(f"{STAGE}*"):
        with suppress(Timeout, OSError), FileLock(left / LOCK, timeout=0):
            shutil.rmtree(left, ignore_errors=True)


def list_files(stage: Path, kind: str) -> dict[str, Path]:
    """Place in the repository -> file; a model or adapter without `sample.safetensors` gets one first."""
    if kind != "dataset" and not (stage / SAMPLE_FILE).is_file():
        write_sample(stage)
    return {place.as_posix(): stage / place for place in _published_places(stage)}


def _published_places(folder: Path) -> list[Path]:
    """No hidden files except the Hub's results, no compiled code, and nothing that is a link out of it."""
    places = [place for place in dataset_files(folder) if "__pycache__" not in place.parts]
    results = sorted(folder.glob(".eval_results/*.yaml"))
    for path in results:
        check_inside(folder, path)
    return sorted([*places, *(path.relative_to(folder) for path in results)])


def _readdress_card(card: str, folder: Path, repo_id: str, with_code: bool) -> str:
    """The card with examples that load from the Hub instead of the place that it was written for.

    That place is what the card's first example loads its processor from; for a pretrained model, the model.
    """
    examples, heading, rest = card.partition("\n## How it was trained\n")  # below, commands are a record
    places = {"model", portable_path(folder), str(folder)}
    for auto_class in ("Processor", "Model"):
        if found := re.search(rf'Auto{auto_class}\.from_pretrained\("([^"]+)"', examples):
            places.add(found[1])
            break
    load = r"--policy\.path=|from_pretrained\((?:base, )?\"|\.yaml --init_from "
    places |= {shlex.quote(place) for place in places}
    here = "|".join(map(re.escape, places))
    card = re.sub(rf"({load})(?:{here})(?=[\s\"`])", rf"\g<1>{repo_id}", examples) + heading + rest
    if with_code:
        card = re.sub(r"^import modeling_foresight .*\n\n?", "", card, flags=re.MULTILINE)
        load = f'from_pretrained("{repo_id}"'
        card = card.replace(load, f"{load}, trust_remote_code=True")
    return card


def pin_base(stage: Path, public: bool, dry_run: bool) -> None:
    """Write the commit of an adapter's base into the staged files, because a branch may move on.

    A dry run does not ask the Hub if the commit is known.

    Raises:
        ValueError: If the base is not on the Hub, or is private and the adapter will be public.
    """
    path = stage / "adapter_config.json"
    config = read_json(path)
    base, revision = config.get("base_model_name_or_path") or "", config.get("revision")
    if is_folder(base):
        return  # check_folder refuses it
    if dry_run and constants.REGEX_COMMIT_OID.fullmatch(revision or ""):
        return
    with explain_hub_errors(base, "model"):
        info = retry_request(lambda: HfApi().model_info(base, revision=revision))
    if public and info.private:
        raise ValueError(
            f"the adapter's base {base} is private: nobody could load the adapter: make its base public first"
        )
    write_json(path, config | {"revision": info.sha})
    if (stage / BASE_FILE).is_file():
        write_json(
            stage / BASE_FILE, read_json(stage / BASE_FILE) | {"base_model": base, "base_revision": info.sha}
        )
    card = stage / "README.md"
    if card.is_file():
        pinned = f'AutoModel.from_pretrained("{base}", revision="{info.sha}"'
        plain = rf'AutoModel\.from_pretrained\("{re.escape(base)}"(?:, revision="[^"]*")?'
        card.write_text(re.sub(plain, pinned, card.read_text()))
    print(f"base: {base} at commit {info.sha}")
