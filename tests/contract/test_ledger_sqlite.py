"""What the embedded ledger promises beyond its port: crashes, corruption, one writer, schema, files that go away."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gateway.contracts.errors import (
    ConfigurationError,
    LedgerCorrupt,
    LedgerError,
    NotFound,
    SchemaMismatch,
    TurnIndexTaken,
)
from gateway.contracts.examples import example_turn
from gateway.contracts.experts import RoutedExperts
from gateway.contracts.media import Blob
from gateway.contracts.records import SessionOrigin, SessionRecord, TurnRecord, snapshot_of
from gateway.contracts.versions import VersionSpan
from gateway.ledger.backend import Connection, Location
from gateway.ledger.rows import TurnRow, read_turn, turn_row
from gateway.ledger.segments_file import SegmentFileWriter, read_record
from gateway.ledger.sqlite import SqliteConnection, SqliteLedger, translate
from gateway.ledger.write_turn import WriteTurn
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
        failures=StoreFailures((sqlite3.Error, OSError), translate, lambda error: isinstance(error, InterruptedError)),
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


async def test_one_damaged_end_of_a_rollout_does_not_hold_up_the_feed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """I9: it is named, in the log and where it is missing from its group; all others are lent."""
    ledger = SqliteLedger.open(tmp_path)
    for name, group in (("a1", "a"), ("a2", "a"), ("b1", None)):
        await ledger.create_session(replace(a_session(name), group=group, group_size=group and 2))
        await ledger.finish(name, reward=1.0, outcome="completed", metadata={}, finished_at=10.0)
    await ledger.aclose()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as connection:
        connection.execute("UPDATE finishes SET checksum = checksum + 1 WHERE session_id = 'a1'")
    connection.close()
    ledger = SqliteLedger.open(tmp_path)
    for whole_groups, lent in ((True, ["a2", "b1"]), (False, ["a2", "b1"])):
        lease = await ledger.lease(
            consumer=f"{whole_groups}", limit=9, lease_seconds=9.0, whole_groups=whole_groups, labels=None, now=100.0
        )
        assert lease is not None
        assert [rollout.session_id for rollout in lease.rollouts] == lent
        assert [group.damaged for group in lease.incomplete] == ([("a1",)] if whole_groups else [])
    assert [record.getMessage() for record in caplog.records if "a1" in record.getMessage()] != []
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


# ---- two processes, while one hands over to the other ----

_SECOND = """
import asyncio, importlib.util, sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("ledger_suite", sys.argv[1])
suite = importlib.util.module_from_spec(spec)
sys.modules["ledger_suite"] = suite
spec.loader.exec_module(suite)
ledger = suite.SqliteLedger.open(Path(sys.argv[2]), lock=int(sys.argv[3]))
assert ledger.shared
sys.stdout.write("open\\n")
sys.stdout.flush()
asyncio.run(suite.append_beside_another(ledger, "second", int(sys.argv[4])))
"""


async def append_beside_another(ledger: SqliteLedger, name: str, num_turns: int) -> None:
    """Append to a session of one's own and to one that both write, freeing files and blobs now and then."""
    await ledger.create_session(a_session(name))
    await ledger.create_session(a_session("both"))

    async def alone() -> None:
        for index in range(num_turns):
            await ledger.put_blob(name, a_blob(index))
            await ledger.append_turn(a_turn(index, name), rows(index))

    async def together() -> None:
        index, written = 0, 0
        while written < num_turns:
            turn = replace(a_turn(index, "both"), turn_id=f"{name}-{written}")
            try:
                await ledger.append_turn(turn, rows(index))
                written += 1
            except TurnIndexTaken:
                index = (await ledger.turns("both"))[-1].index
            index += 1

    async def come_and_go() -> None:
        for n in range(num_turns // 4):
            await ledger.create_session(a_session(f"{name}-{n}"))
            await ledger.put_blob(f"{name}-{n}", a_blob(n))
            await ledger.append_turn(a_turn(0, f"{name}-{n}"), rows(n))
            await ledger.delete_session(f"{name}-{n}")

    await asyncio.gather(alone(), together(), come_and_go())
    await ledger.aclose()


async def test_two_processes_append_at_once_while_one_hands_over(tmp_path: Path) -> None:
    """I3, I4: what both were told is stored is there, one turn an index, and neither removes what the other needs."""
    data = tmp_path / "data"
    ledger = SqliteLedger.open(data)
    lock = ledger.lock_descriptor
    assert lock is not None
    assert not ledger.shared
    ledger.share(True)
    assert ledger.shared
    num_turns = 60
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _SECOND, __file__, str(data), str(lock), str(num_turns)),
        pass_fds=[lock],
        stdout=asyncio.subprocess.PIPE,
    )
    assert child.stdout is not None
    assert await child.stdout.readline() == b"open\n"
    await append_beside_another(ledger, "first", num_turns)
    assert await child.wait() == 0

    ledger = SqliteLedger.open(data)
    for name in ("first", "second"):
        turns = await ledger.turns(name)
        assert [turn.index for turn in turns] == list(range(num_turns))
        for turn in turns:
            found = await ledger.experts(name, turn.turn_id)
            assert found is not None
            np.testing.assert_array_equal(found.ids, rows(turn.index).ids)
            assert await ledger.blob(name, a_blob(turn.index).sha256) == a_blob(turn.index)
    both = await ledger.turns("both")
    assert [turn.index for turn in both] == list(range(2 * num_turns))
    writers = [turn.turn_id.split("-") for turn in both]
    assert sorted(writers, key=lambda one: (one[0], int(one[1]))) == [
        [name, str(n)] for name in ("first", "second") for n in range(num_turns)
    ]
    for turn in both:
        assert await ledger.experts("both", turn.turn_id) is not None
    await ledger.aclose()


