"""All checks of a folder before it is published."""

from pathlib import Path

from hub_cards.checks.card import check_card
from hub_cards.checks.dataset import check_dataset
from hub_cards.checks.model import check_adapter, check_model
from hub_cards.checks.unsafe_files import check_files

__all__ = ["KIND_FILES", "check_folder", "find_kind"]

KIND_FILES = {"adapter_config.json": "adapter", "config.json": "model", "meta/info.json": "dataset"}


def find_kind(folder: Path) -> str | None:
    """`adapter`, `model` or `dataset`, by the file that only this kind has; otherwise `None`."""
    return next((kind for name, kind in KIND_FILES.items() if (folder / name).is_file()), None)


def check_folder(folder: str | Path) -> list[str]:
    """Problems of a model, an adapter or a LeRobot dataset with its card: one line each, with the remedy.

    An adapter's base is loaded too, from the Hub if it is not in the cache.
    """
    folder = Path(folder)
    kind = find_kind(folder)
    if kind is None:
        return [
            f"no {', '.join(KIND_FILES)}: give the folder of a model that train.py exports, or of a dataset"
        ]
    problems = check_files(folder)
    if not problems:  # otherwise loading might run code
        problems = {"adapter": check_adapter, "model": check_model, "dataset": check_dataset}[kind](folder)
    return [" ".join(problem.split()) for problem in [*problems, *check_card(folder)]]
