"""What the shared ledger promises beyond its port: racing processes, a dying server, refusals, sweeps, full disks."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

from engines.launch import free_port
from gateway.cli import main
from gateway.contracts.errors import (
    ConfigurationError,
    LedgerError,
    LedgerFull,
    SchemaMismatch,
    SessionSealed,
    TurnIndexTaken,
    VerbatimError,
)
from gateway.contracts.media import Blob
from gateway.contracts.records import TurnRecord, snapshot_of
from gateway.ledger.backend import Connection
from gateway.ledger.objects import FileObjects, open_objects
from gateway.ledger.postgres import ConnectionLost, PostgresBackend, PostgresLedger
from gateway.ledger.register import ObjectRegister
from tests.contract.test_ledger_sqlite import NUM_ROWS, a_blob, a_session, a_turn, rows
from tests.postgres_server import PostgresServer, running_postgres
from tests.small_disk import fill, small_disk
from tests.waiting import until_async

MIB = 2**20
Reopen = Callable[[], PostgresLedger]


@pytest.fixture
def objects(tmp_path: Path) -> str:
    return (tmp_path / "objects").as_uri()


@pytest.fixture
def reopen(postgres_dsn: str, objects: str) -> Reopen:
    """The same store once more, as another gateway would have it."""
    return lambda: PostgresLedger.open(postgres_dsn, objects)


@pytest.fixture
async def ledger(reopen: Reopen) -> AsyncIterator[PostgresLedger]:
    opened = reopen()
    yield opened
    await opened.aclose()


@pytest.fixture
async def other(reopen: Reopen) -> AsyncIterator[PostgresLedger]:
    opened = reopen()
    yield opened
    await opened.aclose()


@pytest.fixture
def backend(postgres_dsn: str, objects: str) -> Iterator[PostgresBackend]:
    """A gateway's store without its ledger: what it uploads, no row refers to."""
    opened = PostgresBackend(postgres_dsn, open_objects(objects), read_only=False)
    yield opened
    opened.close()


def stored(objects: str) -> set[str]:
    return {each.name for each in FileObjects(Path(objects.removeprefix("file://"))).stored()}


def administer(dsn: str, *statements: str) -> list[Any]:
    """Run statements as an administrator; the rows of the last one."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        for statement in statements:
            cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


async def check_whole(ledger: PostgresLedger, session_id: str, expected_ids: set[str]) -> None:
    """Each turn is there once, with an index of its own and its routing rows."""
    turns = await ledger.turns(session_id)
    assert [turn.index for turn in turns] == list(range(len(turns)))
    assert {turn.turn_id for turn in turns} >= expected_ids
    for turn in turns:
        found = await ledger.experts(session_id, turn.turn_id)
        assert found is not None
        np.testing.assert_array_equal(found.ids, rows(turn.output_token_ids[0]).ids)


# ---- two processes ----

_SECOND = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1]).parents[2]))
from tests.contract.test_ledger_postgres import PostgresLedger, one_of_two

async def main():
    sys.stdout.write("ready\\n")
    sys.stdout.flush()
    sys.stdin.readline()
    ledger = PostgresLedger.open(sys.argv[2], sys.argv[3])
    try:
        await one_of_two(ledger, "second")
    finally:
        await ledger.aclose()

asyncio.run(main())
"""
NUM_TURNS = 40
NUM_ROLLOUTS = 12


async def append_anywhere(ledger: PostgresLedger, turn: TurnRecord) -> TurnRecord:
    """As a gateway does: behind whatever is there, and late where the session was finished meanwhile."""
    experts = rows(turn.output_token_ids[0])
    while True:
        try:
            await ledger.append_turn(turn, experts)
        except SessionSealed:
            try:
                await ledger.append_late_turn(turn, experts)
            except TurnIndexTaken:
                pass
            else:
                return turn
        except TurnIndexTaken:
            pass
        else:
            return turn
        latest = await ledger.turns(turn.session_id, after=turn.index - 1)
        turn = replace(turn, index=latest[-1].index + 1)


