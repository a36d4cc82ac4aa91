"""Who holds which finished rollout: leases, acknowledgement, whole groups; SQL on the tables of `schema.py`.

Each consumer group sees every rollout once. A rollout is free for a consumer when it has no row in `holdings`, or one
of a lease that has expired; it is gone for that consumer when the row says acknowledged. All functions run inside the
caller's transaction; those that write hold the consumer's lock, so that two processes never lend one rollout twice.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from gateway.contracts.errors import Conflict, NotFound
from gateway.contracts.rollouts import FeedCounts, IncompleteGroup, Lease, LeasedRollout
from gateway.ledger.backend import Connection, Value
from gateway.ledger.rows import decode_json, encode_json, finish_is_whole, label_bytes, read_finish, says_complete


class _Settled(NamedTuple):
    """All rollouts up to this one, in the order in which they are lent, are acknowledged or dropped for good.

    num_rollouts, sum_of_ends: of those up to it when that was found; one that is added or deleted changes them.
    """

    finished_at: float = -math.inf
    session_id: str = ""
    num_rollouts: int = 0
    sum_of_ends: float = 0.0


class SettledRollouts:
    """What consumers are through with, so that a lease does not look at every rollout of the past again.

    A memory of one process that every look checks against the store, where other processes write too. Counting the
    rollouts on their index takes a hundredth of looking each of them up.
    """

    def __init__(self) -> None:
        self._by_consumer: dict[str, _Settled] = {}

    def up_to(self, connection: Connection, consumer: str) -> _Settled:
        """The last of those with which the consumer is through, as far as the store says now."""
        known = self._by_consumer.get(consumer, _Settled())
        if known != _Settled() and _counted(connection, known) != known:
            known = _Settled()
        first_open = connection.execute(
            """SELECT f.finished_at, f.session_id FROM finishes f
               LEFT JOIN holdings h ON h.consumer = ? AND h.session_id = f.session_id
               WHERE (f.finished_at, f.session_id) > (?, ?)
               AND f.dropped_at IS NULL AND coalesce(h.acknowledged, 0) = 0
               ORDER BY f.finished_at, f.session_id LIMIT 1""",
            (consumer, known.finished_at, known.session_id),
        ).fetchone()
        before, values = ("", ()) if first_open is None else ("WHERE (finished_at, session_id) < (?, ?)", first_open)
        last = connection.execute(
            f"SELECT finished_at, session_id FROM finishes {before} ORDER BY finished_at DESC, session_id DESC LIMIT 1",
            values,
        ).fetchone()
        if last is not None and (known.finished_at, known.session_id) != tuple(last):
            known = _counted(connection, _Settled(*last))
        self._by_consumer[consumer] = known
        return known


def _counted(connection: Connection, settled: _Settled) -> _Settled:
    row = connection.execute(
        "SELECT count(*), coalesce(sum(finished_at), 0) FROM finishes WHERE (finished_at, session_id) <= (?, ?)",
        settled[:2],
    ).fetchone()
    return _Settled(*settled[:2], *row)


@dataclass(frozen=True, slots=True)
class Selection:
    """What a consumer wants to lease; `now` in seconds since the epoch decides which leases have expired.

    group_deadline_seconds: how long after the first of its members ended a group waits for the rest; None: for ever.
    note_damaged: hears of sessions whose rollout cannot be lent, because the record of its end is damaged.
    settled: what earlier looks have found out.
    """

    consumer: str
    limit: int
    whole_groups: bool
    labels: Mapping[str, str]
    now: float
    group_deadline_seconds: float | None = None
    note_damaged: Callable[[str], None] = field(default=lambda session_id: None, compare=False)
    settled: SettledRollouts = field(default_factory=SettledRollouts, compare=False)


@dataclass(slots=True)
class Picked:
    """What is to be lent, oldest first, and which of its groups are not whole."""

    session_ids: list[str] = field(default_factory=list)
    incomplete: list[IncompleteGroup] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Unit:
    """Rollouts that are lent together or not at all."""

    session_ids: Sequence[str]
    incomplete: IncompleteGroup | None = None


def select_rollouts(connection: Connection, wanted: Selection) -> Picked:
    """What to lend, oldest first: up to `limit`, or one group that is larger than it."""
    picked = Picked()
    for unit in _units(connection, wanted):
        if picked.session_ids and len(picked.session_ids) + len(unit.session_ids) > wanted.limit:
            break  # order is kept: a smaller, younger unit does not overtake
        picked.session_ids += unit.session_ids
        picked.incomplete += [] if unit.incomplete is None else [unit.incomplete]
        if len(picked.session_ids) >= wanted.limit:
            break
    return picked


def may_lend(connection: Connection, wanted: Selection, lease_id: str | None) -> bool:
    """Whether `lend` may have something to give, so that polling an empty feed costs a read and no write."""
    if lease_id is not None and _lease_made(connection, wanted, lease_id) is not None:
        return True
    return bool(select_rollouts(connection, wanted).session_ids)


def lend(
    connection: Connection, wanted: Selection, *, lease_seconds: float, lease_id: str | None = None
) -> Lease | None:
    """Select rollouts and write their lease; None if nothing is free.

    A lease of this id that runs is returned as it was made; Conflict if it has ended, or is another consumer's.
    """
    connection.lock(_lock_name(wanted.consumer))
    if lease_id is not None and (made := _lease_made(connection, wanted, lease_id)) is not None:
        return made
    picked = select_rollouts(connection, wanted)
    if not picked.session_ids:
        return None
    lease = Lease(
        lease_id=uuid.uuid4().hex if lease_id is None else lease_id,
        consumer=wanted.consumer,
        expires_at=wanted.now + lease_seconds,
        rollouts=tuple(_rollout(connection, session_id) for session_id in picked.session_ids),
        incomplete=tuple(picked.incomplete),
    )
    _write_lease(connection, lease)
    return lease


def acknowledge(connection: Connection, lease_id: str) -> list[str]:
    """Mark a lease's rollouts as consumed; its session ids in the lease's order.

    Raises NotFound for an unknown lease, Conflict for one that was released or whose rollouts were lent anew.
    """
    consumer, state, _ = _locked_lease(connection, lease_id)
    session_ids = [session_id for session_id, _ in _items(connection, lease_id)]
    if state == "acknowledged":
        return session_ids
    _check_held(connection, lease_id, consumer, state)
    connection.execute("UPDATE holdings SET acknowledged = 1 WHERE lease_id = ?", (lease_id,))
    connection.execute("UPDATE leases SET state = 'acknowledged' WHERE lease_id = ?", (lease_id,))
    return session_ids


def extend(connection: Connection, lease_id: str, *, lease_seconds: float, now: float) -> float:
    """Move a lease's expiry to `now + lease_seconds` unless it is later already; when it expires then.

    Raises NotFound, Conflict for one that has ended or whose rollouts were lent anew.
    """
    consumer, state, expires_at = _locked_lease(connection, lease_id)
    if state == "acknowledged":
        raise Conflict(f"lease {lease_id} was acknowledged; there is nothing left to extend")
    _check_held(connection, lease_id, consumer, state)
    later = max(expires_at, now + lease_seconds)
    connection.execute("UPDATE holdings SET expires_at = ? WHERE lease_id = ?", (later, lease_id))
    connection.execute("UPDATE leases SET expires_at = ? WHERE lease_id = ?", (later, lease_id))
    return later


def release(connection: Connection, lease_id: str) -> int:
    """Give an open lease's rollouts back and return how many; 0 for one that is unknown or ended."""
    row = connection.execute("SELECT consumer FROM leases WHERE lease_id = ?", (lease_id,)).fetchone()
    if row is None:
        return 0
    connection.lock(_lock_name(row[0]))
    connection.execute("UPDATE leases SET state = 'released' WHERE lease_id = ? AND state = 'open'", (lease_id,))
    return connection.execute("DELETE FROM holdings WHERE lease_id = ? AND acknowledged = 0", (lease_id,)).rowcount