async def test_the_folder_stays_locked_until_both_have_let_go(filled: Path) -> None:
    first = SqliteLedger.open(filled)
    assert first.lock_descriptor is not None
    second = SqliteLedger.open(filled, lock=os.dup(first.lock_descriptor))
    await first.aclose()
    with pytest.raises(ConfigurationError, match="another gateway"):
        SqliteLedger.open(filled)
    await second.append_turn(a_turn(10), rows(10))
    await second.aclose()
    await SqliteLedger.open(filled).aclose()


async def test_a_store_that_needs_migration_is_not_handed_over(full: Path) -> None:
    """The older program still writes what it knows; the newer one waits until it has ended."""
    as_older_version(full, 2)
    lock = os.open(full / "ledger.lock", os.O_RDWR)
    with pytest.raises(SchemaMismatch, match="stop the gateway"):
        SqliteLedger.open(full, lock=lock)
    os.close(lock)


def test_each_process_appends_to_a_file_of_its_own_that_no_other_removes(tmp_path: Path) -> None:
    """I4: records that no row points at yet are kept as long as their writer may still commit."""
    folder = tmp_path / "routing"
    one = SegmentFileWriter(folder)
    first = one.append(b"k", b"one")
    other = SegmentFileWriter(folder)
    second = other.append(b"k", b"other")
    assert (first.file, second.file) == (1, 2)
    other.remove_files(lambda number: False)
    one.remove_files(lambda number: False)
    assert bytes(read_record(folder, first, name="a turn")[1]) == b"one"
    assert bytes(read_record(folder, second, name="a turn")[1]) == b"other"
    one.close()
    other.remove_files(lambda number: False)
    assert [path.name for path in folder.iterdir()] == ["routing-00000002.seg"]
    assert one.append(b"k", b"again").file == 3  # its own is gone, the last one is held
    one.close()
    other.close()


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


# ---- older stores ----

