"""What agents do to their histories, over real turns: nothing is refused or lost, and what was only appended extends.

The engine is the scripted one; prompts are compared with what it really received (I1).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.scripted import ScriptedEngine, ScriptedReply
from gateway.contracts.generation import GenerateRequest
from gateway.contracts.records import SegmentReason, SessionOrigin, TurnRecord
from gateway.ledger.sqlite import SqliteLedger
from gateway.replicas.pool import ReplicaPool, ReplicaSettings
from gateway.sessions.model import ServedModel
from gateway.sessions.registry import Session, SessionRegistry, new_session
from gateway.sessions.segments import build_segments
from gateway.sessions.turns import TurnParts, TurnRunner, TurnSettings
from gateway.tito.conversation import HistoryPolicy
from gateway.wire.openai import parse_chat_request

Messages = list[dict[str, Any]]
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("f", "g")]
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1, "b": [true, 2.0]}}\n</tool_call>'


@dataclass(frozen=True, slots=True, eq=False)
class Spoken:
    """One turn as its agent saw it: what it sent, then the reply, reasoning and all."""

    record: TurnRecord
    conversation: Messages


@dataclass(eq=False, slots=True)
class Rig:
    """One session on a gateway's real parts, without HTTP."""

    runner: TurnRunner
    session: Session
    engine: ScriptedEngine
    ledger: SqliteLedger
    turns: list[Spoken] = field(default_factory=list)

    async def ask(self, messages: Sequence[dict[str, Any]], **fields: Any) -> Spoken:
        """One call, as bytes; the reply counts as delivered."""
        body = json.dumps({"messages": list(messages), **fields}).encode()
        finished = await self.runner.start(self.session, parse_chat_request(body)).finished()
        self.runner.delivered(self.session, finished)
        spoken = Spoken(finished.record, [*messages, finished.whole.reply.message()])
        self.turns.append(spoken)
        return spoken

    async def check(self) -> int:
        """I1, I3: engines got the recorded ids, every sampled token trains exactly once; the number of segments."""
        tree = self.session.tree
        asked = {request.token_ids.tobytes() for request in self.engine.requests}
        sampled = 0
        for record in tree.records:
            node = tree[record.turn_id]
            prompt = node.token_ids()[: node.num_tokens - len(record.output_token_ids)]
            assert prompt.tobytes() in asked
            if node.parent is not None:
                np.testing.assert_array_equal(prompt[: node.parent.num_tokens], node.parent.token_ids())
            sampled += len(record.output_token_ids)
        segments = build_segments(await self.ledger.turns(self.session.record.session_id), {})
        assert sum(int(segment.loss_mask.sum()) for segment in segments) == sampled
        return len(segments)


Script = Callable[[Rig], Awaitable[None]]


@pytest.fixture
def play(tiny_model: Path, tmp_path: Path) -> Callable[[Script], None]:
    """Runs a script against a rig of its own."""
    model = ServedModel.load(tiny_model, history_policy=HistoryPolicy.KEEP)

    def reply(request: GenerateRequest) -> ScriptedReply:
        prompt = model.tokenizer.decode(request.token_ids)
        text = f"<think>\nlet me see\n</think>\n{CALL}" if prompt.rfind("use f") > prompt.rfind("tool") else "so it is"
        return ScriptedReply((*model.tokenizer.encode(text).tolist(), model.tokenizer.eos_token_ids[0]), chunk_size=99)

    async def run(script: Script) -> None:
        pool = ReplicaPool(
            ReplicaSettings(),
            check_identity=model.check_engine,
            stop_token_ids=frozenset(model.tokenizer.eos_token_ids),
        )
        engine = ScriptedEngine(reply, vocab_size=model.tokenizer.vocab_size)
        await pool.add(engine)
        ledger = SqliteLedger.open(tmp_path)
        settings = TurnSettings(default_max_new_tokens=256)
        runner = TurnRunner(TurnParts(model, pool, ledger, settings, lambda *_: None))
        try:
            registry = SessionRegistry(ledger)
            session, _ = await registry.create(new_session("s", key_hash="", origin=SessionOrigin.CREATED))
            await script(Rig(runner, session, engine, ledger))
        finally:
            await runner.aclose()
            await pool.aclose()
            await ledger.aclose()

    return lambda script: asyncio.run(run(script))


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def result(call_id: str = "mine") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": "42"}


def call_id_of(spoken: Spoken) -> str:
    return str(spoken.conversation[-1]["tool_calls"][0]["id"])


