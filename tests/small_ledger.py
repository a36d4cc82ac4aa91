"""A small ledger with something of everything, for tests that damage or empty it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from gateway.contracts.examples import example_turn
from gateway.contracts.experts import RoutedExperts
from gateway.contracts.media import Blob
from gateway.contracts.records import (
    Attachment,
    MatchTier,
    RootContext,
    SegmentReason,
    SessionOrigin,
    SessionRecord,
    TurnRecord,
)
from gateway.contracts.versions import VersionSpan
from gateway.ledger.sqlite import SqliteLedger

NUM_TURNS = 4
_ADDED, _SAMPLED = 20, 2


def a_session(session_id: str) -> SessionRecord:
    return SessionRecord(
        session_id, "g", 3, {"q": 1}, {"k": session_id}, {}, {}, None, "", SessionOrigin.CREATED, True, time.time()
    )


def a_turn(session_id: str, index: int) -> TurnRecord:
    """One of a chain: each extends the one before it."""
    parent = f"t{index - 1}" if index else None
    num_before = index * (_ADDED + _SAMPLED)
    return example_turn(
        index,
        session_id=session_id,
        turn_id=f"t{index}",
        attachment=Attachment(
            parent,
            parent,
            MatchTier.EXACT if parent else MatchTier.NONE,
            None if parent else SegmentReason.FIRST,
        ),
        root=None if parent else RootContext((), {}),
        added_messages=({"role": "user", "content": f"question {index}"},),
        reply={"role": "assistant", "content": "answer"},
        prompt_token_ids=np.arange(_ADDED, dtype=np.int32),
        output_token_ids=np.array([index, 7], dtype=np.int32),
        output_logprobs=np.array([-0.5, -0.25], dtype=np.float32),
        version_spans=(VersionSpan(0, _SAMPLED, 0),),
        num_layers=4,
        num_experts=8,
        top_k=2,
        experts_start=num_before - 1 if index else 0,
        experts_stop=num_before + _ADDED + _SAMPLED - 1,
        engine_id="engine",
        model="tiny",
        created_at=time.time(),
    )


def rows_of(turn: TurnRecord) -> RoutedExperts:
    generator = np.random.default_rng(turn.index)
    shape = (turn.experts_stop - turn.experts_start, turn.num_layers, turn.top_k)
    return RoutedExperts(generator.integers(0, 8, shape, dtype=np.uint8), turn.experts_start)


async def fill_ledger(ledger: SqliteLedger, session_ids: Iterable[str], *, finished: Iterable[str]) -> None:
    """Sessions of a chain of turns each; of them, those in `finished` have ended."""
    for session_id in session_ids:
        await ledger.create_session(a_session(session_id))
        await ledger.put_blob(session_id, Blob.of(f"picture {session_id}".encode(), "image/png"))
        for index in range(NUM_TURNS):
            turn = a_turn(session_id, index)
            await ledger.append_turn(turn, rows_of(turn))
            await ledger.mark_delivered(session_id, turn.turn_id, time.time())
    for session_id in finished:
        await ledger.finish(session_id, reward=1.0, outcome="completed", metadata={}, finished_at=time.time())


async def make_ledger(data: Path) -> None:
    """Sessions a, b, c; a and b have ended, a is acknowledged by `trainer`, b lent to it."""
    ledger = SqliteLedger.open(data)
    await fill_ledger(ledger, "abc", finished="ab")
    for consumes in (True, False):
        lease = await ledger.lease(
            consumer="trainer", limit=1, lease_seconds=600, whole_groups=False, labels=None, now=time.time()
        )
        assert lease is not None
        if consumes:
            await ledger.acknowledge(lease.lease_id)
    await ledger.aclose()
