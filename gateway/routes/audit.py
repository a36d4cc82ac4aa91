"""The audit: one line of JSON for every call with an operator's key, and for every attempt that was refused at an
operators' call, another's session, or a path of the engines that agents do not get.

Lines hold who called (the first letters of the key's sha256, never the key), what was called, how it was answered and
what it changed; no bodies. They are appended by a thread, so that a slow disk holds up nobody; a line that cannot be
written is counted and logged, and the gateway goes on. What waits for the thread is lost if the process is killed.
Attempts that were refused are counted instead of written when there are many of them, so that nobody who has no key can
push what operators did out of the files.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import queue
import stat
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import msgspec
from starlette.types import Scope

from gateway.contracts.errors import ConfigurationError
from gateway.contracts.generation import JsonValue
from gateway.routes.quotas import TokenBucket

_log = logging.getLogger(__name__)

AUDIT_OFF = "none"
"""As the setting `audit`: nothing is written."""

NOTE = "verbatim.audit"
"""Where a request's scope has its `AuditNote`."""

_FILE_NAME = "audit.jsonl"
_MAX_FILE_BYTES = 64 * 2**20
_NUM_OLDER_FILES = 8
_MAX_WAITING_LINES = 10_000
_MAX_TEXT_CHARACTERS = 2_048
_REFUSED_PER_SECOND = 10.0
_CLOSE_SECONDS = 5.0
_FIRST_REFUSAL = 400
_REFUSALS_OF_KEYS = (401, 403)
_CHANGES_NOTHING = frozenset(("GET", "HEAD", "OPTIONS"))


class AuditNote(msgspec.Struct, eq=False):
    """What the parts that a request passes know of it.

    is_operators: it asked for an operators' call. has_operators_key: it came with such a key. key_fingerprint: of
    whatever key it came with. changed: what it did, beyond what its path says; never text of a task or a prompt.
    """

    is_operators: bool = False
    has_operators_key: bool = False
    key_fingerprint: str | None = None
    status: int | None = None
    changed: dict[str, JsonValue] = msgspec.field(default_factory=dict)

    def reach_operators_call(self, path_parameters: Mapping[str, Any]) -> None:
        """It asks for a call that is for operators."""
        self.is_operators = True
        self.changed = {name: str(value) for name, value in path_parameters.items()}


def audit_note(scope: Scope) -> AuditNote:
    """Of a request that came through a `RequestEdge`."""
    note: AuditNote = scope[NOTE]
    return note


def note_change(scope: Scope, **what: JsonValue) -> None:
    """What an operator's call has changed, in a few words."""
    audit_note(scope).changed |= what


def audit_path(setting: str, data: Path) -> Path | None:
    """Where the setting `audit` puts the file: "" beside the ledger; None if it is off."""
    if setting == AUDIT_OFF:
        return None
    return Path(setting).expanduser() if setting else data / _FILE_NAME