async def one_of_two(ledger: PostgresLedger, name: str) -> None:
    """What each of two processes does at once: all of it in sessions that both write, or with one consumer's leases."""
    await ledger.create_session(a_session("both"))

    async def append() -> None:
        for number in range(NUM_TURNS):
            await append_anywhere(ledger, replace(a_turn(number, "both"), turn_id=f"{name}-{number}"))

    async def finish_under_turns() -> None:
        for number in range(NUM_ROLLOUTS):
            session_id = f"rollout-{number}"
            await ledger.create_session(a_session(session_id))
            await append_anywhere(ledger, replace(a_turn(0, session_id), turn_id=f"{name}-first"))
            late = append_anywhere(ledger, replace(a_turn(1, session_id), turn_id=f"{name}-second"))
            sealed = ledger.finish(session_id, reward=1.0, outcome="completed", metadata={}, finished_at=1.0)
            await asyncio.gather(late, sealed)

    async def come_and_go() -> None:
        for number in range(NUM_TURNS // 4):
            await ledger.create_session(a_session(f"{name}-{number}"))
            await ledger.put_blob(f"{name}-{number}", a_blob(number))
            await ledger.append_turn(a_turn(0, f"{name}-{number}"), rows(0))
            await ledger.delete_session(f"{name}-{number}")

    async def consume() -> None:
        while (await ledger.counts("trainer", 50.0)).acknowledged < NUM_ROLLOUTS:
            lease = await ledger.lease(
                consumer="trainer", limit=2, lease_seconds=600.0, whole_groups=True, labels=None, now=50.0
            )
            if lease is None:
                await asyncio.sleep(0.01)
                continue
            for rollout in lease.rollouts:
                await ledger.create_session(a_session(f"lent-{rollout.session_id}-{lease.lease_id}"))
            await ledger.acknowledge(lease.lease_id)

    await asyncio.gather(append(), finish_under_turns(), come_and_go(), consume())


async def test_two_processes_append_finish_and_lease_at_once(postgres_dsn: str, objects: str, reopen: Reopen) -> None:
    """I3, I4: one turn an index, none lost; each rollout is lent once; a late turn is in the latest snapshot."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _SECOND, __file__, postgres_dsn, objects),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert await child.stdout.readline() == b"ready\n"
    child.stdin.write(b"\n")
    ledger = reopen()
    await one_of_two(ledger, "first")
    assert await child.wait() == 0

    names = ("first", "second")
    both = await ledger.turns("both")
    assert len(both) == 2 * NUM_TURNS
    await check_whole(ledger, "both", {f"{name}-{number}" for name in names for number in range(NUM_TURNS)})
    for number in range(NUM_ROLLOUTS):
        turns = await ledger.turns(f"rollout-{number}")
        await check_whole(ledger, f"rollout-{number}", {f"{name}-{n}" for name in names for n in ("first", "second")})
        finish = await ledger.finish_record(f"rollout-{number}")
        assert finish is not None
        assert finish.snapshot == snapshot_of(f"rollout-{number}", [turn.turn_id for turn in turns])
    lent = [session.session_id for session in await ledger.sessions(limit=1000) if "lent-" in session.session_id]
    assert sorted(name.split("-")[2] for name in lent) == sorted(str(number) for number in range(NUM_ROLLOUTS))
    await ledger.aclose()


async def test_a_batch_that_waits_for_another_that_waits_for_it_is_stored_all_the_same(
    ledger: PostgresLedger, postgres_dsn: str
) -> None:
    """A deadlock is nobody's failure: each operation runs again, alone."""
    for name in ("first", "a", "b"):
        await ledger.create_session(a_session(name))
    lock = "SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))"
    waits = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND objid = %s::bit(32)::bigint"
    key = "SELECT hashtextextended(%s, 0)::bit(64) << 32"
    with psycopg.connect(postgres_dsn) as holder, psycopg.connect(postgres_dsn) as rival:

        def is_waited_for(session_id: str) -> bool:
            (bits,) = holder.execute(key, [f"session {session_id}"]).fetchone()
            return holder.execute(waits, [bits[:32]]).fetchone() is not None

        rival.execute("SET deadlock_timeout = '60s'")  # who finds a deadlock first is its victim: not the rival
        rival.execute(lock, ["session b"])
        holder.execute(lock, ["session first"])
        appended = asyncio.gather(*(ledger.append_turn(a_bare_turn(name), None) for name in ("first", "a", "b")))
        await until_async(partial(is_waited_for, "first"))  # so that the others are one batch behind it
        holder.commit()
        await until_async(partial(is_waited_for, "b"))
        await asyncio.to_thread(rival.execute, lock, ["session a"])
    await appended
    for name in ("a", "b"):
        assert [turn.turn_id for turn in await ledger.turns(name)] == ["t0"]


def a_bare_turn(session_id: str) -> TurnRecord:
    """Without routing rows, so that nothing has to be uploaded before it is queued."""
    return replace(a_turn(0, session_id), experts_stop=0)


async def test_a_gateway_that_hangs_inside_a_transaction_holds_the_others_for_seconds_only(
    ledger: PostgresLedger, backend: PostgresBackend
) -> None:
    """SIGSTOP at the worst moment: the server ends that transaction, and who waits for its locks has not given up."""
    await ledger.create_session(a_session())
    hanging = backend.connect(read_only=False)
    hanging.begin()
    hanging.lock("session s")
    async with asyncio.timeout(8):
        await ledger.append_turn(a_turn(0), rows(0))
    with pytest.raises(ConnectionLost):  # of a batch that fails so, every operation runs again
        hanging.commit()
    hanging.close()


# ---- a server that dies ----


class Appender:
    """Appends to one session for as long as it is told to; knows which turns it was told are stored."""

    def __init__(self, ledger: PostgresLedger, session_id: str) -> None:
        self.session_id = session_id
        self.acknowledged: set[str] = set()
        self.failures: list[VerbatimError] = []
        self._ledger = ledger

    async def run(self, stop: asyncio.Event) -> None:
        """A turn whose storing failed is stored again, as whoever retries would."""
        index = 0
        while not stop.is_set():
            try:
                await self._ledger.append_turn(a_turn(index, self.session_id), rows(index))
            except VerbatimError as error:
                self.failures.append(error)
                await asyncio.sleep(0.05)
            else:
                self.acknowledged.add(f"t{index}")
                index += 1


async def append_while(
    ledger: PostgresLedger, break_something: Callable[[], None], *, num_appenders: int = 6
) -> list[Appender]:
    """Append to several sessions; before, while and after something breaks in another thread."""
    appenders = [Appender(ledger, f"s{number}") for number in range(num_appenders)]
    for appender in appenders:
        await ledger.create_session(a_session(appender.session_id))
    stop = asyncio.Event()
    running = asyncio.gather(*(appender.run(stop) for appender in appenders))
    await until_async(lambda: all(appender.acknowledged for appender in appenders))
    await asyncio.to_thread(break_something)
    before = [len(appender.acknowledged) for appender in appenders]
    await until_async(lambda: all(len(a.acknowledged) >= n + 2 for a, n in zip(appenders, before, strict=True)))
    stop.set()
    await running
    return appenders


async def test_the_server_is_killed_and_started_again_and_the_ledger_goes_on(
    reopen: Reopen, postgres_server: PostgresServer
) -> None:
    """I4: what was acknowledged is there, once; who was not told gets a 503 that may be tried again."""
    ledger = reopen()

    def restart() -> None:
        postgres_server.kill()
        postgres_server.start()

    appenders = await append_while(ledger, restart)
    for appender in appenders:
        assert all(isinstance(failure, LedgerError) for failure in appender.failures), appender.failures
        assert all((failure.http_status, failure.retryable) == (503, True) for failure in appender.failures)
        await check_whole(ledger, appender.session_id, appender.acknowledged)
    await ledger.aclose()
    ledger = reopen()
    for appender in appenders:
        await check_whole(ledger, appender.session_id, appender.acknowledged)
    await ledger.aclose()


async def test_connections_that_an_administrator_ends_come_back(
    ledger: PostgresLedger, postgres_server: PostgresServer
) -> None:
    """I4: again and again, in the middle of transactions and of reads."""
    ended = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'verbatim'"
    counts: list[int] = []

    def end_all() -> None:
        for _ in range(8):
            [(number,)] = administer(postgres_server.dsn("postgres"), ended)
            counts.append(number)
            threading.Event().wait(0.1)

    appenders = await append_while(ledger, end_all)
    assert sum(counts) >= 8
    for appender in appenders:
        assert all((failure.http_status, failure.retryable) == (503, True) for failure in appender.failures)
        await check_whole(ledger, appender.session_id, appender.acknowledged)


# ---- refusals ----


@pytest.fixture
def with_password(postgres_server: PostgresServer) -> str:
    """The URL of a user who needs a password, `right`."""
    return postgres_server.create_user("guarded", password="right")


def refusal(dsn: str, objects: str, **options: Any) -> str:
    with pytest.raises((ConfigurationError, SchemaMismatch)) as caught:
        PostgresLedger.open(dsn, objects, **options)
    message = caught.value.message
    assert "\n" not in message
    return message


def test_a_wrong_password_is_refused_and_shown_nowhere(
    with_password: str, objects: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("PGPASSWORD", "s3cret-but-wrong")
    message = refusal(with_password, objects)
    assert 'password authentication failed for user "guarded"' in message
    monkeypatch.delenv("PGPASSWORD")
    assert "no password" in refusal(with_password, objects)
    in_url = with_password.replace("guarded@", "guarded:s3cret-but-wrong@")
    for dsn in (in_url, f"{with_password}?password=s3cret-but-wrong", in_url + "?port=x"):
        message = refusal(dsn, objects)
        assert "s3cret" not in message
    assert "s3cret" not in caplog.text


def test_who_may_not_make_tables_is_told_so(with_password: str, objects: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", "right")
    assert "permission denied for schema public" in refusal(with_password, objects)


def test_a_server_or_database_that_is_not_there_is_refused(postgres_server: PostgresServer, objects: str) -> None:
    message = refusal(f"postgresql://verbatim@127.0.0.1:{free_port()}/postgres", objects)
    assert "Connection refused" in message
    assert 'database "nowhere" does not exist' in refusal(postgres_server.dsn("nowhere"), objects)


async def test_a_store_of_another_version_is_refused(reopen: Reopen, postgres_dsn: str, objects: str) -> None:
    await reopen().aclose()
    for version in (2, 99):
        administer(postgres_dsn, f"UPDATE verbatim_ledger SET schema_version = {version}")
        message = refusal(postgres_dsn, objects)
        assert f"schema version {version}, this program reads" in message
        assert message == refusal(postgres_dsn, objects, read_only=True)


def test_a_database_of_another_program_is_refused_and_left_alone(postgres_dsn: str, objects: str) -> None:
    administer(postgres_dsn, "CREATE TABLE sessions (cookie TEXT)")
    assert "holds tables of another program (sessions)" in refusal(postgres_dsn, objects)
    tables = "SELECT count(*) FROM pg_tables WHERE schemaname = current_schema()"
    assert administer(postgres_dsn, tables) == [(1,)]


def test_an_encoding_that_cannot_hold_every_text_is_refused(postgres_server: PostgresServer, objects: str) -> None:
    administer(postgres_server.dsn("postgres"), "CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0")
    assert "make one with ENCODING 'UTF8'" in refusal(postgres_server.dsn("latin"), objects)


async def test_what_is_only_read_is_neither_made_nor_changed(
    reopen: Reopen, postgres_dsn: str, objects: str, tmp_path: Path
) -> None:
    assert "holds no ledger" in refusal(postgres_dsn, objects, read_only=True)
    assert not (tmp_path / "objects").exists()
    ledger = reopen()
    await ledger.create_session(a_session())
    await ledger.put_blob("s", a_blob(0))
    await ledger.append_turn(a_turn(0), rows(0))
    reader = PostgresLedger.open(postgres_dsn, objects, read_only=True)
    await check_whole(reader, "s", {"t0"})
    assert await reader.blob("s", a_blob(0).sha256) == a_blob(0)
    with pytest.raises(LedgerError, match="reading only"):
        await reader.create_session(a_session("other"))
    assert await reader.reclaim() == (await ledger.reclaim())
    await reader.aclose()
    await ledger.aclose()


# ---- objects that nobody refers to ----


def test_what_a_crash_left_between_upload_and_commit_goes_after_the_grace(
    backend: PostgresBackend, objects: str
) -> None:
    locations = [backend.arrays.append(b"{}", bytes([number]) * 10) for number in range(3)]
    backend.blobs.write(a_blob(0))
    assert len(stored(objects)) == 4
    assert backend.register.sweep(grace_seconds=60.0).num_objects == 0
    report = backend.register.sweep(grace_seconds=0.0)
    assert report.num_objects == 4
    assert report.num_bytes == sum(each.num_bytes for each in locations) + len(a_blob(0).content)
    assert stored(objects) == set()
    assert backend.register.sweep(grace_seconds=0.0) == (0, 0)


def test_more_than_one_batch_is_swept(backend: PostgresBackend, objects: str) -> None:
    for number in range(450):
        backend.register.note(f"{number:064x}", f"{number:064x}", 1)
    assert backend.register.sweep(grace_seconds=0.0) == (450, 450)


async def test_a_blob_that_a_crash_left_noted_and_not_stored_is_stored_in_that_place(
    ledger: PostgresLedger, backend: PostgresBackend, objects: str
) -> None:
    picture = a_blob(0)
    place = f"{picture.sha256}-{'0' * 16}"
    backend.register.note(picture.sha256, place, len(picture.content))
    await ledger.create_session(a_session())
    await ledger.put_blob("s", picture)
    assert stored(objects) == {place}
    assert await ledger.blob("s", picture.sha256) == picture


def test_what_a_sweep_that_died_had_struck_goes_with_the_next(
    backend: PostgresBackend, postgres_dsn: str, objects: str
) -> None:
    location = backend.arrays.append(b"{}", b"rows")
    moved = "WITH s AS (DELETE FROM objects RETURNING place, num_bytes) INSERT INTO removals SELECT * FROM s"
    administer(postgres_dsn, moved)
    assert backend.register.sweep() == (1, location.num_bytes)
    assert stored(objects) == set()


async def test_sweeps_go_on_by_themselves_after_one_that_failed(
    backend: PostgresBackend, postgres_dsn: str, objects: str
) -> None:
    failures: list[Exception] = [LedgerError("the server died in a COMMIT"), psycopg.OperationalError("refused")]

    def connect() -> Connection:
        if failures:
            raise failures.pop()
        return backend.connect(read_only=False)

    backend.arrays.append(b"{}", b"rows")
    administer(postgres_dsn, "UPDATE objects SET noted_at = noted_at - interval '2 hours'")
    register = ObjectRegister(connect, open_objects(objects), backend.failures)
    register.start_sweeping(every_seconds=0.02)
    try:
        await until_async(lambda: not stored(objects))
    finally:
        register.close()
    assert not failures


async def test_what_a_row_refers_to_stays_and_goes_with_the_last_of_them(
    ledger: PostgresLedger, other: PostgresLedger, objects: str
) -> None:
    """Content that two sessions share survives the drop of one."""
    for number, each in enumerate((ledger, other)):
        await each.create_session(a_session(f"s{number}"))
        await each.put_blob(f"s{number}", a_blob(0))
        await each.append_turn(a_turn(0, f"s{number}"), rows(0))
    assert len(stored(objects)) == 3  # a picture that both have, and the routing rows of each
    assert ledger.sweep_objects(grace_seconds=0.0).num_objects == 0

    finish = await ledger.finish("s0", reward=1.0, outcome="completed", metadata={}, finished_at=1.0)
    await ledger.drop_rollout("s0", finish.snapshot)
    assert other.sweep_objects(grace_seconds=0.0).num_objects == 1
    assert await other.blob("s1", a_blob(0).sha256) == a_blob(0)
    await check_whole(other, "s1", {"t0"})

    await other.delete_session("s1")
    assert ledger.sweep_objects(grace_seconds=0.0).num_objects == 2
    assert stored(objects) == set()


async def test_a_writer_that_stalls_for_longer_than_the_grace_is_refused_and_may_try_again(
    ledger: PostgresLedger, backend: PostgresBackend, postgres_dsn: str
) -> None:
    """I4: no row ever refers to an object that was removed."""
    await ledger.create_session(a_session())
    with psycopg.connect(postgres_dsn) as rival:
        await asyncio.to_thread(rival.execute, "SELECT pg_advisory_xact_lock(hashtextextended('session s', 0))")
        appended = asyncio.create_task(ledger.append_turn(a_turn(0), rows(0)))
        await until_async(lambda: backend.register.sweep(grace_seconds=0.0).num_objects == 1)
    with pytest.raises(LedgerError, match="try again"):
        await appended
    assert await ledger.turns("s") == []
    await ledger.append_turn(a_turn(0), rows(0))
    await check_whole(ledger, "s", {"t0"})


async def test_sweeps_beside_two_writers_never_take_what_they_store(
    ledger: PostgresLedger, other: PostgresLedger, backend: PostgresBackend, objects: str
) -> None:
    """I4, I5: the same pictures come and go in both while a sweep with a short grace runs all the time."""
    stop = threading.Event()
    removed: list[int] = []

    def sweep() -> None:
        while not stop.is_set():
            removed.append(backend.register.sweep(grace_seconds=0.3).num_objects)

    async def write(each: PostgresLedger, name: str) -> None:
        for number in range(60):
            session_id = f"{name}-{number}"
            await each.create_session(a_session(session_id))
            picture = Blob.of(f"picture {number % 3}".encode(), "image/png")
            await taken(partial(each.put_blob, session_id, picture))
            await taken(partial(each.append_turn, a_turn(0, session_id), rows(0)))
            if number % 4:
                await each.delete_session(session_id)

    async def taken(store: Callable[[], Awaitable[None]]) -> None:
        """Storing may take longer than so short a grace; then it is refused, and taken when it is tried again."""
        while True:
            try:
                return await store()
            except LedgerError as error:
                if "its arrays were cleared away; try again" not in error.message:
                    raise

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        await asyncio.gather(*(write(each, f"{n}{k}") for n, each in enumerate((ledger, other)) for k in range(3)))
        await asyncio.sleep(0.6)
    finally:
        stop.set()
        sweeper.join()
    assert sum(removed) > 100
    sessions = await ledger.sessions(limit=1000)
    assert len(sessions) == 6 * 15
    for session in sessions:
        await check_whole(ledger, session.session_id, {"t0"})
        number = int(session.session_id.split("-")[1])
        picture = Blob.of(f"picture {number % 3}".encode(), "image/png")
        assert await ledger.blob(session.session_id, picture.sha256) == picture
    assert len(stored(objects)) >= len(sessions)


# ---- commands ----


async def test_doctor_finds_every_damage_also_while_a_gateway_serves(
    ledger: PostgresLedger, postgres_dsn: str, objects: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def doctor(*flags: str) -> tuple[int, list[str]]:
        code = main(["doctor", "--ledger", postgres_dsn, "--objects", objects, *flags])
        return code, capsys.readouterr().out.splitlines()

    await ledger.create_session(a_session())
    for index in range(3):
        await ledger.append_turn(a_turn(index), rows(index))
    await ledger.put_blob("s", a_blob(0))
    code, lines = await asyncio.to_thread(doctor)
    assert (code, lines) == (0, ["whole: 1 sessions, 0 rollouts, 3 turns, 153 tokens, 3 routing records, 1 blobs"])

    administer(postgres_dsn, "UPDATE turns SET facts = facts || 'x'::bytea WHERE turn_id = 't2'")
    [(place,)] = administer(postgres_dsn, "SELECT experts_file FROM turns WHERE turn_id = 't1'")
    folder = FileObjects(Path(objects.removeprefix("file://")))
    folder.put(place, b"?")
    folder.remove([name for name in stored(objects) if "-" in name])
    folder.put("0" * 64, b"stray")
    code, lines = await asyncio.to_thread(doctor)
    assert code == 1
    for expected in (
        "session s turn t2: checksum",
        f"the object {place}",
        a_blob(0).sha256,
        "not known to this ledger",
    ):
        assert sum(expected in line for line in lines) == 1, (expected, lines)
    code, lines = await asyncio.to_thread(doctor, "--json")
    assert (code, len(json.loads(lines[0])["damages"])) == (1, 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("doctor", "--ledger", "postgresql://u@h/d"), "--ledger needs --objects URL"),
        (("doctor", "--objects", "file:///x"), "--objects belongs to a database"),
        (("doctor", "--ledger", "postgresql://u@h/d", "--objects", "file:///x", "--repair"), "--repair mends"),
        (("sessions", "--ledger", "postgresql://u@h/d"), "give --data DIR .*, or --ledger URL with --objects URL"),
        (("sessions",), "give --data DIR .*, or --ledger URL with --objects URL"),
    ],
)
def test_flags_that_do_not_belong_together_are_refused(
    flags: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(list(flags)) == 2
    assert re.search(message, capsys.readouterr().err)


async def test_sessions_are_looked_into_while_a_gateway_writes_them(
    ledger: PostgresLedger, postgres_dsn: str, objects: str, capsys: pytest.CaptureFixture[str]
) -> None:
    await ledger.create_session(a_session())
    await ledger.append_turn(a_turn(0), rows(0))
    place = ("--ledger", postgres_dsn, "--objects", objects, "--json")
    assert await asyncio.to_thread(main, ["sessions", *place]) == 0
    assert json.loads(capsys.readouterr().out)["session"] == "s"
    assert await asyncio.to_thread(main, ["sessions", "s", *place]) == 0
    assert json.loads(capsys.readouterr().out)["routing_rows"] == NUM_ROWS


# ---- how much there is ----


async def test_usage_tells_what_tables_and_objects_take(ledger: PostgresLedger, backend: PostgresBackend) -> None:
    await ledger.create_session(a_session())
    await ledger.put_blob("s", a_blob(0))
    await ledger.append_turn(a_turn(0), rows(0))
    usage = await ledger.usage()
    assert usage.rows_bytes > 8192
    assert usage.routing_bytes > NUM_ROWS * 8
    assert usage.dead_routing_bytes == 0
    assert usage.blob_bytes == len(a_blob(0).content)
    orphan = backend.arrays.append(b"{}", b"orphan")
    assert (await ledger.usage()).dead_routing_bytes == orphan.num_bytes
    assert (await ledger.reclaim()).num_bytes == 0  # it may be of a turn that is just being stored
    administer(ledger_dsn(backend), "UPDATE objects SET noted_at = noted_at - interval '2 hours'")
    reclaimed = await ledger.reclaim()
    assert (reclaimed.num_files, reclaimed.num_bytes) == (1, orphan.num_bytes)


def ledger_dsn(backend: PostgresBackend) -> str:
    return backend.name


def a_large_turn(index: int) -> TurnRecord:
    """60 KB that nothing compresses to less than a half."""
    large = {"role": "user", "content": np.random.default_rng(index).bytes(60_000).hex()}
    return replace(a_turn(index), added_messages=(large,))


async def test_a_full_disk_of_the_database_is_said_and_what_was_sampled_waits_for_room(tmp_path: Path) -> None:
    """I4: nothing is half-stored, and all goes on by itself when there is room."""
    with small_disk(24 * MIB) as disk, running_postgres(enter=disk.enter) as server:
        (disk.folder / "space").mkdir()
        owner = server.folder.stat()
        os.chown(disk.folder / "space", owner.st_uid, owner.st_gid)
        administer(server.dsn("postgres"), f"CREATE TABLESPACE small LOCATION '{disk.inside / 'space'}'")
        dsn = server.dsn("postgres") + "?options=-cdefault_tablespace%3Dsmall"
        objects = (tmp_path / "objects").as_uri()
        ledger = PostgresLedger.open(dsn, objects)
        patient = PostgresLedger.open(dsn, objects, full_wait_seconds=20.0)
        await ledger.create_session(a_session())
        fill(disk.folder / "filler", leave_bytes=MIB)
        acknowledged: set[str] = set()
        while (index := len(acknowledged)) < 1000:
            try:
                await ledger.append_turn(a_large_turn(index), rows(index))
            except LedgerFull:
                break
            acknowledged.add(f"t{index}")
        waiting = asyncio.create_task(patient.append_turn(a_large_turn(index), rows(index)))
        await asyncio.sleep(0.5)
        assert not waiting.done()
        await check_whole(ledger, "s", acknowledged)
        (disk.folder / "filler").unlink()
        await waiting
        await check_whole(ledger, "s", acknowledged | {f"t{index}"})
        await patient.aclose()
        await ledger.aclose()


async def test_a_full_disk_of_the_objects_is_said_and_what_was_sampled_waits_for_room(postgres_dsn: str) -> None:
    """I4: as above, where the objects lie in a folder."""
    with small_disk(4 * MIB) as disk:
        ledger = PostgresLedger.open(postgres_dsn, disk.folder.as_uri(), full_wait_seconds=20.0)
        await ledger.create_session(a_session())
        fill(disk.folder / "filler")
        waiting = asyncio.create_task(ledger.append_turn(a_turn(0), rows(0)))
        await asyncio.sleep(0.5)
        assert not waiting.done()
        (disk.folder / "filler").unlink()
        await waiting
        await check_whole(ledger, "s", {"t0"})
        await ledger.aclose()
