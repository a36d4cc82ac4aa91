"""`verbatim doctor --data DIR` or `--ledger URL --objects URL`: is a ledger whole, and with `--repair`, what of one in
a folder can be mended.

Verification changes nothing and works beside a gateway that serves. Every damage is one line that names session, turn,
file and byte as far as they are known; exit code 1 if there is any. A repair needs the folder for itself, writes what
it takes away to `data/quarantine/` first, and leaves its report in `data/repairs/`.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

from gateway.contracts.errors import ConfigurationError, LengthMismatch, SchemaMismatch
from gateway.contracts.experts import RoutedExperts
from gateway.contracts.generation import JsonValue
from gateway.contracts.records import TurnRecord
from gateway.ledger import migration, wal
from gateway.ledger.backend import Location
from gateway.ledger.blobs import BlobFiles
from gateway.ledger.objects import open_objects
from gateway.ledger.postgres import PostgresBackend
from gateway.ledger.repair import Quarantine, RowsRepair
from gateway.ledger.rows import decode_json
from gateway.ledger.segments_file import file_sizes, scan_records
from gateway.ledger.sqlite import SegmentFiles, SqliteConnection
from gateway.ledger.sqlite_files import (
    check_blob_files,
    check_segment_files,
    check_structure,
    faults,
    live_ends,
    torn_tail,
)
from gateway.ledger.verify import Damage, DamageKind, Found, Parts, verify_rows
from gateway.sessions.picks import PickChoice, pick_turns
from gateway.sessions.segments import build_segments

_BUSY_TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Repair:
    """What a repair found, did, and left. quarantine: where things were taken to, "" if nothing was taken."""

    before: tuple[Damage, ...]
    mended: tuple[str, ...]
    left: Found
    quarantine: str


def show_ledger(data: Path, *, repair: bool, as_json: bool) -> int:
    """Print what is wrong with the ledger in a folder, after mending it if asked; 0 if nothing is, else 1."""
    repaired = repair_ledger(data) if repair else None
    found = verify_ledger(data) if repaired is None else repaired.left
    return _show(found, repaired, as_json=as_json)


def show_shared_ledger(dsn: str, objects: str, *, as_json: bool) -> int:
    """Verify and print the ledger that several gateways share; 0 if it is whole, else 1."""
    return _show(verify_shared_ledger(dsn, objects), None, as_json=as_json)


def _show(found: Found, repaired: Repair | None, *, as_json: bool) -> int:
    if as_json:
        sys.stdout.write(json.dumps(_json(found, repaired), ensure_ascii=False) + "\n")
    else:
        for line in (*(repaired.mended if repaired else ()), *found.notes):
            sys.stdout.write(f"{line}\n")
        for damage in found.damages:
            sys.stdout.write(f"damaged: {damage.message}\n")
        sys.stdout.write(f"{_summary(found, repaired)}\n")
    return 1 if found.damages else 0


def verify_ledger(data: Path) -> Found:
    """Everything that is wrong with the ledger in a folder; raises ConfigurationError if there is none, SchemaMismatch
    for one of another version."""
    path = _store(data)
    found = Found()
    with _alone(data) as alone:
        if alone:
            _note_log(path, found)
    with closing(_open(path, read_only=True)) as raw:
        _verify(data, raw, found)
    return found


def verify_shared_ledger(dsn: str, objects: str) -> Found:
    """Everything that is wrong with the ledger in a database and its objects, also while gateways write; raises
    ConfigurationError where there is none, SchemaMismatch for one of another version."""
    found = Found()
    contents = open_objects(objects, read_only=True)
    with (
        closing(PostgresBackend(dsn, contents, read_only=True)) as backend,
        closing(backend.connect(read_only=True)) as connection,
    ):
        try:
            verify_rows(Parts(connection, backend.arrays, backend.blobs), found, assemble=_assemble)
            found.notes += backend.register.leftovers()
        except backend.failures as error:
            message = f"the ledger cannot be read further: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
            found.damages.append(Damage(DamageKind.STORE, message))
    return found


def repair_ledger(data: Path) -> Repair:
    """Mend what can be mended; raises ConfigurationError while a gateway uses the folder."""
    path = _store(data)
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    quarantine = Quarantine(data / "quarantine" / stamp)
    with _alone(data) as alone:
        if not alone:
            raise ConfigurationError(f"{data}: a gateway uses this data folder; stop it before a repair")
        before = Found()
        mended: list[str] = []
        _note_log(path, before)
        mended += _accept_log(path, quarantine)
        try:
            mended += _mend(data, before, quarantine)
        except sqlite3.Error as error:
            mended.append(f"{path.name}: the repair ends here: {error}")
        left = Found()
        with closing(_open(path, read_only=True)) as raw:
            _verify(data, raw, left)
    repair = Repair(
        before=tuple(before.damages),
        mended=tuple(mended),
        left=left,
        quarantine=str(quarantine.folder) if quarantine.num_rows or quarantine.num_files else "",
    )
    if before.damages or mended:
        _write_report(data / "repairs", stamp, repair)
    return repair


# ---- verification ----


def _verify(data: Path, raw: sqlite3.Connection, found: Found) -> None:
    blobs = BlobFiles(data / "blobs")
    parts = Parts(SqliteConnection(raw), SegmentFiles(data / "routing", None), blobs)
    try:
        migration.check(raw, str(_store(data)))
        found.damages += check_structure(raw)
        verify_rows(parts, found, assemble=_assemble)
        check_segment_files(raw, data / "routing", found)
        check_blob_files(raw, blobs.stored() if (data / "blobs").is_dir() else (), found)
    except SchemaMismatch:
        raise
    except (sqlite3.Error, OSError, UnicodeDecodeError, OverflowError) as error:
        message = f"the ledger cannot be read further: {type(error).__name__}: {error}"
        found.damages.append(Damage(DamageKind.STORE, message, file="ledger.sqlite"))


def _assemble(turns: Sequence[TurnRecord], experts: Mapping[str, RoutedExperts | None]) -> None:
    """What a trainer reads: I2 and I3 are checked where segments are made, and counted again here."""
    picked = pick_turns(turns, PickChoice.load("all").default)
    segments = build_segments(turns, experts, picked=picked.turn_ids)
    num_masked = sum(int(segment.loss_mask.sum()) for segment in segments)
    if num_masked != picked.report.num_trained_tokens:
        raise LengthMismatch(
            f"its segments train {num_masked} tokens, its turns {picked.report.num_trained_tokens} (I3)"
        )


def _note_log(path: Path, found: Found) -> None:
    damage = wal.find_damage(path.with_name(f"{path.name}-wal"))
    if damage is None:
        return
    where = f"{path.name}-wal: a damaged frame at byte {damage.offset} stands before {damage.num_commits_behind}"
    if damage.is_proven:
        message = f"{where} whole commits, which the store does not show"
        found.damages.append(Damage(DamageKind.LOG, message, file=f"{path.name}-wal", offset=damage.offset))
    else:
        found.notes.append(
            f"{where} whole commit; after a power cut this is a commit that nobody was told of, else a damaged one"
        )


# ---- repair ----


def _mend(data: Path, before: Found, quarantine: Quarantine) -> Iterator[str]:
    """Indexes first, because what is verified is read through them."""
    path = _store(data)
    with closing(_open(path, read_only=False)) as raw:
        raw.execute("PRAGMA synchronous = FULL")
        yield from _reindex(raw, path, quarantine)
        _verify(data, raw, before)
        rows_repair = _rows_repair(data, raw, before, quarantine)
        rows_repair.mend(before.damages)
        yield from rows_repair.mended
        yield from _cut_tails(data / "routing", raw, quarantine)


def _accept_log(path: Path, quarantine: Quarantine) -> Iterator[str]:
    """SQLite forgets what stands behind a damaged frame as soon as it opens the store; a copy stays."""
    log = path.with_name(f"{path.name}-wal")
    damage = wal.find_damage(log)
    if damage is not None:
        quarantine.take_bytes(log.name, log.read_bytes())
        yield f"{log.name}: {damage.num_commits_behind} commits behind byte {damage.offset} are lost; a copy is kept"


def _reindex(raw: sqlite3.Connection, path: Path, quarantine: Quarantine) -> Iterator[str]:
    """Indexes are made of tables: where SQLite's check finds fault with nothing else, they are made anew."""
    try:
        lines = [line for (text,) in raw.execute("PRAGMA integrity_check(10000)") for line in faults(str(text))]
    except sqlite3.Error:
        return
    if not lines or not all(" index " in line for line in lines):
        return
    quarantine.take_bytes(path.name, path.read_bytes())
    raw.execute("REINDEX")
    yield f"{path.name}: its indexes were made anew ({len(lines)} faults); a copy of the file is kept"


