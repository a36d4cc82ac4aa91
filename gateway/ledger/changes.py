"""Which sessions other processes of one data folder have written to: so that a worker knows without asking SQLite.

    commit ──▶ append {who, session ids} ──▶ futures        changed_elsewhere: what was appended since, read at once

It is a note beside the store, never needed to read it and never durable: `data/changes.log` holds one record a commit,
appended before anybody hears of that commit. A reader that asks after a request has come therefore knows of all that
the agent may know of. Looking when nothing has happened costs three reads of some bytes.

The file's first page holds a counter, its *epoch*; it is raised before and after the file is cut, when a process joins
(another may have died between its commit and its note), and when a note could not be written. Who finds another epoch
than last time, or an odd one, knows nothing and takes every session for changed.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable, Collection
from pathlib import Path

from gateway.ledger.rows import decode_json, encode_json

_START = 4096
_MAX_BYTES = 16 * 2**20
_READ_BYTES = 2**18
_EPOCH = struct.Struct("<Q")
_RECORD = struct.Struct("<QI")  # who, bytes that follow: a JSON list of session ids


class ChangeLog:
    """One process's view of a folder's notes; `note` is the writer thread's, `changed_elsewhere` the event loop's."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError."""
        self._file = os.open(folder / "changes.log", os.O_RDWR | os.O_CREAT, 0o644)
        self._end = os.open(folder / "changes.log", os.O_WRONLY | os.O_APPEND)
        if os.fstat(self._file).st_size < _START:
            os.pwrite(self._file, bytes(_START), 0)
        self._who = int.from_bytes(os.urandom(8), "little")
        self._epoch_seen: int | None = None
        self._offset = _START
        self.forget()

    def forget(self) -> None:
        """Have everybody take every session for changed."""
        self._change_epoch(lambda: None)

    def note(self, session_ids: Collection[str]) -> None:
        """Say that these were written to: after the commit, before anybody is told of it."""
        content = encode_json(sorted(session_ids))
        record = _RECORD.pack(self._who, len(content)) + content
        try:
            is_whole = os.write(self._end, record) == len(record)
            is_long = os.fstat(self._end).st_size > _MAX_BYTES
        except OSError:
            is_whole, is_long = False, True
        if is_long or not is_whole:
            self._change_epoch(lambda: os.ftruncate(self._file, _START))

    def changed_elsewhere(self) -> frozenset[str] | None:
        """Sessions that other processes noted since the last call; None where that is not known, at first too."""
        epoch, changed = self._epoch(), set[str]()
        is_known = epoch == self._epoch_seen and epoch % 2 == 0
        while is_known and (content := os.pread(self._file, _READ_BYTES, self._offset)):
            num_read = self._take(content, changed)
            self._offset += num_read
            is_known = num_read > 0  # else it is a record longer than any read, or half of one
        if is_known and self._epoch() == epoch:
            return frozenset(changed)
        self._start_anew(epoch)
        return None

    def close(self) -> None:
        """Repeating it is not fine."""
        os.close(self._end)
        os.close(self._file)

    def _take(self, content: bytes, changed: set[str]) -> int:
        """Add others' sessions of the whole records in `content`; how many bytes those have."""
        at = 0
        while at + _RECORD.size <= len(content):
            who, num_bytes = _RECORD.unpack_from(content, at)
            stop = at + _RECORD.size + num_bytes
            if stop > len(content):
                break
            if who != self._who:
                changed.update(decode_json(content[at + _RECORD.size : stop]))
            at = stop
        return at

    def _start_anew(self, epoch: int) -> None:
        """From the end of what is there now, seen after the epoch was: what comes later is read."""
        self._epoch_seen = epoch if epoch % 2 == 0 else None
        self._offset = os.fstat(self._file).st_size

    def _epoch(self) -> int:
        return int(_EPOCH.unpack(os.pread(self._file, _EPOCH.size, 0))[0])

    def _change_epoch(self, work: Callable[[], None]) -> None:
        """Odd while `work` runs; one process at a time."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            odd = self._epoch() | 1  # it is odd already where a process died in here
            os.pwrite(self._file, _EPOCH.pack(odd), 0)
            work()
            os.pwrite(self._file, _EPOCH.pack(odd + 1), 0)
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)
