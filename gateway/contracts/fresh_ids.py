"""Random ids, for which the system is asked for many at once: its call takes longer than all else about an id."""

from __future__ import annotations

import os

_NUM_DIGITS = 8192
"""Of one call of the system's."""


class FreshDigits:
    """Random hexadecimal digits, each given out once; nobody can guess them."""

    def __init__(self) -> None:
        self._digits, self._taken = "", _NUM_DIGITS
        os.register_at_fork(after_in_child=self.forget)  # else parent and child would give out the same ones

    def take(self, number: int) -> str:
        """The next ones, at most 8192."""
        start, self._taken = self._taken, self._taken + number
        if self._taken > _NUM_DIGITS:
            self._digits, start, self._taken = os.urandom(_NUM_DIGITS // 2).hex(), 0, number
        return self._digits[start : self._taken]

    def forget(self) -> None:
        """Give out none of those that are kept."""
        self._digits, self._taken = "", _NUM_DIGITS


fresh_hex = FreshDigits().take
"""So many random hexadecimal digits of this process."""
