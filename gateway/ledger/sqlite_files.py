"""What only the embedded ledger has to verify: SQLite's own structure, the types in its columns, its segment files.

All of it works beside a gateway that writes. The write-ahead log is looked at in `wal.py`, before SQLite opens it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path

from gateway.ledger.segments_file import file_sizes, scan_records
from gateway.ledger.verify import Damage, DamageKind, Found

_MAX_MESSAGES = 100
_TYPES = {"TEXT": "text", "BLOB": "blob", "BIGINT": "integer", "INTEGER": "integer", "DOUBLE PRECISION": "real"}
"""Declared type of a column → what its values are, where they are not NULL."""


def check_structure(connection: sqlite3.Connection) -> Iterator[Damage]:
    """SQLite's own check of pages, trees and indexes, then every column's types (a flipped type code passes that)."""
    for (line,) in connection.execute(f"PRAGMA integrity_check({_MAX_MESSAGES})"):
        for message in faults(str(line)):
            yield Damage(DamageKind.STORE, f"ledger.sqlite: {message}", file="ledger.sqlite")
    tables = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
    for (table,) in tables.fetchall():
        for _, column, declared, *_ in connection.execute(f'PRAGMA table_info("{table}")').fetchall():
            if (expected := _TYPES.get(declared)) is None:
                continue
            query = f'SELECT count(*) FROM "{table}" WHERE typeof("{column}") NOT IN (?, ?)'
            (num_wrong,) = connection.execute(query, (expected, "null")).fetchone()
            if num_wrong:
                yield Damage(
                    DamageKind.TABLE, f"{table}: {num_wrong} values of {column} are no {expected}", file="ledger.sqlite"
                )


def faults(text: str) -> list[str]:
    """The lines of one row of SQLite's check that name something wrong."""
    return [line for line in text.splitlines() if line != "ok" and not line.startswith("*** in database")]


def check_segment_files(connection: sqlite3.Connection, folder: Path, found: Found) -> None:
    """Names what lies behind the last record of a file; records that no row points at are dead, and only counted."""
    live = live_ends(connection)
    for number, num_bytes in file_sizes(folder).items() if folder.is_dir() else ():
        tail = torn_tail(folder, number, num_bytes, live.get(number, 0))
        if tail < num_bytes:
            found.notes.append(
                f"routing-{number:08d}.seg: {num_bytes - tail} bytes at {tail} are no whole record; no turn needs them "
                "(a write that a crash cut)"
            )


def check_blob_files(connection: sqlite3.Connection, stored: Iterable[str], found: Found) -> None:
    """Counts contents that no session refers to; they go when a gateway starts."""
    held = {sha256 for (sha256,) in connection.execute("SELECT DISTINCT sha256 FROM blobs")}
    num_left = sum(sha256 not in held for sha256 in stored)
    if num_left:
        found.notes.append(f"blobs: {num_left} files belong to no session; they go when a gateway starts")


def live_ends(connection: sqlite3.Connection) -> dict[int, int]:
    """By file number, where the last record ends that a turn points at."""
    query = (
        "SELECT experts_file, max(experts_offset + experts_bytes) FROM turns "
        "WHERE experts_file IS NOT NULL GROUP BY experts_file"
    )
    return dict(connection.execute(query).fetchall())


def torn_tail(folder: Path, number: int, num_bytes: int, live_end: int) -> int:
    """Where the bytes of a file begin that no whole record holds: its size, where there are none."""
    if live_end >= num_bytes:
        return num_bytes
    end = live_end
    for record in scan_records(folder, number, start=live_end):
        end = record.location.offset + record.location.num_bytes
    return end
