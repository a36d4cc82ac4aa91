"""The scripted engine keeps the promises of the Engine Protocol."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from engines.scripted import ScriptedEngine, ScriptedReply, scripted_experts
from gateway.contracts.errors import EngineRejected, EngineUnavailable
from gateway.contracts.experts import RoutingShape, valid_rows
from gateway.contracts.generation import FinishReason, GenerateChunk, GenerateEnd, GenerateRequest, SamplingParams
from gateway.contracts.ports import PauseMode

ROUTING = RoutingShape(num_layers=4, num_experts=8, top_k=2)


def request(prompt: list[int], *, max_new_tokens: int = 100, start: int | None = 0) -> GenerateRequest:
    sampling = SamplingParams(max_new_tokens=max_new_tokens)
    return GenerateRequest("0" * 32, np.asarray(prompt, dtype=np.int32), sampling=sampling, routed_experts_start=start)


async def run(engine: ScriptedEngine, asked: GenerateRequest) -> tuple[list[int], GenerateEnd]:
    token_ids: list[int] = []
    async for item in engine.generate(asked):
        if isinstance(item, GenerateChunk):
            token_ids += item.token_ids.tolist()
        else:
            return token_ids, item
    raise AssertionError("no end came")


async def test_rows_cover_prompt_and_output_but_the_last_token_and_are_distinct() -> None:
    """I2: P + C - 1 rows from the asked start."""
    engine = ScriptedEngine([ScriptedReply((7, 8, 9))], routing=ROUTING)
    token_ids, end = await run(engine, request([1, 2, 3, 4], start=2))
    assert token_ids == [7, 8, 9]
    assert end.finish.reason is FinishReason.STOP
    assert end.routed_experts is not None
    assert (end.routed_experts.start, end.routed_experts.stop) == (2, 6)
    assert valid_rows(end.routed_experts.ids, ROUTING.num_experts).all()


async def test_a_row_is_the_same_sampled_or_prefilled() -> None:
    engine = ScriptedEngine([ScriptedReply((7, 8, 9)), ScriptedReply((5,))], routing=ROUTING)
    _, first = await run(engine, request([1, 2]))
    _, second = await run(engine, request([1, 2, 7, 8, 9, 4]))
    assert first.routed_experts is not None
    assert second.routed_experts is not None
    np.testing.assert_array_equal(first.routed_experts.ids, second.routed_experts.ids[:4])
    np.testing.assert_array_equal(
        second.routed_experts.ids, scripted_experts(np.asarray([1, 2, 7, 8, 9, 4], dtype=np.int32), ROUTING, start=0)
    )


async def test_versions_change_inside_a_turn_that_is_held_in_place() -> None:
    """I5: spans per token."""
    engine = ScriptedEngine([ScriptedReply((1, 2, 3, 4), delay_seconds=0.01)])
    running = asyncio.create_task(run(engine, request([9])))
    await asyncio.sleep(0.015)
    await engine.pause(PauseMode.IN_PLACE)
    engine.load_policy(1)
    await asyncio.sleep(0.02)
    assert not running.done()
    await engine.resume()
    _, end = await running
    assert [span.policy_version for span in end.version_spans] == [0, 1]
    assert end.version_spans[-1].stop == 4


async def test_abort_pause_ends_requests_with_what_they_have() -> None:
    engine = ScriptedEngine([ScriptedReply((1, 2, 3, 4), delay_seconds=0.01)])
    running = asyncio.create_task(run(engine, request([9])))
    await asyncio.sleep(0.015)
    await engine.pause(PauseMode.ABORT)
    token_ids, end = await running
    assert end.finish.reason is FinishReason.ABORT
    assert 0 < len(token_ids) < 4
    assert end.completion_tokens == len(token_ids)


async def test_a_broken_connection_keeps_the_chunks_before_it() -> None:
    engine = ScriptedEngine([ScriptedReply((1, 2, 3), fail_after=2)])
    seen: list[int] = []

    async def consume() -> None:
        async for item in engine.generate(request([9])):
            assert isinstance(item, GenerateChunk)
            seen.extend(item.token_ids.tolist())

    with pytest.raises(EngineUnavailable):
        await consume()
    assert seen == [1, 2]


async def test_too_long_requests_are_rejected_and_foreign_ids_are_fatal() -> None:
    engine = ScriptedEngine([ScriptedReply((1,))], context_length=8, vocab_size=50)
    with pytest.raises(EngineRejected, match="maximum context length"):
        await run(engine, request([1] * 7, max_new_tokens=2))
    with pytest.raises(EngineUnavailable):
        await run(engine, request([50], max_new_tokens=2))


async def test_length_ends_a_reply_that_is_longer_than_asked() -> None:
    token_ids, end = await run(ScriptedEngine([ScriptedReply((1, 2, 3))]), request([9], max_new_tokens=2))
    assert token_ids == [1, 2]
    assert end.finish.reason is FinishReason.LENGTH