def without_reasoning(messages: Messages) -> Messages:
    return [{name: value for name, value in m.items() if name != "reasoning_content"} for m in messages]


def under_reasoning(messages: Messages) -> Messages:
    return [{("reasoning" if name == "reasoning_content" else name): m[name] for name in m} for m in messages]


def with_calls(messages: Messages, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Messages:
    return [
        m | {"tool_calls": [change(call) for call in m["tool_calls"]]} if "tool_calls" in m else m for m in messages
    ]


def arguments_respelled(messages: Messages) -> Messages:
    def respelled(call: dict[str, Any]) -> dict[str, Any]:
        return call | {"index": 0, "function": call["function"] | {"arguments": '{ "b":[true,2], "a":1.0 }'}}

    return with_calls(messages, respelled)


def ids_renamed(messages: Messages) -> Messages:
    renamed = with_calls(messages, lambda call: call | {"id": "mine"})
    return [m | {"tool_call_id": "mine"} if "tool_call_id" in m else m for m in renamed]


def ids_dropped(messages: Messages) -> Messages:
    bare = with_calls(messages, lambda call: {"type": "function", "function": call["function"]})
    return [{name: value for name, value in m.items() if name != "tool_call_id"} for m in bare]


def decorated(messages: Messages) -> Messages:
    extra = {"refusal": None, "annotations": [], "provider_specific_fields": {"a": 1}, "name": "n", "vendor": 1}
    return [m | extra | {"content": m["content"] or ""} if m["role"] == "assistant" else m for m in messages]


def as_parts(messages: Messages) -> Messages:
    def parts(text: str) -> Messages:
        return [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}]

    return [m | {"content": parts(m["content"])} if m["role"] == "assistant" and m["content"] else m for m in messages]


@pytest.mark.parametrize(
    "replay",
    [list, without_reasoning, under_reasoning, arguments_respelled, ids_renamed, ids_dropped, decorated, as_parts],
)
def test_every_way_to_replay_a_history_extends_one_segment(
    play: Callable[[Script], None], replay: Callable[[Messages], Messages]
) -> None:
    """I3: four turns with tools, reasoning and text stay one segment."""

    async def script(rig: Rig) -> None:
        turn = await rig.ask([user("use f")], tools=TOOLS)
        assert "reasoning_content" in turn.conversation[-1]
        for text in ("use f", "and now", "done?"):
            answer = [result(call_id_of(turn))] if "tool_calls" in turn.conversation[-1] else []
            turn = await rig.ask(replay([*turn.conversation, *answer, user(text)]), tools=TOOLS)
            assert turn.record.attachment.segment_reason is None
            history = replay(turn.conversation[:-1])  # what this client keeps is its own spelling
            turn = Spoken(turn.record, [*history, turn.conversation[-1]])
        assert await rig.check() == 1

    play(script)


def test_assistant_turns_that_the_agent_inserts_are_context(play: Callable[[Script], None]) -> None:
    """I3: before the first sampled turn, several in a row, and between tool results."""

    async def script(rig: Rig) -> None:
        mine = {"role": "assistant", "content": "a plan"}
        turn = await rig.ask([user("hello"), mine, mine, user("use f")], tools=TOOLS)
        answers = [result(call_id_of(turn)), mine, result(call_id_of(turn)), mine, user("and now")]
        turn = await rig.ask([*turn.conversation, *answers], tools=TOOLS)
        assert turn.record.attachment.segment_reason is None
        turn = await rig.ask([*without_reasoning(turn.conversation), mine, user("done?")], tools=TOOLS)
        assert turn.record.attachment.segment_reason is None
        assert await rig.check() == 1

    play(script)


async def conversation_of_four(rig: Rig) -> list[Spoken]:
    turns = [await rig.ask([{"role": "system", "content": "be brief"}, user("turn 0")], tools=TOOLS)]
    for number in range(1, 4):
        turns.append(await rig.ask([*turns[-1].conversation, user(f"turn {number}")], tools=TOOLS))
    return turns


