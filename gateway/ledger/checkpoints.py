"""Moves what the write-ahead log holds into the SQLite file, beside the writer, so that no commit waits for it.

    commit ──▶ note ──▶ this thread: wal_checkpoint(PASSIVE) on a connection of its own
                          └─ the log is long, and grew meanwhile ──▶ the writer moves the last pages itself (`finish`)

SQLite begins the log anew only when all of it was moved, which beside a writer that never rests would not happen: it is
the writer that takes the last step, of few pages. Left to itself SQLite moves a thousand pages inside some commit.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable

from gateway.ledger.backend import Connection

WITHOUT_US_PAGES = 8192
"""At so many the writer's own commit moves them after all (`wal_autocheckpoint`)."""

_PAUSE_SECONDS = 0.2
_WORTH_COMMITS = 64
"""A log of fewer commits is left alone: nothing is written while nothing happens."""

_LONG_LOG_PAGES = 1024
_MOVE = "PRAGMA wal_checkpoint(PASSIVE)"  # waits for nobody, and nobody for it


class Checkpoints:
    """A thread that owns its connection; `close` ends it. connect: opens the connection, in that thread."""

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect
        self._wanted = threading.Event()
        self._closed = threading.Event()
        self._log_is_long = False
        self._num_commits = 0
        self._thread = threading.Thread(target=self._run, name="ledger-checkpoints", daemon=True)
        self._thread.start()

    def note(self, connection: Connection) -> None:
        """After a commit, by the writer with its connection, outside of a transaction."""
        if self._log_is_long:
            self._log_is_long = False
            connection.execute(_MOVE).fetchall()
        self._num_commits += 1
        if self._num_commits >= _WORTH_COMMITS:
            self._num_commits = 0
            self._wanted.set()

    def close(self) -> None:
        """End the thread; repeating it is fine."""
        self._closed.set()
        self._wanted.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            connection = self._connect()
        except (sqlite3.Error, OSError):
            return  # the writer's commits move pages themselves, at `WITHOUT_US_PAGES`
        try:
            while not self._closed.wait(_PAUSE_SECONDS):
                self._wanted.wait()
                self._wanted.clear()
                self._move(connection)
        finally:
            connection.close()

    def _move(self, connection: Connection) -> None:
        try:
            _, num_pages, _ = connection.execute(_MOVE).fetchone()
        except (sqlite3.Error, OSError):
            return  # a full or failing disk: the log stays as it is, and the writer finds out by itself
        self._log_is_long = num_pages > _LONG_LOG_PAGES
