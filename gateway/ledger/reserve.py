"""Room on the disk: a reserve that is given up when the disk is full, so that what was sampled is still recorded.

    data/reserve.turns   preallocated; given up at the first ENOSPC, for the turns that are under way
    data/reserve.last    preallocated; given up at the next one, for what frees space or is tiny: drops, acks

    open ──▶ low        little is left: no new turns (who asks for one gets LedgerFull), the rest goes on
      ▲       │ ENOSPC
      │       ▼
      │    reserve      turns under way are recorded in what the first reserve gave back
      │       │ ENOSPC again
      │       ▼
      └──── full        nothing that grows is written; those turns wait in memory for room

`refresh` goes back as soon as there is room: it makes the reserves anew first, then new turns are taken again. The
files hold nothing and may be deleted at any time. Two processes of one folder (a hand-over) share them by name.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from gateway.contracts.errors import ConfigurationError, LedgerFull

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_SPACE_IN_SQLITE = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)
_MIN_TURN_BYTES = 256 * 2**10
_LAST_PART = 4
"""The last reserve is one of so many parts of the whole."""


class SpaceState(StrEnum):
    """How much is still written; see the module's picture."""

    OPEN = "open"
    LOW = "low"
    RESERVE = "reserve"
    FULL = "full"


def _nothing() -> None:
    """Where a store has nothing beside its tables."""


@dataclass(frozen=True, slots=True, eq=False)
class Room:
    """What a ledger does about a full disk. reserve: None where it is not a disk of ours.

    begin, forget: before a batch writes beside the tables, and after it has failed: what it wrote is garbage.
    wait_seconds: how long a turn that was sampled waits for room before it is refused.
    """

    reserve: SpaceReserve | None = None
    begin: Callable[[], None] = _nothing
    forget: Callable[[], None] = _nothing
    wait_seconds: float = 0.0

    def make(self, *, grows: bool) -> bool:
        """As `SpaceReserve.make_room`."""
        return self.reserve is not None and self.reserve.make_room(grows=grows)


@dataclass(frozen=True, slots=True)
class Space:
    """The disk of a data folder. free_bytes: as of the last look; reserve_bytes: held back at the moment;
    wanted_bytes: what must be free for new turns, not counting those under way; turn_bytes: the largest turn so far;
    since: when this state began (seconds since the epoch)."""

    state: SpaceState
    free_bytes: int
    reserve_bytes: int
    wanted_bytes: int
    turn_bytes: int
    since: float


class SpaceReserve:
    """The reserve of one data folder; safe to use from several threads.

    min_free_bytes: below it no new turns begin. reserve_bytes: of both files together; 0 keeps none.
    """

    def __init__(self, folder: Path, *, min_free_bytes: int, reserve_bytes: int) -> None:
        self._folder = folder
        last = reserve_bytes // _LAST_PART
        self._turns = _ReserveFile(folder / "reserve.turns", reserve_bytes - last)
        self._last = _ReserveFile(folder / "reserve.last", last)
        self._lock = threading.Lock()
        self._space = Space(SpaceState.OPEN, 0, 0, min_free_bytes, 0, time.time())

    @property
    def space(self) -> Space:
        """As of the last look or write."""
        return self._space

    def prepare(self) -> None:
        """Make the folder and, where there is room for them, the reserves; raises ConfigurationError."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self.refresh()
        except OSError as error:
            raise ConfigurationError(f"{self._folder}: cannot be used as data folder ({error.strerror})") from error

    def check(self, num_running: int) -> None:
        """Raise LedgerFull where a new turn, beside those running, might not be recorded; asks the disk nothing."""
        space = self._space
        wanted = space.wanted_bytes + (num_running + 1) * space.turn_bytes
        if space.state is not SpaceState.OPEN or space.free_bytes < wanted:
            raise LedgerFull(
                f"no room for new turns: {space.free_bytes:,} bytes are free where {wanted:,} should be; "
                "turns under way are recorded, new ones are taken again when there is room"
            )

    def note_turn(self, num_bytes: int) -> None:
        """A turn of this size was written: the turns under way may become as large."""
        if num_bytes > self._space.turn_bytes:
            with self._lock:
                self._space = replace(self._space, turn_bytes=max(num_bytes, self._space.turn_bytes))

    def takes_growth(self) -> bool:
        """Whether it is worth trying to write what grows."""
        return self._space.state is not SpaceState.FULL

    def make_room(self, *, grows: bool) -> bool:
        """After a write that found the disk full: give up the next reserve and say whether to try again.

        grows: whether the write adds data; the last reserve is not for those.
        """
        with self._lock:
            if self._turns.give_up():
                self._enter(SpaceState.RESERVE)
                return True
            self._enter(SpaceState.FULL)
            gave_up = not grows and self._last.give_up()
            self._look()
            return gave_up

    def refresh(self) -> Space:
        """Look at the disk, and go back where there is room again; blocks, so not for the event loop."""
        with self._lock:
            free = self._look()
            missing = self._turns.missing_bytes + self._last.missing_bytes
            if missing and free >= missing + self._space.wanted_bytes:
                self._last.make()
                self._turns.make()
                free = self._look()
            self._enter(self._state(free))
            return self._space

    def close(self) -> None:
        """Give everything back: a folder that nobody serves needs no reserve."""
        with self._lock:
            self._turns.give_up()
            self._last.give_up()

    def _state(self, free: int) -> SpaceState:
        if self._turns.missing_bytes or self._last.missing_bytes:
            if self._space.state is SpaceState.FULL and free <= max(self._space.turn_bytes, _MIN_TURN_BYTES):
                return SpaceState.FULL
            # Since the start there may never have been room for it, while nothing was full yet.
            return SpaceState.LOW if self._space.state in (SpaceState.OPEN, SpaceState.LOW) else SpaceState.RESERVE
        return SpaceState.OPEN if free >= self._space.wanted_bytes else SpaceState.LOW

    def _look(self) -> int:
        disk = os.statvfs(self._folder)
        free = disk.f_bavail * disk.f_frsize
        held = self._turns.held_bytes + self._last.held_bytes
        self._space = replace(self._space, free_bytes=free, reserve_bytes=held)
        return free

    def _enter(self, state: SpaceState) -> None:
        if state is not self._space.state:
            self._space = replace(self._space, state=state, since=time.time())


def is_disk_full(error: BaseException) -> bool:
    """Whether the system or SQLite says that there is no space left."""
    if isinstance(error, LedgerFull):
        return True
    if isinstance(error, OSError):
        return error.errno in _NO_SPACE
    return isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", None) in _NO_SPACE_IN_SQLITE


NO_ROOM_TO_MAKE = Room()
"""Of a store that has no reserve."""


class _ReserveFile:
    """One preallocated file, known by its name only, so that another process may remove or make it."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self._path = path
        self._num_bytes = num_bytes

    @property
    def held_bytes(self) -> int:
        try:
            return self._path.stat().st_size
        except FileNotFoundError:
            return 0

    @property
    def missing_bytes(self) -> int:
        return max(0, self._num_bytes - self.held_bytes)

    def make(self) -> None:
        """Allocate it whole or not at all."""
        if not self.missing_bytes:
            return
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, self._num_bytes)
        except OSError as error:
            self._path.unlink(missing_ok=True)
            if error.errno not in _NO_SPACE:
                raise
        finally:
            os.close(descriptor)

    def give_up(self) -> bool:
        """Free it; False if there was nothing to free."""
        held = self.held_bytes
        self._path.unlink(missing_ok=True)
        return held > 0