def _rows_repair(data: Path, raw: sqlite3.Connection, found: Found, quarantine: Quarantine) -> RowsRepair:
    is_lost = any(damage.kind is DamageKind.ROUTING for damage in found.damages)
    records = _records(data / "routing") if is_lost else {}
    return RowsRepair(SqliteConnection(raw), SegmentFiles(data / "routing", None), records, quarantine)


def _records(folder: Path) -> Mapping[tuple[str, str], Sequence[Location]]:
    """Every whole routing record of every file, by the session and turn that its key names."""
    found: dict[tuple[str, str], list[Location]] = {}
    for number in file_sizes(folder):
        for record in scan_records(folder, number):
            facts = decode_json(record.key)
            found.setdefault((facts["session_id"], facts["turn_id"]), []).append(record.location)
    return found


def _cut_tails(folder: Path, raw: sqlite3.Connection, quarantine: Quarantine) -> Iterator[str]:
    ends = live_ends(raw)
    for number, num_bytes in file_sizes(folder).items() if folder.is_dir() else ():
        end = torn_tail(folder, number, num_bytes, ends.get(number, 0))
        if end < num_bytes:
            path = folder / f"routing-{number:08d}.seg"
            with path.open("r+b") as file:
                file.seek(end)
                quarantine.take_bytes(f"{path.name}.{end}", file.read())
                file.truncate(end)
                os.fsync(file.fileno())
            yield f"{path.name}: {num_bytes - end} bytes at its end, which are no whole record, were cut off"


