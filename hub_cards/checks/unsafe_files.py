"""Files that a published folder must not hold: pickles, programs, foreign code, links, LFS pointers."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import modeling_foresight

__all__ = ["check_files"]

PICKLED = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".dill", ".npy", ".npz", ".h5"}
PROGRAMS = {".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".pyc", ".pyd", ".whl"}
# First bytes, whatever the file is called. A safetensors file begins with a length, which may look the same.
PICKLE, PROGRAM = tuple(b"\x80" + bytes([n]) for n in range(2, 6)), (b"\x7fELF", b"MZ", b"#!")
CODE = Path(modeling_foresight.__file__).parent


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
    return problems + [problem for path in sorted(folder.glob("*.json")) for problem in _foreign_code(path)]


def _foreign_code(path: Path) -> Iterator[str]:
    """Code that `trust_remote_code=True` would run (`auto_map`) that is not beside the file."""
    try:
        classes = json.loads(path.read_text())["auto_map"].values()
    except (ValueError, TypeError, KeyError, AttributeError):
        return  # names no code; loading reports a damaged file
    names = [name for value in classes for name in (value if isinstance(value, list) else [value]) if name]
    for name in map(str, names):
        if "--" in name or not (path.parent / f"{name.partition('.')[0]}.py").is_file():
            yield f"{path.name} takes code from elsewhere (auto_map: {name}): export the model again"


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
