"""The ledger over any store: the port's methods as SQL on the tables of `schema.py`.

Writes go through one thread that commits in groups (writer.py); reads run on connections of their own in a small pool.
Nothing here blocks the event loop, and nothing is kept in memory that is not in the store, so several processes can
have one store: what must not happen twice is decided inside a transaction that holds the session's or the consumer's
lock.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TypeVar

from msgspec import structs

from gateway.contracts.errors import (
    Conflict,
    InvalidRequest,
    LedgerCorrupt,
    LedgerError,
    LedgerFull,
    NotFound,
    SessionSealed,
    TurnIndexTaken,
)
from gateway.contracts.experts import RoutedExperts
from gateway.contracts.generation import JsonValue
from gateway.contracts.media import Blob
from gateway.contracts.records import FinishRecord, SessionRecord, TurnRecord, snapshot_of
from gateway.contracts.rollouts import Compressed, FeedCounts, Lease, Reclaimed, StoredRollout, StoreUsage
from gateway.ledger import inventory, leases, rows
from gateway.ledger.backend import ArrayStore, Backend, Connection, Location
from gateway.ledger.batch import Append, ArrayRecord, Arrival, Creation, Note, write_together
from gateway.ledger.reserve import NO_ROOM_TO_MAKE, Room, is_disk_full
from gateway.ledger.writer import GroupCommitWriter, Operation, StoreFailures, leave_all

Result = TypeVar("Result")

_log = logging.getLogger(__name__)

_NUM_READERS = 4
_ROOM_SECONDS = 0.25
_TURN_COLUMNS = ", ".join(rows.TurnRow._fields)
_TABLES_OF_SESSION = ("sessions", "session_labels", "turns", "finishes", "snapshots", "holdings")


class SqlLedger:
    """`gateway.contracts.ports.Ledger` on a store of SQL tables, arrays and blobs; end it with `aclose`."""

    def __init__(self, backend: Backend, room: Room = NO_ROOM_TO_MAKE) -> None:
        """Owns the store from here on: also closes it. room: what is done about a full disk."""
        self._backend = backend
        self._room = room
        self._closed = False
        self._space_was_freed = True  # after a crash things may be left that no row points at
        self._damaged: set[str] = set()
        self._settled = leases.SettledRollouts()
        self._freed_blobs: set[str] = set() if backend.read_only else set(backend.unclaimed_blobs())
        self._readers = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="ledger-reader")
        self._idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        for _ in range(_NUM_READERS):
            self._idle.put(backend.connect(read_only=True))
        self._writer: GroupCommitWriter | None = None
        if not backend.read_only:
            self._writer = GroupCommitWriter(
                backend.connect(read_only=False),
                failures=StoreFailures(backend.failures, backend.translate, backend.met_another),
                flush=backend.arrays.flush,
                after_commit=self._keep_house,
                room=room,
                together=partial(write_together, arrays=backend.arrays) if backend.alone_in_transaction else leave_all,
            )

    @property
    def shared(self) -> bool:
        """Whether other processes may write to the store meanwhile."""
        return self._backend.shared

    # ---- sessions and turns ----

    async def create_session(self, session: SessionRecord) -> SessionRecord:
        """Store a session; an equal one (`created_at` aside) is returned as it is stored, another one is a Conflict."""
        for name, text in (("session_id", session.session_id), ("group", session.group or "")):
            _check_text(name, text)

        def create_alone(connection: Connection) -> SessionRecord | None:
            _lock(connection, session.session_id)
            stored = _session(connection, session.session_id)
            if stored is None:
                _insert_session(connection, session)
            elif not rows.same_session(stored, session):
                raise Conflict(f"session {session.session_id} exists already with other properties")
            return stored

        creation = Creation(rows.session_row(session), rows.label_rows(session), create_alone)
        stored = await self._write(creation, grows=True)
        return session if stored is None else stored

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

        Raises SessionSealed, NotFound (no such session), TurnIndexTaken, Conflict (the turn id is taken by another
        content, or its parent is not recorded), ExpertsMismatch (the rows are not those that the turn's record speaks
        of).
        """
        arrival = _arrival(turn, experts)
        if arrival.record is not None and self._backend.arrays.before_transaction:
            arrival = await self._uploaded(arrival)
        append = Append(arrival, self._append_alone)
        try:  # as `_patiently`, whose layers cost more than the wait
            await self._submit(append, grows=True)
        except LedgerFull:
            await self._patiently(append)
        if (reserve := self._room.reserve) is not None:
            reserve.note_turn(arrival.num_bytes)

    def _append_alone(self, connection: Connection, arrival: Arrival) -> None:
        _append(connection, self._backend.arrays, arrival)

    async def append_late_turn(self, turn: TurnRecord, experts: RoutedExperts | None) -> FinishRecord:
        """Store a turn of a finished session as the port says, and name the snapshot that has it.

        Raises NotFound, Conflict (also for a session that is not finished), TurnIndexTaken, ExpertsMismatch, and
        SessionSealed where the rollout was dropped.
        """
        arrival = await self._uploaded(_arrival(turn, experts))
        return await self._patiently(partial(_append_late, arrays=self._backend.arrays, arrival=arrival))

    def mark_delivered(self, session_id: str, turn_id: str, delivered_at: float) -> Awaitable[None]:
        """Note when a turn's reply left (the latest time wins); NotFound for an unknown turn.

        Begun when it returns: a future, which needs no task to be waited for later."""
        return self._submit(Note(session_id, turn_id, "delivered_at", delivered_at), urgent=False)

    def mark_lost(self, session_id: str, turn_id: str, lost_at: float) -> Awaitable[None]:
        """Note that a turn's reply reached nobody; a delivery, noted before or after, counts more. NotFound.

        Begun when it returns, as `mark_delivered`."""
        return self._submit(Note(session_id, turn_id, "lost_at", lost_at), urgent=False)

    async def unknown_deliveries(self, session_id: str) -> Sequence[str]:
        """Ids of turns of whose reply nobody has said that it was delivered, or lost."""
        query = "SELECT turn_id FROM turns WHERE session_id = ? AND delivered_at IS NULL AND lost_at IS NULL"
        return await self._read(lambda connection: [name for (name,) in connection.execute(query, (session_id,))])

    async def turns(self, session_id: str, *, after: int = -1, snapshot: str | None = None) -> Sequence[TurnRecord]:
        """Turns of a session above index `after` in order of `index`, with a snapshot only its own; empty for an
        unknown session or snapshot, and for a dropped rollout."""
        in_snapshot = (
            "AND since_snapshot <= (SELECT n.ordinal FROM snapshots n WHERE n.session_id = turns.session_id "
            "AND n.snapshot = ?)"
        )
        query = (
            f"SELECT {_TURN_COLUMNS}, delivered_at FROM turns WHERE session_id = ? AND turn_index > ? "
            f"{'' if snapshot is None else in_snapshot} ORDER BY turn_index"
        )
        parameters = (session_id, after) if snapshot is None else (session_id, after, snapshot)
        return await self._read(
            lambda connection: [
                rows.read_turn(rows.TurnRow(*columns), delivered_at)
                for *columns, delivered_at in connection.execute(query, parameters)
            ]
        )

    async def deliveries(self, session_id: str) -> Mapping[str, float]:
        """When each delivered turn's reply left, by turn id."""
        query = "SELECT turn_id, delivered_at FROM turns WHERE session_id = ? AND delivered_at IS NOT NULL"
        return await self._read(lambda connection: dict(connection.execute(query, (session_id,)).fetchall()))

    async def experts(self, session_id: str, turn_id: str) -> RoutedExperts | None:
        """The routing rows stored with a turn, None if there are none; raises NotFound, LedgerCorrupt."""

        def read(connection: Connection) -> RoutedExperts | None:
            location = _routing_location(connection, session_id, turn_id)
            if location is None:
                return None
            try:
                return _read_routing(self._backend.arrays, location, session_id, turn_id)
            except LedgerCorrupt:
                # NotFound if the rollout was dropped meanwhile; elsewhere if its rows were moved.
                if _routing_location(connection, session_id, turn_id) == location:
                    raise
            return read(connection)

        return await self._read(read)

    async def put_blob(self, session_id: str, blob: Blob) -> None:
        """Keep a content for a session, in a file that equal contents of all sessions share; again is a no-op.

        Raises NotFound for an unknown session, SessionSealed for one whose rollout was dropped.
        """
        if await self._read(lambda connection: _blob_type(connection, session_id, blob.sha256)) is not None:
            return
        blobs = self._backend.blobs
        if not self._backend.read_only:  # not in the writer's thread: megabytes would hold everybody's commits
            await self._in_thread(partial(self._write_blob, blob))

        def hold(connection: Connection) -> None:
            _lock(connection, session_id)
            _check_keeps(connection, session_id)
            if not blobs.has(blob.sha256):  # nobody held it until now, so it may just have been cleared away
                blobs.write(blob)
            connection.execute(
                "INSERT INTO blobs (session_id, sha256, media_type, num_bytes) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (session_id, sha256) DO NOTHING",
                (session_id, blob.sha256, blob.media_type, len(blob.content)),
            )

        await self._patiently(hold)

    async def blob(self, session_id: str, sha256: str) -> Blob | None:
        """A content that the session refers to, None if it refers to no such; raises LedgerCorrupt."""

        def read(connection: Connection) -> Blob | None:
            media_type = _blob_type(connection, session_id, sha256)
            if media_type is None:
                return None
            try:
                return Blob(sha256, media_type, self._backend.blobs.read(sha256, name=f"session {session_id}"))
            except LedgerCorrupt:
                if _blob_type(connection, session_id, sha256) is None:  # dropped meanwhile
                    return None
                raise

        return await self._read(read)

    async def finish(
        self,
        session_id: str,
        *,
        reward: float | None,
        outcome: str,
        metadata: Mapping[str, JsonValue],
        finished_at: float,
    ) -> FinishRecord:
        """Seal a session; an equal repetition (the time aside) returns the record as it is, another one is a Conflict.

        Raises NotFound for an unknown session, InvalidRequest for a reward that is no number.
        """
        if reward is not None and not math.isfinite(reward):
            raise InvalidRequest(f"reward: expected a finite number, or null where there is none, not {reward}")
        _check_text("outcome", outcome)
        wanted = FinishRecord(session_id, "", reward, outcome, metadata, finished_at)

        def seal(connection: Connection) -> FinishRecord:
            _lock(connection, session_id)
            stored = _finish(connection, session_id)
            if stored is None:
                return _seal(connection, wanted)
            if not rows.same_finish(stored, wanted):
                raise Conflict(f"session {session_id} was finished already with another reward or outcome")
            return stored

        return await self._write(seal)

    async def finish_record(self, session_id: str, *, snapshot: str | None = None) -> FinishRecord | None:
        """How the session ended, with its latest snapshot or an earlier one; None while it is open, or if it never had
        that snapshot."""

        def read(connection: Connection) -> FinishRecord | None:
            finish = _finish(connection, session_id)
            if finish is None or snapshot in (None, finish.snapshot):
                return finish
            query = "SELECT snapshot FROM snapshots WHERE session_id = ? AND snapshot = ?"
            row = connection.execute(query, (session_id, snapshot)).fetchone()
            return None if row is None else replace(finish, snapshot=row[0])

        return await self._read(read)

    async def delete_session(self, session_id: str) -> None:
        """Forget a session; Conflict while its finished rollout was neither acknowledged nor dropped; NotFound."""

        def delete(connection: Connection) -> None:
            _lock(connection, session_id)
            if _session(connection, session_id) is None:
                raise NotFound(f"no session {session_id}")
            finish = _finish(connection, session_id)
            if finish is not None and finish.dropped_at is None and not _is_acknowledged(connection, session_id):
                raise Conflict(f"session {session_id} is in the feed: acknowledge or drop its rollout first")
            for table in _TABLES_OF_SESSION:
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
        group_deadline_seconds: float | None = None,
        lease_id: str | None = None,
    ) -> Lease | None:
        """Lend finished rollouts as the port says; polling an empty feed costs a read, no write."""
        _check_text("consumer", consumer)
        _check_text("lease_id", lease_id or "")
        if limit < 1 or lease_seconds <= 0:
            raise InvalidRequest(f"limit is {limit} and lease_seconds {lease_seconds}; both must be positive")
        wanted = leases.Selection(
            consumer, limit, whole_groups, labels or {}, now, group_deadline_seconds, self._note_damaged, self._settled
        )
        if not await self._read(partial(leases.may_lend, wanted=wanted, lease_id=lease_id)):
            return None
        return await self._write(partial(leases.lend, wanted=wanted, lease_seconds=lease_seconds, lease_id=lease_id))

    def _note_damaged(self, session_id: str) -> None:
        """Once for each: feeds are polled."""
        if session_id not in self._damaged:
            self._damaged.add(session_id)
            _log.error("rollout %s is not lent: the record of its end is damaged; see `verbatim doctor`", session_id)

    async def extend_lease(self, lease_id: str, *, lease_seconds: float, now: float) -> float:
        """Let a lease run on; when it expires then. NotFound, or Conflict if it has ended or was lent anew since."""
        if lease_seconds <= 0:
            raise InvalidRequest(f"lease_seconds is {lease_seconds}; it must be positive")
        return await self._write(partial(leases.extend, lease_id=lease_id, lease_seconds=lease_seconds, now=now))

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

        def drop(connection: Connection) -> None:
            _lock(connection, session_id)
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
        """Back-pressure figures for this consumer."""
        return await self._read(lambda connection: leases.counts(connection, consumer, now))

    async def leases(self, *, now: float, consumer: str | None = None, limit: int = 100) -> Sequence[Lease]:
        """Leases that have not ended, by when they expire."""
        return await self._read(lambda connection: leases.running(connection, consumer, now, limit))

    async def consumers(self, *, limit: int = 100) -> Sequence[str]:
        """Names of consumers that hold or have acknowledged rollouts, in order."""
        return await self._read(lambda connection: leases.consumers(connection, limit))

    # ---- what is stored ----

    async def sessions_past_ttl(self, now: float, *, limit: int) -> Sequence[str]:
        """Open sessions whose time to live has passed, oldest first."""
        return await self._read(lambda connection: inventory.sessions_past_ttl(connection, now, limit))

    async def stored_rollouts(
        self, *, finished_before: float, limit: int, after: StoredRollout | None = None
    ) -> Sequence[StoredRollout]:
        """Finished rollouts that still hold data, oldest first, starting behind `after`."""
        return await self._read(lambda connection: inventory.stored_rollouts(connection, finished_before, limit, after))

    async def stored_bytes(self) -> int:
        """What turns, routing rows and blobs of all sessions take."""
        return await self._read(inventory.stored_bytes)

    # ---- policies ----

    async def set_policy(self, policy_version: int, weight_version: str) -> None:
        """Remember what a label means; the latest meaning wins."""
        await self._write(
            lambda connection: connection.executemany(
                "INSERT INTO policies (weight_version, policy_version) VALUES (?, ?) "
                "ON CONFLICT (weight_version) DO UPDATE SET policy_version = excluded.policy_version",
                [(weight_version, policy_version)],
            )
        )

    async def policies(self) -> Mapping[str, int]:
        """All remembered labels and their policy versions."""
        return await self._read(
            lambda connection: dict(
                connection.execute("SELECT weight_version, policy_version FROM policies").fetchall()
            )
        )

    async def usage(self) -> StoreUsage:
        """What the store takes on its disks; a store that is elsewhere cannot say."""
        return StoreUsage(0, 0, 0, 0, 0, 0)

    async def reclaim(self) -> Reclaimed:
        """Nothing: a store that is elsewhere looks after itself."""
        return Reclaimed()

    async def compress(self, *, bytes_per_second: float) -> Compressed:
        """Nothing: a store that is elsewhere keeps its arrays as they came."""
        return Compressed()

    async def aclose(self) -> None:
        """Commit what is queued, close everything; repeating it is fine."""
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._close)

    # ---- threads ----

    async def _write(self, operation: Operation[Result], *, grows: bool = False) -> Result:
        return await self._submit(operation, grows=grows)

    def _submit(
        self, operation: Operation[Result], *, grows: bool = False, urgent: bool = True
    ) -> asyncio.Future[Result]:
        """grows: it adds data; what does not is tried for longest on a full disk. urgent: somebody waits for it."""
        if self._writer is None:
            raise LedgerError(f"{self._backend.name}: this ledger was opened for reading only")
        if grows and (reserve := self._room.reserve) is not None and not reserve.takes_growth():
            raise LedgerFull("the ledger's disk is full; what adds to it is taken again when there is room")
        return self._writer.submit(operation, grows=grows, urgent=urgent)

    async def _patiently(self, operation: Operation[Result]) -> Result:
        """Write what was sampled already, and on a full disk wait for room before it is given up."""
        return await self._with_room(lambda: self._write(operation, grows=True))

    async def _with_room(self, work: Callable[[], Awaitable[Result]]) -> Result:
        deadline = time.monotonic() + self._room.wait_seconds
        while True:
            try:
                return await work()
            except LedgerFull:
                if time.monotonic() >= deadline:
                    raise
            await asyncio.sleep(_ROOM_SECONDS)

    def _write_blob(self, blob: Blob) -> None:
        """On a full disk it is written with the row that needs it, which waits for room."""
        try:
            self._backend.blobs.write(blob)
        except OSError as error:
            if not is_disk_full(error):
                raise

    async def _read(self, query: Callable[[Connection], Result]) -> Result:
        if self._closed:
            raise LedgerError("the ledger is closed")
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._run_query, query)

    def _run_query(self, query: Callable[[Connection], Result]) -> Result:
        connection = self._idle.get()  # never waits: there are as many connections as threads
        try:
            return query(connection)
        except self._backend.failures as error:
            raise self._backend.translate(error) from error
        finally:
            self._idle.put(connection)

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        """Run what writes beside the tables in a thread of its own; the store's errors as ours."""
        try:
            return await asyncio.to_thread(work)
        except self._backend.failures as error:
            raise self._backend.translate(error) from error

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._readers.shutdown(wait=True)
        while not self._idle.empty():
            self._idle.get().close()
        if self._room.reserve is not None:
            self._room.reserve.close()
        self._backend.close()

    async def _uploaded(self, arrival: Arrival) -> Arrival:
        """Its rows are stored already where that is slow."""
        arrays = self._backend.arrays
        if arrival.record is None or not arrays.before_transaction or self._backend.read_only:
            return arrival
        upload = partial(arrays.append, *arrival.record)
        location = await self._with_room(lambda: self._in_thread(upload))
        return structs.replace(arrival, location=location)

    # ---- in the writer's thread ----

    def _let_go_of_blobs(self, connection: Connection, session_id: str) -> None:
        """They go after the commit, those that no other session refers to."""
        held = connection.execute("SELECT sha256 FROM blobs WHERE session_id = ?", (session_id,))
        self._freed_blobs.update(sha256 for (sha256,) in held)
        connection.execute("DELETE FROM blobs WHERE session_id = ?", (session_id,))

    def _keep_house(self, connection: Connection) -> None:
        self._backend.keep_house(connection)
        if self._space_was_freed:
            self._backend.free_space(connection, self._freed_blobs)
            self._freed_blobs.clear()
            self._space_was_freed = False


