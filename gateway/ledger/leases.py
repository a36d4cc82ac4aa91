"""Who holds which finished rollout: leases, acknowledgement, whole groups; SQL on the tables of `schema.py`.

Each consumer group sees every rollout once. A rollout is free for a consumer when it has no row in `holdings`, or one
of a lease that has expired; it is gone for that consumer when the row says acknowledged. All functions run inside the
caller's transaction.
"""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gateway.contracts.errors import Conflict, NotFound
from gateway.contracts.rollouts import FeedCounts, Lease, LeasedRollout
from gateway.ledger.rows import read_finish


@dataclass(frozen=True, slots=True)
class Selection:
    """What a consumer wants to lease; `now` in seconds since the epoch decides which leases have expired."""

    consumer: str
    limit: int
    whole_groups: bool
    labels: Mapping[str, str]
    now: float


@dataclass(slots=True)
class _Candidate:
    session_id: str
    group: str | None


@dataclass(slots=True)
class _Picked:
    session_ids: list[str] = field(default_factory=list)
    groups_seen: set[str] = field(default_factory=set)


def select_rollouts(connection: sqlite3.Connection, wanted: Selection) -> list[str]:
    """Session ids to lend, oldest first: up to `limit`, or one group that is larger than it."""
    picked = _Picked()
    for candidate in _free_rollouts(connection, wanted):
        unit = _unit_of(connection, wanted, candidate, picked)
        if unit and picked.session_ids and len(picked.session_ids) + len(unit) > wanted.limit:
            break  # order is kept: a smaller, younger unit does not overtake
        picked.session_ids += unit
        if len(picked.session_ids) >= wanted.limit:
            break
    return picked.session_ids


def lend(connection: sqlite3.Connection, wanted: Selection, *, lease_seconds: float) -> Lease | None:
    """Select rollouts and write their lease; None if nothing is free."""
    session_ids = select_rollouts(connection, wanted)
    if not session_ids:
        return None
    lease_id = uuid.uuid4().hex
    expires_at = wanted.now + lease_seconds
    connection.execute("INSERT INTO leases VALUES (?, ?, ?, 'open')", (lease_id, wanted.consumer, expires_at))
    connection.executemany(
        "INSERT INTO lease_items VALUES (?, ?, ?)",
        [(lease_id, position, session_id) for position, session_id in enumerate(session_ids)],
    )
    connection.executemany(
        "INSERT OR REPLACE INTO holdings VALUES (?, ?, ?, ?, 0)",
        [(wanted.consumer, session_id, lease_id, expires_at) for session_id in session_ids],
    )
    rollouts = tuple(_leased_rollout(connection, session_id) for session_id in session_ids)
    return Lease(lease_id, wanted.consumer, expires_at, rollouts)


def acknowledge(connection: sqlite3.Connection, lease_id: str) -> list[str]:
    """Mark a lease's rollouts as consumed; its session ids in the lease's order.

    Raises NotFound for an unknown lease, Conflict for one that was released or whose rollouts were lent anew.
    """
    consumer, state = _lease(connection, lease_id)
    session_ids = _items(connection, lease_id)
    if state == "acknowledged":
        return session_ids
    if state == "released":
        raise Conflict(f"lease {lease_id} was released; its rollouts are back in the feed")
    for session_id in session_ids:
        holder = connection.execute(
            "SELECT lease_id FROM holdings WHERE consumer = ? AND session_id = ?", (consumer, session_id)
        ).fetchone()
        if holder is not None and holder[0] != lease_id:
            raise Conflict(f"lease {lease_id} expired and rollout {session_id} was lent anew since")
    connection.execute("UPDATE holdings SET acknowledged = 1 WHERE lease_id = ?", (lease_id,))
    connection.execute("UPDATE leases SET state = 'acknowledged' WHERE lease_id = ?", (lease_id,))
    return session_ids


def release(connection: sqlite3.Connection, lease_id: str) -> int:
    """Give an open lease's rollouts back and return how many; 0 for one that is unknown or ended."""
    connection.execute("UPDATE leases SET state = 'released' WHERE lease_id = ? AND state = 'open'", (lease_id,))
    return connection.execute("DELETE FROM holdings WHERE lease_id = ? AND acknowledged = 0", (lease_id,)).rowcount


def release_consumer(connection: sqlite3.Connection, consumer: str) -> int:
    """Release every open lease of a consumer, expired ones too; returns how many rollouts it held unacknowledged."""
    rows = connection.execute("SELECT lease_id FROM leases WHERE consumer = ? AND state = 'open'", (consumer,))
    return sum(release(connection, lease_id) for (lease_id,) in rows.fetchall())


