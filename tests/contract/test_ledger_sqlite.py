"""What the embedded ledger promises beyond its port: crashes, corruption, one writer, schema, files that go away."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest

from gateway.contracts.errors import ConfigurationError, LedgerCorrupt, LedgerError, NotFound, SchemaMismatch
from gateway.contracts.examples import example_turn
from gateway.contracts.experts import RoutedExperts
from gateway.contracts.media import Blob
from gateway.contracts.records import SessionOrigin, SessionRecord, TurnRecord
from gateway.contracts.versions import VersionSpan
from gateway.ledger.backend import Connection, Location
from gateway.ledger.segments_file import SegmentFileWriter, read_record
from gateway.ledger.sqlite import SqliteConnection, SqliteLedger, translate
from gateway.ledger.writer import GroupCommitWriter, StoreFailures

NUM_ROWS = 50


def a_session(session_id: str = "s") -> SessionRecord:
    return SessionRecord(session_id, None, None, None, {}, {}, {}, None, "", SessionOrigin.CREATED, True, 1.0)


def a_turn(index: int, session_id: str = "s") -> TurnRecord:
    return example_turn(
        index,
        session_id=session_id,
        added_messages=({"role": "user", "content": f"question {index}"},),
        reply={"role": "assistant", "content": "answer"},
        prompt_token_ids=np.arange(NUM_ROWS, dtype=np.int32),
        output_token_ids=np.array([index], dtype=np.int32),
        output_logprobs=np.array([-0.5], dtype=np.float32),
        version_spans=(VersionSpan(0, 1, 0),),
        num_layers=4,
        num_experts=8,
        top_k=2,
        experts_stop=NUM_ROWS,
        engine_id="engine",
        model="tiny",
        created_at=1.0,
    )


def a_blob(index: int) -> Blob:
    """One picture in five turns is another one."""
    return Blob.of(f"picture {index // 5}".encode(), "image/png")


def rows(index: int) -> RoutedExperts:
    generator = np.random.default_rng(index)
    return RoutedExperts(generator.integers(0, 8, (NUM_ROWS, 4, 2), dtype=np.uint8), 0)


@pytest.fixture
async def filled(tmp_path: Path) -> Path:
    """A closed ledger with ten turns of one session."""
    ledger = SqliteLedger.open(tmp_path / "data")
    await ledger.create_session(a_session())
    for index in range(10):
        await ledger.append_turn(a_turn(index), rows(index))
    await ledger.aclose()
    return tmp_path / "data"


@pytest.fixture
async def writer(tmp_path: Path) -> AsyncIterator[tuple[GroupCommitWriter, list[OSError]]]:
    """A writer on a store of its own; an error put into the list fails the next commits."""
    connection = SqliteConnection(
        sqlite3.connect(tmp_path / "store.sqlite", isolation_level=None, check_same_thread=False)
    )
    connection.execute("CREATE TABLE numbers (n INTEGER PRIMARY KEY)")
    failures: list[OSError] = []

    def flush() -> None:
        if failures:
            raise failures[0]

    group = GroupCommitWriter(
        connection,
        failures=StoreFailures((sqlite3.Error, OSError), translate, lambda error: False),
        flush=flush,
        after_commit=lambda connection: None,
    )
    yield group, failures
    group.close()


def routing_file(data: Path) -> Path:
    (path,) = (data / "routing").iterdir()
    return path


# ---- crashes ----

_APPENDER = """
import asyncio, importlib.util, sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("ledger_suite", sys.argv[1])
suite = importlib.util.module_from_spec(spec)
sys.modules["ledger_suite"] = suite
spec.loader.exec_module(suite)

async def append(ledger, session_id):
    await ledger.create_session(suite.a_session(session_id))
    for index in range(100_000):
        await ledger.put_blob(session_id, suite.a_blob(index))
        await ledger.append_turn(suite.a_turn(index, session_id), suite.rows(index))
        sys.stdout.write(f"{session_id} {index}\\n")
        sys.stdout.flush()

async def main():
    ledger = suite.SqliteLedger.open(Path(sys.argv[2]))
    await asyncio.gather(*(append(ledger, f"s{n}") for n in range(8)))

