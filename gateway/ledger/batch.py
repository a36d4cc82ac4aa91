"""What nearly every commit is made of, new sessions, turns and what became of replies, written by a few statements.

    creations ─▶ one SELECT for all: none is there ─▶ INSERT of many rows (and of their labels)
    appends   ─▶ one SELECT for all: session there, not ended, parent there ─▶ INSERT of many rows
    notes     ─▶ UPDATE of many rows

Every statement gives the interpreter's lock away and takes it again, which beside a busy event loop may wait for
milliseconds; so what counts is how many there are, not how long each runs. Nothing here decides a conflict: what is not
ordinary (an index or a turn that is there already, a session that is not open, an unknown turn) is left to the
operations themselves, which run one by one and say what is wrong.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain
from typing import Any, NamedTuple, TypeVar

from msgspec import Struct

from gateway.contracts.errors import NotFound
from gateway.contracts.records import SessionRecord
from gateway.ledger import rows
from gateway.ledger.backend import ArrayStore, Buffer, Connection, Location, Value

T = TypeVar("T")

_MOST_ROWS = 64
"""Of one statement. Statements have a power of two of them, so that few differ and all stay compiled."""

_INSERTED = (*rows.TurnRow._fields, "experts_file", "experts_offset", "experts_bytes", "delivered_at", "recorded_at")


class Creation(Struct, frozen=True, eq=False):
    """The operation that stores a session; None where it was stored as given, else what `alone` found there."""

    row: rows.SessionRow
    labels: Sequence[rows.LabelRow]
    alone: Callable[[Connection], SessionRecord | None]

    def __call__(self, connection: Connection) -> SessionRecord | None:
        return self.alone(connection)


class ArrayRecord(NamedTuple):
    """Routing rows as an array store takes them."""

    key: bytes
    payload: Buffer


class Arrival(Struct, frozen=True, eq=False):
    """A turn on its way into the store; `location` of its routing rows if they are there already."""

    parent_id: str | None
    row: rows.TurnRow
    delivered_at: float | None
    record: ArrayRecord | None
    location: Location | None = None

    @property
    def num_bytes(self) -> int:
        """About what it takes on disk."""
        row, record = self.row, self.record
        arrays = len(row.prompt_token_ids) + len(row.output_token_ids) + len(row.output_logprobs)
        return len(row.facts) + arrays + (0 if record is None else len(record.payload))

    def place(self, arrays: ArrayStore) -> Location | tuple[None, None, None]:
        """Where its routing rows are; stores them if that was not done yet."""
        if self.location is not None:
            return self.location
        return (None, None, None) if self.record is None else arrays.append(*self.record)


class Append(Struct, frozen=True, eq=False):
    """The operation that appends a turn; `alone` carries it out by itself, with all that can be said against it."""

    arrival: Arrival
    alone: Callable[[Connection, Arrival], None]

    def __call__(self, connection: Connection) -> None:
        self.alone(connection, self.arrival)


class Note(Struct, frozen=True, eq=False):
    """The operation that notes when a turn's reply left (`delivered_at`), or was lost (`lost_at`)."""

    session_id: str
    turn_id: str
    column: str
    at: float

    def __call__(self, connection: Connection) -> None:
        query = f"UPDATE turns SET {self.column} = ? WHERE session_id = ? AND turn_id = ?"
        if not connection.execute(query, (self.at, self.session_id, self.turn_id)).rowcount:
            raise NotFound(f"session {self.session_id} has no turn {self.turn_id}")


def write_together(
    connection: Connection, operations: Sequence[Callable[[Connection], Any]], arrays: ArrayStore
) -> set[int]:
    """Carry out the ordinary ones of a batch's operations; which were left, by position.

    All of a batch run at the same time as far as anybody can tell, so their order does not matter. What is left may be
    half done: each finds what it stored already.
    """
    left = set(range(len(operations)))
    creations = {i: operation for i, operation in enumerate(operations) if isinstance(operation, Creation)}
    if creations and _create_all(connection, list(creations.values())):
        left.difference_update(creations)
    appends = {i: operation.arrival for i, operation in enumerate(operations) if isinstance(operation, Append)}
    if appends and _append_all(connection, list(appends.values()), arrays):
        left.difference_update(appends)
    for column in ("delivered_at", "lost_at"):
        notes = {i: note for i, note in enumerate(operations) if isinstance(note, Note) and note.column == column}
        if notes and _note_all(connection, column, list(notes.values())):
            left.difference_update(notes)
    return left