_TABLES_OF_VERSION_2 = """
    CREATE TABLE sessions (session_id TEXT PRIMARY KEY, group_name TEXT, group_size INTEGER, labels TEXT NOT NULL,
        facts BLOB NOT NULL, checksum INTEGER NOT NULL);
    CREATE INDEX sessions_of_group ON sessions (group_name) WHERE group_name IS NOT NULL;
    CREATE TABLE turns (session_id TEXT NOT NULL, turn_id TEXT NOT NULL, turn_index INTEGER NOT NULL,
        facts BLOB NOT NULL, prompt_token_ids BLOB NOT NULL, output_token_ids BLOB NOT NULL,
        output_logprobs BLOB NOT NULL, checksum INTEGER NOT NULL, num_tokens INTEGER NOT NULL,
        num_trainable_tokens INTEGER NOT NULL, experts_file INTEGER, experts_offset INTEGER, experts_bytes INTEGER,
        delivered_at REAL, PRIMARY KEY (session_id, turn_id));
    CREATE INDEX turns_of_file ON turns (experts_file) WHERE experts_file IS NOT NULL;
    CREATE TABLE finishes (session_id TEXT PRIMARY KEY, snapshot TEXT NOT NULL, finished_at REAL NOT NULL,
        facts BLOB NOT NULL, checksum INTEGER NOT NULL, num_tokens INTEGER NOT NULL,
        num_sampled_tokens INTEGER NOT NULL, dropped_at REAL);
    CREATE INDEX finishes_by_age ON finishes (finished_at);
    CREATE TABLE leases (lease_id TEXT PRIMARY KEY, consumer TEXT NOT NULL, expires_at REAL NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('open', 'released', 'acknowledged')));
    CREATE INDEX open_leases ON leases (consumer) WHERE state = 'open';
    CREATE TABLE lease_items (lease_id TEXT NOT NULL, position INTEGER NOT NULL, session_id TEXT NOT NULL,
        PRIMARY KEY (lease_id, position));
    CREATE TABLE holdings (consumer TEXT NOT NULL, session_id TEXT NOT NULL, lease_id TEXT NOT NULL,
        expires_at REAL NOT NULL, acknowledged INTEGER NOT NULL, PRIMARY KEY (consumer, session_id));
    CREATE INDEX holdings_of_session ON holdings (session_id);
    CREATE INDEX holdings_of_lease ON holdings (lease_id);
    CREATE TABLE policies (weight_version TEXT PRIMARY KEY, policy_version INTEGER NOT NULL);
"""
_BLOBS_OF_VERSION_2 = """
    CREATE TABLE blobs (session_id TEXT NOT NULL, sha256 TEXT NOT NULL, media_type TEXT NOT NULL,
        num_bytes INTEGER NOT NULL, PRIMARY KEY (session_id, sha256));
    CREATE INDEX blobs_by_content ON blobs (sha256);
"""
_ROWS_OF_VERSION_2 = """
    INSERT INTO sessions SELECT session_id, group_name, group_size,
        (SELECT json_group_object(CAST(l.name AS TEXT), CAST(l.value AS TEXT)) FROM now.session_labels l
         WHERE l.session_id = s.session_id), facts, checksum FROM now.sessions s;
    INSERT INTO turns SELECT session_id, turn_id, turn_index, facts, prompt_token_ids, output_token_ids,
        output_logprobs, checksum, num_tokens, num_trainable_tokens, experts_file, experts_offset, experts_bytes,
        delivered_at FROM now.turns;
    INSERT INTO finishes SELECT f.session_id, f.snapshot, finished_at, facts, checksum, num_tokens,
        num_sampled_tokens, dropped_at FROM now.finishes f JOIN now.snapshots n USING (session_id);
    INSERT INTO leases SELECT lease_id, consumer, expires_at, state FROM now.leases;
    INSERT INTO lease_items SELECT lease_id, position, session_id FROM now.lease_items;
    INSERT INTO holdings SELECT * FROM now.holdings;
    INSERT INTO policies SELECT * FROM now.policies;
"""


def as_older_version(data: Path, version: int) -> None:
    """Write a closed store anew as the program of that version had it (1: before there were blobs)."""
    store = data / "ledger.sqlite"
    store.rename(data / "now.sqlite")
    with sqlite3.connect(store) as connection:
        connection.execute("ATTACH ? AS now", (str(data / "now.sqlite"),))
        connection.executescript(_TABLES_OF_VERSION_2 + _ROWS_OF_VERSION_2)
        if version == 2:
            connection.executescript(_BLOBS_OF_VERSION_2 + "INSERT INTO blobs SELECT * FROM now.blobs;")
        connection.execute(f"PRAGMA user_version = {version}")
    connection.close()
    (data / "now.sqlite").unlink()


