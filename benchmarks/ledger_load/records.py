"""Sessions and turns as an agent with tools leaves them: about two kilobytes a turn, no two alike."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from gateway.contracts.examples import example_turn
from gateway.contracts.generation import Finish, FinishReason
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

_TOOL = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Work out an expression.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
    },
}


def a_session(session_id: str) -> SessionRecord:
    """One with a group and labels, as trainers make them."""
    return SessionRecord(
        session_id=session_id,
        group=f"group-{session_id[-3:]}",
        group_size=None,
        task={"question": "How much is 3 + 4?"},
        labels={"split": "train"},
        metadata={},
        sampling={},
        ttl_seconds=3600.0,
        key_hash=hashlib.sha256(session_id.encode()).hexdigest(),
        origin=SessionOrigin.CREATED,
        complete=True,
        created_at=time.time(),
    )


def conversation(session_id: str, num_turns: int) -> Iterator[TurnRecord]:
    """Turns that extend one another, a tool's result and a call each."""
    parent: str | None = None
    for index in range(num_turns):
        turn = _turn(session_id, index, parent)
        parent = turn.turn_id
        yield turn


def long_turn(session_id: str, index: int, parent: str | None, *, num_tokens: int, **fields: Any) -> TurnRecord:
    """A turn of many tokens, half of them sampled; `fields` as of `example_turn`."""
    num_sampled = num_tokens // 2
    return _turn(session_id, index, parent, num_tokens - num_sampled, num_sampled, **fields)


def _turn(
    session_id: str, index: int, parent: str | None, num_added: int = 40, num_sampled: int = 34, **fields: Any
) -> TurnRecord:
    digest = hashlib.sha256(f"{session_id} {index}".encode()).hexdigest()
    call = {"name": "calculator", "arguments": json.dumps({"expression": f"{index} + {digest[:4]}"})}
    generator = np.random.default_rng(index)
    return example_turn(
        index,
        **{
            "session_id": session_id,
            "turn_id": f"turn-{digest[:24]}",
            "attachment": _attachment(parent),
            "root": RootContext((_TOOL,), {}) if parent is None else None,
            "added_messages": ({"role": "tool", "tool_call_id": f"call_{digest[:32]}", "content": f"It is {index}."},),
            "reply": {
                "role": "assistant",
                "content": "Let me compute that.",
                "tool_calls": [{"id": f"call_{digest[-32:]}", "type": "function", "function": call}],
            },
            "prompt_token_ids": generator.integers(0, 50_000, num_added, dtype=np.int32),
            "output_token_ids": generator.integers(0, 50_000, num_sampled, dtype=np.int32),
            "output_logprobs": -generator.random(num_sampled, dtype=np.float32),
            "version_spans": (VersionSpan(0, num_sampled, 3),),
            "finish": Finish(FinishReason.STOP, 901),
            "sampling": _SAMPLING,
            "engine_id": "sglang-127.0.0.1:30000",
            "model": "model",
            "request_digest": digest,
            "meta": _META,
            "created_at": time.time(),
            **fields,
        },
    )


def _attachment(parent: str | None) -> Attachment:
    if parent is None:
        return Attachment(None, None, MatchTier.NONE, SegmentReason.FIRST)
    return Attachment(parent, parent, MatchTier.EXACT, None)


_SAMPLING = {
    "max_new_tokens": 2048,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "stop": [],
    "stop_token_ids": [901, 902],
    "seed": None,
    "ignore_eos": False,
    "extra": {},
}
_META = {
    "certified_by": "shape",
    "hidden_messages": [],
    "flags": [],
    "num_reasoning_tokens": 0,
    "engine_ids": ["sglang-127.0.0.1:30000"],
    "num_attempts": 1,
    "lost_attempts": 0,
    "passthrough": {},
    "ignored_fields": [],
    "tool_choice_enforced": None,
    "request": {},
    "error": None,
    "engine": {},
    "engine_reply": {},
    "call": {"endpoint": "/v1/chat/completions", "choice": 0, "idempotency_key": None},
}