def _write_report(folder: Path, stamp: str, repair: Repair) -> None:
    folder.mkdir(exist_ok=True)
    facts = {
        "before": [asdict(damage) for damage in repair.before],
        "mended": list(repair.mended),
        "left": [asdict(damage) for damage in repair.left.damages],
        "quarantine": repair.quarantine,
    }
    (folder / f"{stamp}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


# ---- files ----


def _store(data: Path) -> Path:
    path = data / "ledger.sqlite"
    if not path.is_file():
        raise ConfigurationError(f"{data}: holds no ledger")
    return path


def _open(path: Path, *, read_only: bool) -> sqlite3.Connection:
    """Read-only in earnest: not even the write-ahead log is merged."""
    mode = "ro" if read_only else "rw"
    try:
        raw = sqlite3.connect(
            f"file:{quote(str(path))}?mode={mode}", uri=True, timeout=_BUSY_TIMEOUT_SECONDS, isolation_level=None
        )
    except sqlite3.Error as error:
        raise ConfigurationError(f"{path}: cannot be opened ({error})") from error
    return raw


@contextmanager
def _alone(data: Path) -> Iterator[bool]:
    """Whether no gateway uses the folder; then none can begin to before the body ends."""
    try:
        lock = os.open(data / "ledger.lock", os.O_RDONLY)
    except FileNotFoundError:
        yield True
        return
    except OSError as error:
        raise ConfigurationError(f"{data}: cannot be read ({error.strerror})") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(lock)


def _json(found: Found, repaired: Repair | None) -> dict[str, JsonValue]:
    facts = {**asdict(found), "damages": [asdict(damage) for damage in found.damages]}
    if repaired is not None:
        facts |= {
            "before": [asdict(damage) for damage in repaired.before],
            "mended": list(repaired.mended),
            "quarantine": repaired.quarantine,
        }
    return facts


def _summary(found: Found, repaired: Repair | None) -> str:
    state = f"{len(found.damages)} damages" if found.damages else "whole"
    kept = f"; what was taken away is in {repaired.quarantine}" if repaired is not None and repaired.quarantine else ""
    return (
        f"{state}: {found.num_sessions} sessions, {found.num_rollouts} rollouts, {found.num_turns} turns, "
        f"{found.num_tokens} tokens, {found.num_routing_records} routing records, {found.num_blobs} blobs{kept}"
    )