def release_consumer(connection: Connection, consumer: str) -> int:
    """Release every open lease of a consumer, expired ones too; returns how many rollouts it held unacknowledged."""
    connection.lock(_lock_name(consumer))
    rows = connection.execute("SELECT lease_id FROM leases WHERE consumer = ? AND state = 'open'", (consumer,))
    return sum(release(connection, lease_id) for (lease_id,) in rows.fetchall())


def counts(connection: Connection, consumer: str, now: float) -> FeedCounts:
    """Figures for one consumer; what was dropped before it saw it is no part."""
    free = "(h.session_id IS NULL OR (h.acknowledged = 0 AND h.expires_at <= ?))"
    finished, leased, acknowledged, oldest = connection.execute(
        f"""SELECT count(*),
                   count(*) FILTER (WHERE h.acknowledged = 0 AND h.expires_at > ?),
                   count(*) FILTER (WHERE h.acknowledged = 1),
                   min(CASE WHEN {free} THEN f.finished_at END)
            FROM finishes f LEFT JOIN holdings h ON h.consumer = ? AND h.session_id = f.session_id
            WHERE f.dropped_at IS NULL OR h.acknowledged = 1""",
        (now, now, consumer),
    ).fetchone()
    return FeedCounts(
        finished=finished,
        unleased=finished - leased - acknowledged,
        leased=leased,
        acknowledged=acknowledged,
        oldest_seconds=0.0 if oldest is None else max(0.0, now - oldest),
    )


