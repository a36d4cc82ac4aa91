"""Segment files of which most is dead: what of them is still needed is appended to the newest file, and they go.

    file: ▒▒██▒▒▒▒█▒▒▒  dead and live  ─▶ live records appended, flushed ─▶ rows point there: COMMIT ─▶ file removed

A crash at any moment leaves copies that no row points at. A reader that had looked up the old place finds the record
gone and looks again. A record that does not hold keeps its file, so that it can still be examined.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from gateway.ledger.backend import ArrayStore, Connection, Location

_MIN_FILE_BYTES = 2**16
_CHUNK_BYTES = 16 * 2**20
"""Of one transaction, so that turns do not wait for long."""


class LiveRecord(NamedTuple):
    """A record that a turn needs, and where it lies."""

    session_id: str
    turn_id: str
    location: Location


def live_bytes(connection: Connection) -> dict[int, int]:
    """What turns need of each file, by its number."""
    query = "SELECT experts_file, sum(experts_bytes) FROM turns WHERE experts_file IS NOT NULL GROUP BY experts_file"
    return dict(connection.execute(query).fetchall())


def mostly_dead(sizes: Mapping[int, int], live: Mapping[int, int]) -> list[int]:
    """Numbers of the files of which less than half is needed; small ones are left as they are."""
    return [number for number, size in sizes.items() if size >= _MIN_FILE_BYTES and live.get(number, 0) * 2 < size]


def live_records(connection: Connection, number: int) -> list[LiveRecord]:
    """Of one file, in order."""
    query = (
        "SELECT session_id, turn_id, experts_offset, experts_bytes FROM turns WHERE experts_file = ? "
        "ORDER BY experts_offset"
    )
    return [
        LiveRecord(session_id, turn_id, Location(number, offset, num_bytes))
        for session_id, turn_id, offset, num_bytes in connection.execute(query, (number,)).fetchall()
    ]


def chunks(records: Sequence[LiveRecord]) -> Iterator[Sequence[LiveRecord]]:
    """Parts that one transaction may have."""
    part: list[LiveRecord] = []
    num_bytes = 0
    for record in records:
        if part and num_bytes + record.location.num_bytes > _CHUNK_BYTES:
            yield part
            part, num_bytes = [], 0
        part.append(record)
        num_bytes += record.location.num_bytes
    if part:
        yield part


def move(connection: Connection, arrays: ArrayStore, records: Sequence[LiveRecord]) -> int:
    """Append records anew and have their rows point there; how many bytes. Those that were dropped since stay dropped.

    Runs in the writer's transaction; raises LedgerCorrupt for a record that does not hold.
    """
    num_moved = 0
    for record in records:
        place = (record.session_id, record.turn_id, record.location.file, record.location.offset)
        where = "session_id = ? AND turn_id = ? AND experts_file = ? AND experts_offset = ?"
        if connection.execute(f"SELECT 1 FROM turns WHERE {where}", place).fetchone() is None:
            continue
        key, payload = arrays.read(record.location, name=f"session {record.session_id} turn {record.turn_id}")
        moved = arrays.append(key, bytes(payload))
        connection.execute(
            f"UPDATE turns SET experts_file = ?, experts_offset = ?, experts_bytes = ? WHERE {where}", (*moved, *place)
        )
        num_moved += moved.num_bytes
    return num_moved
