"""Files that a published folder must not hold: pickles, programs, foreign code, links, LFS pointers."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from lerobot.utils.import_utils import register_third_party_plugins

import modeling_foresight
from lerobot_policy_foresight.processor_foresight import find_foreign_steps

__all__ = ["check_files"]

PICKLED = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".dill", ".npy", ".npz", ".h5"}
PROGRAMS = {".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".pyc", ".pyd", ".whl"}
# First bytes, whatever the file is called. A safetensors file begins with a length, which may look the same.
PICKLE, PROGRAM = tuple(b"\x80" + bytes([n]) for n in range(2, 6)), (b"\x7fELF", b"MZ", b"#!")
CODE = Path(modeling_foresight.__file__).parent
# Keys by which transformers and peft find code, beside `auto_map`, and the values that mean nobody else's.
CODE_NAMES = {
    "processor_class": lambda name: name == "ForesightProcessor",
    "tokenizer_class": lambda name: isinstance(name, str) and hasattr(transformers, name),
    "parent_library": lambda name: str(name).partition(".")[0] in OWN_PACKAGES,
    "megatron_core": lambda name: name == "megatron.core",
    "trust_remote_code": lambda value: value is False,
    **dict.fromkeys(
        (
            *("image_processor_type", "feature_extractor_type", "video_processor_type"),
            *("custom_pipelines", "audio_tokenizer"),
        ),
        lambda name: False,
    ),
}
OWN_PACKAGES = ("modeling_foresight", "lerobot_policy_foresight")


def check_files(folder: Path) -> list[str]:
    """One line per file that may not be published."""
    problems = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_symlink():
            problems.append(
                f"{name} is a link: copy the folder with `cp -rL`, so that it holds the files themselves"
            )
        elif path.is_file():
            problems += [f"{name} {reason}" for reason in _reasons_against(path)]
    register_third_party_plugins()  # their steps may be in a pipeline
    return problems + [problem for path in sorted(folder.rglob("*.json")) for problem in _foreign_code(path)]


def _foreign_code(path: Path) -> Iterator[str]:
    """Code that whoever opens the file would run, and that is not beside it."""
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError):
        return  # names no code; loading reports a damaged file
    except RecursionError:
        yield f"{path.name} is nested too deeply to be read: write the file again"
        return
    for step in find_foreign_steps(content):
        yield f"{path.name} has a step that is not registered ({step}): remove it, or register its class"
    for key, value in _list_entries(content):
        if value is None:
            continue
        if key == "auto_map":
            names = value.values() if isinstance(value, dict) else [value]
            names = [name for one in names for name in (one if isinstance(one, list) else [one]) if name]
            foreign = [name for name in map(str, names) if not _is_beside(path, name)]
        else:
            foreign = [] if CODE_NAMES.get(key, lambda name: True)(value) else [value]
        for name in foreign:
            yield f"{path.name} takes code from elsewhere ({key}: {name}): export the model again"


def _list_entries(content: Any) -> Iterator[tuple[str, Any]]:
    """All keys and values of objects, however deep."""
    found = [content]
    while found:
        one = found.pop()
        if isinstance(one, dict):
            yield from one.items()
        if isinstance(one, dict | list):
            found += one.values() if isinstance(one, dict) else one


def _is_beside(path: Path, name: str) -> bool:
    return "--" not in name and (path.parent / f"{name.partition('.')[0]}.py").is_file()


def _reasons_against(path: Path) -> list[str]:
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        return ["is a pointer of Git LFS, not the file: run `git lfs pull`"]
    if path.suffix == ".py":
        own = CODE / path.name
        if own.is_file() and own.read_bytes() == path.read_bytes():
            return []
        return ["is code, but not that of modeling_foresight: export the model again, or remove the file"]
    if path.suffix == ".safetensors":
        return []  # holds numbers only; loading reports a damaged file
    if path.suffix in PROGRAMS or head.startswith(PROGRAM):
        return ["is a program: remove it"]
    if path.suffix in PICKLED or head.startswith(PICKLE) or _zips_a_pickle(path, head):
        return ["may run code when it is loaded (a pickle): save it as safetensors or JSON, or remove it"]
    return []


def _zips_a_pickle(path: Path, head: bytes) -> bool:
    if not head.startswith(b"PK"):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False