@pytest.fixture
async def full(filled: Path) -> Path:
    """A closed ledger with every kind of row: turns, a blob, labels, a lease, a drop, an open session with a TTL."""
    ledger = SqliteLedger.open(filled)
    await ledger.put_blob("s", a_blob(0))
    for name in ("lent", "dropped"):
        await ledger.create_session(replace(a_session(name), labels={"run": 'é "1"'}, ttl_seconds=5.0))
        await ledger.append_turn(a_turn(0, name), rows(0))
        await ledger.finish(name, reward=0.5, outcome="completed", metadata={}, finished_at=float(len(name)))
    await ledger.create_session(replace(a_session("open"), ttl_seconds=1e9, created_at=time.time()))
    await ledger.lease(
        consumer="c", limit=1, lease_seconds=60.0, whole_groups=True, labels=None, now=100.0, lease_id="lease"
    )
    await ledger.drop_rollout("dropped", snapshot_of("dropped", ["t0"]))
    await ledger.set_policy(3, "three")
    await ledger.aclose()
    return filled


@pytest.mark.parametrize("version", [1, 2])
async def test_an_older_store_is_migrated_when_it_is_opened_for_writing(full: Path, version: int) -> None:
    """I1, I4: nothing that an earlier version stored is lost or changed, and what is new works on it."""
    as_older_version(full, version)
    ledger = SqliteLedger.open(full)
    assert [turn.index for turn in await ledger.turns("s")] == list(range(10))
    found = await ledger.experts("s", "t3")
    assert found is not None
    np.testing.assert_array_equal(found.ids, rows(3).ids)
    assert [session.session_id for session in await ledger.sessions(labels={"run": 'é "1"'})] == ["dropped", "lent"]
    again = await ledger.lease(
        consumer="c", limit=1, lease_seconds=60.0, whole_groups=True, labels=None, now=100.0, lease_id="lease"
    )
    assert again is not None
    assert [(r.session_id, r.snapshot, r.num_tokens) for r in again.rollouts] == [
        ("lent", snapshot_of("lent", ["t0"]), NUM_ROWS + 1)
    ]
    late = await ledger.append_late_turn(a_turn(1, "lent"), rows(1))
    assert late.snapshot == snapshot_of("lent", ["t0", "t1"])
    assert await ledger.acknowledge("lease") == ["lent"]
    assert await ledger.sessions_past_ttl(time.time() + 1e8, limit=9) == []
    assert await ledger.sessions_past_ttl(time.time() + 2e9, limit=9) == ["open"]
    assert [rollout.session_id for rollout in await ledger.stored_rollouts(finished_before=1e12, limit=9)] == ["lent"]
    assert await ledger.stored_bytes() > 11 * NUM_ROWS * 8
    assert await ledger.policies() == {"three": 3}
    await ledger.put_blob("open", a_blob(5))
    assert await ledger.blob("s", a_blob(0).sha256) == (a_blob(0) if version == 2 else None)
    await ledger.aclose()
    await SqliteLedger.open(full, read_only=True).aclose()


async def test_a_migrated_store_has_the_columns_and_indexes_of_a_new_one(full: Path, tmp_path: Path) -> None:
    def shape(data: Path) -> set[tuple[str, ...]]:
        with closing(sqlite3.connect(data / "ledger.sqlite")) as connection:
            indexes = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema WHERE type = 'index'")
            columns = connection.execute(
                "SELECT t.name, c.name, c.pk, c.'notnull' FROM sqlite_schema t, pragma_table_info(t.name) c "
                "WHERE t.type = 'table'"
            )
            return {tuple(map(str, row)) for row in (*indexes, *columns)}

    as_older_version(full, 2)
    for data in (full, tmp_path / "new"):
        await SqliteLedger.open(data).aclose()
    assert shape(full) == shape(tmp_path / "new")


