"""Memory that was freed, given back to the system.

glibc gives back only the end of its heaps. Decoders that are opened and closed all the time leave holes of
many sizes before it, and a loader's worker grows for hours although nothing is kept.
"""

import ctypes

__all__ = ["return_freed_memory"]

try:
    _malloc_trim = ctypes.CDLL(None).malloc_trim
except (AttributeError, OSError, TypeError):  # musl, macOS, Windows: other allocators
    _malloc_trim = None


def return_freed_memory() -> None:
    """Return all freed pages to the system (a few milliseconds); does nothing without glibc."""
    if _malloc_trim is not None:
        _malloc_trim(0)
