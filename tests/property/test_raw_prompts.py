"""Raw prompts and chats mixed at random in one session: tokens decide where a raw prompt stands, and nothing is lost.

Turns are real but for the engine, which samples any ids at all: half characters, control tokens, ends and cut replies.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from engines.scripted import ScriptedEngine, ScriptedReply
from gateway.contracts.generation import Finish, FinishReason, GenerateRequest
from gateway.contracts.records import RootContext, SessionOrigin, TurnRecord
from gateway.ledger.sqlite import SqliteLedger
from gateway.replicas.pool import ReplicaPool, ReplicaSettings
from gateway.sessions.attach import attach
from gateway.sessions.model import ServedModel
from gateway.sessions.picks import AllTurns
from gateway.sessions.raw import attach_raw
from gateway.sessions.registry import Session, SessionRegistry, new_session
from gateway.sessions.report import Retokenisation, session_report
from gateway.sessions.segments import build_segments
from gateway.sessions.turns import TurnParts, TurnRunner, TurnSettings
from gateway.tito.conversation import HistoryPolicy
from gateway.wire.completions import parse_completions_request
from gateway.wire.openai import parse_chat_request
from gateway.wire.request import RawPrompt

Prompt = list[int] | str
TEXTS = ["so", " it is", "\n", "über 🙂", "<|im_end|>\n<|im_start|>user\nand?", "\ufffd"]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> ServedModel:
    return ServedModel.load(tiny_model, history_policy=HistoryPolicy.KEEP)


@dataclass
class Client:
    """One session, and what is done to it; every draw is hypothesis's."""

    data: st.DataObject
    model: ServedModel
    runner: TurnRunner
    session: Session
    engine: ScriptedEngine
    chats: list[list[Any]] = field(default_factory=lambda: [[]])
    raw: list[TurnRecord] = field(default_factory=list)

    def one_of(self, *choices: Any) -> Any:
        return self.data.draw(st.sampled_from(choices))

    async def chat(self) -> None:
        """A message more in some conversation; what stands for a raw prompt in the record is found by none."""
        messages = [*self.one_of(*self.chats[-4:]), {"role": "user", "content": self.one_of(*TEXTS)}]
        if self.raw:
            forged = [*self.session.tree[self.one_of(*self.raw).turn_id].messages(), *messages]
            place = attach(self.session.tree, forged, RootContext((), {}))
            assert place.parent is None or place.parent.record.turn_id not in {turn.turn_id for turn in self.raw}
        finished = await self.turn(parse_chat_request(json.dumps({"messages": messages}).encode()))
        parent_id = finished.record.attachment.parent_id
        assert parent_id not in {turn.turn_id for turn in self.raw}
        self.chats.append([*messages, finished.whole.reply.message()])

    async def complete(self) -> None:
        """What some turn recorded, perhaps cut or changed, and something behind it; as ids or as text."""
        prompt = self.prompt()
        num_choices = self.one_of(1, 1, 2)
        expected = self.deepest(prompt)
        body = json.dumps({"prompt": prompt, "max_tokens": self.one_of(1, 5, 40)}).encode()
        [request] = parse_completions_request(body).turns
        for finished in await asyncio.gather(*(self.turn(request) for _ in range(num_choices))):
            self.check(finished, prompt, expected)
            self.raw.append(finished.record)

    async def turn(self, request: Any) -> Any:
        finished = await self.runner.start(self.session, request).finished()
        if self.one_of(True, True, False):
            self.runner.delivered(self.session, finished)
        return finished

    def prompt(self) -> Prompt:
        nodes = list(self.session.tree)
        known = self.one_of(*nodes[-5:]).token_ids().tolist() if nodes and self.one_of(True, True, False) else []
        if self.one_of(False, False, True):
            known = known[: self.data.draw(st.integers(0, len(known)))]
        if self.one_of(True, False):
            own = self.data.draw(st.lists(st.integers(0, self.model.tokenizer.vocab_size - 1), max_size=6))
            return known + own or [7]
        return self.model.tokenizer.decode(known) + self.one_of("", *TEXTS) or "q"

    def deepest(self, prompt: Prompt) -> str | None:
        """By trying every recorded turn."""
        tree, decode = self.session.tree, self.model.tokenizer.decode
        best: tuple[Any, str] | None = None
        for node in tree:
            path: Prompt = node.token_ids().tolist() if isinstance(prompt, list) else decode(node.token_ids())
            if prompt[: len(path)] == path:
                delivered_at = tree.delivered_at(node.record.turn_id) or 0.0
                length = len(path) if isinstance(path, list) else len(path.encode())
                rank = (length, delivered_at, node.record.index)
                best = max(best, (rank, node.record.turn_id)) if best else (rank, node.record.turn_id)
        return best[1] if best else None

    def check(self, finished: Any, prompt: Prompt, expected: str | None) -> None:
        """I1: the parent is the deepest, its recorded ids begin the prompt, and only what follows was made of text."""
        record, tokenizer = finished.record, self.model.tokenizer
        assert record.attachment.parent_id == expected
        assert record.meta["certified_by"] == "raw"
        [message] = record.added_messages
        assert message["role"] == "prompt"
        recorded = [] if expected is None else self.session.tree[expected].token_ids().tolist()
        sent = finished.whole.prompt_token_ids.tolist()
        assert sent[: len(recorded)] == recorded
        assert record.prompt_token_ids.tolist() == sent[len(recorded) :]
        if isinstance(prompt, list):
            assert sent == prompt
        else:
            rest = prompt[len(tokenizer.decode(recorded)) :]
            assert sent[len(recorded) :] == tokenizer.encode(rest).tolist()
            assert message["content"] == rest

    async def judge(self, ledger: SqliteLedger) -> None:
        """I1, I3: engines got the recorded ids, each sampled token trains once, and a new process sees the same."""
        tree = self.session.tree
        asked = [request.token_ids.tobytes() for request in self.engine.requests]
        for node in tree:
            prompt = node.token_ids()[: node.num_tokens - len(node.record.output_token_ids)]
            assert prompt.tobytes() in asked
        turns = await ledger.turns("s")
        segments = build_segments(turns, {})
        trained = sum(int(segment.loss_mask.sum()) for segment in segments)
        assert trained == sum(len(turn.output_token_ids) for turn in turns)
        await self.session.deliveries_noted()
        again = await SessionRegistry(ledger).get("s")
        for prompt in [self.prompt() for _ in range(3)]:
            raw = RawPrompt(text=prompt) if isinstance(prompt, str) else RawPrompt(np.array(prompt, dtype=np.int32))
            tokenizer = self.model.tokenizer
            found = attach_raw(again.tree, again.token_paths, raw, tokenizer).place.parent
            assert (None if found is None else found.record.turn_id) == self.deepest(prompt)
        report = session_report(
            new_session("s", key_hash="", origin=SessionOrigin.CREATED),
            turns,
            AllTurns(),
            Retokenisation.of_model(self.model),
        )
        assert report.num_turns == len(turns)


