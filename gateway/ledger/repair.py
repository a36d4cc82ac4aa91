"""Mends what is provably mendable in a ledger that nobody serves, and takes aside what cannot be read.

Each mend follows from something whose checksum holds, and nothing is deleted that was not written to
`data/quarantine/<time>/` first:

    columns, labels, counts beside a whole record  ─▶ written anew from the record
    routing rows at a wrong place                  ─▶ found by their key in the segment files
    routing rows that are lost                     ─▶ their turn stays, marked `routing_lost`: it trains no more (I9)
    a turn that cannot be read, and what extends it ─▶ taken aside; the session loads again, `complete: false`, and a
                                                      finished rollout gets the snapshot of what is left
    holdings whose lease is gone, lists of no lease ─▶ removed; the rollouts are free again
    torn ends of segment files, blobs of nobody     ─▶ cut off, taken aside

Left and named: sessions and finishes that cannot be read, blobs whose bytes are lost, damage inside SQLite that
REINDEX does not mend.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gateway.contracts.errors import LedgerCorrupt, VerbatimError
from gateway.contracts.records import TurnRecord, snapshot_of
from gateway.ledger import rows
from gateway.ledger.backend import ArrayStore, Connection, Location
from gateway.ledger.segments_file import sync_folder
from gateway.ledger.verify import Damage, DamageKind, read_routing

ROUTING_LOST = "routing_lost"
"""`untrainable_reason` of a turn whose routing rows were damaged and could not be found."""

_TURN_COLUMNS = ", ".join(rows.TurnRow._fields)


@dataclass(slots=True)
class Quarantine:
    """Where things go before they are deleted: `rows.jsonl`, and files under their names; made when first needed."""

    folder: Path
    num_rows: int = 0
    num_files: int = 0

    def take_row(self, table: str, row: Mapping[str, Any]) -> None:
        """Write one row down; durable when it returns."""
        self._prepare()
        values = {name: _json_value(value) for name, value in row.items()}
        with (self.folder / "rows.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"table": table, "row": values}) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
        self.num_rows += 1

    def take_bytes(self, name: str, content: bytes) -> None:
        """Write bytes down under a name; durable when it returns."""
        self._prepare()
        with (self.folder / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.folder)
        self.num_files += 1

    def _prepare(self) -> None:
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True)
            sync_folder(self.folder.parent)
            sync_folder(self.folder.parent.parent)


def _json_value(value: Any) -> Any:
    return {"base64": base64.b64encode(bytes(value)).decode()} if isinstance(value, bytes | memoryview) else value


@dataclass(slots=True)
class RowsRepair:
    """Mends the tables of one store. `records`: where whole routing records lie, by session and turn id, read from the
    arrays themselves. `mended`: one line for each thing that was done."""

    connection: Connection
    arrays: ArrayStore
    records: Mapping[tuple[str, str], Sequence[Location]]
    quarantine: Quarantine
    mended: list[str] = field(default_factory=list)

    def mend(self, damages: Iterable[Damage]) -> None:
        """One transaction for everything of a session; what cannot be mended stays as it is."""
        by_session: dict[str | None, list[Damage]] = {}
        for damage in damages:
            by_session.setdefault(damage.session_id, []).append(damage)
        for session_id, found in by_session.items():
            self.connection.begin()
            try:
                if session_id is not None:
                    self._mend_session(session_id, {damage.kind for damage in found})
                if any(damage.kind is DamageKind.FEED for damage in found):
                    self._mend_feed()
                self.connection.commit()
            finally:
                if self.connection.in_transaction:
                    self.connection.rollback()

    # ---- one session ----

    def _mend_session(self, session_id: str, kinds: set[DamageKind]) -> None:
        if DamageKind.SESSION in kinds:
            self._rewrite_session(session_id)
        if kinds & {DamageKind.TURN, DamageKind.ROUTING}:
            lost = self._unreadable(session_id)
            if lost:
                self._take_aside(session_id, lost)
            for turn, location in self._turns(session_id):
                self._rewrite_turn(turn)
                self._mend_routing(turn, location)
        if kinds & {DamageKind.TURN, DamageKind.ROUTING, DamageKind.FINISH}:
            self._recount(session_id)

    def _rewrite_session(self, session_id: str) -> None:
        """Columns and labels from a record that is whole."""
        found = self.connection.execute(
            "SELECT facts, checksum FROM sessions WHERE session_id = ?", (session_id,)
        ).fetchone()
        try:
            session = rows.read_session(session_id, *found)
        except (LedgerCorrupt, ValueError, KeyError, TypeError):
            return
        if session.session_id != session_id:
            return
        row = rows.session_row(session)
        is_over = self.connection.execute("SELECT 1 FROM finishes WHERE session_id = ?", (session_id,)).fetchone()
        self.connection.execute(
            "UPDATE sessions SET group_name = ?, group_size = ?, created_at = ?, ttl_seconds = ? WHERE session_id = ?",
            (row.group_name, row.group_size, row.created_at, None if is_over else row.ttl_seconds, session_id),
        )
        self.connection.execute("DELETE FROM session_labels WHERE session_id = ?", (session_id,))
        self.connection.executemany(
            "INSERT INTO session_labels (session_id, name, value) VALUES (?, ?, ?)", rows.label_rows(session)
        )
        self.mended.append(f"session {session_id}: columns and labels were written anew from its record")

    def _unreadable(self, session_id: str) -> list[str]:
        """Ids of turns that cannot be read, or are not what their row says, and of all that extend one of them."""
        found: dict[str, TurnRecord | None] = {}
        for *columns, delivered_at in self.connection.execute(
            f"SELECT {_TURN_COLUMNS}, delivered_at FROM turns WHERE session_id = ? ORDER BY turn_index", (session_id,)
        ).fetchall():
            row = rows.TurnRow(*columns)
            found[row.turn_id] = _whole(row, delivered_at)
        lost: list[str] = []
        for turn_id, turn in found.items():
            parent_id = None if turn is None else turn.attachment.parent_id
            if turn is None or (parent_id is not None and (parent_id not in found or parent_id in lost)):
                lost.append(turn_id)
        return lost

    def _take_aside(self, session_id: str, turn_ids: Sequence[str]) -> None:
        columns = (
            f"{_TURN_COLUMNS}, experts_file, experts_offset, experts_bytes, delivered_at, lost_at, recorded_at, "
            "since_snapshot"
        )
        for turn_id in turn_ids:
            where = (session_id, turn_id)
            query = f"SELECT {columns} FROM turns WHERE session_id = ? AND turn_id = ?"
            for row in self.connection.execute(query, where).fetchall():
                self.quarantine.take_row("turns", dict(zip(columns.split(", "), row, strict=True)))
            self.connection.execute("DELETE FROM turns WHERE session_id = ? AND turn_id = ?", where)
            self.mended.append(f"session {session_id} turn {turn_id}: taken aside")
        self._mark_incomplete(session_id)

    def _mark_incomplete(self, session_id: str) -> None:
        """So that a trainer can tell: something of this session is not there any more."""
        facts, checksum = self.connection.execute(
            "SELECT facts, checksum FROM sessions WHERE session_id = ?", (session_id,)
        ).fetchone()
        try:
            session = rows.read_session(session_id, facts, checksum)
        except (LedgerCorrupt, ValueError, KeyError, TypeError):
            return
        row = rows.session_row(replace(session, complete=False))
        self.connection.execute(
            "UPDATE sessions SET facts = ?, checksum = ? WHERE session_id = ?", (row.facts, row.checksum, session_id)
        )

    def _turns(self, session_id: str) -> Iterator[tuple[TurnRecord, Location | None]]:
        query = (
            f"SELECT {_TURN_COLUMNS}, delivered_at, experts_file, experts_offset, experts_bytes FROM turns "
            "WHERE session_id = ? ORDER BY turn_index"
        )
        for *columns, delivered_at, file, offset, num_bytes in self.connection.execute(query, (session_id,)).fetchall():
            turn = _whole(rows.TurnRow(*columns), delivered_at)
            if turn is not None:
                yield turn, None if file is None else Location(file, offset, num_bytes)

    def _rewrite_turn(self, turn: TurnRecord) -> None:
        row = rows.turn_row(turn)
        changed = self.connection.execute(
            "UPDATE turns SET num_tokens = ?, num_trainable_tokens = ? WHERE session_id = ? AND turn_id = ? "
            "AND (num_tokens <> ? OR num_trainable_tokens <> ?)",
            (
                row.num_tokens,
                row.num_trainable_tokens,
                row.session_id,
                row.turn_id,
                row.num_tokens,
                row.num_trainable_tokens,
            ),
        ).rowcount
        if changed:
            self.mended.append(f"session {row.session_id} turn {row.turn_id}: its counts were written anew")

    def _mend_routing(self, turn: TurnRecord, location: Location | None) -> None:
        has_rows = turn.experts_stop > turn.experts_start
        if not has_rows and location is None:
            return
        if has_rows and location is not None and self._fits(turn, location):
            return
        name = f"session {turn.session_id} turn {turn.turn_id}"
        where = (turn.session_id, turn.turn_id)
        candidates = self.records.get(where, ()) if has_rows else ()
        for candidate in candidates:
            if self._fits(turn, candidate):
                self._place(where, candidate)
                self.mended.append(
                    f"{name}: its routing rows were found in file {candidate.file} at {candidate.offset}"
                )
                return
        self._place(where, None)
        if not has_rows:
            self.mended.append(f"{name}: it has no routing rows, and no longer points at any")
            return
        row = rows.turn_row(
            replace(turn, experts_stop=turn.experts_start, untrainable_reason=turn.untrainable_reason or ROUTING_LOST)
        )
        self.connection.execute(
            "UPDATE turns SET facts = ?, checksum = ?, num_trainable_tokens = ? WHERE session_id = ? AND turn_id = ?",
            (row.facts, row.checksum, row.num_trainable_tokens, *where),
        )
        self.mended.append(f"{name}: its routing rows are lost; it is kept and trains no more ({ROUTING_LOST})")

    def _fits(self, turn: TurnRecord, location: Location) -> bool:
        try:
            return rows.check_experts(turn, read_routing(self.arrays, location, turn)) is not None
        except (VerbatimError, ValueError, KeyError, TypeError, OSError):
            return False

    def _place(self, where: tuple[str, str], location: Location | None) -> None:
        self.connection.execute(
            "UPDATE turns SET experts_file = ?, experts_offset = ?, experts_bytes = ? "
            "WHERE session_id = ? AND turn_id = ?",
            (*(location or (None, None, None)), *where),
        )

    def _recount(self, session_id: str) -> None:
        """Name every snapshot after the turns that are there, and count them; nothing of a dropped rollout."""
        found = self.connection.execute(
            "SELECT facts, checksum, dropped_at FROM finishes WHERE session_id = ?", (session_id,)
        ).fetchone()
        if found is None or found[2] is not None:
            return
        try:
            finish = rows.read_finish(session_id, *found)
        except (LedgerCorrupt, ValueError, KeyError, TypeError):
            return
        members = self.connection.execute(
            "SELECT turn_id, since_snapshot, num_tokens, num_trainable_tokens FROM turns WHERE session_id = ?",
            (session_id,),
        ).fetchall()
        query = "SELECT ordinal, snapshot, num_tokens, num_sampled_tokens FROM snapshots WHERE session_id = ?"
        for ordinal, snapshot, *counts in self.connection.execute(
            f"{query} ORDER BY ordinal", (session_id,)
        ).fetchall():
            mine = [member for member in members if member[1] <= ordinal]
            named = snapshot_of(session_id, (turn_id for turn_id, *_ in mine))
            sums = [sum(member[2] for member in mine), sum(member[3] for member in mine)]
            if (named, sums) == (snapshot, counts):
                continue
            self.connection.execute(
                "UPDATE snapshots SET snapshot = ?, num_tokens = ?, num_sampled_tokens = ? "
                "WHERE session_id = ? AND ordinal = ?",
                (named, *sums, session_id, ordinal),
            )
            self.connection.execute(
                "UPDATE lease_items SET snapshot = ? WHERE session_id = ? AND snapshot = ?",
                (named, session_id, snapshot),
            )
            self.mended.append(f"session {session_id}: snapshot {snapshot} is {named} now, of {len(mine)} turns")
            if named != snapshot:
                self._mark_incomplete(session_id)
            finish = replace(finish, snapshot=named)
        row = rows.finish_row(finish)
        self.connection.execute(
            f"UPDATE finishes SET snapshot = ?, finished_at = ?, facts = ?, checksum = ?, num_bytes = (SELECT "
            f"coalesce(sum({rows.TURN_BYTES}), 0) FROM turns WHERE session_id = ?) WHERE session_id = ?",
            (row.snapshot, row.finished_at, row.facts, row.checksum, session_id, session_id),
        )

    # ---- the feed ----

    def _mend_feed(self) -> None:
        """Unacknowledged holdings that no lease accounts for are given back; acknowledged ones say what was done."""
        for what, statement in (
            (
                "holdings without their lease were given back",
                "DELETE FROM holdings WHERE acknowledged = 0 AND NOT EXISTS (SELECT 1 FROM leases l "
                "WHERE l.lease_id = holdings.lease_id AND l.consumer = holdings.consumer)",
            ),
            (
                "holdings of sessions that are not finished or do not exist were removed",
                "DELETE FROM holdings WHERE NOT EXISTS "
                "(SELECT 1 FROM finishes f WHERE f.session_id = holdings.session_id)",
            ),
            (
                "entries of leases that do not exist were removed",
                "DELETE FROM lease_items WHERE NOT EXISTS "
                "(SELECT 1 FROM leases l WHERE l.lease_id = lease_items.lease_id)",
            ),
        ):
            num_rows = self.connection.execute(statement).rowcount
            if num_rows:
                self.mended.append(f"feed: {num_rows} {what}")


def _whole(row: rows.TurnRow, delivered_at: float | None) -> TurnRecord | None:
    """The turn of a row, None if it cannot be read or is another one than the row says."""
    try:
        turn = rows.read_turn(row, delivered_at if isinstance(delivered_at, float) else None)
    except (VerbatimError, ValueError, KeyError, TypeError, AttributeError):
        return None
    same = (turn.session_id, turn.turn_id, turn.index) == (row.session_id, row.turn_id, row.turn_index)
    return turn if same else None