def _create_all(connection: Connection, creations: Sequence[Creation]) -> bool:
    """False if one of them is there already, or comes twice: who made which is then told one by one."""
    names = {creation.row.session_id for creation in creations}
    if len(names) < len(creations):
        return False
    for part in _parts(sorted(names)):
        if connection.execute(_known_query(len(part)), part).fetchone() is not None:
            return False
    for rows_ in _parts([creation.row for creation in creations]):
        connection.execute(_create_query(len(rows_)), _flat(rows_))
    for labels in _parts([label for creation in creations for label in creation.labels]):
        connection.execute(_label_query(len(labels)), _flat(labels))
    return True


def _append_all(connection: Connection, arrivals: Sequence[Arrival], arrays: ArrayStore) -> bool:
    """False if not all of them were stored."""
    for part in _parts(arrivals):
        links = [(arrival.row.session_id, arrival.parent_id) for arrival in part]
        (num_ordinary,) = connection.execute(_check_query(len(part)), _flat(links)).fetchone()
        if num_ordinary < len(part):
            return False
    recorded_at = time.time()
    for part in _parts(arrivals):
        columns = [(*a.row, *a.place(arrays), a.delivered_at, recorded_at) for a in part]
        if connection.execute(_insert_query(len(part)), _flat(columns)).rowcount < len(part):
            return False
    return True


def _note_all(connection: Connection, column: str, notes: Sequence[Note]) -> bool:
    """False if not all of their turns are there."""
    latest = {(note.session_id, note.turn_id): note.at for note in notes}
    for part in _parts([(*turn, at) for turn, at in latest.items()]):
        if connection.execute(_note_query(column, len(part)), _flat(part)).rowcount < len(part):
            return False
    return True


def _parts(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """All items, in parts of a power of two."""
    start = 0
    while rest := len(items) - start:
        size = min(1 << (rest.bit_length() - 1), _MOST_ROWS)
        yield items[start : start + size]
        start += size


def _flat(rows_: Sequence[Sequence[Value]]) -> list[Value]:
    return list(chain.from_iterable(rows_))


@cache
def _known_query(num_rows: int) -> str:
    return f"SELECT 1 FROM sessions WHERE session_id IN ({', '.join('?' * num_rows)}) LIMIT 1"


@cache
def _create_query(num_rows: int) -> str:
    columns = rows.SessionRow._fields
    row = f"({', '.join('?' * len(columns))})"
    return f"INSERT INTO sessions ({', '.join(columns)}) VALUES {', '.join([row] * num_rows)}"


@cache
def _label_query(num_rows: int) -> str:
    return f"INSERT INTO session_labels (session_id, name, value) {_values(num_rows, 3)}"


@cache
def _check_query(num_rows: int) -> str:
    """How many of (session, parent) are of open sessions that have the parent, or none."""
    return (
        f"SELECT count(*) FROM ({_values(num_rows, 2)}) AS given "
        "WHERE EXISTS (SELECT 1 FROM sessions s WHERE s.session_id = given.column1) "
        "AND NOT EXISTS (SELECT 1 FROM finishes f WHERE f.session_id = given.column1) "
        "AND (given.column2 IS NULL OR EXISTS "
        "(SELECT 1 FROM turns t WHERE t.session_id = given.column1 AND t.turn_id = given.column2))"
    )


@cache
def _insert_query(num_rows: int) -> str:
    # "ON CONFLICT DO NOTHING" says nearly the same, but has SQLite keep what it needs to undo half a statement.
    row = f"({', '.join('?' * len(_INSERTED))}, 0)"
    return f"INSERT OR IGNORE INTO turns ({', '.join(_INSERTED)}, since_snapshot) VALUES {', '.join([row] * num_rows)}"


@cache
def _note_query(column: str, num_rows: int) -> str:
    return (
        f"UPDATE turns SET {column} = given.column3 FROM ({_values(num_rows, 3)}) AS given "
        "WHERE turns.session_id = given.column1 AND turns.turn_id = given.column2"
    )


def _values(num_rows: int, num_columns: int) -> str:
    row = f"({', '.join('?' * num_columns)})"
    return f"VALUES {', '.join([row] * num_rows)}"
