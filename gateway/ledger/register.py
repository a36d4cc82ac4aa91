"""Which objects exist and whether anybody refers to them; the sweep that removes those that nobody does.

    note ─▶ upload ─▶ row that refers to it (a foreign key: what is not noted cannot be referred to)
    sweep: noted longer ago than the grace, and no row refers to it ─▶ struck from `objects`, its place into `removals`:
           COMMIT ─▶ object goes ─▶ `removals` forgets the place

A name is noted before its upload starts and counts as fresh from then on, so that the sweep of another gateway never
takes what is just being stored. A writer that stalls for longer than the grace is refused by the foreign key. What was
struck and comes again has another place, so a sweep that hangs before it removes takes nothing that is new; what a
sweep that died had struck is removed by the next one. Times are the server's alone.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from gateway.contracts.errors import VerbatimError
from gateway.ledger.backend import Connection
from gateway.ledger.objects import Objects

GRACE_SECONDS = 3600.0
"""How long an object may lie without a row: far longer than an upload with all its retries."""

_SWEEP_SECONDS = 600.0
_SWEEP_BATCH = 200
_NUM_CONNECTIONS = 4

_log = logging.getLogger(__name__)

TABLES = (
    """CREATE TABLE objects (
        name TEXT COLLATE "C" PRIMARY KEY,
        place TEXT COLLATE "C" NOT NULL,
        num_bytes BIGINT NOT NULL,
        noted_at TIMESTAMP WITH TIME ZONE NOT NULL
    )""",
    'CREATE TABLE removals (place TEXT COLLATE "C" PRIMARY KEY, num_bytes BIGINT NOT NULL)',
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
        # VerbatimError: where the server died in a COMMIT.
        self._failures: tuple[type[Exception], ...] = (*failures, VerbatimError)
        self._idle: queue.SimpleQueue[Connection | None] = queue.SimpleQueue()
        for _ in range(_NUM_CONNECTIONS):
            self._idle.put(None)  # opened when it is needed
        self._closing = threading.Event()
        self._sweeper: threading.Thread | None = None

    def note(self, name: str, place: str, num_bytes: int) -> str:
        """Remember a content before it is uploaded, on disk when it returns: to `place`, unless it has one already."""
        with self._connection() as connection:
            (noted,) = connection.execute(
                "INSERT INTO objects (name, place, num_bytes, noted_at) VALUES (?, ?, ?, now()) "
                "ON CONFLICT (name) DO UPDATE SET noted_at = excluded.noted_at RETURNING place",
                (name, place, num_bytes),
            ).fetchone()
            return str(noted)

    def place_of(self, name: str) -> str | None:
        """Where a content lies, None if nobody noted it."""
        with self._connection() as connection:
            row = connection.execute("SELECT place FROM objects WHERE name = ?", (name,)).fetchone()
            return None if row is None else str(row[0])

    def is_kept(self, name: str) -> bool:
        """Whether a session refers to a blob of this name; ask after `note`, so that it stays."""
        with self._connection() as connection:
            return connection.execute("SELECT 1 FROM blobs WHERE sha256 = ? LIMIT 1", (name,)).fetchone() is not None

    def sweep(self, *, grace_seconds: float = GRACE_SECONDS) -> SweepReport:
        """Remove what nobody refers to and nobody has noted for `grace_seconds`, and what a sweep that died left."""
        removed: list[tuple[str, int]] = []
        connection = self._connect()
        try:
            num_struck = _SWEEP_BATCH
            while num_struck == _SWEEP_BATCH and not self._closing.is_set():
                num_struck = _strike(connection, grace_seconds)
                removed += self._remove_struck(connection)
        finally:
            connection.close()
        return SweepReport(len(removed), sum(num_bytes for _, num_bytes in removed))

    def leftovers(self) -> Sequence[str]:
        """A line for each kind of object that nothing refers to: those that a sweep will take, and those that are not
        noted, which no sweep will."""
        lines = []
        with self._connection() as connection:
            unused = connection.execute(
                f"SELECT count(*), coalesce(sum(o.num_bytes), 0) FROM objects o WHERE {_UNUSED}"
            ).fetchone()
            stored = dict(self._objects.stored())
            for (place,) in connection.execute("SELECT place FROM objects UNION ALL SELECT place FROM removals"):
                stored.pop(place, None)
        if unused[0]:
            lines.append(f"{unused[0]} objects ({int(unused[1])} bytes) that nothing refers to await a sweep")
        if stored:
            what = f"{len(stored)} objects ({sum(stored.values())} bytes)"
            lines.append(f"{self._objects.url}: {what} are not known to this ledger, and no sweep will remove them")
        return lines

    def start_sweeping(self, *, every_seconds: float = _SWEEP_SECONDS) -> None:
        """Sweep now and then, in a thread, until `close`."""
        self._sweeper = threading.Thread(
            target=self._keep_sweeping, args=(every_seconds,), name="ledger-sweeper", daemon=True
        )
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

    def _keep_sweeping(self, every_seconds: float) -> None:
        while not self._closing.wait(every_seconds):
            try:
                report = self.sweep()
            except self._failures as error:
                _log.warning("objects were not swept, a later sweep will: %s", error)
            else:
                if report.num_objects:
                    _log.info("removed %d objects (%d bytes) that nothing refers to", *report)

    def _remove_struck(self, connection: Connection) -> Sequence[tuple[str, int]]:
        """Places and sizes of what went; two sweeps at once remove the same, and one of them counts it."""
        removed: list[tuple[str, int]] = []
        while struck := connection.execute(f"SELECT place FROM removals LIMIT {_SWEEP_BATCH}").fetchall():
            self._objects.remove([place for (place,) in struck])
            for place in struck:
                removed += connection.execute(
                    "DELETE FROM removals WHERE place = ? RETURNING place, num_bytes", place
                ).fetchall()
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


def _strike(connection: Connection, grace_seconds: float) -> int:
    """How many rows went from `objects`, their places to `removals`; each that is noted or used meanwhile stays.

    Candidates are locked first and looked at again then: what committed before is seen by the second statement.
    """
    connection.begin()
    try:
        candidates = connection.execute(
            f"""SELECT o.name FROM objects o
                WHERE o.noted_at < now() - make_interval(secs => ?) AND {_UNUSED}
                ORDER BY o.noted_at LIMIT {_SWEEP_BATCH} FOR UPDATE SKIP LOCKED""",
            (grace_seconds,),
        ).fetchall()
        connection.executemany(
            f"""WITH struck AS (DELETE FROM objects o WHERE o.name = ? AND {_UNUSED} RETURNING o.place, o.num_bytes)
                INSERT INTO removals (place, num_bytes) SELECT place, num_bytes FROM struck ON CONFLICT DO NOTHING""",
            candidates,
        )
        connection.commit()
    except BaseException:
        connection.rollback()
        raise
    return len(candidates)
