"""Download files in the background before they are needed."""

import collections
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from datasets_scripts.storage.hub.download import DOWNLOADS_AT_ONCE

__all__ = ["Prefetcher"]


class Prefetcher:
    """Fetches the files that were asked for last, in their order, in threads.

    Args:
        fetch (`Callable[[Path, frozenset[Path]], object]`): Gets one file, given all that are to be kept.

    Attributes:
        error (`Exception`, *optional*): The first that `fetch` raised.
    """

    def __init__(self, fetch: Callable[[Path, frozenset[Path]], object]):
        self.error: Exception | None = None
        self._fetch, self._wanted = fetch, frozenset()
        self._queue: collections.deque[Path] = collections.deque()
        self._changed = threading.Condition()
        for _ in range(DOWNLOADS_AT_ONCE):  # daemons: the end of a process does not wait for a download
            threading.Thread(target=self._work, daemon=True).start()

    def ask_for(self, files: Iterable[Path], still_read: Iterable[Path] = ()) -> None:
        """Replaces the files that are to be fetched and kept, and those that are kept but not fetched."""
        files = list(files)
        with self._changed:
            self._wanted, self._queue = frozenset([*files, *still_read]), collections.deque(files)
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue:
                    self._changed.wait()
                path, wanted = self._queue.popleft(), self._wanted
            try:
                self._fetch(path, wanted)
            except Exception as error:  # whatever it is, the reader raises it
                self.error = self.error or error
