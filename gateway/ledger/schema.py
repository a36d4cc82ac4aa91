"""The tables of the ledger, for every store; a store says by `ColumnTypes` how it calls its types.

Times are seconds since the epoch, numbers of bytes are as stored. Checksums stand beside what they cover.
"""

from __future__ import annotations

from typing import NamedTuple


class ColumnTypes(NamedTuple):
    """text: compared byte by byte. data: bytes. place: what an array store calls a file (`Location.file`)."""

    text: str
    data: str
    place: str


def tables(types: ColumnTypes) -> list[str]:
    """The statements that make an empty store's tables and indexes."""
    return [statement.format(**types._asdict()) for statement in _TABLES]


_TABLES = (
    # `ttl_seconds` is NULL once the session has ended, so that the index holds those that can still expire.
    """CREATE TABLE sessions (
        session_id {text} PRIMARY KEY,
        group_name {text},
        group_size BIGINT,
        facts {data} NOT NULL,
        checksum BIGINT NOT NULL,
        created_at DOUBLE PRECISION NOT NULL,
        ttl_seconds DOUBLE PRECISION
    )""",
    "CREATE INDEX sessions_of_group ON sessions (group_name) WHERE group_name IS NOT NULL",
    "CREATE INDEX sessions_by_age ON sessions (created_at) WHERE ttl_seconds IS NOT NULL",
    # As bytes, because a label may be any string that JSON can hold.
    """CREATE TABLE session_labels (
        session_id {text} NOT NULL,
        name {data} NOT NULL,
        value {data} NOT NULL,
        PRIMARY KEY (session_id, name)
    )""",
    "CREATE INDEX sessions_of_label ON session_labels (name, value)",
    # `checksum` covers facts and arrays; what became of the reply and where the routing rows lie stay outside of it.
    # `delivered_at`, `lost_at`: both NULL where the process that answered died before it could say.
    # `since_snapshot`: the first snapshot (its ordinal) that has the turn; 0 for all but late ones.
    """CREATE TABLE turns (
        session_id {text} NOT NULL,
        turn_id {text} NOT NULL,
        turn_index BIGINT NOT NULL,
        facts {data} NOT NULL,
        prompt_token_ids {data} NOT NULL,
        output_token_ids {data} NOT NULL,
        output_logprobs {data} NOT NULL,
        checksum BIGINT NOT NULL,
        num_tokens BIGINT NOT NULL,
        num_trainable_tokens BIGINT NOT NULL,
        experts_file {place},
        experts_offset BIGINT,
        experts_bytes BIGINT,
        delivered_at DOUBLE PRECISION,
        lost_at DOUBLE PRECISION,
        recorded_at DOUBLE PRECISION NOT NULL,
        since_snapshot BIGINT NOT NULL,
        PRIMARY KEY (session_id, turn_id)
    )""",
    "CREATE UNIQUE INDEX turns_in_order ON turns (session_id, turn_index)",
    "CREATE INDEX turns_of_file ON turns (experts_file) WHERE experts_file IS NOT NULL",
    # How each session ended; `snapshot` is the latest of those in `snapshots`.
    """CREATE TABLE finishes (
        session_id {text} PRIMARY KEY,
        snapshot {text} NOT NULL,
        finished_at DOUBLE PRECISION NOT NULL,
        facts {data} NOT NULL,
        checksum BIGINT NOT NULL,
        num_bytes BIGINT NOT NULL,
        dropped_at DOUBLE PRECISION
    )""",
    "CREATE INDEX finishes_by_age ON finishes (finished_at, session_id)",
    """CREATE TABLE snapshots (
        session_id {text} NOT NULL,
        ordinal BIGINT NOT NULL,
        snapshot {text} NOT NULL,
        num_tokens BIGINT NOT NULL,
        num_sampled_tokens BIGINT NOT NULL,
        PRIMARY KEY (session_id, ordinal)
    )""",
    # `incomplete`: JSON of the groups of which this lease holds a part, to return the lease as it was made.
    """CREATE TABLE leases (
        lease_id {text} PRIMARY KEY,
        consumer {text} NOT NULL,
        expires_at DOUBLE PRECISION NOT NULL,
        state {text} NOT NULL CHECK (state IN ('open', 'released', 'acknowledged')),
        incomplete {data}
    )""",
    "CREATE INDEX open_leases ON leases (consumer) WHERE state = 'open'",
    """CREATE TABLE lease_items (
        lease_id {text} NOT NULL,
        position BIGINT NOT NULL,
        session_id {text} NOT NULL,
        snapshot {text} NOT NULL,
        PRIMARY KEY (lease_id, position)
    )""",
    # Where a rollout stands with one consumer group: no row means free; the newest lease owns the row.
    """CREATE TABLE holdings (
        consumer {text} NOT NULL,
        session_id {text} NOT NULL,
        lease_id {text} NOT NULL,
        expires_at DOUBLE PRECISION NOT NULL,
        acknowledged BIGINT NOT NULL,
        PRIMARY KEY (consumer, session_id)
    )""",
    "CREATE INDEX holdings_of_session ON holdings (session_id)",
    "CREATE INDEX holdings_of_lease ON holdings (lease_id)",
    "CREATE TABLE policies (weight_version {text} PRIMARY KEY, policy_version BIGINT NOT NULL)",
    # Which sessions refer to which contents of the blob store.
    """CREATE TABLE blobs (
        session_id {text} NOT NULL,
        sha256 {text} NOT NULL,
        media_type {text} NOT NULL,
        num_bytes BIGINT NOT NULL,
        PRIMARY KEY (session_id, sha256)
    )""",
    "CREATE INDEX blobs_by_content ON blobs (sha256)",
)