def consumers(connection: Connection, limit: int) -> list[str]:
    """Names in `holdings`, in order; steps from name to name on its index instead of reading every row."""
    rows = connection.execute(
        """WITH RECURSIVE names (consumer) AS (
               SELECT min(consumer) FROM holdings
               UNION ALL
               SELECT (SELECT min(h.consumer) FROM holdings h WHERE h.consumer > names.consumer)
               FROM names WHERE names.consumer IS NOT NULL
           )
           SELECT consumer FROM names WHERE consumer IS NOT NULL LIMIT ?""",
        (limit,),
    )
    return [consumer for (consumer,) in rows]


def running(connection: Connection, consumer: str | None, now: float, limit: int) -> list[Lease]:
    """Leases that have not ended, of one consumer or of all, by when they expire."""
    clause, values = ("", []) if consumer is None else (" AND consumer = ?", [consumer])
    rows = connection.execute(
        f"""SELECT lease_id, consumer, state, expires_at, incomplete FROM leases
            WHERE state = 'open' AND expires_at > ?{clause} ORDER BY expires_at, lease_id LIMIT ?""",
        [now, *values, limit],
    )
    return [_lease_of_row(connection, *row) for row in rows.fetchall()]


def label_filter(labels: Mapping[str, str]) -> tuple[str, list[Value]]:
    """SQL (to put after a WHERE condition) and values: sessions `s` that carry all of `labels`."""
    clause = (
        " AND EXISTS (SELECT 1 FROM session_labels l WHERE l.session_id = s.session_id AND l.name = ? AND l.value = ?)"
    )
    return clause * len(labels), [label_bytes(text) for item in labels.items() for text in item]


# ---- what is free ----


def _units(connection: Connection, wanted: Selection) -> Iterator[_Unit]:
    """What can be lent, oldest first; a group stands where its oldest free rollout does."""
    groups_seen: set[str] = set()
    for session_id, group in _free_rollouts(connection, wanted):
        if not wanted.whole_groups or group is None:
            yield _Unit([session_id])
        elif group not in groups_seen:
            groups_seen.add(group)
            members = _Members.read(connection, wanted, group)
            if members.may_be_lent(wanted):
                yield _Unit(members.free, members.missing)


def _free_rollouts(connection: Connection, wanted: Selection) -> Iterator[tuple[str, str | None]]:
    clause, values = label_filter(wanted.labels)
    settled = wanted.settled.up_to(connection, wanted.consumer)
    rows = connection.execute(
        f"""SELECT s.session_id, s.group_name, f.facts, f.checksum
            FROM finishes f JOIN sessions s ON s.session_id = f.session_id
            LEFT JOIN holdings h ON h.consumer = ? AND h.session_id = f.session_id
            WHERE f.dropped_at IS NULL AND (f.finished_at, f.session_id) > (?, ?)
            AND (h.session_id IS NULL OR (h.acknowledged = 0 AND h.expires_at <= ?)){clause}
            ORDER BY f.finished_at, f.session_id""",
        [wanted.consumer, settled.finished_at, settled.session_id, wanted.now, *values],
    )
    for session_id, group, facts, checksum in rows:
        if finish_is_whole(facts, checksum):
            yield session_id, group
        else:  # one damaged record must not hold up the feed
            wanted.note_damaged(session_id)