def _append(connection: Connection, arrays: ArrayStore, arrival: Arrival) -> None:
    row = arrival.row
    _lock(connection, row.session_id)
    if _is_stored(connection, row):
        return
    _check_open(connection, row.session_id)
    _insert_turn(connection, arrays, arrival, since_snapshot=0)


def _append_late(connection: Connection, arrays: ArrayStore, arrival: Arrival) -> FinishRecord:
    row = arrival.row
    _lock(connection, row.session_id)
    _check_exists(connection, row.session_id)
    finish = _finish(connection, row.session_id)
    if finish is None:
        raise Conflict(f"session {row.session_id} is not finished; its turns are appended as they come")
    if _is_stored(connection, row):
        return finish
    _check_kept(row.session_id, finish)
    query = "SELECT max(ordinal) FROM snapshots WHERE session_id = ?"
    ordinal = 1 + connection.execute(query, (row.session_id,)).fetchone()[0]
    _insert_turn(connection, arrays, arrival, since_snapshot=ordinal)
    return _reseal(connection, finish, ordinal)


def _insert_turn(connection: Connection, arrays: ArrayStore, arrival: Arrival, *, since_snapshot: int) -> None:
    _check_place(connection, arrival)
    connection.execute(
        f"INSERT INTO turns ({_TURN_COLUMNS}, experts_file, experts_offset, experts_bytes, delivered_at, recorded_at, "
        f"since_snapshot) VALUES ({', '.join('?' * (len(arrival.row) + 6))})",
        (*arrival.row, *arrival.place(arrays), arrival.delivered_at, time.time(), since_snapshot),
    )


