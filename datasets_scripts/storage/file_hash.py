"""The hash by which a file's content is recorded and recognized."""

import hashlib
from pathlib import Path

__all__ = ["hash_file"]


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file's content in hexadecimal digits, read piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
