"""Dataclasses that nobody changes once they are made, for those of which every turn makes some.

Above the contracts, which do without other packages, such records are `msgspec.Struct`s, made without a call of Python.
The type checker sees `dataclass` and holds everybody to `frozen=True`. At run time that alone would set each field by a
call of its own: a turn fills two hundred, and that took a twentieth of all it took.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["frozen_dataclass"]

if TYPE_CHECKING:
    from dataclasses import dataclass as frozen_dataclass
else:
    from dataclasses import dataclass

    def frozen_dataclass(*, frozen: bool, slots: bool, eq: bool = True):
        """A dataclass with the hash of a frozen one."""
        return dataclass(slots=slots, eq=eq, unsafe_hash=frozen and eq)
