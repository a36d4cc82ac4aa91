"""The embedded ledger: SQLite (WAL, synchronous=FULL) for rows, segment files for routing rows, one folder, no server.

    data/ledger.lock      held by the one process that writes; its pid inside
    data/ledger.sqlite    sessions, turns, finishes, leases, policies
    data/routing/*.seg    routing rows (segments_file.py)
    data/blobs/*          images and other bytes that messages refer to (blobs.py)

Writes go through one thread that commits in groups (writer.py); reads run on connections of their own in a small pool.
Nothing here blocks the event loop, and nothing is kept in memory that is not on disk.
"""

from __future__ import annotations

import asyncio
import fcntl
import math
import os
import queue
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self, TypeVar

from gateway.contracts.errors import (
    ConfigurationError,
    Conflict,
    InvalidRequest,
    LedgerCorrupt,
    LedgerError,
    NotFound,
    SessionSealed,
)
from gateway.contracts.experts import RoutedExperts
from gateway.contracts.media import Blob
from gateway.contracts.records import FinishRecord, SessionRecord, TurnRecord
from gateway.contracts.rollouts import FeedCounts, Lease
from gateway.ledger import leases, rows, schema
from gateway.ledger.blobs import BlobFiles
from gateway.ledger.segments_file import Location, SegmentFileWriter, read_record, sync_folder
from gateway.ledger.writer import GroupCommitWriter, Operation, translate

Result = TypeVar("Result")

_NUM_READERS = 4
_BUSY_TIMEOUT_SECONDS = 10.0
_TURN_COLUMNS = ", ".join(rows.TurnRow._fields)


class _Writing(NamedTuple):
    lock: int
    routing: SegmentFileWriter