async def test_turns_of_one_index_in_an_older_store_are_numbered_apart(full: Path) -> None:
    """I3: two turns that once shared an index both stay, in the order in which they were read; damage stays named."""
    as_older_version(full, 2)
    with closing(sqlite3.connect(full / "ledger.sqlite")) as connection, connection:
        for turn_id, index in (("t4", 3), ("t7", 6)):
            (row,) = connection.execute(
                f"SELECT {', '.join(TurnRow._fields)} FROM turns WHERE turn_id = ?", (turn_id,)
            ).fetchall()
            changed = turn_row(replace(read_turn(TurnRow(*row), None), index=index))
            connection.execute(
                "UPDATE turns SET turn_index = ?, facts = ?, checksum = ? WHERE turn_id = ?",
                (index, changed.facts, changed.checksum, turn_id),
            )
    ledger = SqliteLedger.open(full)
    turns = await ledger.turns("s")
    assert [(turn.index, turn.turn_id) for turn in turns] == [(n, f"t{n}") for n in range(10)]
    await ledger.aclose()


async def test_a_damaged_turn_of_an_older_store_is_named_after_migration(full: Path) -> None:
    as_older_version(full, 2)
    with closing(sqlite3.connect(full / "ledger.sqlite")) as connection, connection:
        connection.execute("UPDATE turns SET turn_index = 3, checksum = checksum + 1 WHERE turn_id = 't4'")
    ledger = SqliteLedger.open(full)
    assert [turn.index for turn in await ledger.turns("s", after=4)] == [5, 6, 7, 8, 9]
    with pytest.raises(LedgerCorrupt, match="session s turn t4"):
        await ledger.turns("s")
    await ledger.aclose()


@pytest.mark.parametrize("version", [1, 2])
async def test_reading_an_older_store_says_that_it_needs_migration(full: Path, version: int) -> None:
    as_older_version(full, version)
    with pytest.raises(SchemaMismatch, match=f"version {version}.*migrates it"):
        SqliteLedger.open(full, read_only=True)


# ---- group commit ----


async def test_a_failing_commit_fails_exactly_its_waiters(
    writer: tuple[GroupCommitWriter, list[OSError]], tmp_path: Path
) -> None:
    """I4: nothing is acknowledged that is not on disk, and the next commit goes on."""
    group, failures = writer

    def insert(n: int) -> Callable[[Connection], None]:
        return lambda connection: connection.executemany("INSERT INTO numbers VALUES (?)", [(n,)])

    await group.submit(insert(0))
    failures.append(OSError(28, "No space left on device"))
    lost = [group.submit(insert(n)) for n in range(1, 5)]
    for error in await asyncio.gather(*lost, return_exceptions=True):
        assert isinstance(error, LedgerError)
        assert "No space left" in str(error)
    failures.clear()
    kept = [group.submit(insert(n)) for n in (1, 2)]
    await asyncio.gather(*kept)
    stored = await group.submit(lambda c: c.execute("SELECT n FROM numbers").fetchall())
    assert stored == [(0,), (1,), (2,)]


async def test_a_batch_that_met_another_process_is_run_again_each_operation_alone(
    writer: tuple[GroupCommitWriter, list[OSError]],
) -> None:
    """I3, I4: each is stored once, whatever its neighbours met; who always meets another is told so."""
    group, _ = writer
    held = threading.Event()
    runs: list[int] = []

    def insert(n: int) -> Callable[[Connection], None]:
        def operation(connection: Connection) -> None:
            runs.append(n)
            connection.executemany("INSERT INTO numbers VALUES (?)", [(n,)])
            if n == 2:
                raise InterruptedError("deadlock detected")

        return operation

    waiting = group.submit(lambda connection: held.wait(10.0))  # the others gather into one batch meanwhile
    gathered = [group.submit(insert(n)) for n in (0, 2, 1)]
    held.set()
    await asyncio.wrap_future(waiting)
    first, always, last = await asyncio.gather(*map(asyncio.wrap_future, gathered), return_exceptions=True)
    assert (first, last) == (None, None)
    assert isinstance(always, LedgerError)
    assert "deadlock" in str(always)
    assert runs[:2] == [0, 2]
    assert runs.count(2) > 2
    stored = await group.submit(lambda c: c.execute("SELECT n FROM numbers").fetchall())
    assert stored == [(0,), (1,)]