@dataclass(slots=True)
class _Members:
    """The sessions of a group (within the labels wanted), by where they stand with one consumer; in order of end."""

    group: str
    expected: int | None = None
    first_end: float | None = None
    free: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    lent: list[str] = field(default_factory=list)
    acknowledged: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, connection: Connection, wanted: Selection, group: str) -> _Members:
        """Ask the store."""
        clause, values = label_filter(wanted.labels)
        rows = connection.execute(
            f"""SELECT s.session_id, s.group_size, f.finished_at, f.dropped_at, h.acknowledged, h.expires_at,
                       f.facts, f.checksum
                FROM sessions s LEFT JOIN finishes f ON f.session_id = s.session_id
                LEFT JOIN holdings h ON h.consumer = ? AND h.session_id = s.session_id
                WHERE s.group_name = ?{clause} ORDER BY f.finished_at, s.session_id""",
            [wanted.consumer, group, *values],
        )
        members = cls(group)
        for session_id, group_size, finished_at, dropped_at, acknowledged, expires_at, facts, checksum in rows:
            if group_size is not None:
                members.expected = max(group_size, members.expected or 0)
            if members.first_end is None:
                members.first_end = finished_at
            if finished_at is None:
                members.unfinished.append(session_id)
            elif acknowledged:
                members.acknowledged.append(session_id)
            elif expires_at is not None and expires_at > wanted.now:
                members.lent.append(session_id)
            elif dropped_at is not None:
                members.dropped.append(session_id)
            elif not finish_is_whole(facts, checksum):
                members.damaged.append(session_id)
            else:
                members.free.append(session_id)
        return members

    @property
    def num_not_created(self) -> int:
        """How many of the expected ones nobody has made."""
        known = (self.free, self.unfinished, self.lent, self.acknowledged, self.dropped, self.damaged)
        return max(0, (self.expected or 0) - sum(map(len, known)))

    @property
    def missing(self) -> IncompleteGroup | None:
        """What a lease on `free` lacks; None where that is the whole group."""
        lent_before = (*self.acknowledged, *self.lent)
        if not (self.unfinished or self.num_not_created or lent_before or self.dropped or self.damaged):
            return None
        return IncompleteGroup(
            group=self.group,
            expected=self.expected,
            unfinished=tuple(self.unfinished),
            num_not_created=self.num_not_created,
            lent_before=lent_before,
            dropped=tuple(self.dropped),
            damaged=tuple(self.damaged),
        )

    def may_be_lent(self, wanted: Selection) -> bool:
        """All have ended and none is lent at the moment, or they have waited for long enough."""
        if not (self.unfinished or self.num_not_created or self.lent):
            return True
        deadline = wanted.group_deadline_seconds
        return deadline is not None and self.first_end is not None and wanted.now >= self.first_end + deadline


# ---- leases as rows ----


def _lock_name(consumer: str) -> str:
    return f"consumer {consumer}"


def _write_lease(connection: Connection, lease: Lease) -> None:
    incomplete = encode_json([asdict(group) for group in lease.incomplete]) if lease.incomplete else None
    connection.execute(
        "INSERT INTO leases (lease_id, consumer, expires_at, state, incomplete) VALUES (?, ?, ?, 'open', ?)",
        (lease.lease_id, lease.consumer, lease.expires_at, incomplete),
    )
    connection.executemany(
        "INSERT INTO lease_items (lease_id, position, session_id, snapshot) VALUES (?, ?, ?, ?)",
        [(lease.lease_id, i, rollout.session_id, rollout.snapshot) for i, rollout in enumerate(lease.rollouts)],
    )
    connection.executemany(
        "INSERT INTO holdings (consumer, session_id, lease_id, expires_at, acknowledged) VALUES (?, ?, ?, ?, 0) "
        "ON CONFLICT (consumer, session_id) DO UPDATE "
        "SET lease_id = excluded.lease_id, expires_at = excluded.expires_at, acknowledged = 0",
        [(lease.consumer, rollout.session_id, lease.lease_id, lease.expires_at) for rollout in lease.rollouts],
    )


