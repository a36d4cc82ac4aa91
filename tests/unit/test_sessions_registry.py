"""Which sessions stay in memory: those in use, and the latest others."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.contracts.errors import Conflict
from gateway.contracts.records import SessionOrigin
from gateway.ledger.sqlite import SqliteLedger
from gateway.sessions.registry import Session, SessionRegistry, new_session


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[SqliteLedger]:
    ledger = SqliteLedger.open(tmp_path)
    yield ledger
    await ledger.aclose()


async def made(registry: SessionRegistry, session_id: str) -> Session:
    session, is_new = await registry.create(new_session(session_id, key_hash="", origin=SessionOrigin.CREATED))
    assert is_new
    return session


def in_memory(registry: SessionRegistry) -> set[str]:
    return {session.record.session_id for session in registry.loaded}


async def test_idle_sessions_make_room_for_new_ones_and_used_ones_do_not(ledger: SqliteLedger) -> None:
    registry = SessionRegistry(ledger, capacity=3)
    (await made(registry, "used")).closing = True
    for number in range(20):
        await made(registry, f"s{number}")
    assert in_memory(registry) == {"used", "s18", "s19"}
    assert (await registry.get("s0")).record.session_id == "s0"  # nothing is lost: it is read again


async def test_one_that_is_touched_stays_longer_than_those_made_after_it(ledger: SqliteLedger) -> None:
    registry = SessionRegistry(ledger, capacity=3)
    for number in range(3):
        await made(registry, f"s{number}")
    first = registry.unchanged("s0")
    assert first is not None
    registry.touch(first)
    await made(registry, "s3")
    assert in_memory(registry) == {"s0", "s2", "s3"}


async def test_more_than_there_is_room_for_stay_where_all_are_used(ledger: SqliteLedger) -> None:
    registry = SessionRegistry(ledger, capacity=3)
    sessions = []
    for number in range(40):
        sessions.append(await made(registry, f"s{number}"))
        sessions[-1].closing = True
    assert len(in_memory(registry)) == 40
    for session in sessions:
        session.closing = False
    for number in range(40, 45):
        await made(registry, f"s{number}")
    assert len(in_memory(registry)) == 3
    assert "s44" in in_memory(registry)


async def test_one_that_is_there_is_found_and_another_of_its_name_refused(ledger: SqliteLedger) -> None:
    """Nobody looks before it is written, in this registry or in one that has not read it."""
    wanted = new_session("s", key_hash="", origin=SessionOrigin.CREATED, labels={"a": "b"})
    first, is_new = await SessionRegistry(ledger).create(wanted)
    assert is_new
    again, is_new = await SessionRegistry(ledger).create(wanted)
    assert (again.record, is_new) == (first.record, False)
    other = new_session("s", key_hash="", origin=SessionOrigin.CREATED)
    for registry in (SessionRegistry(ledger), SessionRegistry(ledger)):
        with pytest.raises(Conflict):
            await registry.create(other)
    again, is_new = await SessionRegistry(ledger).create(replace(wanted, created_at=wanted.created_at + 1))
    assert (again.record.created_at, is_new) == (wanted.created_at, False)