def _insert_session(connection: Connection, session: SessionRecord) -> None:
    row = rows.session_row(session)
    connection.execute(f"INSERT INTO sessions ({', '.join(row._fields)}) VALUES ({', '.join('?' * len(row))})", row)
    if session.labels:
        connection.executemany(
            "INSERT INTO session_labels (session_id, name, value) VALUES (?, ?, ?)", rows.label_rows(session)
        )


def _seal(connection: Connection, wanted: FinishRecord) -> FinishRecord:
    _check_exists(connection, wanted.session_id)
    finish = replace(wanted, snapshot=_snapshot(connection, wanted.session_id))
    row = rows.finish_row(finish)
    connection.execute(
        f"INSERT INTO finishes ({', '.join(row._fields)}, num_bytes) VALUES ({', '.join('?' * len(row))}, 0)", row
    )
    connection.execute(
        "UPDATE sessions SET ttl_seconds = NULL WHERE session_id = ? AND ttl_seconds IS NOT NULL", (finish.session_id,)
    )
    _write_snapshot(connection, finish, 0)
    return finish


def _reseal(connection: Connection, earlier: FinishRecord, ordinal: int) -> FinishRecord:
    """The same end with a snapshot of the turns that are there now."""
    finish = replace(earlier, snapshot=_snapshot(connection, earlier.session_id))
    row = rows.finish_row(finish)
    connection.execute(
        "UPDATE finishes SET snapshot = ?, facts = ?, checksum = ? WHERE session_id = ?",
        (row.snapshot, row.facts, row.checksum, row.session_id),
    )
    _write_snapshot(connection, finish, ordinal)
    return finish