def counts(connection: sqlite3.Connection, consumer: str, now: float) -> FeedCounts:
    """`finished - leased - acknowledged` rollouts are free; what was dropped before this consumer saw it is no part."""
    finished, leased, acknowledged, oldest = connection.execute(
        """SELECT count(*),
                  sum(h.acknowledged = 0 AND h.expires_at > :now),
                  sum(h.acknowledged = 1),
                  min(iif(h.session_id IS NULL OR (h.acknowledged = 0 AND h.expires_at <= :now), f.finished_at, NULL))
           FROM finishes f LEFT JOIN holdings h ON h.consumer = :consumer AND h.session_id = f.session_id
           WHERE f.dropped_at IS NULL OR h.acknowledged = 1""",
        {"now": now, "consumer": consumer},
    ).fetchone()
    return FeedCounts(
        finished=finished,
        leased=leased or 0,
        acknowledged=acknowledged or 0,
        oldest_unleased_seconds=0.0 if oldest is None else max(0.0, now - oldest),
    )


def label_filter(labels: Mapping[str, str]) -> tuple[str, list[str]]:
    """SQL (to put after a WHERE condition) and values: sessions `s` that carry all of `labels`."""
    clause = " AND EXISTS (SELECT 1 FROM json_each(s.labels) AS l WHERE l.key = ? AND l.value = ?)"
    return clause * len(labels), [text for item in labels.items() for text in item]


def _free_rollouts(
    connection: sqlite3.Connection, wanted: Selection, *, group: str | None = None
) -> Iterator[_Candidate]:
    clause, values = label_filter(wanted.labels)
    in_group, group_values = ("", []) if group is None else (" AND s.group_name = ?", [group])
    rows = connection.execute(
        f"""SELECT s.session_id, s.group_name
            FROM finishes f JOIN sessions s ON s.session_id = f.session_id
            LEFT JOIN holdings h ON h.consumer = ? AND h.session_id = f.session_id
            WHERE f.dropped_at IS NULL
            AND (h.session_id IS NULL OR (h.acknowledged = 0 AND h.expires_at <= ?)){clause}{in_group}
            ORDER BY f.finished_at, f.session_id""",
        [wanted.consumer, wanted.now, *values, *group_values],
    )
    return (_Candidate(session_id, group_name) for session_id, group_name in rows)


def _unit_of(
    connection: sqlite3.Connection, wanted: Selection, candidate: _Candidate, picked: _Picked
) -> Sequence[str]:
    """What is lent together with this rollout: itself, its whole group, or nothing (not yet, or taken already)."""
    if not wanted.whole_groups or candidate.group is None:
        return [candidate.session_id]
    if candidate.group in picked.groups_seen:
        return []
    picked.groups_seen.add(candidate.group)
    if not _group_is_whole(connection, wanted, candidate.group):
        return []
    return [member.session_id for member in _free_rollouts(connection, wanted, group=candidate.group)]


def _group_is_whole(connection: sqlite3.Connection, wanted: Selection, group: str) -> bool:
    """All sessions of the group (within the labels) have ended, as many as it should have, none lent at the moment."""
    clause, values = label_filter(wanted.labels)
    size, unfinished, expected, lent = connection.execute(
        f"""SELECT count(*), sum(f.session_id IS NULL), max(coalesce(s.group_size, 0)),
                   sum(h.session_id IS NOT NULL AND h.acknowledged = 0 AND h.expires_at > ?)
            FROM sessions s LEFT JOIN finishes f ON f.session_id = s.session_id
            LEFT JOIN holdings h ON h.consumer = ? AND h.session_id = s.session_id
            WHERE s.group_name = ?{clause}""",
        [wanted.now, wanted.consumer, group, *values],
    ).fetchone()
    return bool(unfinished == 0 and lent == 0 and size >= expected)


def _lease(connection: sqlite3.Connection, lease_id: str) -> tuple[str, str]:
    row = connection.execute("SELECT consumer, state FROM leases WHERE lease_id = ?", (lease_id,)).fetchone()
    if row is None:
        raise NotFound(f"no lease {lease_id}")
    return row[0], row[1]


def _items(connection: sqlite3.Connection, lease_id: str) -> list[str]:
    rows = connection.execute("SELECT session_id FROM lease_items WHERE lease_id = ? ORDER BY position", (lease_id,))
    return [session_id for (session_id,) in rows]


def _leased_rollout(connection: sqlite3.Connection, session_id: str) -> LeasedRollout:
    facts, checksum, num_tokens, num_sampled, group = connection.execute(
        """SELECT f.facts, f.checksum, f.num_tokens, f.num_sampled_tokens, s.group_name
           FROM finishes f JOIN sessions s ON s.session_id = f.session_id WHERE f.session_id = ?""",
        (session_id,),
    ).fetchone()
    finish = read_finish(session_id, facts, checksum, None)
    return LeasedRollout(
        session_id=session_id,
        snapshot=finish.snapshot,
        group=group,
        reward=finish.reward,
        outcome=finish.outcome,
        num_tokens=num_tokens,
        num_sampled_tokens=num_sampled,
    )
