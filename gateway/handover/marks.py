"""Which sessions other workers have changed, in memory that all of them share: a look costs a microsecond, not a query.

Each worker counts, in columns of its own, the changes that it began and those that it ended, by a hash of the session's
id. Who sees the same sums as before, and nothing begun that has not ended, need not read the session again. A worker
that dies at a change leaves it begun, so that nobody relies on what he knows of those sessions.
"""

from __future__ import annotations

import hashlib
import mmap

_NUM_ROWS = 2**16
"""Sessions with one row are read again for each other; this many need 1 MiB a worker."""


class ChangeMarks:
    """Made before workers are forked. A word is written by its worker alone; torn reads cannot be (aligned words)."""

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._words = memoryview(mmap.mmap(-1, 2 * num_workers * _NUM_ROWS * 8)).cast("q")

    def of(self, number: int) -> WorkerMarks:
        """Those of worker `number`, as it uses them."""
        return WorkerMarks(self._words, number, self._num_workers)


class WorkerMarks:
    """One worker's view."""

    def __init__(self, words: memoryview, number: int, num_workers: int) -> None:
        self._words = words
        self._own = 2 * number
        self._width = 2 * num_workers

    def begin(self, session_id: str) -> None:
        """A change of this worker's begins."""
        self._words[self._row(session_id) + self._own] += 1

    def end(self, session_id: str) -> None:
        """A change that it began has ended."""
        self._words[self._row(session_id) + self._own + 1] += 1

    def changes(self, session_id: str) -> int | None:
        """The sum of what others began; None while not all of it has ended."""
        row = self._row(session_id)
        words = self._words[row : row + self._width]
        begun, ended = sum(words[::2]) - words[self._own], sum(words[1::2]) - words[self._own + 1]
        return begun if begun == ended else None

    def _row(self, session_id: str) -> int:
        # Equal in all workers, which a string's own hash is only while they are forked and not started.
        digest = hashlib.blake2b(session_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "little") % _NUM_ROWS * self._width