def _write_snapshot(connection: Connection, finish: FinishRecord, ordinal: int) -> None:
    session_id = finish.session_id
    num_tokens, num_trainable, num_bytes = connection.execute(
        "SELECT coalesce(sum(num_tokens), 0), coalesce(sum(num_trainable_tokens), 0), "
        f"coalesce(sum({rows.TURN_BYTES}), 0) FROM turns WHERE session_id = ?",
        (session_id,),
    ).fetchone()
    connection.execute(
        "INSERT INTO snapshots (session_id, ordinal, snapshot, num_tokens, num_sampled_tokens) VALUES (?, ?, ?, ?, ?)",
        (session_id, ordinal, finish.snapshot, int(num_tokens), int(num_trainable)),
    )
    connection.execute("UPDATE finishes SET num_bytes = ? WHERE session_id = ?", (int(num_bytes), session_id))


def _snapshot(connection: Connection, session_id: str) -> str:
    turn_ids = connection.execute("SELECT turn_id FROM turns WHERE session_id = ?", (session_id,))
    return snapshot_of(session_id, (turn_id for (turn_id,) in turn_ids))


def _lock(connection: Connection, session_id: str) -> None:
    """Until the end of the transaction nobody else appends to this session or ends it."""
    connection.lock(f"session {session_id}")


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{name} is not valid Unicode text ({error.reason})") from error


