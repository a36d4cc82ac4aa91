"""The version of a SQLite store: made when empty, brought up to date when opened for writing, refused when newer.

The version lives in SQLite's `user_version`, written in the same transaction as the tables, so that a crash while
making or migrating them leaves the store as it was.
"""

from __future__ import annotations

import json
import sqlite3
import time
from dataclasses import replace

from gateway.contracts.errors import LedgerCorrupt, SchemaMismatch
from gateway.contracts.records import SCHEMA_VERSION, TurnRecord
from gateway.ledger import rows, schema
from gateway.ledger.backend import Connection

COLUMN_TYPES = schema.ColumnTypes(text="TEXT", data="BLOB", place="INTEGER")
STORE_VERSION = 4
"""Of a folder: the tables of version 3 (`SCHEMA_VERSION`, which says what records hold), and routing rows that may be
packed, which programs of version 3 cannot read."""
_SAME_TABLES = (SCHEMA_VERSION, STORE_VERSION)
_MIGRATED = (1, 2)


def prepare(connection: sqlite3.Connection, name: str, *, migrate: bool = True) -> None:
    """Make the tables of an empty store, or migrate those of an older one; `connection` is in autocommit mode.

    `name` is said in errors. migrate: False where another process of the older program may still write to it.
    Raises SchemaMismatch for a newer store, one that is no ledger, or one that may not be migrated now.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        if _is_empty(connection):
            for statement in schema.tables(COLUMN_TYPES):
                connection.execute(statement)
        elif migrate and _version(connection) in _MIGRATED:
            _migrate(connection)
        else:
            check(connection, name)
        if migrate or _version(connection) not in _SAME_TABLES:
            connection.execute(f"PRAGMA user_version = {STORE_VERSION}")
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def check(connection: sqlite3.Connection, name: str) -> None:
    """Raise SchemaMismatch unless the store has the schema that this program reads."""
    version = _version(connection)
    if version in _MIGRATED:
        raise SchemaMismatch(
            f"{name} has ledger schema version {version}, this program reads {STORE_VERSION}; stop the gateway that "
            "uses it and start this version's on it once (`verbatim serve --data …`), which migrates it"
        )
    if version not in _SAME_TABLES:
        raise SchemaMismatch(
            f"{name} has ledger schema version {version}, this program reads {STORE_VERSION}; "
            "use the version of Verbatim that wrote it, or another data folder"
        )


def may_pack(connection: Connection) -> bool:
    """Whether no program that cannot read packed rows can have the store open."""
    return bool(connection.execute("PRAGMA user_version").fetchone()[0] == STORE_VERSION)


def _version(connection: sqlite3.Connection) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return int(version)


def _is_empty(connection: sqlite3.Connection) -> bool:
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    return bool(_version(connection) == 0 and tables == 0)


# ---- versions 1 and 2: labels as JSON, one snapshot a session, indexes of turns that could be equal ----


def _migrate(connection: sqlite3.Connection) -> None:
    now = time.time()
    for statement in (
        f"ALTER TABLE sessions ADD COLUMN created_at DOUBLE PRECISION NOT NULL DEFAULT {now!r}",
        "ALTER TABLE sessions ADD COLUMN ttl_seconds DOUBLE PRECISION",
        # Open sessions' time to live starts anew: when a turn was recorded was not kept.
        f"ALTER TABLE turns ADD COLUMN recorded_at DOUBLE PRECISION NOT NULL DEFAULT {now!r}",
        "ALTER TABLE turns ADD COLUMN since_snapshot BIGINT NOT NULL DEFAULT 0",
        "ALTER TABLE turns ADD COLUMN lost_at DOUBLE PRECISION",
        f"UPDATE turns SET lost_at = {now!r} WHERE delivered_at IS NULL",  # nobody noted which of them were
        "ALTER TABLE finishes ADD COLUMN num_bytes BIGINT NOT NULL DEFAULT 0",
        "ALTER TABLE leases ADD COLUMN incomplete BLOB",
        "ALTER TABLE lease_items ADD COLUMN snapshot TEXT NOT NULL DEFAULT ''",
        "DROP INDEX finishes_by_age",
    ):
        connection.execute(statement)
    _number_turns_apart(connection)
    for statement in schema.tables(COLUMN_TYPES):
        connection.execute(_if_missing(statement))
    _fill_sessions(connection)
    _fill_finishes(connection)
    for statement in (
        "ALTER TABLE sessions DROP COLUMN labels",
        "ALTER TABLE finishes DROP COLUMN num_tokens",
        "ALTER TABLE finishes DROP COLUMN num_sampled_tokens",
    ):
        connection.execute(statement)


def _if_missing(statement: str) -> str:
    for words in ("CREATE TABLE", "CREATE INDEX", "CREATE UNIQUE INDEX"):
        if statement.startswith(f"{words} "):
            return statement.replace(words, f"{words} IF NOT EXISTS", 1)
    raise AssertionError(f"no statement that makes a table or an index: {statement}")


def _number_turns_apart(connection: sqlite3.Connection) -> None:
    """Give the turns of sessions with equal indexes their place in the order in which they were read until now."""
    repeated = connection.execute(
        "SELECT DISTINCT session_id FROM (SELECT session_id FROM turns GROUP BY session_id, turn_index "
        "HAVING count(*) > 1)"
    ).fetchall()
    for (session_id,) in repeated:
        query = f"SELECT {', '.join(rows.TurnRow._fields)} FROM turns WHERE session_id = ? ORDER BY turn_index, rowid"
        for index, columns in enumerate(connection.execute(query, (session_id,)).fetchall()):
            _renumber(connection, rows.TurnRow(*columns), index)


def _renumber(connection: sqlite3.Connection, row: rows.TurnRow, index: int) -> None:
    if row.turn_index == index:
        return
    turn = _whole_turn(row)
    if turn is not None:
        row = rows.turn_row(replace(turn, index=index))
    connection.execute(  # a damaged turn keeps its bytes and its checksum, and is still named when it is read
        "UPDATE turns SET turn_index = ?, facts = ?, checksum = ? WHERE session_id = ? AND turn_id = ?",
        (index, row.facts, row.checksum, row.session_id, row.turn_id),
    )


def _whole_turn(row: rows.TurnRow) -> TurnRecord | None:
    try:
        return rows.read_turn(row, None)
    except LedgerCorrupt:
        return None


def _fill_sessions(connection: sqlite3.Connection) -> None:
    for session_id, labels, facts, checksum in connection.execute(
        "SELECT session_id, labels, facts, checksum FROM sessions"
    ).fetchall():
        connection.executemany(
            "INSERT INTO session_labels (session_id, name, value) VALUES (?, ?, ?)",
            [(session_id, rows.label_bytes(key), rows.label_bytes(value)) for key, value in json.loads(labels).items()],
        )
        try:
            session = rows.read_session(session_id, facts, checksum)
        except LedgerCorrupt:
            continue  # it is named whenever it is read; until somebody decides, it does not expire
        connection.execute(
            "UPDATE sessions SET created_at = ?, ttl_seconds = "
            "CASE WHEN EXISTS (SELECT 1 FROM finishes f WHERE f.session_id = sessions.session_id) THEN NULL ELSE ? END "
            "WHERE session_id = ?",
            (session.created_at, session.ttl_seconds, session_id),
        )


def _fill_finishes(connection: sqlite3.Connection) -> None:
    connection.execute(
        "INSERT INTO snapshots (session_id, ordinal, snapshot, num_tokens, num_sampled_tokens) "
        "SELECT session_id, 0, snapshot, num_tokens, num_sampled_tokens FROM finishes"
    )
    connection.execute(
        f"UPDATE finishes SET num_bytes = (SELECT coalesce(sum({rows.TURN_BYTES}), 0) FROM turns t "
        "WHERE t.session_id = finishes.session_id)"
    )
    connection.execute(
        "UPDATE lease_items SET snapshot = coalesce((SELECT f.snapshot FROM finishes f "
        "WHERE f.session_id = lease_items.session_id), '')"
    )
