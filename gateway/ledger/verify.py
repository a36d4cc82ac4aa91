"""Is a ledger whole? Every row, routing record and blob against its checksum, and every reference between them.

    tables ─▶ types, rows without their session, leases without holdings
    each session ─▶ session · finishes and snapshots · turns ─▶ routing rows · blobs
                    checksum, columns against the record, parents, snapshot digests, counts

Works over any store (`Connection`, `ArrayStore`, `BlobStore`), also while gateways write: what looks damaged is looked
at once more, because two statements may see two states. What SQLite and its files add is in `sqlite_files.py`.

Not covered by any checksum, because they change: when a reply was delivered, when a lease expires, which consumer has
acknowledged what. Their types and their order in time are checked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeAlias

from gateway.contracts.errors import LedgerCorrupt, VerbatimError
from gateway.contracts.experts import RoutedExperts
from gateway.contracts.media import blob_name, placed_media
from gateway.contracts.records import FinishRecord, SessionRecord, TurnRecord, snapshot_of
from gateway.ledger import rows
from gateway.ledger.backend import ArrayStore, BlobStore, Connection, Location

_PAGE = 500
_CLOCK_SECONDS = 86_400.0
"""By which clocks of several machines may differ before a time is taken for a damaged one."""
_TURN_COLUMNS = ", ".join(rows.TurnRow._fields)
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError)
"""What a record whose checksum holds, and whose content is not ours, raises when it is read."""


Assembly: TypeAlias = Callable[[Sequence[TurnRecord], Mapping[str, RoutedExperts | None]], None]
"""(turns of a session, routing rows by turn id) → nothing; raises IntegrityError for what does not fit."""


class DamageKind(StrEnum):
    """What is damaged."""

    STORE = "store"
    LOG = "log"
    TABLE = "table"
    SESSION = "session"
    TURN = "turn"
    ROUTING = "routing"
    BLOB = "blob"
    FINISH = "finish"
    FEED = "feed"
    SEGMENTS = "segments"


@dataclass(frozen=True, slots=True)
class Damage:
    """One fault, as one line in `message`. file, offset: where it lies, if in a file of its own."""

    kind: DamageKind
    message: str
    session_id: str | None = None
    turn_id: str | None = None
    file: str | None = None
    offset: int | None = None


@dataclass(slots=True)
class Found:
    """What a verification saw. notes: what is odd and harms nothing (leftovers of a crash)."""

    damages: list[Damage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_sessions: int = 0
    num_turns: int = 0
    num_tokens: int = 0
    num_routing_records: int = 0
    num_blobs: int = 0
    num_rollouts: int = 0


@dataclass(frozen=True, slots=True)
class Parts:
    """Of one store: a connection to read with, where its arrays and blobs lie."""

    connection: Connection
    arrays: ArrayStore
    blobs: BlobStore


@dataclass(slots=True)
class _Seen:
    """Of one session."""

    damages: list[Damage] = field(default_factory=list)
    turns: dict[str, TurnRecord] = field(default_factory=dict)
    experts: dict[str, RoutedExperts | None] = field(default_factory=dict)
    num_rows: int = 0
    num_routing_records: int = 0
    is_finished: bool = False


def verify_rows(parts: Parts, found: Found, *, assemble: Assembly | None = None) -> None:
    """Add all that is wrong with tables, sessions and what they refer to.

    assemble: makes of a session that is whole what a trainer reads; what it raises is a damage too.
    """
    found.damages += _tables(parts.connection)
    checked_blobs: dict[str, str | None] = {}
    for session_id in _session_ids(parts.connection):
        seen = _look_at(parts, session_id, checked_blobs, assemble)
        if seen.damages:  # a writer may have been between two of our statements
            checked_blobs = {name: fault for name, fault in checked_blobs.items() if fault is None}
            seen = _look_at(parts, session_id, checked_blobs, assemble)
        found.damages += seen.damages
        found.num_sessions += 1
        found.num_turns += seen.num_rows
        found.num_tokens += sum(len(t.prompt_token_ids) + len(t.output_token_ids) for t in seen.turns.values())
        found.num_routing_records += seen.num_routing_records
        found.num_rollouts += seen.is_finished
    found.num_blobs += len(checked_blobs)


# ---- tables ----

_ORPHANS = (
    ("turns", "turn_id", DamageKind.TURN),
    ("finishes", "snapshot", DamageKind.FINISH),
    ("snapshots", "snapshot", DamageKind.FINISH),
    ("session_labels", "session_id", DamageKind.SESSION),
    ("blobs", "sha256", DamageKind.BLOB),
    ("holdings", "consumer", DamageKind.FEED),
)
"""Tables whose rows belong to a session; what names a row."""


def _tables(connection: Connection) -> Iterator[Damage]:
    for table, name, kind in _ORPHANS:
        query = (
            f"SELECT t.session_id, t.{name} FROM {table} t WHERE NOT EXISTS "
            "(SELECT 1 FROM sessions s WHERE s.session_id = t.session_id)"
        )
        for session_id, value in connection.execute(query).fetchall():
            yield Damage(kind, f"{table}: {value!r} belongs to session {session_id}, which does not exist", session_id)
    for consumer, session_id, lease_id, acknowledged in connection.execute(
        "SELECT h.consumer, h.session_id, h.lease_id, h.acknowledged FROM holdings h WHERE NOT EXISTS "
        "(SELECT 1 FROM leases l WHERE l.lease_id = h.lease_id AND l.consumer = h.consumer)"
    ).fetchall():
        state = "acknowledged" if acknowledged else "held"
        yield Damage(
            DamageKind.FEED,
            f"session {session_id}: {state} by {consumer} under lease {lease_id}, which this consumer does not have",
            session_id,
        )
    for consumer, session_id in connection.execute(
        "SELECT h.consumer, h.session_id FROM holdings h WHERE NOT EXISTS "
        "(SELECT 1 FROM finishes f WHERE f.session_id = h.session_id) AND EXISTS "
        "(SELECT 1 FROM sessions s WHERE s.session_id = h.session_id)"
    ).fetchall():
        yield Damage(DamageKind.FEED, f"session {session_id}: held by {consumer}, but it is not finished", session_id)
    for lease_id, num_rows in connection.execute(
        "SELECT i.lease_id, count(*) FROM lease_items i WHERE NOT EXISTS "
        "(SELECT 1 FROM leases l WHERE l.lease_id = i.lease_id) GROUP BY i.lease_id"
    ).fetchall():
        yield Damage(DamageKind.FEED, f"lease {lease_id}: {num_rows} rollouts are listed in it, and it does not exist")
    for label, version in connection.execute("SELECT weight_version, policy_version FROM policies").fetchall():
        if not isinstance(version, int) or version < 0:
            yield Damage(DamageKind.TABLE, f"policies: {label!r} means version {version!r}, which is none")


def _session_ids(connection: Connection) -> Iterator[str]:
    """In order, a page at a time, so that no statement stays open beside a writer."""
    after = ""
    while True:
        query = "SELECT session_id FROM sessions WHERE session_id > ? ORDER BY session_id LIMIT ?"
        page = [session_id for (session_id,) in connection.execute(query, (after, _PAGE)).fetchall()]
        yield from page
        if len(page) < _PAGE:
            return
        after = page[-1]


# ---- one session ----


def _look_at(parts: Parts, session_id: str, checked_blobs: dict[str, str | None], assemble: Assembly | None) -> _Seen:
    seen = _Seen()
    report = _Report(seen.damages, session_id)
    session = _check_session(parts.connection, session_id, report)
    finish, snapshots = _check_finish(parts.connection, session, session_id, report)
    seen.is_finished = finish is not None
    turn_rows = parts.connection.execute(
        f"SELECT {_TURN_COLUMNS}, experts_file, experts_offset, experts_bytes, delivered_at, lost_at, recorded_at, "
        "since_snapshot FROM turns WHERE session_id = ? ORDER BY turn_index",
        (session_id,),
    ).fetchall()
    since: dict[str, int] = {}
    for *columns, file, offset, num_bytes, delivered_at, lost_at, recorded_at, since_snapshot in turn_rows:
        row = rows.TurnRow(*columns)
        seen.num_rows += 1
        since[row.turn_id] = since_snapshot
        turn = _check_turn(row, delivered_at, {"lost_at": lost_at, "recorded_at": recorded_at}, report)
        if turn is None:
            continue
        seen.turns[row.turn_id] = turn
        location = None if file is None else Location(file, offset, num_bytes)
        seen.num_routing_records += location is not None
        seen.experts[row.turn_id] = _check_routing(parts.arrays, turn, location, report)
    _check_tree(seen.turns, set(since), report)
    if finish is not None:
        _check_snapshots(finish, snapshots, since, seen, report)
    _check_blobs(parts, session_id, seen.turns, checked_blobs, report)
    if assemble is not None and not seen.damages:
        try:
            assemble(list(seen.turns.values()), seen.experts)
        except VerbatimError as error:
            report.say(DamageKind.SEGMENTS, f"{error}")
    return seen


@dataclass(frozen=True, slots=True)
class _Report:
    """Notes damages of one session."""

    damages: list[Damage]
    session_id: str

    def say(
        self,
        kind: DamageKind,
        what: str,
        *,
        turn: str | None = None,
        file: str | None = None,
        offset: int | None = None,
    ) -> None:
        where = f"session {self.session_id}" + ("" if turn is None else f" turn {turn}")
        message = what if what.startswith(where) else f"{where}: {what}"
        self.damages.append(Damage(kind, message, self.session_id, turn, file, offset))


def _check_session(connection: Connection, session_id: str, report: _Report) -> SessionRecord | None:
    columns = ", ".join(rows.SessionRow._fields)
    found = connection.execute(f"SELECT {columns} FROM sessions WHERE session_id = ?", (session_id,)).fetchone()
    if found is None:
        return None  # deleted meanwhile
    row = rows.SessionRow(*found)
    try:
        session = rows.read_session(row.session_id, row.facts, row.checksum)
    except (LedgerCorrupt, *_UNREADABLE) as error:
        report.say(DamageKind.SESSION, f"{error}")
        return None
    expected = rows.session_row(session)
    _compare(row, expected, ("session_id", "group_name", "group_size", "created_at"), DamageKind.SESSION, report)
    if row.ttl_seconds not in (None, expected.ttl_seconds):
        report.say(DamageKind.SESSION, f"ttl_seconds is {row.ttl_seconds!r}, its record says {expected.ttl_seconds!r}")
    labels = connection.execute(
        "SELECT session_id, name, value FROM session_labels WHERE session_id = ? ORDER BY name", (session_id,)
    ).fetchall()
    if [tuple(label) for label in labels] != sorted(rows.label_rows(session), key=lambda label: label[1]):
        report.say(DamageKind.SESSION, "its labels are not those of its record")
    return session


def _check_finish(
    connection: Connection, session: SessionRecord | None, session_id: str, report: _Report
) -> tuple[FinishRecord | None, list[tuple[int, str, int, int]]]:
    found = connection.execute(
        "SELECT session_id, snapshot, finished_at, facts, checksum, dropped_at FROM finishes WHERE session_id = ?",
        (session_id,),
    ).fetchone()
    snapshots = [
        tuple(row)
        for row in connection.execute(
            "SELECT ordinal, snapshot, num_tokens, num_sampled_tokens FROM snapshots WHERE session_id = ? "
            "ORDER BY ordinal",
            (session_id,),
        ).fetchall()
    ]
    if found is None:
        if snapshots:
            report.say(DamageKind.FINISH, "it has snapshots and no finish")
        return None, []
    *columns, dropped_at = found
    row = rows.FinishRow(*columns)
    try:
        finish = rows.read_finish(row.session_id, row.facts, row.checksum, dropped_at)
    except (LedgerCorrupt, *_UNREADABLE) as error:
        report.say(DamageKind.FINISH, f"{error}")
        return None, []
    _compare(row, rows.finish_row(finish), ("session_id", "finished_at"), DamageKind.FINISH, report)
    if not snapshots or snapshots[-1][1] != row.snapshot:
        report.say(DamageKind.FINISH, f"its snapshot {row.snapshot} is not the latest of its snapshots")
    if [ordinal for ordinal, *_ in snapshots] != list(range(len(snapshots))):
        report.say(DamageKind.FINISH, "its snapshots are not numbered from 0 without gaps")
    if dropped_at is not None and not finish.finished_at <= dropped_at + _CLOCK_SECONDS <= _latest():
        report.say(DamageKind.FINISH, f"dropped_at is {dropped_at!r}, which is no time after its end")
    return finish, snapshots


def _check_turn(
    row: rows.TurnRow, delivered_at: float | None, other_times: Mapping[str, float | None], report: _Report
) -> TurnRecord | None:
    try:
        turn = rows.read_turn(row, delivered_at)
        expected = rows.turn_row(turn)
    except (VerbatimError, *_UNREADABLE) as error:
        report.say(DamageKind.TURN, f"{error}", turn=row.turn_id)
        return None
    names = ("session_id", "turn_id", "turn_index", "num_tokens", "num_trainable_tokens")
    _compare(row, expected, names, DamageKind.TURN, report, turn=row.turn_id)
    for name, value in {"delivered_at": delivered_at, **other_times}.items():
        if value is not None and not (
            isinstance(value, float) and turn.created_at - _CLOCK_SECONDS <= value < _latest()
        ):
            report.say(DamageKind.TURN, f"{name} is {value!r}, which is no time after its beginning", turn=row.turn_id)
    return turn


def _check_routing(
    arrays: ArrayStore, turn: TurnRecord, location: Location | None, report: _Report
) -> RoutedExperts | None:
    """The rows, None if there are none that hold."""
    if location is None:
        if turn.experts_stop > turn.experts_start:
            what = f"its record says rows [{turn.experts_start}, {turn.experts_stop}), none are stored"
            report.say(DamageKind.ROUTING, what, turn=turn.turn_id)
        return None
    name = f"session {turn.session_id} turn {turn.turn_id}"
    try:
        experts = read_routing(arrays, location, turn)
        if rows.check_experts(turn, experts) is None:
            raise LedgerCorrupt(f"{name}: routing rows are stored, and its record speaks of none")
        if turn.num_experts and int(experts.ids.max(initial=0)) >= turn.num_experts:
            raise LedgerCorrupt(f"{name}: an expert id is not below {turn.num_experts}")
    except (VerbatimError, *_UNREADABLE) as error:
        report.say(DamageKind.ROUTING, f"{error}", turn=turn.turn_id, file=str(location.file), offset=location.offset)
        return None
    return experts


def read_routing(arrays: ArrayStore, location: Location, turn: TurnRecord) -> RoutedExperts:
    """A turn's routing rows; raises LedgerCorrupt for those of another turn."""
    name = f"session {turn.session_id} turn {turn.turn_id}"
    key, payload = arrays.read(location, name=name)
    facts = rows.decode_json(key)
    if (facts["session_id"], facts["turn_id"]) != (turn.session_id, turn.turn_id):
        raise LedgerCorrupt(f"{name}: its routing rows belong to session {facts['session_id']} turn {facts['turn_id']}")
    return rows.read_experts(facts, payload)