def _check_exists(connection: Connection, session_id: str) -> None:
    if connection.execute("SELECT 1 FROM sessions WHERE session_id = ?", (session_id,)).fetchone() is None:
        raise NotFound(f"no session {session_id}")


def _check_keeps(connection: Connection, session_id: str) -> None:
    """A session keeps data until its rollout is dropped: turns of other gateways come late."""
    _check_exists(connection, session_id)
    if (finish := _finish(connection, session_id)) is not None:
        _check_kept(session_id, finish)


def _check_kept(session_id: str, finish: FinishRecord) -> None:
    if finish.dropped_at is not None:
        raise SessionSealed(f"session {session_id} is finished and its rollout was dropped")


def _check_open(connection: Connection, session_id: str) -> None:
    """Inside the transaction, because finishing races with appending."""
    row = connection.execute(
        "SELECT f.session_id FROM sessions s LEFT JOIN finishes f ON f.session_id = s.session_id "
        "WHERE s.session_id = ?",
        (session_id,),
    ).fetchone()
    if row is None:
        raise NotFound(f"no session {session_id}")
    if row[0] is not None:
        raise SessionSealed(f"session {session_id} is finished; open another session")


def _check_place(connection: Connection, arrival: Arrival) -> None:
    """The turn's index is free and its parent is there."""
    row = arrival.row
    name = f"session {row.session_id} turn {row.turn_index}"
    taken = connection.execute(
        "SELECT turn_id FROM turns WHERE session_id = ? AND turn_index = ?", (row.session_id, row.turn_index)
    ).fetchone()
    if taken is not None:
        raise TurnIndexTaken(f"{name}: {taken[0]} has this index; read it and append {row.turn_id} behind the latest")
    if arrival.parent_id is None:
        return
    query = "SELECT 1 FROM turns WHERE session_id = ? AND turn_id = ?"
    if connection.execute(query, (row.session_id, arrival.parent_id)).fetchone() is None:
        raise Conflict(f"{name}: its parent {arrival.parent_id} is not recorded")


