"""What is stored and for how long: sessions past their time to live, rollouts by age and size; SQL on `schema.py`."""

from __future__ import annotations

import math
from itertools import groupby

from gateway.contracts.rollouts import StoredRollout
from gateway.ledger.backend import Connection
from gateway.ledger.rows import TURN_BYTES


def sessions_past_ttl(connection: Connection, now: float, limit: int) -> list[str]:
    """Open sessions without a turn for as long as they may live, oldest first; 0 is for ever."""
    rows = connection.execute(
        """SELECT s.session_id FROM sessions s
           WHERE s.ttl_seconds IS NOT NULL AND s.ttl_seconds > 0 AND s.created_at + s.ttl_seconds <= ?
           AND NOT EXISTS (SELECT 1 FROM turns t
                           WHERE t.session_id = s.session_id AND t.recorded_at + s.ttl_seconds > ?)
           ORDER BY s.created_at, s.session_id LIMIT ?""",
        (now, now, limit),
    )
    return [session_id for (session_id,) in rows]


def stored_rollouts(
    connection: Connection, finished_before: float, limit: int, after: StoredRollout | None
) -> list[StoredRollout]:
    """A page of finished rollouts that still hold data, oldest first."""
    start = (-math.inf, "") if after is None else (after.finished_at, after.session_id)
    rows = connection.execute(
        """WITH page AS (
               SELECT session_id, snapshot, finished_at, num_bytes FROM finishes
               WHERE dropped_at IS NULL AND finished_at < ? AND (finished_at, session_id) > (?, ?)
               ORDER BY finished_at, session_id LIMIT ?
           )
           SELECT page.session_id, page.snapshot, page.finished_at, page.num_bytes,
                  (SELECT coalesce(sum(b.num_bytes), 0) FROM blobs b WHERE b.session_id = page.session_id),
                  h.consumer, h.acknowledged
           FROM page LEFT JOIN holdings h ON h.session_id = page.session_id
           ORDER BY page.finished_at, page.session_id, h.consumer""",
        (finished_before, *start, limit),
    ).fetchall()
    return [
        StoredRollout(
            session_id=session_id,
            snapshot=snapshot,
            finished_at=finished_at,
            num_bytes=int(turn_bytes) + int(blob_bytes),
            acknowledged_by=tuple(consumer for *_, consumer, acknowledged in holdings if acknowledged),
            leased=any(acknowledged == 0 for *_, acknowledged in holdings),
        )
        for (session_id, snapshot, finished_at, turn_bytes, blob_bytes), holdings in (
            (facts, list(group)) for facts, group in groupby(rows, key=lambda row: tuple(row[:5]))
        )
    ]


def stored_bytes(connection: Connection) -> int:
    """Finished rollouts' sizes were taken when they ended; those of open sessions are added up now."""
    figures = connection.execute(
        f"""SELECT (SELECT coalesce(sum(num_bytes), 0) FROM finishes WHERE dropped_at IS NULL),
                   (SELECT coalesce(sum((SELECT sum({TURN_BYTES}) FROM turns t WHERE t.session_id = s.session_id)), 0)
                    FROM sessions s
                    WHERE NOT EXISTS (SELECT 1 FROM finishes f WHERE f.session_id = s.session_id)),
                   (SELECT coalesce(sum(once.num_bytes), 0)
                    FROM (SELECT max(num_bytes) AS num_bytes FROM blobs GROUP BY sha256) AS once)"""
    ).fetchone()
    return sum(int(figure) for figure in figures)
