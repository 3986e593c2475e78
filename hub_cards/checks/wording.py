"""Wording of problems."""

__all__ = ["EXPORT_AGAIN", "shorten_error"]

EXPORT_AGAIN = "export the model again with training/train.py"
LONGEST = 300  # characters of a library's message


def shorten_error(error: Exception) -> str:
    """A library's message on one line of limited length."""
    text = " ".join(str(error).split())
    return text if len(text) < LONGEST else f"{text[:LONGEST]}..."