class SqliteLedger:
    """`gateway.contracts.ports.Ledger` on a local disk; make it with `open`, end it with `aclose`."""

    def __init__(self, data: Path, writing: _Writing | None) -> None:
        """Use `open`; `writing` is None for reading only."""
        self._data = data
        self._writing = writing
        self._closed = False
        self._space_was_freed = True  # after a crash files may be left that no row points at
        self._blobs = BlobFiles(data / "blobs")
        self._freed_blobs: set[str] = set() if writing is None else set(self._blobs.stored())
        self._readers = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="ledger-reader")
        self._idle: queue.SimpleQueue[sqlite3.Connection] = queue.SimpleQueue()
        for _ in range(_NUM_READERS):
            self._idle.put(_connect(_store(data), read_only=True))
        self._writer: GroupCommitWriter | None = None
        if writing is not None:
            connection = _connect(_store(data), read_only=False)
            self._writer = GroupCommitWriter(connection, flush=writing.routing.flush, after_commit=self._free_space)

    @classmethod
    def open(cls, data: Path, *, read_only: bool = False) -> Self:
        """Open or make the ledger in folder `data`; blocks for a moment.

        `read_only` takes no lock and makes nothing, so that another program can look while a gateway runs.
        Raises ConfigurationError if the folder cannot be used or another process writes to it, SchemaMismatch for a
        store of another version, LedgerCorrupt for one that cannot be read.
        """
        if read_only:
            if not _store(data).is_file():
                raise ConfigurationError(f"{data}: holds no ledger")
            _prepare(data, schema.check)
            return cls(data, None)
        lock = _lock_folder(data)
        try:
            _prepare(data, schema.prepare)
            return cls(data, _Writing(lock, _open_files(data)))
        except BaseException:
            os.close(lock)
            raise

    # ---- sessions and turns ----

    async def create_session(self, session: SessionRecord) -> SessionRecord:
        """Store a session; an equal one (`created_at` aside) is returned as it is stored, another one is a Conflict."""
        for name, text in (("session_id", session.session_id), ("group", session.group or "")):
            _check_text(name, text)

        def create(connection: sqlite3.Connection) -> SessionRecord:
            stored = _session(connection, session.session_id)
            if stored is None:
                connection.execute("INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?)", rows.session_row(session))
                return session
            if not rows.same_session(stored, session):
                raise Conflict(f"session {session.session_id} exists already with other properties")
            return stored

        return await self._write(create)

    async def session(self, session_id: str) -> SessionRecord | None:
        """The session, or None."""
        return await self._read(lambda connection: _session(connection, session_id))

    async def sessions(
        self, *, labels: Mapping[str, str] | None = None, limit: int = 100, after: str | None = None
    ) -> Sequence[SessionRecord]:
        """Sessions that carry all of `labels`, in order of id, starting after `after`."""
        clause, values = leases.label_filter(labels or {})
        query = (
            "SELECT s.session_id, s.facts, s.checksum FROM sessions s "
            f"WHERE s.session_id > ?{clause} ORDER BY s.session_id LIMIT ?"
        )
        parameters = [after or "", *values, limit]
        return await self._read(
            lambda connection: [rows.read_session(*row) for row in connection.execute(query, parameters)]
        )

    async def append_turn(self, turn: TurnRecord, experts: RoutedExperts | None) -> None:
        """Store one turn and its routing rows; the same turn again is a no-op.

        Raises SessionSealed, NotFound (no such session), Conflict (the turn id is taken by another content, or its
        parent is not recorded), ExpertsMismatch (the rows are not those that the turn's record speaks of).
        """
        routing = rows.check_experts(turn, experts)
        row = rows.turn_row(turn)

        def append(connection: sqlite3.Connection) -> None:
            if _is_stored(connection, row):
                return
            _check_open(connection, turn.session_id)
            _check_parent(connection, turn)
            location = (None, None, None) if routing is None else self._append_routing(turn, routing)
            connection.execute(
                f"INSERT INTO turns ({_TURN_COLUMNS}, experts_file, experts_offset, experts_bytes, delivered_at) "
                f"VALUES ({', '.join('?' * (len(row) + 4))})",
                (*row, *location, turn.delivered_at),
            )

        await self._write(append)

    async def mark_delivered(self, session_id: str, turn_id: str, delivered_at: float) -> None:
        """Note when a turn's reply left (the latest time wins); raises NotFound for an unknown turn."""

        def mark(connection: sqlite3.Connection) -> None:
            marked = connection.execute(
                "UPDATE turns SET delivered_at = ? WHERE session_id = ? AND turn_id = ?",
                (delivered_at, session_id, turn_id),
            )
            if not marked.rowcount:
                raise NotFound(f"session {session_id} has no turn {turn_id}")

        await self._write(mark)

    async def turns(self, session_id: str) -> Sequence[TurnRecord]:
        """All turns of a session in order of `index`; empty for an unknown session or a dropped rollout."""
        query = f"SELECT {_TURN_COLUMNS}, delivered_at FROM turns WHERE session_id = ? ORDER BY turn_index, rowid"
        return await self._read(
            lambda connection: [
                rows.read_turn(rows.TurnRow(*columns), delivered_at)
                for *columns, delivered_at in connection.execute(query, (session_id,))
            ]
        )

    async def experts(self, session_id: str, turn_id: str) -> RoutedExperts | None:
        """The routing rows stored with a turn, None if there are none; raises NotFound, LedgerCorrupt."""

        def read(connection: sqlite3.Connection) -> RoutedExperts | None:
            location = _routing_location(connection, session_id, turn_id)
            if location is None:
                return None
            try:
                return _read_routing(self._data / "routing", location, session_id, turn_id)
            except LedgerCorrupt:
                _routing_location(connection, session_id, turn_id)  # NotFound if the rollout was dropped meanwhile
                raise

        return await self._read(read)

    async def put_blob(self, session_id: str, blob: Blob) -> None:
        """Keep a content for a session, in a file that equal contents of all sessions share; again is a no-op.

        Raises NotFound for an unknown session, SessionSealed for a finished one.
        """
        if await self._read(lambda connection: _blob_type(connection, session_id, blob.sha256)) is not None:
            return
        if self._writing is not None:  # not in the writer's thread: megabytes would hold everybody's commits
            await asyncio.to_thread(_translated, lambda: self._blobs.write(blob))

        def hold(connection: sqlite3.Connection) -> None:
            _check_open(connection, session_id)
            if not self._blobs.has(blob.sha256):  # nobody held it until now, so it may just have been cleared away
                self._blobs.write(blob)
            connection.execute(
                "INSERT OR IGNORE INTO blobs VALUES (?, ?, ?, ?)",
                (session_id, blob.sha256, blob.media_type, len(blob.content)),
            )

        await self._write(hold)

    async def blob(self, session_id: str, sha256: str) -> Blob | None:
        """A content that the session refers to, None if it refers to no such; raises LedgerCorrupt."""

        def read(connection: sqlite3.Connection) -> Blob | None:
            media_type = _blob_type(connection, session_id, sha256)
            if media_type is None:
                return None
            try:
                return Blob(sha256, media_type, self._blobs.read(sha256, name=f"session {session_id}"))
            except LedgerCorrupt:
                if _blob_type(connection, session_id, sha256) is None:  # dropped meanwhile
                    return None
                raise

        return await self._read(read)

    async def finish(self, finish: FinishRecord) -> FinishRecord:
        """Seal a session; an equal repetition (times and snapshot aside) returns the first record, another one is a
        Conflict. Raises NotFound for an unknown session, InvalidRequest for a reward that is no number."""
        if finish.reward is not None and not math.isfinite(finish.reward):
            raise InvalidRequest(f"reward is {finish.reward}; give a finite number, or null where there is none")
        _check_text("outcome", finish.outcome)

        def seal(connection: sqlite3.Connection) -> FinishRecord:
            stored = _finish(connection, finish.session_id)
            if stored is None:
                return _seal(connection, finish)
            if not rows.same_finish(stored, finish):
                raise Conflict(f"session {finish.session_id} was finished already with another reward or outcome")
            return stored

        return await self._write(seal)

    async def finish_record(self, session_id: str) -> FinishRecord | None:
        """How the session ended, or None while it is open."""
        return await self._read(lambda connection: _finish(connection, session_id))

    async def delete_session(self, session_id: str) -> None:
        """Forget a session; Conflict while its finished rollout was neither acknowledged nor dropped; NotFound."""

        def delete(connection: sqlite3.Connection) -> None:
            if _session(connection, session_id) is None:
                raise NotFound(f"no session {session_id}")
            finish = _finish(connection, session_id)
            if finish is not None and finish.dropped_at is None and not _is_acknowledged(connection, session_id):
                raise Conflict(f"session {session_id} is in the feed: acknowledge or drop its rollout first")
            for table in ("sessions", "turns", "finishes", "holdings"):
                connection.execute(f"DELETE FROM {table} WHERE session_id = ?", (session_id,))
            self._let_go_of_blobs(connection, session_id)
            self._space_was_freed = True

        await self._write(delete)

    # ---- the feed ----

    async def lease(
        self,
        *,
        consumer: str,
        limit: int,
        lease_seconds: float,
        whole_groups: bool,
        labels: Mapping[str, str] | None,
        now: float,
    ) -> Lease | None:
        """Lend finished rollouts as the Protocol says; polling an empty feed costs a read, no write."""
        _check_text("consumer", consumer)
        if limit < 1 or lease_seconds <= 0:
            raise InvalidRequest(f"limit is {limit} and lease_seconds {lease_seconds}; both must be positive")
        wanted = leases.Selection(consumer, limit, whole_groups, labels or {}, now)
        if not await self._read(lambda connection: leases.select_rollouts(connection, wanted)):
            return None
        return await self._write(partial(leases.lend, wanted=wanted, lease_seconds=lease_seconds))

    async def acknowledge(self, lease_id: str) -> Sequence[str]:
        """Mark a lease's rollouts as consumed; NotFound, or Conflict if it was released or lent anew since."""
        return await self._write(partial(leases.acknowledge, lease_id=lease_id))

    async def release(self, lease_id: str) -> None:
        """Give a lease's rollouts back at once."""
        await self._write(partial(leases.release, lease_id=lease_id))

    async def release_consumer(self, consumer: str) -> int:
        """Give back all that a consumer holds; returns how many rollouts (those of expired leases too)."""
        return await self._write(partial(leases.release_consumer, consumer=consumer))

    async def drop_rollout(self, session_id: str, snapshot: str) -> None:
        """Free a rollout's turns, routing rows and blobs, keep its session and finish; repeating it is fine.

        Raises NotFound if it is not finished, Conflict for another snapshot.
        """

        def drop(connection: sqlite3.Connection) -> None:
            finish = _finish(connection, session_id)
            if finish is None:
                raise NotFound(f"session {session_id} has no finished rollout")
            if finish.snapshot != snapshot:
                raise Conflict(f"rollout {session_id} has snapshot {finish.snapshot}, not {snapshot}")
            if finish.dropped_at is None:
                connection.execute("DELETE FROM turns WHERE session_id = ?", (session_id,))
                connection.execute("UPDATE finishes SET dropped_at = ? WHERE session_id = ?", (time.time(), session_id))
                self._let_go_of_blobs(connection, session_id)
                self._space_was_freed = True

        await self._write(drop)

    async def counts(self, consumer: str, now: float) -> FeedCounts:
        """Back-pressure figures; `finished - leased - acknowledged` rollouts are free for this consumer."""
        return await self._read(lambda connection: leases.counts(connection, consumer, now))

    # ---- policies ----

    async def set_policy(self, policy_version: int, weight_version: str) -> None:
        """Remember what a label means; the latest meaning wins."""
        await self._write(
            lambda connection: connection.execute(
                "INSERT OR REPLACE INTO policies VALUES (?, ?)", (weight_version, policy_version)
            ).close()
        )

    async def policies(self) -> Mapping[str, int]:
        """All remembered labels and their policy versions."""
        return await self._read(
            lambda connection: dict(connection.execute("SELECT weight_version, policy_version FROM policies"))
        )

    async def aclose(self) -> None:
        """Commit what is queued, close everything, give up the lock; repeating it is fine."""
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._close)

    # ---- threads ----

    async def _write(self, operation: Operation[Result]) -> Result:
        if self._writer is None:
            raise LedgerError(f"{self._data}: this ledger was opened for reading only")
        return await asyncio.wrap_future(self._writer.submit(operation))

    async def _read(self, query: Callable[[sqlite3.Connection], Result]) -> Result:
        if self._closed:
            raise LedgerError("the ledger is closed")
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._run_query, query)

    def _run_query(self, query: Callable[[sqlite3.Connection], Result]) -> Result:
        connection = self._idle.get()  # never waits: there are as many connections as threads
        try:
            return query(connection)
        except (sqlite3.Error, OSError) as error:
            raise translate(error) from error
        finally:
            self._idle.put(connection)

    def _close(self) -> None:
        if self._writer is not None and self._writing is not None:
            self._writer.close()
            self._writing.routing.close()
        self._readers.shutdown(wait=True)
        while not self._idle.empty():
            self._idle.get().close()
        if self._writing is not None:
            os.close(self._writing.lock)

    # ---- in the writer's thread ----

    def _append_routing(self, turn: TurnRecord, experts: RoutedExperts) -> Location:
        assert self._writing is not None
        key = _routing_key(turn.session_id, turn.turn_id) | rows.experts_facts(experts)
        return self._writing.routing.append(rows.encode_json(key), rows.experts_bytes(experts))

    def _let_go_of_blobs(self, connection: sqlite3.Connection, session_id: str) -> None:
        """Files go after the commit, those that no other session refers to."""
        held = connection.execute("SELECT sha256 FROM blobs WHERE session_id = ?", (session_id,))
        self._freed_blobs.update(sha256 for (sha256,) in held)
        connection.execute("DELETE FROM blobs WHERE session_id = ?", (session_id,))

    def _free_space(self, connection: sqlite3.Connection) -> None:
        if not self._space_was_freed:
            return
        assert self._writing is not None
        query = "SELECT 1 FROM turns WHERE experts_file = ? LIMIT 1"
        self._writing.routing.remove_files(lambda number: connection.execute(query, (number,)).fetchone() is not None)
        while self._freed_blobs:
            sha256 = self._freed_blobs.pop()
            if connection.execute("SELECT 1 FROM blobs WHERE sha256 = ? LIMIT 1", (sha256,)).fetchone() is None:
                self._blobs.remove(sha256)
        self._space_was_freed = False