def _check_tree(turns: Mapping[str, TurnRecord], all_ids: set[str], report: _Report) -> None:
    for turn in turns.values():
        for what, other_id in (("parent", turn.attachment.parent_id), ("follows", turn.attachment.follows_id)):
            if other_id is None:
                continue
            if other_id not in all_ids:
                report.say(DamageKind.TURN, f"its {what} {other_id} is not recorded", turn=turn.turn_id)
            elif (other := turns.get(other_id)) is not None and what == "parent" and other.index >= turn.index:
                report.say(DamageKind.TURN, f"its parent {other_id} comes later than it", turn=turn.turn_id)


def _check_snapshots(
    finish: FinishRecord,
    snapshots: Sequence[tuple[int, str, int, int]],
    since: Mapping[str, int],
    seen: _Seen,
    report: _Report,
) -> None:
    if finish.dropped_at is not None:
        if since:
            report.say(DamageKind.FINISH, f"its rollout was dropped, and {len(since)} of its turns are there")
        return
    for ordinal, snapshot, num_tokens, num_sampled in snapshots:
        members = [turn_id for turn_id, first in since.items() if first <= ordinal]
        if snapshot_of(finish.session_id, members) != snapshot:
            report.say(DamageKind.FINISH, f"snapshot {snapshot} is not made of the {len(members)} turns that are there")
        elif all(turn_id in seen.turns for turn_id in members):
            counted = [rows.turn_row(seen.turns[turn_id]) for turn_id in members]
            sums = (sum(row.num_tokens for row in counted), sum(row.num_trainable_tokens for row in counted))
            if sums != (num_tokens, num_sampled):
                report.say(
                    DamageKind.FINISH,
                    f"snapshot {snapshot} counts {num_tokens} tokens, {num_sampled} of them trainable; its turns have "
                    f"{sums[0]} and {sums[1]}",
                )


