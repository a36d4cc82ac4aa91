"""Whose turn it is to write, among processes that share a store.

SQLite lets one transaction write at a time, and who comes second sleeps and tries again, longer each time, up to a
tenth of a second. A lock on a file of its own wakes the next one at once; who dies gives it back.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class WriteTurn:
    """One connection's place in the queue; one thread at a time uses it."""

    def __init__(self, path: Path) -> None:
        """Makes the file if need be; raises OSError."""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._is_mine = False

    def take(self) -> None:
        """Wait until nobody else writes, unless it is this one's turn already; raises OSError."""
        if not self._is_mine:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self._is_mine = True

    def give(self) -> None:
        """Let the next one write; repeating it is fine."""
        if self._is_mine:
            self._is_mine = False
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        """It stands in the queue no more."""
        os.close(self._file)