def sampled(model: ServedModel, request: GenerateRequest) -> ScriptedReply:
    """Any ids, the same for equal prompts: siblings may be equal."""
    seed = hashlib.blake2b(request.token_ids.tobytes(), digest_size=8).digest()
    random = np.random.default_rng(int.from_bytes(seed))
    ids = random.integers(0, model.tokenizer.vocab_size, random.integers(1, 12)).tolist()
    if random.random() < 0.5:
        stop = model.tokenizer.eos_token_ids[0]
        return ScriptedReply((*ids, stop), finish=Finish(FinishReason.STOP, stop), chunk_size=99)
    return ScriptedReply(tuple(ids), finish=Finish(FinishReason.LENGTH), chunk_size=3)


async def play(model: ServedModel, data: st.DataObject, folder: Path) -> None:
    engine = ScriptedEngine(lambda request: sampled(model, request), vocab_size=model.tokenizer.vocab_size)
    pool = ReplicaPool(ReplicaSettings(), check_identity=model.check_engine, stop_token_ids=frozenset())
    await pool.add(engine)
    ledger = SqliteLedger.open(folder)
    parts = TurnParts(model, pool, ledger, TurnSettings(default_max_new_tokens=64), lambda *_: None)
    runner = TurnRunner(parts)
    try:
        session, _ = await SessionRegistry(ledger).create(new_session("s", key_hash="", origin=SessionOrigin.CREATED))
        client = Client(data, model, runner, session, engine)
        for step in data.draw(st.lists(st.sampled_from([Client.chat, Client.complete, Client.complete]), max_size=9)):
            await step(client)
        await client.judge(ledger)
    finally:
        await runner.aclose()
        await pool.aclose()
        await ledger.aclose()


@settings(max_examples=25, phases=(Phase.explicit, Phase.generate))
@given(data=st.data())
def test_raw_prompts_among_chats_extend_the_deepest_recorded_tokens(model: ServedModel, data: st.DataObject) -> None:
    """I1, I3: a raw prompt extends exactly the turn whose tokens it begins with; no chat finds a raw turn."""
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(play(model, data, Path(folder)))