async def test_what_comes_while_another_process_commits_is_one_batch(tmp_path: Path) -> None:
    """Each worker's fsync holds up all others, so there are as few as can be."""
    file, turn = tmp_path / "store.sqlite", tmp_path / "ledger.turn"
    raw = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    raw.execute("CREATE TABLE numbers (n INTEGER PRIMARY KEY)")
    commits: list[int] = []
    group = GroupCommitWriter(
        SqliteConnection(raw, WriteTurn(turn)),
        failures=StoreFailures((sqlite3.Error, OSError), translate, lambda error: False),
        flush=lambda: commits.append(1),
        after_commit=lambda connection: None,
    )
    other = WriteTurn(turn)
    other.take()

    def insert(n: int) -> Callable[[Connection], None]:
        return lambda connection: connection.executemany("INSERT INTO numbers VALUES (?)", [(n,)])

    waiting = [group.submit(insert(0))]
    await asyncio.sleep(0.3)  # the writer has it, and waits
    waiting += [group.submit(insert(n)) for n in (1, 2)]
    await asyncio.sleep(0.1)
    assert not any(future.done() for future in waiting)
    other.give()
    async with asyncio.timeout(20):
        await asyncio.gather(*waiting)
    assert len(commits) == 1
    other.take()  # it was given back
    other.close()
    group.close()


async def test_what_can_wait_is_committed_with_something_urgent_or_waits_all_of_its_time(tmp_path: Path) -> None:
    """A commit of its own for each delivery, which the next turn then waits for, would be two for every turn."""
    patience_seconds = 0.1
    raw = sqlite3.connect(tmp_path / "store.sqlite", isolation_level=None, check_same_thread=False)
    batches: list[list[tuple[bool, float]]] = [[]]  # of each operation: is it urgent, how long had it waited
    group = GroupCommitWriter(
        SqliteConnection(raw),
        failures=StoreFailures((sqlite3.Error, OSError), translate, lambda error: False),
        flush=lambda: batches.append([]),
        after_commit=lambda connection: None,
        patience_seconds=patience_seconds,
    )

    def submit(*, urgent: bool) -> asyncio.Future[None]:
        began = time.monotonic()
        return group.submit(lambda _: batches[-1].append((urgent, time.monotonic() - began)), urgent=urgent)

    notes = []
    for _ in range(20):
        notes.append(submit(urgent=False))
        await asyncio.sleep(0.03)
        await submit(urgent=True)
    last = submit(urgent=False)
    async with asyncio.timeout(20):
        await asyncio.gather(*notes, last)
    group.close()
    assert [urgent for batch in batches for urgent, _ in batch].count(False) == len(notes) + 1
    assert any({True, False} == {urgent for urgent, _ in batch} for batch in batches)
    alone = [batch for batch in batches if batch and not any(urgent for urgent, _ in batch)]
    assert alone, "the last one had nothing to go with"
    assert all(batch[0][1] >= patience_seconds for batch in alone)


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

    futures = [group.submit(operation) for operation in (half, twice, whole)]
    bug, clash, fine = await asyncio.gather(*futures, return_exceptions=True)
    assert isinstance(bug, ZeroDivisionError)
    assert isinstance(clash, LedgerError)
    assert fine == "stored"
    stored = await group.submit(lambda c: c.execute("SELECT n FROM numbers").fetchall())
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


async def test_bytes_are_not_kept_by_a_ledger_opened_for_reading(filled: Path) -> None:
    ledger = SqliteLedger.open(filled, read_only=True)
    with pytest.raises(LedgerError, match="for reading only"):
        await ledger.put_blob("s", a_blob(0))
    assert not list((filled / "blobs").iterdir())
    await ledger.aclose()
