"""Which objects exist and whether anybody refers to them; the sweep that removes those that nobody does.

    note ─▶ upload ─▶ row that refers to it (a foreign key: what is not noted cannot be referred to)
    sweep: noted longer ago than the grace, and no row refers to it ─▶ row and object go, under the row's lock

A name is noted before its upload starts and counts as fresh from then on, so that the sweep of another gateway never
takes what is just being stored. A writer that stalls for longer than the grace is refused by the foreign key. Times are
the server's alone.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from gateway.ledger.backend import Connection
from gateway.ledger.objects import Objects

GRACE_SECONDS = 3600.0
"""How long an object may lie without a row: far longer than an upload with all its retries."""

_SWEEP_SECONDS = 600.0
_SWEEP_BATCH = 200
_SWEEP_LOCK = "sweep of objects"
_NUM_CONNECTIONS = 4

_log = logging.getLogger(__name__)

TABLES = (
    """CREATE TABLE objects (
        name TEXT COLLATE "C" PRIMARY KEY,
        num_bytes BIGINT NOT NULL,
        noted_at TIMESTAMP WITH TIME ZONE NOT NULL
    )""",
    "CREATE INDEX objects_by_age ON objects (noted_at)",
    "ALTER TABLE turns ADD CONSTRAINT turns_object FOREIGN KEY (experts_file) REFERENCES objects (name)",
    "ALTER TABLE blobs ADD CONSTRAINT blobs_object FOREIGN KEY (sha256) REFERENCES objects (name)",
)
"""Made behind the ledger's own tables."""

_UNUSED = """NOT EXISTS (SELECT 1 FROM turns t WHERE t.experts_file = o.name)
             AND NOT EXISTS (SELECT 1 FROM blobs b WHERE b.sha256 = o.name)"""


class SweepReport(NamedTuple):
    """What a sweep removed."""

    num_objects: int
    num_bytes: int


class ObjectRegister:
    """The table `objects`; safe to use from several threads. `failures`: what its connections and objects raise."""

    def __init__(
        self, connect: Callable[[], Connection], objects: Objects, failures: tuple[type[Exception], ...]
    ) -> None:
        self._connect = connect
        self._objects = objects
        self._failures = failures
        self._idle: queue.SimpleQueue[Connection | None] = queue.SimpleQueue()
        for _ in range(_NUM_CONNECTIONS):
            self._idle.put(None)  # opened when it is needed
        self._closing = threading.Event()
        self._sweeper: threading.Thread | None = None

    def note(self, name: str, num_bytes: int) -> None:
        """Remember a name before its content is uploaded; on disk when it returns."""
        with self._connection() as connection:
            connection.execute(
                "INSERT INTO objects (name, num_bytes, noted_at) VALUES (?, ?, now()) "
                "ON CONFLICT (name) DO UPDATE SET noted_at = excluded.noted_at",
                (name, num_bytes),
            )

    def is_kept(self, name: str) -> bool:
        """Whether a session refers to a blob of this name; ask after `note`, so that it stays."""
        with self._connection() as connection:
            return connection.execute("SELECT 1 FROM blobs WHERE sha256 = ? LIMIT 1", (name,)).fetchone() is not None

    def sweep(self, *, grace_seconds: float = GRACE_SECONDS) -> SweepReport:
        """Remove what nobody refers to and nobody has noted for `grace_seconds`; nothing while another sweep runs."""
        num_objects = num_bytes = 0
        connection = self._connect()
        try:
            connection.execute("SET idle_in_transaction_session_timeout = 0")  # deleting objects takes its time
            while not self._closing.is_set():
                removed = self._sweep_some(connection, grace_seconds)
                num_objects += len(removed)
                num_bytes += sum(size for _, size in removed)
                if len(removed) < _SWEEP_BATCH:
                    break
        finally:
            connection.close()
        return SweepReport(num_objects, num_bytes)

    def start_sweeping(self) -> None:
        """Sweep now and then, in a thread, until `close`."""
        self._sweeper = threading.Thread(target=self._keep_sweeping, name="ledger-sweeper", daemon=True)
        self._sweeper.start()

    def close(self) -> None:
        """End the thread and the connections."""
        self._closing.set()
        if self._sweeper is not None:
            self._sweeper.join()
        while not self._idle.empty():
            connection = self._idle.get()
            if connection is not None:
                connection.close()

    def _keep_sweeping(self) -> None:
        while not self._closing.wait(_SWEEP_SECONDS):
            try:
                report = self.sweep()
            except self._failures as error:
                _log.warning("objects were not swept, a later sweep will: %s", error)
            else:
                if report.num_objects:
                    _log.info("removed %d objects (%d bytes) that nothing refers to", *report)

    def _sweep_some(self, connection: Connection, grace_seconds: float) -> Sequence[tuple[str, int]]:
        connection.begin()
        try:
            removed = _remove_rows(connection, grace_seconds)
            self._objects.remove([name for name, _ in removed])  # while the rows are locked: who notes them now waits
            connection.commit()
        except BaseException:
            connection.rollback()
            raise
        return removed

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        connection = self._idle.get()
        try:
            if connection is None:
                connection = self._connect()
            yield connection
        finally:
            self._idle.put(connection)


def _remove_rows(connection: Connection, grace_seconds: float) -> Sequence[tuple[str, int]]:
    """Lock candidates first and look again then: what committed before the lock is seen by the second statement."""
    (alone,) = connection.execute("SELECT pg_try_advisory_xact_lock(hashtextextended(?, 0))", (_SWEEP_LOCK,)).fetchone()
    if not alone:
        return ()
    candidates = connection.execute(
        f"""SELECT o.name FROM objects o
            WHERE o.noted_at < now() - make_interval(secs => ?) AND {_UNUSED}
            ORDER BY o.noted_at LIMIT {_SWEEP_BATCH} FOR UPDATE SKIP LOCKED""",
        (grace_seconds,),
    ).fetchall()
    removed = []
    for (name,) in candidates:
        removed += connection.execute(
            f"DELETE FROM objects o WHERE o.name = ? AND {_UNUSED} RETURNING o.name, o.num_bytes", (name,)
        ).fetchall()
    return removed
