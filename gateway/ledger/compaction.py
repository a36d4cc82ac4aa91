"""Segment files that are written anew: those of which most is dead, and those that are full and not packed yet.

    file: ▒▒██▒▒▒▒█▒▒▒  dead and live  ─▶ live records appended, flushed ─▶ rows point there: COMMIT ─▶ file removed
    file: ████████████  not packed     ─▶ each packed into a file of its own kind, flushed ─▶ the same

A crash at any moment leaves copies that no row points at. A reader that had looked up the old place finds the record
gone and looks again. A record that does not hold keeps its file, so that it can still be examined.

What is dead is appended by the writer's thread behind the newest rows: it is little. Packing reads, packs and syncs in
a thread of its own, which the system runs when nobody else wants to, and only the rows change in the writer's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from gateway.ledger.backend import Connection, Location
from gateway.ledger.packing import pack
from gateway.ledger.rows import decode_json
from gateway.ledger.segments_file import SegmentFileWriter, read_stored

_MIN_FILE_BYTES = 2**16
_CHUNK_BYTES = 16 * 2**20
"""Of one transaction, so that turns do not wait for long."""

FULL_BYTES = 64 * 2**20
"""From which on a file that is appended to is closed and another begun, so that its rows can be packed."""


class LiveRecord(NamedTuple):
    """A record that a turn needs, and where it lies."""

    session_id: str
    turn_id: str
    location: Location


class CopyingArrays(Protocol):
    """Of an array store: records written once more."""

    def copy(self, location: Location, *, name: str) -> Location:
        """Append a record as it is; raises LedgerCorrupt, saying `name`, if it does not hold."""
        ...


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


class Packed(NamedTuple):
    """A record that lies packed at another place as well, durable there."""

    record: LiveRecord
    location: Location


def pack_records(folder: Path, writer: SegmentFileWriter, records: Sequence[LiveRecord]) -> list[Packed]:
    """Append records anew, packed; raises LedgerCorrupt for one that does not hold, OSError where there is no room."""
    packed = []
    for record in records:
        name = f"session {record.session_id} turn {record.turn_id}"
        key, payload, is_done = read_stored(folder, record.location, name=name)
        frame = payload if is_done else pack(payload, decode_json(key))
        packed.append(Packed(record, writer.append(key, frame, is_packed=True)))
    writer.flush()
    return packed


def point_to(connection: Connection, packed: Sequence[Packed]) -> int:
    """Have rows point at the packed records, unless they were dropped or moved since; by how many bytes they are less.

    Runs in the writer's transaction.
    """
    num_saved = 0
    for record, location in packed:
        found = connection.execute(
            "UPDATE turns SET experts_file = ?, experts_offset = ?, experts_bytes = ? WHERE session_id = ? "
            "AND turn_id = ? AND experts_file = ? AND experts_offset = ?",
            (*location, record.session_id, record.turn_id, record.location.file, record.location.offset),
        )
        if found.rowcount:
            saved = record.location.num_bytes - location.num_bytes
            connection.execute(
                "UPDATE finishes SET num_bytes = num_bytes - ? WHERE session_id = ?", (saved, record.session_id)
            )
            num_saved += saved
    return num_saved


def move(connection: Connection, arrays: CopyingArrays, records: Sequence[LiveRecord]) -> int:
    """Append records anew as they are and have their rows point there; how many bytes.

    Those that were dropped since stay dropped. Runs in the writer's transaction; raises LedgerCorrupt for a record that
    does not hold.
    """
    num_moved = 0
    for record in records:
        place = (record.session_id, record.turn_id, record.location.file, record.location.offset)
        where = "session_id = ? AND turn_id = ? AND experts_file = ? AND experts_offset = ?"
        if connection.execute(f"SELECT 1 FROM turns WHERE {where}", place).fetchone() is None:
            continue
        moved = arrays.copy(record.location, name=f"session {record.session_id} turn {record.turn_id}")
        connection.execute(
            f"UPDATE turns SET experts_file = ?, experts_offset = ?, experts_bytes = ? WHERE {where}", (*moved, *place)
        )
        num_moved += moved.num_bytes
    return num_moved
