"""Attachment against a plain model: whatever an agent does to its history, the deepest recorded match is found."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.contracts.generation import Finish, FinishReason, LogprobKind
from gateway.contracts.records import Attachment, MatchTier, RootContext, SegmentReason, TurnRecord
from gateway.contracts.versions import VersionSpan
from gateway.sessions.attach import attach, restore_reasoning
from gateway.sessions.tree import TurnTree

ROOTS = [RootContext((), {}), RootContext(({"name": "tool"},), {}), RootContext((), {"thinking": False})]
texts = st.sampled_from(["a", "b", ""])
thoughts = st.sampled_from([None, "r", "s"])


@dataclass(frozen=True)
class Step:
    """One call: keep `kept` turns of the conversation so far, then say `question`; the model answers."""

    kept: int
    question: str
    answer: str
    thought: str | None
    respelled: bool
    drops_reasoning: bool
    root: int


steps = st.lists(
    st.builds(
        Step,
        kept=st.integers(0, 3),
        question=texts,
        answer=texts,
        thought=thoughts,
        respelled=st.booleans(),
        drops_reasoning=st.booleans(),
        root=st.integers(0, 2),
    ),
    max_size=12,
)


def record(index: int, attachment: Attachment, root: RootContext | None, added: list[Any], reply: Any) -> TurnRecord:
    return TurnRecord(
        session_id="s",
        turn_id=f"turn-{index}",
        index=index,
        attachment=attachment,
        root=root,
        added_messages=tuple(added),
        reply=reply,
        prompt_token_ids=np.array([index, index], dtype=np.int32),
        output_token_ids=np.array([100 + index], dtype=np.int32),
        output_logprobs=np.zeros(1, dtype=np.float32),
        version_spans=(VersionSpan(0, 1, 0),),
        finish=Finish(FinishReason.STOP),
        logprob_kind=LogprobKind.RAW,
        sampling={},
        num_layers=0,
        num_experts=0,
        top_k=0,
        experts_start=0,
        experts_stop=0,
        engine_id="e",
        model="m",
        request_digest="",
        cached_tokens=0,
        num_retractions=0,
        meta={},
        untrainable_reason=None,
        created_at=0.0,
        delivered_at=None,
    )


def answer_of(step: Step) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": step.answer or None}
    return message if step.thought is None else message | {"reasoning_content": step.thought}


def replayed(message: dict[str, Any], step: Step) -> dict[str, Any]:
    """How a client may send a message back."""
    sent = dict(message)
    if step.respelled:
        sent["content"] = [{"type": "text", "text": sent["content"]}] if sent["content"] else ""
    if step.drops_reasoning:
        sent.pop("reasoning_content", None)
    return sent


def semantically(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    text = content if isinstance(content, str) else content[0]["text"]
    return json.dumps([message["role"], text])


def forgives(recorded: dict[str, Any], sent: dict[str, Any]) -> bool:
    """The model of design 4: equal in meaning, and reasoning equal or left out."""
    same_reasoning = (sent.get("reasoning_content") or None) in (None, recorded.get("reasoning_content") or None)
    return semantically(recorded) == semantically(sent) and same_reasoning


def covers(recorded: list[Any], sent: list[Any]) -> bool:
    return len(recorded) <= len(sent) and all(map(forgives, recorded, sent))


@settings(max_examples=150, deadline=None)
@given(steps)
def test_deepest_turn_whose_conversation_the_request_begins_with_is_found(calls: list[Step]) -> None:
    """I6: always a place; I3: a match never skips recorded turns, a mismatch never claims them."""
    tree = TurnTree()
    history: list[dict[str, Any]] = []
    for index, step in enumerate(calls):
        root = ROOTS[step.root]
        past = history[: 2 * step.kept]
        sent = [*(replayed(m, step) if m["role"] == "assistant" else m for m in past)]
        sent.append({"role": "user", "content": step.question})
        place = attach(tree, sent, root)
        depths = {
            node.num_messages
            for node in map(tree.__getitem__, [r.turn_id for r in tree.records])
            if node.root == root and covers(node.messages(), sent)
        }
        assert place.num_matched == max(depths, default=0)
        if place.parent is None:
            assert (place.tier is MatchTier.NONE) == (place.reason is not None)
            assert (place.reason is SegmentReason.FIRST) == (index == 0)
        else:
            assert covers(place.parent.messages(), sent)
            assert place.reason is None
            shown = restore_reasoning(place, sent)
            assert all(
                semantically(a) == semantically(b) and a.get("reasoning_content") == b.get("reasoning_content")
                for a, b in zip(place.parent.messages(), shown, strict=False)
            )
        parent_id = None if place.parent is None else place.parent.record.turn_id
        attachment = Attachment(parent_id, None, place.tier, place.reason)
        added = sent[place.num_matched :]
        turn = record(index, attachment, None if place.parent else root, added, answer_of(step))
        node = tree.add(turn)
        parent_tokens = [] if place.parent is None else place.parent.token_ids().tolist()
        assert node.token_ids().tolist() == [*parent_tokens, index, index, 100 + index]
        history = [*sent, answer_of(step)]
    rebuilt = TurnTree(tree.records)
    assert [node.chain for node in map(rebuilt.__getitem__, [r.turn_id for r in tree.records])] == [
        node.chain for node in map(tree.__getitem__, [r.turn_id for r in tree.records])
    ]


def test_between_equal_siblings_the_latest_delivered_one_is_continued() -> None:
    tree = TurnTree()
    first = Attachment(None, None, MatchTier.NONE, SegmentReason.FIRST)
    reply = {"role": "assistant", "content": "same"}
    question = {"role": "user", "content": "q"}
    for index in range(3):
        tree.add(record(index, first, ROOTS[0], [question], reply))
    tree.mark_delivered("turn-1", 5.0)
    place = attach(tree, [question, reply, question], ROOTS[0])
    assert place.parent is tree["turn-1"]


def test_sibling_is_known_by_its_tool_call_id() -> None:
    tree = TurnTree()
    first = Attachment(None, None, MatchTier.NONE, SegmentReason.FIRST)
    question = {"role": "user", "content": "q"}

    def reply(call_id: str) -> dict[str, Any]:
        function = {"name": "f", "arguments": "{}"}
        return {"role": "assistant", "content": None, "tool_calls": [{"id": call_id, "function": function}]}

    for index in range(3):
        tree.add(record(index, first, ROOTS[0], [question], reply(f"call-{index}")))
    tree.mark_delivered("turn-2", 5.0)
    result = {"role": "tool", "tool_call_id": "call-1", "content": "1"}
    for spelling in ({}, {"refusal": None}):
        place = attach(tree, [question, reply("call-1") | spelling, result], ROOTS[0])
        assert place.parent is tree["turn-1"]
