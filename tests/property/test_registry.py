"""The sessions in memory, asked for by many callers at once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gateway.contracts.records import SessionOrigin
from gateway.ledger.sqlite import SqliteLedger
from gateway.sessions.registry import Session, SessionRegistry, new_session

NUM_ROUNDS = 60


@pytest.mark.parametrize("shared", [False, True])
async def test_callers_who_name_a_new_session_at_once_all_get_one_and_the_same(tmp_path: Path, shared: bool) -> None:
    """I3: a look that began before the session was made must not be taken for an answer after it."""
    ledger = SqliteLedger.open(tmp_path)
    ledger.share(shared)
    registry = SessionRegistry(ledger)

    async def make(session_id: str, delay: float) -> Session:
        await asyncio.sleep(delay)
        session, _ = await registry.create(new_session(session_id, key_hash="", origin=SessionOrigin.RECREATED))
        return session

    async def look(session_id: str, delay: float) -> None:
        await asyncio.sleep(delay)
        for _ in range(20):
            await registry.find(session_id)

    for number in range(NUM_ROUNDS):
        callers = (make(f"s{number}", 0.0002 * i) for i in range(5))
        lookers = (look(f"s{number}", 0.0003 * i) for i in range(8))
        sessions, _ = await asyncio.gather(asyncio.gather(*callers), asyncio.gather(*lookers))
        assert len(set(map(id, sessions))) == 1
    await ledger.aclose()