def _store(data: Path) -> Path:
    return data / "ledger.sqlite"


def _lock_folder(data: Path) -> int:
    """The descriptor that holds the folder's lock for as long as it is open."""
    try:
        data.mkdir(parents=True, exist_ok=True)
        lock = os.open(data / "ledger.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigurationError(f"{data}: cannot be used as data folder ({error.strerror})") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.write(lock, str(os.getpid()).encode())
    except BlockingIOError as error:
        holder = os.pread(lock, 32, 0).decode() or "unknown"
        os.close(lock)
        raise ConfigurationError(
            f"{data}: another gateway (process {holder}) uses this data folder; stop it or choose another --data"
        ) from error
    except OSError as error:
        os.close(lock)
        raise ConfigurationError(f"{data}: cannot be locked ({error.strerror})") from error
    return lock


def _open_files(data: Path) -> SegmentFileWriter:
    """The routing rows' writer, and the blobs' folder; the names of new files become durable here too."""
    try:
        routing = SegmentFileWriter(data / "routing")
        BlobFiles(data / "blobs").prepare()
        sync_folder(data)
    except OSError as error:
        raise ConfigurationError(f"{data}: cannot be used as data folder ({error.strerror})") from error
    return routing


def _prepare(data: Path, step: Callable[[sqlite3.Connection, str], None]) -> None:
    path = _store(data)
    try:
        connection = _connect(path, read_only=step is schema.check)
    except sqlite3.OperationalError as error:
        raise ConfigurationError(f"{path}: cannot be opened ({error})") from error
    except sqlite3.DatabaseError as error:
        raise LedgerCorrupt(f"{path}: {error}; it is damaged, or no ledger") from error
    try:
        step(connection, str(path))
    except sqlite3.Error as error:
        raise translate(error) from error
    finally:
        connection.close()


def _connect(path: Path, *, read_only: bool) -> sqlite3.Connection:
    """An autocommit connection that any thread may use (one at a time, which the callers see to)."""
    connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        if not read_only:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")  # I4: a commit is on disk when it returns
        else:
            connection.execute("PRAGMA query_only = ON")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{name} is not valid Unicode text ({error.reason})") from error


def _session(connection: sqlite3.Connection, session_id: str) -> SessionRecord | None:
    query = "SELECT session_id, facts, checksum FROM sessions WHERE session_id = ?"
    row = connection.execute(query, (session_id,)).fetchone()
    return None if row is None else rows.read_session(*row)


def _finish(connection: sqlite3.Connection, session_id: str) -> FinishRecord | None:
    query = "SELECT session_id, facts, checksum, dropped_at FROM finishes WHERE session_id = ?"
    row = connection.execute(query, (session_id,)).fetchone()
    return None if row is None else rows.read_finish(*row)


def _is_stored(connection: sqlite3.Connection, row: rows.TurnRow) -> bool:
    stored = connection.execute(
        "SELECT checksum FROM turns WHERE session_id = ? AND turn_id = ?", (row.session_id, row.turn_id)
    ).fetchone()
    if stored is not None and stored[0] != row.checksum:
        raise Conflict(f"session {row.session_id} turn {row.turn_id} is recorded already with another content")
    return stored is not None


def _check_open(connection: sqlite3.Connection, session_id: str) -> None:
    """Inside the transaction, because finishing races with appending."""
    if connection.execute("SELECT 1 FROM sessions WHERE session_id = ?", (session_id,)).fetchone() is None:
        raise NotFound(f"no session {session_id}")
    if connection.execute("SELECT 1 FROM finishes WHERE session_id = ?", (session_id,)).fetchone() is not None:
        raise SessionSealed(f"session {session_id} is finished; open another session")


def _check_parent(connection: sqlite3.Connection, turn: TurnRecord) -> None:
    parent_id = turn.attachment.parent_id
    if parent_id is None:
        return
    found = connection.execute("SELECT 1 FROM turns WHERE session_id = ? AND turn_id = ?", (turn.session_id, parent_id))
    if found.fetchone() is None:
        raise Conflict(f"session {turn.session_id} turn {turn.index}: its parent {parent_id} is not recorded")


def _seal(connection: sqlite3.Connection, finish: FinishRecord) -> FinishRecord:
    if _session(connection, finish.session_id) is None:
        raise NotFound(f"no session {finish.session_id}")
    num_tokens, num_trainable = connection.execute(
        "SELECT coalesce(sum(num_tokens), 0), coalesce(sum(num_trainable_tokens), 0) FROM turns WHERE session_id = ?",
        (finish.session_id,),
    ).fetchone()
    connection.execute(
        "INSERT INTO finishes VALUES (?, ?, ?, ?, ?, ?, ?, NULL)",
        (*rows.finish_row(finish), num_tokens, num_trainable),
    )
    return finish


def _is_acknowledged(connection: sqlite3.Connection, session_id: str) -> bool:
    query = "SELECT 1 FROM holdings WHERE session_id = ? AND acknowledged = 1"
    return connection.execute(query, (session_id,)).fetchone() is not None


def _routing_location(connection: sqlite3.Connection, session_id: str, turn_id: str) -> Location | None:
    query = "SELECT experts_file, experts_offset, experts_bytes FROM turns WHERE session_id = ? AND turn_id = ?"
    row = connection.execute(query, (session_id, turn_id)).fetchone()
    if row is None:
        raise NotFound(f"session {session_id} has no turn {turn_id}")
    return None if row[0] is None else Location(*row)


def _blob_type(connection: sqlite3.Connection, session_id: str, sha256: str) -> str | None:
    """The media type of a content that a session refers to, None if it does not."""
    query = "SELECT media_type FROM blobs WHERE session_id = ? AND sha256 = ?"
    row = connection.execute(query, (session_id, sha256)).fetchone()
    return None if row is None else str(row[0])


def _translated(work: Callable[[], None]) -> None:
    """Run what writes files; the system's errors as ours."""
    try:
        work()
    except OSError as error:
        raise translate(error) from error


def _routing_key(session_id: str, turn_id: str) -> dict[str, object]:
    return {"session_id": session_id, "turn_id": turn_id}


def _read_routing(folder: Path, location: Location, session_id: str, turn_id: str) -> RoutedExperts:
    name = f"session {session_id} turn {turn_id}"
    key, payload = read_record(folder, location, name=name)
    facts = rows.decode_json(key)
    if _routing_key(facts["session_id"], facts["turn_id"]) != _routing_key(session_id, turn_id):
        raise LedgerCorrupt(f"{name}: its routing rows belong to session {facts['session_id']} turn {facts['turn_id']}")
    return rows.read_experts(facts, payload)
