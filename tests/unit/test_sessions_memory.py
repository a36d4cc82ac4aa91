"""What a session costs in memory: O(tokens), a few kilobytes a turn beyond them."""

from __future__ import annotations

import asyncio
import gc
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gateway.contracts.examples import example_turn
from gateway.contracts.generation import Finish, FinishReason, JsonValue
from gateway.contracts.records import Attachment, MatchTier, RootContext, SegmentReason, SessionOrigin, TurnRecord
from gateway.contracts.versions import VersionSpan
from gateway.ledger.sqlite import SqliteLedger
from gateway.sessions.attach import Place, attach
from gateway.sessions.registry import Session, SessionRegistry, new_session
from gateway.sessions.tree import Node, RecordedMessage

NUM_TURNS, TOKENS_PER_TURN = 200, 320
TOOLS = tuple({"type": "function", "function": {"name": f"tool_{i}", "description": "d" * 400}} for i in range(8))
ROOT = RootContext(TOOLS, {})
SAMPLING = {"max_new_tokens": 4096, "temperature": 1.0, "stop": [], "stop_token_ids": [2], "extra": {}}


def request_body(history: list[JsonValue]) -> list[JsonValue]:
    """The messages as a request brings them: parsed from bytes of their own."""
    return list(json.loads(json.dumps(history)))


def sampled(index: int) -> dict[str, Any]:
    """A reply with its reasoning and one call; about a third of a turn's text."""
    function = {"name": "tool_0", "arguments": json.dumps({"command": f"{index} " + "x" * 100})}
    call = {"id": f"call-{index}", "type": "function", "function": function}
    return {"role": "assistant", "content": "y" * 100, "reasoning_content": "z" * 200, "tool_calls": [call]}


def record(session_id: str, index: int, place: Place, messages: list[JsonValue], *, num_tokens: int) -> TurnRecord:
    """A turn as a live one leaves it: its arrays are cut out of larger ones."""
    parent_id = None if place.parent is None else place.parent.record.turn_id
    ids: npt.NDArray[np.int32] = np.arange(200_000, dtype=np.int32)
    num_output = num_tokens // 3
    return example_turn(
        index,
        session_id=session_id,
        turn_id=f"turn-{index:024}",
        attachment=Attachment(parent_id, None, place.tier, place.reason),
        root=ROOT if parent_id is None else None,
        added_messages=tuple(messages[place.num_matched :]),
        reply=sampled(index),
        prompt_token_ids=ids[: num_tokens - num_output],
        output_token_ids=ids[:num_output].copy(),
        output_logprobs=np.zeros(num_output, dtype=np.float32),
        version_spans=(VersionSpan(0, num_output, 0),),
        finish=Finish(FinishReason.STOP, 2),
        sampling=dict(SAMPLING),
        engine_id="engine-0",
        model="model",
        request_digest="0" * 64,
        meta={
            "certified_by": "shape",
            "flags": [],
            "num_reasoning_tokens": 0,
            "engine_ids": ["engine-0"],
            "engine": {},
        },
    )


async def play(
    session: Session, ledger: SqliteLedger, *, num_turns: int, num_tokens: int, replays: bool = True
) -> None:
    """Turns of a tool-using agent that drops reasoning; without `replays` every turn opens a root of its own."""
    history: list[JsonValue] = [{"role": "user", "content": "q" * 800}]
    for index in range(num_turns):
        messages = request_body(history) if not replays else [*history[:-2], *request_body(history[-2:])]
        place = attach(session.tree, messages, ROOT)
        if not replays:
            place = Place(None, None, 0, MatchTier.NONE, SegmentReason.UNCERTIFIED)
        turn = record(session.record.session_id, index, place, messages, num_tokens=num_tokens)
        await ledger.append_turn(turn, None)
        session.tree.add(turn)
        shown = {name: value for name, value in turn.reply.items() if name != "reasoning_content"}
        history = [*history, shown, {"role": "tool", "tool_call_id": f"call-{index}", "content": "t" * 800}]


async def new(registry: SessionRegistry, session_id: str) -> Session:
    session, _ = await registry.create(new_session(session_id, key_hash="0" * 64, origin=SessionOrigin.CREATED))
    return session


def traced() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


async def grown_bytes(registry: SessionRegistry, session_ids: list[str]) -> int:
    """How much memory the sessions take once they are loaded."""
    before = traced()
    for session_id in session_ids:
        await registry.get(session_id)
    return traced() - before


def test_a_session_of_200_turns_and_64k_tokens_takes_less_than_10_mb(tmp_path: Path) -> None:
    """Issue 3: memory of a session is O(tokens); live, and loaded from the ledger."""

    async def measure() -> tuple[int, int]:
        ledger = SqliteLedger.open(tmp_path)
        try:
            registry = SessionRegistry(ledger)
            tracemalloc.start()
            before = traced()
            session = await new(registry, "s")
            await play(session, ledger, num_turns=NUM_TURNS, num_tokens=TOKENS_PER_TURN)
            live = traced() - before
            assert sum(turn.attachment.parent_id is None for turn in session.tree.records) == 1
            assert session.tree[session.tree.records[-1].turn_id].num_tokens == NUM_TURNS * TOKENS_PER_TURN
            return live, await grown_bytes(SessionRegistry(ledger), ["s"])
        finally:
            tracemalloc.stop()
            await ledger.aclose()

    live, loaded = asyncio.run(measure())
    assert live < 2_500_000
    assert loaded < 2_500_000


def test_a_session_that_goes_leaves_nothing_to_the_collector(tmp_path: Path) -> None:
    """What it holds goes with it: passes over everything are rare, because they stop everything."""

    async def left_behind() -> list[object]:
        ledger = SqliteLedger.open(tmp_path)
        try:
            registry = SessionRegistry(ledger)
            await play(await new(registry, "s"), ledger, num_turns=20, num_tokens=3)
            await play(await new(registry, "roots"), ledger, num_turns=5, num_tokens=3, replays=False)
            gc.collect()
            await registry.delete("s")
            await registry.delete("roots")
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            return [found for found in gc.garbage if isinstance(found, Node | RecordedMessage | Session)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            await ledger.aclose()

    assert not asyncio.run(left_behind())


def test_equal_messages_are_held_once_whatever_roots_they_stand_in(tmp_path: Path) -> None:
    """A session whose every turn opens a new segment holds tokens of all of them, but each message only once."""

    async def measure() -> int:
        ledger = SqliteLedger.open(tmp_path)
        try:
            session = await new(SessionRegistry(ledger), "s")
            await play(session, ledger, num_turns=60, num_tokens=3, replays=False)
            tracemalloc.start()
            return await grown_bytes(SessionRegistry(ledger), ["s"])
        finally:
            tracemalloc.stop()
            await ledger.aclose()

    assert asyncio.run(measure()) < 1_500_000  # the messages of the 60 requests together have 3.5 MB


def test_an_idle_session_of_three_turns_takes_a_few_kilobytes_beyond_its_text(tmp_path: Path) -> None:
    """Twelve thousand of them fit into a small machine."""

    async def measure() -> int:
        ledger = SqliteLedger.open(tmp_path)
        try:
            session_ids = [f"s-{i}" for i in range(40)]
            registry = SessionRegistry(ledger)
            for session_id in session_ids:
                await play(await new(registry, session_id), ledger, num_turns=3, num_tokens=30)
            tracemalloc.start()
            return await grown_bytes(SessionRegistry(ledger), session_ids) // len(session_ids)
        finally:
            tracemalloc.stop()
            await ledger.aclose()

    assert asyncio.run(measure()) < 40_000