class AuditLog:
    """Appends to one file, and to the next when that is full (`FILE.1` is the youngest of the older ones).

    observe hears of each line: `written`, `failed` or `suppressed`. Raises ConfigurationError if the file cannot be
    opened at all.
    """

    def __init__(
        self,
        path: Path,
        *,
        observe: Callable[[str], None] = lambda _: None,
        max_bytes: int = _MAX_FILE_BYTES,
        num_older: int = _NUM_OLDER_FILES,
    ) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _AuditFile(path, max_bytes=max_bytes, num_older=num_older)
        except OSError as error:
            raise ConfigurationError(f"audit: {path} cannot be written ({error.strerror})") from error
        self._observe = observe
        self._refused = TokenBucket(_REFUSED_PER_SECOND, now=time.monotonic())
        self._num_suppressed = 0
        self._lines: queue.Queue[str | None] = queue.Queue(_MAX_WAITING_LINES)
        self._thread = threading.Thread(target=self._write_all, name="audit", daemon=True)
        self._thread.start()

    def record(self, scope: Scope, request_id: bytes, note: AuditNote) -> None:
        """Have a call written, if it is one that has to be."""
        is_refused = (
            (note.is_operators or note.status in _REFUSALS_OF_KEYS) and not note.has_operators_key and _failed(note)
        )
        if not (note.is_operators or note.has_operators_key or is_refused):
            return
        if is_refused and not self._has_room_for_refusal():
            self._num_suppressed += 1
            self._observe("suppressed")
            return
        entry = _entry(scope, request_id, note)
        if self._num_suppressed:
            entry["refused_before"] = self._num_suppressed
            self._num_suppressed = 0
        try:
            self._lines.put_nowait(json.dumps(entry, default=str))  # ASCII: one line, whatever was sent
        except queue.Full:
            self._tell_failure("the disk does not keep up")

    def close(self) -> None:
        """Write what waits, and end."""
        try:
            self._lines.put(None, timeout=_CLOSE_SECONDS)
            self._thread.join(_CLOSE_SECONDS)
            self._file.close()
        except (queue.Full, OSError) as error:
            self._tell_failure(str(error))

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            failure = self._file.append(line)
            if failure is None:
                self._observe("written")
            else:
                self._tell_failure(failure.strerror or str(failure))

    def _has_room_for_refusal(self) -> bool:
        now = time.monotonic()
        if self._refused.wait_seconds(1, now):
            return False
        self._refused.take(1, now)
        return True

    def _tell_failure(self, why: str) -> None:
        self._observe("failed")
        _log.error("a line of the audit is not written: %s", why)


class _AuditFile(RotatingFileHandler):
    """The file, for its owner's eyes; the standard library turns it over. Several processes may write it: each line is
    written, and each file turned over, under a lock on the folder."""

    def __init__(self, path: Path, *, max_bytes: int, num_older: int) -> None:
        self._failure: OSError | None = None
        super().__init__(path, maxBytes=max_bytes, backupCount=num_older, encoding="utf-8")

    def append(self, line: str) -> OSError | None:
        """Write one line; what went wrong, if something did."""
        self._failure = None
        try:
            folder = os.open(os.path.dirname(self.baseFilename), os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX)
                self._follow_name()
                self.emit(logging.LogRecord(__name__, logging.INFO, "", 0, line, None, None))
            finally:
                os.close(folder)  # and the lock with it
        except OSError as error:
            return error
        return self._failure

    def _follow_name(self) -> None:
        """Have the file opened anew where another process has turned it over."""
        if self.stream is None:
            return
        try:
            if os.path.samestat(os.fstat(self.stream.fileno()), os.stat(self.baseFilename)):
                return
        except FileNotFoundError:  # moved away
            pass
        self.stream.close()
        self.stream = None  # `emit` opens it

    def handleError(self, record: logging.LogRecord) -> None:
        """Called inside the library's `except`."""
        error = sys.exc_info()[1]
        self._failure = error if isinstance(error, OSError) else OSError(str(error))

    def _open(self) -> TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode):
            os.fchmod(descriptor, 0o600)
        size = status.st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":  # a process was killed in the middle of a line
            os.write(descriptor, b"\n")
        return open(descriptor, "a", encoding="utf-8")


def _entry(scope: Scope, request_id: bytes, note: AuditNote) -> dict[str, JsonValue]:
    method: str = scope["method"]
    changes = note.status is not None and not _failed(note) and method not in _CHANGES_NOTHING
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": request_id.decode(),
        "method": method,
        "path": _cut(path.decode("latin-1")),
        "query": _cut(scope["query_string"].decode("latin-1")),
        "peer": _peer(scope),
        "key": note.key_fingerprint,
        "status": note.status,
        "changed": {name: _cut(value) for name, value in note.changed.items()} if changes else None,
    }


def _failed(note: AuditNote) -> bool:
    return note.status is None or note.status >= _FIRST_REFUSAL


def _peer(scope: Scope) -> str | None:
    client = scope.get("client")
    return None if client is None else f"{client[0]}:{client[1]}"


def _cut(value: JsonValue) -> JsonValue:
    return value[:_MAX_TEXT_CHARACTERS] if isinstance(value, str) else value
