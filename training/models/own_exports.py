"""What a run has exported: it replaces that, and nothing else.

A run that was killed between its export and its end finds the export there. Anything else at that place is
another run's model, or its own checkpoints.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from accelerate.utils import gather_object

from datasets_scripts.storage.atomic import read_json, refuse_contents, write_json
from datasets_scripts.storage.file_hash import hash_file

__all__ = ["check_export", "note_export"]

NOTES = "exports.json"  # in the run folder: SHA-256 of the contents of each export
RUN_FOLDERS = ("checkpoints", "pictures")  # which a run fills in its own folder


def check_export(output: Path, places: Sequence[Path]) -> None:
    """Refuses to replace what the run in `output` did not export; all processes call it together.

    Raises:
        ValueError: In every process; names the folder.
    """
    problem = None
    try:
        for place in places:
            if taken := {output.resolve() / name for name in RUN_FOLDERS} & {
                place.resolve(),
                *place.resolve().parents,
            }:
                raise ValueError(f"--export is {place}, but {taken.pop()} has this run's own files: move it")
            refuse_contents(place, "--export", lambda folder: _digest(folder) in _read_notes(output))
    except ValueError as error:
        problem = str(error)
    if problem := gather_object([problem])[0]:  # the main process alone writes them
        raise ValueError(problem)


def note_export(output: Path, folder: Path) -> None:
    """Notes the contents of an export in the run folder, before the export appears in its place."""
    write_json(output / NOTES, sorted({*_read_notes(output), _digest(folder)}))


def _read_notes(output: Path) -> list[str]:
    path = output / NOTES
    return read_json(path, kind=list) if path.is_file() else []


def _digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{path.relative_to(folder)} {hash_file(path)}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
