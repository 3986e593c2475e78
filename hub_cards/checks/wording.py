"""Wording of problems."""

from collections.abc import Collection

__all__ = ["EXPORT_AGAIN", "list_some", "shorten_error"]

EXPORT_AGAIN = "export the model again with training/train.py"
NAMED = 3  # in one line
LONGEST = 300  # characters of a library's message


def list_some(names: Collection[str]) -> str:
    """`a, b, c and 4 more`, in alphabetical order."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(sorted(names)[:NAMED]) + more


def shorten_error(error: Exception) -> str:
    """A library's message on one line of limited length."""
    text = " ".join(str(error).split())
    return text if len(text) < LONGEST else f"{text[:LONGEST]}..."