def _check_blobs(
    parts: Parts,
    session_id: str,
    turns: Mapping[str, TurnRecord],
    checked: dict[str, str | None],
    report: _Report,
) -> None:
    query = "SELECT sha256, num_bytes FROM blobs WHERE session_id = ?"
    held: dict[str, int] = dict(parts.connection.execute(query, (session_id,)).fetchall())
    for turn in turns.values():
        for placed in placed_media(turn.added_messages):
            name = blob_name(placed.media.url)
            if name is not None and name not in held:
                report.say(DamageKind.BLOB, f"{placed.place}: the blob {name} is not the session's", turn=turn.turn_id)
    for sha256, num_bytes in held.items():
        if sha256 not in checked:
            checked[sha256] = _blob_fault(parts.blobs, sha256, num_bytes)
        if (fault := checked[sha256]) is not None:
            report.say(DamageKind.BLOB, fault, file=f"blobs/{sha256}")


def _blob_fault(blobs: BlobStore, sha256: str, num_bytes: int) -> str | None:
    try:
        content = blobs.read(sha256, name=f"blob {sha256}")
    except LedgerCorrupt as error:
        return str(error)
    return None if len(content) == num_bytes else f"blob {sha256}: {len(content)} bytes, its row says {num_bytes}"


def _compare(
    row: Any, expected: Any, names: Sequence[str], kind: DamageKind, report: _Report, *, turn: str | None = None
) -> None:
    for name in names:
        if getattr(row, name) != getattr(expected, name):
            report.say(
                kind, f"{name} is {getattr(row, name)!r}, its record says {getattr(expected, name)!r}", turn=turn
            )


def _latest() -> float:
    return time.time() + _CLOCK_SECONDS