def _session(connection: Connection, session_id: str) -> SessionRecord | None:
    query = "SELECT session_id, facts, checksum FROM sessions WHERE session_id = ?"
    row = connection.execute(query, (session_id,)).fetchone()
    return None if row is None else rows.read_session(*row)


def _finish(connection: Connection, session_id: str) -> FinishRecord | None:
    query = "SELECT session_id, facts, checksum, dropped_at FROM finishes WHERE session_id = ?"
    row = connection.execute(query, (session_id,)).fetchone()
    return None if row is None else rows.read_finish(*row)


def _is_stored(connection: Connection, row: rows.TurnRow) -> bool:
    stored = connection.execute(
        "SELECT checksum FROM turns WHERE session_id = ? AND turn_id = ?", (row.session_id, row.turn_id)
    ).fetchone()
    if stored is not None and stored[0] != row.checksum:
        raise Conflict(f"session {row.session_id} turn {row.turn_id} is recorded already with another content")
    return stored is not None


def _is_acknowledged(connection: Connection, session_id: str) -> bool:
    query = "SELECT 1 FROM holdings WHERE session_id = ? AND acknowledged = 1"
    return connection.execute(query, (session_id,)).fetchone() is not None


def _blob_type(connection: Connection, session_id: str, sha256: str) -> str | None:
    """The media type of a content that a session refers to, None if it does not."""
    query = "SELECT media_type FROM blobs WHERE session_id = ? AND sha256 = ?"
    row = connection.execute(query, (session_id, sha256)).fetchone()
    return None if row is None else str(row[0])