@pytest.mark.parametrize(
    ("change", "parent"),
    [
        pytest.param(lambda h: h[:2], None, id="retry of the first turn"),
        pytest.param(lambda h: h[:6], 1, id="retry of a middle turn"),
        pytest.param(lambda h: h[:8], 2, id="retry of the last turn"),
        pytest.param(lambda h: [*h[:3], user("elsewhere")], 0, id="deep unwinding"),
        pytest.param(lambda h: [*h[:4], h[4] | {"content": "edited"}, *h[5:], user("x")], 0, id="edited reply"),
        pytest.param(lambda h: [*h[:2], h[2] | {"content": "no"}, *h[3:], user("x")], None, id="first reply edited"),
        pytest.param(lambda h: [*h[:3], *h[5:], user("x")], 0, id="messages removed from the middle"),
        pytest.param(lambda h: [h[0] | {"content": "be long"}, *h[1:], user("x")], None, id="system prompt changed"),
        pytest.param(lambda h: [*h[1:], user("x")], None, id="system prompt dropped"),
        pytest.param(lambda h: [h[0], user("summary of all"), *h[-2:], user("x")], None, id="compaction"),
        pytest.param(lambda h: [user("you are a sub-agent")], None, id="sub-agent"),
        pytest.param(lambda h: [*h, user("summarise")], 3, id="summary call"),
        pytest.param(
            lambda h: [h[0], user("hand-off"), {"role": "assistant", "content": "ok"}, user("x")], None, id="ho"
        ),
    ],
)
def test_a_rewritten_history_opens_a_branch_and_loses_nothing(
    play: Callable[[Script], None], change: Callable[[Messages], Messages], parent: int | None
) -> None:
    """I6, I3: the branch hangs on the deepest turn that still stands; the old branch can be continued as before."""

    async def script(rig: Rig) -> None:
        turns = await conversation_of_four(rig)
        branch = await rig.ask(change(turns[-1].conversation), tools=TOOLS)
        expected = None if parent is None else turns[parent].record.turn_id
        assert branch.record.attachment.parent_id == expected
        for spoken in (branch, turns[-1]):
            again = await rig.ask([*spoken.conversation, user("go on")], tools=TOOLS)
            latest = [turn for turn in rig.turns if turn.conversation == spoken.conversation][-1]
            assert again.record.attachment.parent_id == latest.record.turn_id
        # The engine is deterministic: a retry of the last turn says the same, and both are continued as the later one.
        num_twins = int(branch.conversation == turns[-1].conversation)
        assert await rig.check() == 2 + num_twins

    play(script)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tools": TOOLS[:1]}, SegmentReason.TOOLS_CHANGED),
        ({"tools": TOOLS[::-1]}, SegmentReason.TOOLS_CHANGED),
        ({}, SegmentReason.TOOLS_CHANGED),
        ({"tools": TOOLS, "chat_template_kwargs": {"x": 1}}, SegmentReason.TEMPLATE_ARGUMENTS_CHANGED),
        ({"tools": TOOLS, "reasoning_effort": "high"}, SegmentReason.TEMPLATE_ARGUMENTS_CHANGED),
    ],
)
def test_tools_or_arguments_that_change_open_a_segment_that_goes_on(
    play: Callable[[Script], None], fields: dict[str, Any], reason: SegmentReason
) -> None:
    """I6."""

    async def script(rig: Rig) -> None:
        turn = (await conversation_of_four(rig))[-1]
        changed = await rig.ask([*turn.conversation, user("x")], **fields)
        attachment = changed.record.attachment
        assert (attachment.parent_id, attachment.segment_reason) == (None, reason)
        assert attachment.follows_id == turn.record.turn_id
        again = await rig.ask([*changed.conversation, user("y")], **fields)
        assert again.record.attachment.parent_id == changed.record.turn_id
        assert await rig.check() == 2

    play(script)


@pytest.mark.parametrize("num_calls", [2, 50])
def test_concurrent_calls_from_one_parent_become_siblings(play: Callable[[Script], None], num_calls: int) -> None:
    """I3: identical ones too; each of them is kept."""

    async def script(rig: Rig) -> None:
        turn = await rig.ask([user("turn 0")])
        messages = [*turn.conversation, user("turn 1")]
        spoken = await asyncio.gather(*(rig.ask(messages) for _ in range(num_calls)))
        assert {s.record.attachment.parent_id for s in spoken} == {turn.record.turn_id}
        assert await rig.check() == num_calls
        last = await rig.ask([*spoken[0].conversation, user("turn 2")])
        times = {s.record.turn_id: rig.session.tree.delivered_at(s.record.turn_id) or 0.0 for s in spoken}
        delivered = max(spoken, key=lambda s: (times[s.record.turn_id], s.record.index))
        assert last.record.attachment.parent_id == delivered.record.turn_id

    play(script)