asyncio.run(main())
"""


def append_until_killed(data: Path, num_acknowledged: int) -> list[str]:
    """Lines `session index` of the turns that a child process had acknowledged when it was killed."""
    arguments = [sys.executable, "-c", _APPENDER, __file__, str(data)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(num_acknowledged)]
        child.send_signal(signal.SIGKILL)
        return lines + [line for line in child.stdout.read().splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.parametrize("num_acknowledged", [1, 40, 300])
async def test_every_turn_acknowledged_before_sigkill_is_there_afterwards(
    tmp_path: Path, num_acknowledged: int
) -> None:
    """I4: a reply that was seen is never lost, whenever the process dies."""
    data = tmp_path / "data"
    lines = await asyncio.to_thread(append_until_killed, data, num_acknowledged)
    assert len(lines) >= num_acknowledged

    ledger = SqliteLedger.open(data)
    for session_id in {line.split()[0] for line in lines}:
        acknowledged = [int(line.split()[1]) for line in lines if line.split()[0] == session_id]
        turns = await ledger.turns(session_id)
        assert [turn.index for turn in turns] == list(range(len(turns)))
        assert len(turns) > max(acknowledged)
        for turn in turns:
            found = await ledger.experts(session_id, turn.turn_id)
            assert found is not None
            np.testing.assert_array_equal(found.ids, rows(turn.index).ids)
            assert await ledger.blob(session_id, a_blob(turn.index).sha256) == a_blob(turn.index)
    await ledger.append_turn(a_turn(100_000, "s0"), rows(7))  # appending goes on behind the tail
    found = await ledger.experts("s0", "t100000")
    assert found is not None
    np.testing.assert_array_equal(found.ids, rows(7).ids)
    await ledger.aclose()


async def test_a_torn_tail_of_a_segment_file_harms_nothing(filled: Path) -> None:
    """I4: what a crash left behind the last committed record is passed over."""
    with routing_file(filled).open("ab") as stream:
        stream.write(b"VRX1 torn")
    ledger = SqliteLedger.open(filled)
    await ledger.append_turn(a_turn(10), rows(10))
    for index in range(11):
        found = await ledger.experts("s", f"t{index}")
        assert found is not None
        np.testing.assert_array_equal(found.ids, rows(index).ids)
    await ledger.aclose()


# ---- corruption ----


@pytest.mark.parametrize("place", ["magic", "checksum", "length", "key", "payload"])
async def test_a_flipped_byte_of_routing_rows_is_named_with_session_and_turn(filled: Path, place: str) -> None:
    """I9: damaged rows are never handed out."""
    path = routing_file(filled)
    content = bytearray(path.read_bytes())
    record = len(content) // 10 * 3  # all ten records have one length: this one belongs to turn 3
    content[record + {"magic": 0, "checksum": 5, "length": 12, "key": 25, "payload": 250}[place]] ^= 1
    path.write_bytes(content)
    ledger = SqliteLedger.open(filled)
    with pytest.raises(LedgerCorrupt, match="session s turn t3"):
        await ledger.experts("s", "t3")
    for index in (2, 4):
        assert await ledger.experts("s", f"t{index}") is not None
    await ledger.aclose()


async def test_a_cut_or_missing_segment_file_is_named(filled: Path) -> None:
    path = routing_file(filled)
    os.truncate(path, path.stat().st_size - 1)
    ledger = SqliteLedger.open(filled)
    with pytest.raises(LedgerCorrupt, match=r"turn t9.*cut"):
        await ledger.experts("s", "t9")
    path.unlink()
    with pytest.raises(LedgerCorrupt, match=r"turn t0.*missing"):
        await ledger.experts("s", "t0")
    with pytest.raises(NotFound):
        await ledger.experts("s", "unknown")
    await ledger.aclose()


async def test_rows_of_another_turn_are_not_taken_for_its_own(filled: Path) -> None:
    with sqlite3.connect(filled / "ledger.sqlite") as connection:
        connection.execute(
            "UPDATE turns SET experts_offset = (SELECT experts_offset FROM turns WHERE turn_id = 't1') "
            "WHERE turn_id = 't0'"
        )
    connection.close()
    ledger = SqliteLedger.open(filled)
    with pytest.raises(LedgerCorrupt, match=r"session s turn t0.*belong to session s turn t1"):
        await ledger.experts("s", "t0")
    await ledger.aclose()


@pytest.mark.parametrize("column", ["facts", "prompt_token_ids", "output_token_ids", "output_logprobs"])
async def test_a_changed_byte_of_a_turn_is_named(filled: Path, column: str) -> None:
    """I1: tokens that are not those recorded are an error, not data."""
    with sqlite3.connect(filled / "ledger.sqlite") as connection:
        (blob,) = connection.execute(f"SELECT {column} FROM turns WHERE turn_id = 't4'").fetchone()
        damaged = bytes([blob[0] ^ 1]) + blob[1:]
        connection.execute(f"UPDATE turns SET {column} = ? WHERE turn_id = 't4'", (damaged,))
    connection.close()
    ledger = SqliteLedger.open(filled)
    with pytest.raises(LedgerCorrupt, match="session s turn t4"):
        await ledger.turns("s")
    await ledger.aclose()


# ---- opening ----


async def test_a_folder_in_use_is_refused_naming_the_process(filled: Path) -> None:
    ledger = SqliteLedger.open(filled)
    with pytest.raises(ConfigurationError, match=f"process {os.getpid()}"):
        SqliteLedger.open(filled)
    await ledger.aclose()
    await SqliteLedger.open(filled).aclose()


async def test_another_program_can_read_while_the_gateway_writes(filled: Path) -> None:
    ledger = SqliteLedger.open(filled)
    reader = SqliteLedger.open(filled, read_only=True)
    await ledger.append_turn(a_turn(10), rows(10))
    assert len(await reader.turns("s")) == 11
    with pytest.raises(LedgerError, match="reading only"):
        await reader.create_session(a_session("other"))
    await reader.aclose()
    await ledger.aclose()


async def test_reading_only_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no ledger"):
        SqliteLedger.open(tmp_path / "data", read_only=True)
    assert not (tmp_path / "data").exists()


def test_a_path_that_cannot_be_a_folder_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "data"):
        with pytest.raises(ConfigurationError, match="data folder"):
            SqliteLedger.open(path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "routing").write_text("in the way")
    with pytest.raises(ConfigurationError, match="data folder"):
        SqliteLedger.open(tmp_path / "data")


@pytest.mark.parametrize("read_only", [False, True])
async def test_a_store_of_another_schema_is_refused(filled: Path, read_only: bool) -> None:
    with sqlite3.connect(filled / "ledger.sqlite") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(SchemaMismatch, match="version 99"):
        SqliteLedger.open(filled, read_only=read_only)


def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_text("not a database, but long enough to be taken for its header" * 100)
    with pytest.raises(LedgerCorrupt, match="ledger"):
        SqliteLedger.open(tmp_path)


# ---- group commit ----


async def test_a_failing_commit_fails_exactly_its_waiters(
    writer: tuple[GroupCommitWriter, list[OSError]], tmp_path: Path
) -> None:
    """I4: nothing is acknowledged that is not on disk, and the next commit goes on."""
    group, failures = writer

    def insert(n: int) -> Callable[[Connection], None]:
        return lambda connection: connection.executemany("INSERT INTO numbers VALUES (?)", [(n,)])

    await asyncio.wrap_future(group.submit(insert(0)))
    failures.append(OSError(28, "No space left on device"))
    lost = [asyncio.wrap_future(group.submit(insert(n))) for n in range(1, 5)]
    for error in await asyncio.gather(*lost, return_exceptions=True):
        assert isinstance(error, LedgerError)
        assert "No space left" in str(error)
    failures.clear()
    kept = [asyncio.wrap_future(group.submit(insert(n))) for n in (1, 2)]
    await asyncio.gather(*kept)
    stored = await asyncio.wrap_future(group.submit(lambda c: c.execute("SELECT n FROM numbers").fetchall()))
    assert stored == [(0,), (1,), (2,)]


async def test_an_operation_that_raises_fails_alone_and_leaves_nothing(
    writer: tuple[GroupCommitWriter, list[OSError]],
) -> None:
    group, _ = writer

    def half(connection: Connection) -> None:
        connection.execute("INSERT INTO numbers VALUES (7)")
        raise ZeroDivisionError("a bug")

    def twice(connection: Connection) -> None:
        connection.execute("INSERT INTO numbers VALUES (8)")
        connection.execute("INSERT INTO numbers VALUES (8)")

    def whole(connection: Connection) -> str:
        connection.execute("INSERT INTO numbers VALUES (9)")
        return "stored"

    futures = [asyncio.wrap_future(group.submit(operation)) for operation in (half, twice, whole)]
    bug, clash, fine = await asyncio.gather(*futures, return_exceptions=True)
    assert isinstance(bug, ZeroDivisionError)
    assert isinstance(clash, LedgerError)
    assert fine == "stored"
    stored = await asyncio.wrap_future(group.submit(lambda c: c.execute("SELECT n FROM numbers").fetchall()))
    assert stored == [(9,)]


# ---- segment files ----


def test_segment_files_are_rotated_by_size_and_go_on_after_reopening(tmp_path: Path) -> None:
    locations: list[Location] = []
    for _ in range(2):
        writer = SegmentFileWriter(tmp_path / "routing", max_file_bytes=1000)
        locations += [writer.append(b"key", bytes([n]) * 400) for n in range(5)]
        writer.flush()
        writer.close()
    assert [location.file for location in locations] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    for n, location in enumerate(locations):
        key, payload = read_record(tmp_path / "routing", location, name="a turn")
        assert (key, bytes(payload)) == (b"key", bytes([n % 5]) * 400)


def test_a_record_larger_than_a_file_has_one_of_its_own(tmp_path: Path) -> None:
    writer = SegmentFileWriter(tmp_path / "routing", max_file_bytes=100)
    locations = [writer.append(b"k", b"x" * size) for size in (10, 5000, 10)]
    writer.close()
    assert [location.file for location in locations] == [1, 2, 3]
    assert len(read_record(tmp_path / "routing", locations[1], name="a turn")[1]) == 5000


async def test_a_segment_file_goes_when_its_last_rollout_was_dropped(filled: Path) -> None:
    """The file being written stays until the next one is begun; others go when no row points at them."""
    ledger = SqliteLedger.open(filled)
    (filled / "routing" / "routing-00000009.seg").write_bytes(b"")
    await ledger.aclose()
    ledger = SqliteLedger.open(filled)
    ended = await ledger.finish("s", reward=1.0, outcome="completed", metadata={}, finished_at=2.0)
    assert len(list((filled / "routing").iterdir())) == 2
    await ledger.drop_rollout("s", ended.snapshot)
    await ledger.set_policy(1, "one")  # housekeeping follows a commit; this one comes after the drop's
    assert [path.name for path in (filled / "routing").iterdir()] == ["routing-00000009.seg"]
    await ledger.aclose()


# ---- bytes that messages refer to ----


async def test_equal_bytes_are_one_file_and_what_a_crash_left_goes_at_the_next_start(filled: Path) -> None:
    ledger = SqliteLedger.open(filled)
    for name in ("s", "t"):
        await ledger.create_session(a_session(name))
        await ledger.put_blob(name, a_blob(0))
    await ledger.aclose()
    blobs = filled / "blobs"
    assert [path.name for path in blobs.iterdir()] == [a_blob(0).sha256]
    (blobs / a_blob(5).sha256).write_bytes(a_blob(5).content)
    (blobs / f"{a_blob(10).sha256}.x.tmp").write_bytes(b"pict")
    ledger = SqliteLedger.open(filled)
    await ledger.set_policy(1, "one")
    await ledger.set_policy(2, "two")  # housekeeping follows a commit; this one comes after the first's
    assert [path.name for path in blobs.iterdir()] == [a_blob(0).sha256]
    assert await ledger.blob("t", a_blob(0).sha256) == a_blob(0)
    await ledger.aclose()


@pytest.mark.parametrize("content", [None, b"", b"picture 1"])
async def test_bytes_that_are_not_what_their_name_says_are_named(filled: Path, content: bytes | None) -> None:
    ledger = SqliteLedger.open(filled)
    await ledger.put_blob("s", a_blob(0))
    path = filled / "blobs" / a_blob(0).sha256
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
        LedgerCorrupt, match=f"session s: the file blobs/{path.name} (is missing|holds another content)"
    ):
        await ledger.blob("s", a_blob(0).sha256)
    await ledger.aclose()


async def test_a_store_from_before_there_were_blobs_takes_them(filled: Path) -> None:
    with sqlite3.connect(filled / "ledger.sqlite") as connection:
        connection.execute("DROP TABLE blobs")
    connection.close()
    ledger = SqliteLedger.open(filled)
    await ledger.put_blob("s", a_blob(0))
    assert await ledger.blob("s", a_blob(0).sha256) == a_blob(0)
    assert len(await ledger.turns("s")) == 10
    await ledger.aclose()


async def test_bytes_are_not_kept_by_a_ledger_opened_for_reading(filled: Path) -> None:
    ledger = SqliteLedger.open(filled, read_only=True)
    with pytest.raises(LedgerError, match="for reading only"):
        await ledger.put_blob("s", a_blob(0))
    assert not list((filled / "blobs").iterdir())
    await ledger.aclose()