def _lease_made(connection: Connection, wanted: Selection, lease_id: str) -> Lease | None:
    row = connection.execute(
        "SELECT consumer, state, expires_at, incomplete FROM leases WHERE lease_id = ?", (lease_id,)
    ).fetchone()
    if row is None:
        return None
    consumer, state, expires_at, _ = row
    if consumer != wanted.consumer:
        raise Conflict(f"lease {lease_id} belongs to another consumer; choose another id")
    if state != "open" or expires_at <= wanted.now:
        raise Conflict(f"lease {lease_id} has ended; choose another id")
    return _lease_of_row(connection, lease_id, *row)


def _lease_of_row(
    connection: Connection, lease_id: str, consumer: str, _state: str, expires_at: float, incomplete: bytes | None
) -> Lease:
    return Lease(
        lease_id=lease_id,
        consumer=consumer,
        expires_at=expires_at,
        rollouts=tuple(_rollout(connection, *item) for item in _items(connection, lease_id)),
        incomplete=() if incomplete is None else tuple(map(IncompleteGroup.of_json, decode_json(incomplete))),
    )


def _locked_lease(connection: Connection, lease_id: str) -> tuple[str, str, float]:
    """Consumer, state and expiry of a lease, as they are while its consumer's lock is held."""
    query = "SELECT consumer, state, expires_at FROM leases WHERE lease_id = ?"
    row = connection.execute(query, (lease_id,)).fetchone()
    if row is None:
        raise NotFound(f"no lease {lease_id}")
    connection.lock(_lock_name(row[0]))
    consumer, state, expires_at = connection.execute(query, (lease_id,)).fetchone()
    return consumer, state, expires_at


def _check_held(connection: Connection, lease_id: str, consumer: str, state: str) -> None:
    """Raise Conflict unless the lease still owns its rollouts, expired or not."""
    if state == "released":
        raise Conflict(f"lease {lease_id} was released; its rollouts are back in the feed")
    for session_id, _ in _items(connection, lease_id):
        holder = connection.execute(
            "SELECT lease_id FROM holdings WHERE consumer = ? AND session_id = ?", (consumer, session_id)
        ).fetchone()
        if holder is not None and holder[0] != lease_id:
            raise Conflict(f"lease {lease_id} expired and rollout {session_id} was lent anew since")


def _items(connection: Connection, lease_id: str) -> list[tuple[str, str]]:
    """Session id and snapshot of each rollout of a lease, in its order."""
    return connection.execute(
        "SELECT session_id, snapshot FROM lease_items WHERE lease_id = ? ORDER BY position", (lease_id,)
    ).fetchall()


def _rollout(connection: Connection, session_id: str, snapshot: str | None = None) -> LeasedRollout:
    """A rollout as a lease names it: by its latest snapshot, or by an earlier one."""
    row = connection.execute(
        """SELECT f.facts, f.checksum, n.snapshot, n.num_tokens, n.num_sampled_tokens, s.group_name, s.facts,
                  s.checksum
           FROM finishes f JOIN sessions s ON s.session_id = f.session_id
           JOIN snapshots n ON n.session_id = f.session_id AND n.snapshot = coalesce(CAST(? AS TEXT), f.snapshot)
           WHERE f.session_id = ?""",
        (snapshot, session_id),
    ).fetchone()
    if row is None:
        raise Conflict(f"rollout {session_id} was deleted since it was lent")
    facts, checksum, named, num_tokens, num_sampled, group, *session_facts = row
    finish = read_finish(session_id, facts, checksum, None)
    return LeasedRollout(
        session_id=session_id,
        snapshot=named,
        group=group,
        reward=finish.reward,
        outcome=finish.outcome,
        num_tokens=num_tokens,
        num_sampled_tokens=num_sampled,
        complete=says_complete(*session_facts),
    )
