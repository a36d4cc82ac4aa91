"""Clients that ask, leave, come back and ask again in any order, over restarts: each reply sampled once (design 4)."""

from __future__ import annotations

import asyncio
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from engines.scripted import ScriptedEngine, ScriptedReply
from gateway.contracts.errors import EngineUnavailable
from gateway.contracts.generation import GenerateRequest
from gateway.contracts.records import SessionOrigin
from gateway.ledger.sqlite import SqliteLedger
from gateway.replicas.pool import ReplicaPool, ReplicaSettings
from gateway.sessions.idempotency import CallChoice
from gateway.sessions.model import ServedModel
from gateway.sessions.picks import AllTurns
from gateway.sessions.registry import Session, SessionRegistry, new_session
from gateway.sessions.segments import load_segments
from gateway.sessions.turn import Turn
from gateway.sessions.turns import TurnParts, TurnRunner, TurnSettings
from gateway.tito.conversation import HistoryPolicy
from gateway.wire.openai import parse_chat_request

QUESTIONS = ("one?", "one?", "one?", "two?")
ANSWER = "one two"


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> ServedModel:
    return ServedModel.load(tiny_model, history_policy=HistoryPolicy.KEEP)


@dataclass(eq=False)
class Caller:
    """One call of a client that is there (waits for its reply), has gone, or has it."""

    question: str
    turn: Turn
    state: str = "waits"


@dataclass
class Clients:
    """All calls of one session; every draw is hypothesis's."""

    data: st.DataObject
    model: ServedModel
    ledger: SqliteLedger
    runner: TurnRunner
    session: Session
    callers: list[Caller] = field(default_factory=list)
    delivered: list[str] = field(default_factory=list)

    def draw(self, state: str) -> Caller | None:
        able = [caller for caller in self.callers if caller.state == state]
        return self.data.draw(st.sampled_from(able)) if able else None

    async def ask(self) -> None:
        question = self.data.draw(st.sampled_from(QUESTIONS))
        left = [caller for caller in self.callers if caller.state == "gone" and caller.question == question]
        if self.runner.parts.settings.disconnect_grace_seconds == 0:
            await asyncio.gather(*(caller.turn.settled() for caller in left))
            await asyncio.sleep(0)
        known = {node.record.turn_id for node in self.session.tree}
        left = [caller for caller in left if caller.turn.turn_id in known or not self.is_over(caller)]
        request = parse_chat_request(json.dumps({"messages": [{"role": "user", "content": question}]}).encode())
        turn = await self.runner.answer(self.session, request, CallChoice("/v1/chat/completions", request.digest, 0))
        others = {caller.turn.turn_id for caller in self.callers if caller.state in ("waits", "has it")}
        assert turn.turn_id not in others, "what somebody waits for or has is nobody else's"
        ids = {caller.turn.turn_id: caller for caller in left}
        origin = ids.get(turn.turn_id) or await self.begun(turn, ids)
        assert (origin is not None) == bool(left), "a retry is answered by what it left, and nothing else is"
        if origin is not None:
            origin.state = "retried"
        self.callers.append(Caller(question, turn))

    def is_over(self, caller: Caller) -> bool:
        return caller.turn not in self.session.running

    async def begun(self, turn: Turn, ids: dict[str, Caller]) -> Caller | None:
        """Whose reply a new turn goes on with, as its first event shows."""
        if not ids:
            return None
        async for event in turn.events():
            if hasattr(event, "token_ids"):
                parents = [c for i, c in ids.items() if i in {n.record.turn_id for n in self.session.tree}]
                tokens = event.token_ids.tolist()
                return next((c for c in parents if self.kept(c) == tokens[: len(self.kept(c))]), None)
        return None

    def kept(self, caller: Caller) -> list[int]:
        node = self.session.tree[caller.turn.turn_id]
        return [token for part in node.reply_nodes() for token in part.record.output_token_ids.tolist()]

    async def leave(self) -> None:
        if (caller := self.draw("waits")) is not None:
            caller.state = "gone"
            self.runner.abandon(self.session, caller.turn)

    async def receive(self) -> None:
        if (caller := self.draw("waits")) is not None:
            finished = await caller.turn.finished()
            assert finished.whole.reply.content == ANSWER
            assert finished.whole.token_ids.tolist()[:-1] == self.model.tokenizer.encode(ANSWER).tolist()
            assert len(finished.whole.logprobs) == len(finished.whole.token_ids)
            caller.state = "has it"
            self.runner.delivered(self.session, finished)
            self.delivered.append(finished.record.turn_id)

    async def wait(self) -> None:
        await asyncio.sleep(self.data.draw(st.sampled_from([0.0, 0.004, 0.08])))

    async def restart(self) -> None:
        """Another process takes the session over from the ledger; nobody's connection survives."""
        for turn in list(self.session.running):
            turn.cut(EngineUnavailable("the gateway stops"))
        await asyncio.gather(*(turn.settled() for turn in list(self.session.running)))
        await asyncio.sleep(0)
        await self.session.deliveries_noted()
        self.session = await SessionRegistry(self.ledger).get("s")
        for caller in self.callers:
            if caller.state == "waits":
                caller.state = "gone"

    async def judge(self) -> None:
        """I3: no reply went to two clients, every sampled token trains exactly once."""
        while any(caller.state == "waits" for caller in self.callers):
            await self.receive()
        for turn in list(self.session.running):
            await turn.settled()
        await asyncio.sleep(0)
        assert len(set(self.delivered)) == len(self.delivered)
        picked, segments = await load_segments(self.ledger, "s", AllTurns())
        sampled = sum(len(record.output_token_ids) for record in await self.ledger.turns("s"))
        assert sum(int(segment.loss_mask.sum()) for segment in segments) == sampled
        assert picked.report.num_sampled_tokens == sampled


