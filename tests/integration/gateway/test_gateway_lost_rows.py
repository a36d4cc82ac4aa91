"""Routing rows that an engine lost with a turn: asked for with the next one, and never taken from other weights."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.scripted import ScriptedEngine, ScriptedReply, scripted_experts
from gateway.contracts.generation import GenerateRequest
from gateway.contracts.records import SessionOrigin
from gateway.contracts.samples import Segment
from gateway.ledger.sqlite import SqliteLedger
from gateway.replicas.pool import ReplicaPool, ReplicaSettings
from gateway.sessions.idempotency import CallChoice
from gateway.sessions.model import ServedModel
from gateway.sessions.picks import AllTurns
from gateway.sessions.registry import Session, SessionRegistry, new_session
from gateway.sessions.segments import load_segments
from gateway.sessions.turns import TurnParts, TurnRunner, TurnSettings
from gateway.tito.conversation import HistoryPolicy
from gateway.wire.openai import parse_chat_request

ANSWER = "one two"


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> ServedModel:
    return ServedModel.load(tiny_model, history_policy=HistoryPolicy.KEEP)


class Conversation:
    """An agent's turns with an engine that loses the rows of some."""

    def __init__(self, model: ServedModel, ledger: SqliteLedger) -> None:
        self._tokens = (*model.tokenizer.encode(ANSWER).tolist(), *model.tokenizer.eos_token_ids[:1])
        self._ledger = ledger
        self._messages: list[dict[str, Any]] = []
        self._loses = False
        self.engine = ScriptedEngine(self._reply, routing=model.routing, vocab_size=model.tokenizer.vocab_size)
        self.runner: TurnRunner
        self.session: Session

    def _reply(self, request: GenerateRequest) -> ScriptedReply:
        return ScriptedReply(self._tokens, hides_experts=self._loses)

    async def turn(self, *, loses_rows: bool = False) -> None:
        self._loses = loses_rows
        self._messages.append({"role": "user", "content": f"question {len(self._messages)}"})
        request = parse_chat_request(json.dumps({"messages": self._messages}).encode())
        choice = CallChoice("/v1/chat/completions", request.digest, 0)
        turn = await self.runner.answer(self.session, request, choice)
        finished = await turn.finished()
        self.runner.delivered(self.session, finished)
        self._messages.append({"role": "assistant", "content": finished.whole.reply.content})

    async def segment(self) -> Segment:
        _, segments = await load_segments(self._ledger, "s", AllTurns())
        (segment,) = segments
        return segment


@asynccontextmanager
async def conversation(model: ServedModel, folder: Path) -> AsyncIterator[Conversation]:
    ledger = SqliteLedger.open(folder)
    talk = Conversation(model, ledger)
    pool = ReplicaPool(ReplicaSettings(), check_identity=model.check_engine, stop_token_ids=frozenset())
    await pool.add(talk.engine)
    talk.runner = TurnRunner(TurnParts(model, pool, ledger, TurnSettings(default_max_new_tokens=64), lambda *_: None))
    try:
        made = new_session("s", key_hash="", origin=SessionOrigin.CREATED)
        talk.session, _ = await SessionRegistry(ledger).create(made)
        yield talk
    finally:
        await talk.runner.aclose()
        await pool.aclose()
        await ledger.aclose()


async def test_rows_lost_with_two_turns_come_with_the_next_one(model: ServedModel, tmp_path: Path) -> None:
    """I2: every row but the last token's is there, and is the one of its token."""
    async with conversation(model, tmp_path) as talk:
        await talk.turn()
        first_stop = len((await talk.segment()).token_ids) - 1
        await talk.turn(loses_rows=True)
        await talk.turn(loses_rows=True)
        assert not (await talk.segment()).routed_valid[first_stop:].any()
        await talk.turn()
        segment = await talk.segment()
        assert talk.engine.requests[-1].routed_experts_start == first_stop
    assert model.routing is not None
    assert segment.routed_valid.all()
    assert segment.routed_experts is not None
    expected = scripted_experts(segment.token_ids[:-1], model.routing, start=0)
    assert np.array_equal(segment.routed_experts, expected)


async def test_lost_rows_are_not_taken_from_weights_that_did_not_sample(model: ServedModel, tmp_path: Path) -> None:
    """I9: the new weights' rows of old tokens are other rows."""
    async with conversation(model, tmp_path) as talk:
        await talk.turn()
        first_stop = len((await talk.segment()).token_ids) - 1
        await talk.turn(loses_rows=True)
        second_stop = len((await talk.segment()).token_ids) - 1
        talk.engine.load_policy(1)
        await talk.turn()
        valid = (await talk.segment()).routed_valid
    assert valid[:first_stop].all()
    assert not valid[first_stop:second_stop].any()
    assert valid[second_stop:].all()
