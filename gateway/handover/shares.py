"""How many connections each worker has, in memory that all of them share, so that none takes more than its part.

Workers accept from one listening socket. Left to itself that is unfair: whoever wakes first takes a whole burst
(measured: 32 of 32 connections, by one of two). So a worker that has more connections than another one steps back for a
moment; it accepts all the same when nobody else did, because the other one may be busy, hang, or be about to die.
"""

from __future__ import annotations

import mmap
import struct

_COUNT = struct.Struct("q")
_NOBODY = -1


class Shares:
    """Made before workers are forked. A count is written by its worker alone; torn reads cannot be (aligned words)."""

    def __init__(self, num_workers: int) -> None:
        self._counts = memoryview(mmap.mmap(-1, num_workers * _COUNT.size)).cast("q")
        for number in range(num_workers):
            self.leave(number)

    def enter(self, number: int) -> Share:
        """Worker `number` accepts from now on."""
        self._counts[number] = 0
        return Share(self._counts, number)

    def leave(self, number: int) -> None:
        """It does not, or has died: nobody steps back for it."""
        self._counts[number] = _NOBODY

    def least(self) -> int:
        """The number of the worker with the fewest connections; raises ValueError if there is none."""
        return min((number for number, count in enumerate(self._counts) if count >= 0), key=self._counts.__getitem__)


class Share:
    """One worker's part."""

    def __init__(self, counts: memoryview, number: int) -> None:
        self._counts = counts
        self._number = number

    def set(self, num_connections: int) -> None:
        """So many connections are open."""
        self._counts[self._number] = num_connections

    def leave(self) -> None:
        """Nothing is accepted any more."""
        self._counts[self._number] = _NOBODY

    @property
    def is_exceeded(self) -> bool:
        """Whether another worker has fewer."""
        mine = self._counts[self._number]
        return any(0 <= count < mine for count in self._counts)
