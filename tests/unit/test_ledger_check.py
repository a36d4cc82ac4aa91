"""`verbatim doctor --data`: each damage is found and named, and what is provable is mended."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.cli import main
from gateway.contracts.errors import ConfigurationError, LedgerCorrupt, VerbatimError
from gateway.ledger.sqlite import SqliteLedger
from gateway.ledger.verify import DamageKind
from gateway.ledger.wal import find_damage
from gateway.ledger_check import repair_ledger, verify_ledger
from tests.small_ledger import NUM_TURNS, fill_ledger, make_ledger

TIMES = {"turns": (13, 14, 15), "finishes": (2, 6), "sessions": (5,), "leases": (2,), "holdings": (3,)}
"""Columns of times, which have no checksum of their own: only whether they are there is compared."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("whole") / "data"
    asyncio.run(make_ledger(data))
    return data


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "data"))


def change(data: Path, statement: str, *values: object) -> None:
    connection = sqlite3.connect(data / "ledger.sqlite")
    with connection:
        assert connection.execute(statement, values).rowcount
    connection.close()


def segment_file(data: Path) -> Path:
    (path,) = (data / "routing").iterdir()
    return path


def flip(path: Path, offset: int, *, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def found(data: Path) -> dict[DamageKind, str]:
    """All that is wrong, the first message of each kind."""
    damages = verify_ledger(data).damages
    return {damage.kind: damage.message for damage in reversed(damages)}


async def read_session(data: Path, session_id: str) -> tuple[list[str], bool]:
    """Turn ids, and whether the session says that it is complete."""
    ledger = SqliteLedger.open(data, read_only=True)
    try:
        turns = await ledger.turns(session_id)
        for turn in turns:
            await ledger.experts(session_id, turn.turn_id)
        session = await ledger.session(session_id)
        assert session is not None
        return [turn.turn_id for turn in turns], session.complete
    finally:
        await ledger.aclose()


def test_a_whole_ledger_is_told_to_be_whole(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--data", str(data)]) == 0
    assert capsys.readouterr().out == (
        "whole: 3 sessions, 2 rollouts, 12 turns, 264 tokens, 12 routing records, 3 blobs\n"
    )


def test_damages_are_named_a_line_each_and_as_json(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(segment_file(data), 40)
    assert main(["doctor", "--data", str(data)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("damaged: session a turn t0: routing rows in routing-00000001.seg at byte 0")
    assert lines[-1].startswith("1 damages: ")
    assert main(["doctor", "--data", str(data), "--json"]) == 1
    (damage,) = json.loads(capsys.readouterr().out)["damages"]
    assert (damage["session_id"], damage["turn_id"], damage["offset"]) == ("a", "t0", 0)


def test_verification_works_beside_a_gateway_and_changes_nothing(data: Path) -> None:
    async def look() -> None:
        ledger = SqliteLedger.open(data)
        await fill_ledger(ledger, "d", finished="")
        before = {
            path: path.read_bytes() for path in data.rglob("*") if path.is_file() and path.suffix != ".sqlite-shm"
        }
        assert (await asyncio.to_thread(verify_ledger, data)).damages == []
        with pytest.raises(ConfigurationError, match="stop it before a repair"):
            await asyncio.to_thread(repair_ledger, data)
        assert {path: path.read_bytes() for path in before if not path.name.endswith("-shm")} == {
            path: content for path, content in before.items() if not path.name.endswith("-shm")
        }
        await ledger.aclose()

    asyncio.run(look())


def test_a_damaged_turn_is_taken_aside_with_what_extends_it_and_its_session_loads(data: Path) -> None:
    """I3: the snapshot of a finished rollout is that of what is left, and says so."""
    change(data, "UPDATE turns SET facts = replace(CAST(facts AS TEXT), 'question', 'qvestion') WHERE session_id = 'b' "
                 "AND turn_id = 't2'")  # fmt: skip
    change(data, "UPDATE turns SET facts = CAST(facts AS BLOB)")
    assert "session b turn t2: checksum" in found(data)[DamageKind.TURN]
    with pytest.raises(LedgerCorrupt, match="session b turn t2"):
        asyncio.run(read_session(data, "b"))
    repair = repair_ledger(data)
    assert repair.left.damages == []
    assert asyncio.run(read_session(data, "b")) == (["t0", "t1"], False)
    assert asyncio.run(read_session(data, "a")) == ([f"t{i}" for i in range(NUM_TURNS)], True)
    taken = [json.loads(line)["row"] for line in (Path(repair.quarantine) / "rows.jsonl").read_text().splitlines()]
    assert [row["turn_id"] for row in taken] == ["t2", "t3"]
    assert list((data / "repairs").iterdir())


def test_rows_at_a_wrong_place_are_found_by_their_key(data: Path) -> None:
    change(data, "UPDATE turns SET experts_offset = experts_offset + 8 WHERE session_id = 'c' AND turn_id = 't1'")
    assert "session c turn t1: routing rows in" in found(data)[DamageKind.ROUTING]
    repair = repair_ledger(data)
    assert repair.left.damages == []
    assert "its routing rows were found" in repair.mended[0]
    assert asyncio.run(read_session(data, "c"))[1]


def test_a_turn_whose_rows_are_lost_is_kept_and_trains_no_more(data: Path) -> None:
    """I9."""
    flip(segment_file(data), 40)
    assert repair_ledger(data).left.damages == []

    async def reasons() -> list[str | None]:
        ledger = SqliteLedger.open(data, read_only=True)
        turns = await ledger.turns("a")
        await ledger.aclose()
        return [turn.untrainable_reason for turn in turns]

    assert asyncio.run(reasons()) == ["routing_lost", None, None, None]


def test_a_missing_segment_file_and_a_missing_blob_are_named(data: Path) -> None:
    segment_file(data).unlink()
    next((data / "blobs").iterdir()).unlink()
    kinds = found(data)
    assert "the file is missing" in kinds[DamageKind.ROUTING]
    assert "is missing" in kinds[DamageKind.BLOB]
    assert {damage.kind for damage in repair_ledger(data).left.damages} == {DamageKind.BLOB}


def test_a_torn_end_is_no_damage_and_is_cut_off_by_a_repair(data: Path) -> None:
    path = segment_file(data)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"VRX1 torn")
    found_now = verify_ledger(data)
    assert found_now.damages == []
    assert "9 bytes" in found_now.notes[0]
    assert repair_ledger(data).left.notes == []
    assert path.stat().st_size == size


def test_a_lost_turn_is_named_by_the_snapshot_and_by_who_extends_it(data: Path) -> None:
    change(data, "DELETE FROM turns WHERE session_id = 'a' AND turn_id = 't1'")
    kinds = found(data)
    assert "its parent t1 is not recorded" in kinds[DamageKind.TURN]
    assert "is not made of the 3 turns" in kinds[DamageKind.FINISH]


def test_holdings_without_their_lease_are_given_back_acknowledged_ones_stay(data: Path) -> None:
    change(data, "DELETE FROM leases")
    assert DamageKind.FEED in found(data)
    left = repair_ledger(data).left.damages
    assert [damage.session_id for damage in left] == ["a"], "what was acknowledged was trained: it is not offered anew"


def test_indexes_are_made_anew(data: Path) -> None:
    """The entry of one row is taken out of an index, by having SQLite believe meanwhile that there is no such index."""
    connection = sqlite3.connect(data / "ledger.sqlite")
    root, sql = connection.execute("SELECT rootpage, sql FROM sqlite_schema WHERE name = 'finishes_by_age'").fetchone()
    with connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("DELETE FROM sqlite_schema WHERE name = 'finishes_by_age'")
    connection.close()
    change(data, "UPDATE finishes SET finished_at = finished_at + 1 WHERE session_id = 'a'")
    connection = sqlite3.connect(data / "ledger.sqlite")
    with connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute(
            "INSERT INTO sqlite_schema VALUES ('index', 'finishes_by_age', 'finishes', ?, ?)", (root, sql)
        )
    connection.close()
    assert "missing from index finishes_by_age" in found(data)[DamageKind.STORE]
    repair = repair_ledger(data)
    assert "its indexes were made anew" in repair.mended[0]
    assert repair.left.damages == []


def test_damage_in_front_of_answered_commits_in_the_log_is_told_before_sqlite_forgets_them(whole: Path) -> None:
    """I4: SQLite would take the damaged frame for the log's end."""
    log = whole.parent / "crashed-wal"
    connection = sqlite3.connect(whole.parent / "crashed", isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE t (n)")
    for n in range(4):
        connection.execute("INSERT INTO t VALUES (?)", (n,))
    copy = whole.parent / "copy-wal"
    shutil.copy(log, copy)
    connection.close()
    assert find_damage(copy) is None
    flip(copy, 32 + 24 + 100)
    damage = find_damage(copy)
    assert damage is not None
    assert damage.is_proven
    assert damage.offset == 32
    copy.write_bytes(copy.read_bytes()[:-10])  # a torn end is no damage
    flip(copy, 32 + 24 + 100)
    assert find_damage(copy) is None


def content(data: Path) -> dict[str, list[tuple[object, ...]]]:
    """All tables; of times only their presence."""
    connection = sqlite3.connect(data / "ledger.sqlite")
    tables = ("sessions", "session_labels", "turns", "finishes", "snapshots", "leases", "lease_items", "holdings",
              "policies", "blobs")  # fmt: skip
    try:
        return {
            table: sorted(
                (
                    tuple(value is None if i in TIMES.get(table, ()) else value for i, value in enumerate(row))
                    for row in connection.execute(f"SELECT * FROM {table}")
                ),
                key=repr,
            )
            for table in tables
        }
    finally:
        connection.close()


@settings(max_examples=120, suppress_health_check=list(HealthCheck))
@given(which=st.integers(0, 10_000), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_flipped_bit_is_found_or_changes_nothing(whole: Path, tmp_path: Path, which: int, place: float,
                                                       bit: int) -> None:  # fmt: skip
    data = tmp_path / "flipped"
    shutil.rmtree(data, ignore_errors=True)
    shutil.copytree(whole, data)
    files = sorted(path for path in data.rglob("*") if path.is_file() and path.stat().st_size > 8)
    path = files[which % len(files)]
    flip(path, int(place * path.stat().st_size), bit=bit)
    try:
        damages = verify_ledger(data).damages
    except VerbatimError:
        return  # told, and nothing is read
    assert damages or content(data) == content(whole)