async def play(model: ServedModel, data: st.DataObject, folder: Path) -> None:
    tokens = (*model.tokenizer.encode(ANSWER).tolist(), *model.tokenizer.eos_token_ids[:1])

    def rest(request: GenerateRequest) -> ScriptedReply:
        asked = request.token_ids.tolist()
        begun = next((n for n in range(len(tokens) - 1, 0, -1) if asked[-n:] == list(tokens[:n])), 0)
        return ScriptedReply(tokens[begun:], delay_seconds=0.001)

    engine = ScriptedEngine(rest, routing=model.routing, vocab_size=model.tokenizer.vocab_size)
    pool = ReplicaPool(ReplicaSettings(), check_identity=model.check_engine, stop_token_ids=frozenset())
    await pool.add(engine)
    ledger = SqliteLedger.open(folder)
    grace = data.draw(st.sampled_from([0.0, 60.0]))
    turns = TurnSettings(default_max_new_tokens=64, disconnect_grace_seconds=grace)
    runner = TurnRunner(TurnParts(model, pool, ledger, turns, lambda *_: None))
    try:
        session, _ = await SessionRegistry(ledger).create(new_session("s", key_hash="", origin=SessionOrigin.CREATED))
        clients = Clients(data, model, ledger, runner, session)
        ordinary = [Clients.ask, Clients.leave, Clients.wait, Clients.receive]
        steps = st.sampled_from([*ordinary, Clients.ask, *ordinary, Clients.ask, Clients.restart])
        for step in data.draw(st.lists(steps, min_size=8, max_size=16)):
            await step(clients)
        await clients.judge()
    finally:
        await runner.aclose()
        await pool.aclose()
        await ledger.aclose()


@settings(max_examples=60, phases=(Phase.explicit, Phase.generate))
@given(data=st.data())
def test_every_retry_is_answered_by_what_its_call_left_behind(model: ServedModel, data: st.DataObject) -> None:
    """I3 over joins, given replies, continued partials, siblings and restarts."""
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(play(model, data, Path(folder)))