def _routing_location(connection: Connection, session_id: str, turn_id: str) -> Location | None:
    query = "SELECT experts_file, experts_offset, experts_bytes FROM turns WHERE session_id = ? AND turn_id = ?"
    row = connection.execute(query, (session_id, turn_id)).fetchone()
    if row is None:
        raise NotFound(f"session {session_id} has no turn {turn_id}")
    return None if row[0] is None else Location(*row)


def _arrival(turn: TurnRecord, experts: RoutedExperts | None) -> Arrival:
    """Check and encode a turn; raises ExpertsMismatch."""
    has_rows = experts is not None or turn.experts_start != turn.experts_stop
    record = _record(turn, experts) if has_rows else None
    return Arrival(turn.attachment.parent_id, rows.turn_row(turn), turn.delivered_at, record)


def _record(turn: TurnRecord, experts: RoutedExperts | None) -> ArrayRecord | None:
    """Raises ExpertsMismatch; None where there are no rows."""
    routing = rows.check_experts(turn, experts)
    if routing is None:
        return None
    key = _routing_key(turn.session_id, turn.turn_id) | rows.experts_facts(routing)
    return ArrayRecord(rows.encode_json(key), rows.experts_bytes(routing))


def _routing_key(session_id: str, turn_id: str) -> dict[str, object]:
    return {"session_id": session_id, "turn_id": turn_id}


def _read_routing(arrays: ArrayStore, location: Location, session_id: str, turn_id: str) -> RoutedExperts:
    name = f"session {session_id} turn {turn_id}"
    key, payload = arrays.read(location, name=name)
    facts = rows.decode_json(key)
    if _routing_key(facts["session_id"], facts["turn_id"]) != _routing_key(session_id, turn_id):
        raise LedgerCorrupt(f"{name}: its routing rows belong to session {facts['session_id']} turn {facts['turn_id']}")
    return rows.read_experts(facts, payload)
