"""The tables of the embedded ledger, and the check that a store has the schema that this program reads.

The version lives in SQLite's `user_version`, written in the same transaction as the tables, so that a crash while
making them leaves an empty file and never half a schema.
"""

from __future__ import annotations

import sqlite3

from gateway.contracts.errors import SchemaMismatch
from gateway.contracts.records import SCHEMA_VERSION

_TABLES = (
    """CREATE TABLE sessions (
        session_id TEXT PRIMARY KEY,
        group_name TEXT,
        group_size INTEGER,
        labels TEXT NOT NULL,
        facts BLOB NOT NULL,
        checksum INTEGER NOT NULL
    )""",
    "CREATE INDEX sessions_of_group ON sessions (group_name) WHERE group_name IS NOT NULL",
    # `checksum` covers facts and arrays; delivered_at and where the routing rows lie stay outside of it.
    """CREATE TABLE turns (
        session_id TEXT NOT NULL,
        turn_id TEXT NOT NULL,
        turn_index INTEGER NOT NULL,
        facts BLOB NOT NULL,
        prompt_token_ids BLOB NOT NULL,
        output_token_ids BLOB NOT NULL,
        output_logprobs BLOB NOT NULL,
        checksum INTEGER NOT NULL,
        num_tokens INTEGER NOT NULL,
        num_trainable_tokens INTEGER NOT NULL,
        experts_file INTEGER,
        experts_offset INTEGER,
        experts_bytes INTEGER,
        delivered_at REAL,
        PRIMARY KEY (session_id, turn_id)
    )""",
    "CREATE INDEX turns_of_file ON turns (experts_file) WHERE experts_file IS NOT NULL",
    """CREATE TABLE finishes (
        session_id TEXT PRIMARY KEY,
        snapshot TEXT NOT NULL,
        finished_at REAL NOT NULL,
        facts BLOB NOT NULL,
        checksum INTEGER NOT NULL,
        num_tokens INTEGER NOT NULL,
        num_sampled_tokens INTEGER NOT NULL,
        dropped_at REAL
    )""",
    "CREATE INDEX finishes_by_age ON finishes (finished_at)",
    """CREATE TABLE leases (
        lease_id TEXT PRIMARY KEY,
        consumer TEXT NOT NULL,
        expires_at REAL NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('open', 'released', 'acknowledged'))
    )""",
    "CREATE INDEX open_leases ON leases (consumer) WHERE state = 'open'",
    """CREATE TABLE lease_items (
        lease_id TEXT NOT NULL,
        position INTEGER NOT NULL,
        session_id TEXT NOT NULL,
        PRIMARY KEY (lease_id, position)
    )""",
    # Where a rollout stands with one consumer group: no row means free; the newest lease owns the row.
    """CREATE TABLE holdings (
        consumer TEXT NOT NULL,
        session_id TEXT NOT NULL,
        lease_id TEXT NOT NULL,
        expires_at REAL NOT NULL,
        acknowledged INTEGER NOT NULL,
        PRIMARY KEY (consumer, session_id)
    )""",
    "CREATE INDEX holdings_of_session ON holdings (session_id)",
    "CREATE INDEX holdings_of_lease ON holdings (lease_id)",
    "CREATE TABLE policies (weight_version TEXT PRIMARY KEY, policy_version INTEGER NOT NULL)",
)

_ADDED = (
    # Which sessions refer to which contents of blobs.py.
    """CREATE TABLE IF NOT EXISTS blobs (
        session_id TEXT NOT NULL,
        sha256 TEXT NOT NULL,
        media_type TEXT NOT NULL,
        num_bytes INTEGER NOT NULL,
        PRIMARY KEY (session_id, sha256)
    )""",
    "CREATE INDEX IF NOT EXISTS blobs_by_content ON blobs (sha256)",
)
"""Tables that a store of this version may lack; they are made when it is opened for writing."""


_READ_AS_THEY_ARE = (1,)
"""Older versions whose rows only lack facts whose absence says the same."""


def prepare(connection: sqlite3.Connection, name: str) -> None:
    """Make the tables of an empty store, or those that are missing; `connection` is in autocommit mode.

    `name` is said in errors. A store of an older version is migrated. Raises SchemaMismatch for a newer one, or one
    that is no ledger.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        if _is_empty(connection):
            for statement in _TABLES:
                connection.execute(statement)
        else:
            check(connection, name)
        for statement in _ADDED:
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")  # the older program would misread new rows
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def check(connection: sqlite3.Connection, name: str) -> None:
    """Raise SchemaMismatch unless the store has a schema that this program reads."""
    version = _version(connection)
    if version not in (*_READ_AS_THEY_ARE, SCHEMA_VERSION):
        raise SchemaMismatch(
            f"{name} has ledger schema version {version}, this program reads {SCHEMA_VERSION}; "
            "use the version of Verbatim that wrote it, or another data folder"
        )


def _version(connection: sqlite3.Connection) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return int(version)


def _is_empty(connection: sqlite3.Connection) -> bool:
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    return bool(_version(connection) == 0 and tables == 0)
