"""The SGLang client against servers that break their protocol, over real HTTP: nothing wrong is passed on as right."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import orjson
import pytest
from aiohttp import web

from engines.launch import free_port
from engines.sglang import SglangEngine
from engines.weights.names import policy_version_of
from gateway.contracts.errors import (
    EngineError,
    EngineProtocolError,
    EngineRejected,
    EngineTimeout,
    EngineUnavailable,
)
from gateway.contracts.experts import RoutingShape, valid_rows
from gateway.contracts.generation import GenerateChunk, GenerateEnd, GenerateRequest, SamplingParams
from gateway.contracts.versions import VersionSpan

SHAPE = RoutingShape(num_layers=2, num_experts=4, top_k=2)
PROMPT = np.array([1, 2, 3], dtype=np.int32)
LENGTH = {"type": "length", "length": 2}


def event(output_ids: list[int], *, finish: Any = None, **meta: Any) -> dict[str, Any]:
    """One event of a cumulative stream, well-formed unless `meta` says otherwise."""
    facts: dict[str, Any] = {
        "finish_reason": finish,
        "prompt_tokens": 3,
        "completion_tokens": len(output_ids),
        "weight_version": "default",
        "output_token_logprobs": [[-0.5, token, None] for token in output_ids],
    }
    return {"text": "", "output_ids": output_ids, "meta_info": facts | meta}


def rows(count: int, *, highest: int = 3) -> str:
    """Base64 of `count` routing rows."""
    ids = np.tile(np.array([[0, highest], [1, 2]], dtype="<i4"), (count, 1, 1))
    return base64.b64encode(ids.tobytes()).decode()


@asynccontextmanager
async def served(
    answer: Callable[[web.Request], Awaitable[web.StreamResponse]], *, idle_timeout_seconds: float = 30.0
) -> AsyncIterator[SglangEngine]:
    """A client of a server whose `/generate` is `answer`."""
    app = web.Application()
    app.router.add_post("/generate", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    engine = SglangEngine(
        f"http://127.0.0.1:{port}",
        engine_id="e0",
        routing=SHAPE,
        policy_version_of=lambda label: policy_version_of(label, {}),
        idle_timeout_seconds=idle_timeout_seconds,
    )
    try:
        yield engine
    finally:
        await engine.aclose()
        await runner.cleanup()


def streaming(*events: Any, done: bool = True) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for content in events:
            await response.write(
                b"data: " + (content if isinstance(content, bytes) else orjson.dumps(content)) + b"\n\n"
            )
        if done:
            await response.write(b"data: [DONE]\n\n")
        return response

    return answer


async def ask(engine: SglangEngine, **fields: Any) -> tuple[list[GenerateChunk], GenerateEnd]:
    request = GenerateRequest("r" * 32, PROMPT, SamplingParams(max_new_tokens=2), **fields)
    items = [item async for item in engine.generate(request)]
    *chunks, end = items
    assert isinstance(end, GenerateEnd)
    return [chunk for chunk in chunks if isinstance(chunk, GenerateChunk)], end


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([event([7]), event([8, 9], finish=LENGTH)], "changed tokens"),
        ([event([7, 8], finish=LENGTH, completion_tokens=5)], "2 ids in an event that claims 5"),
        ([event([7, 8], finish=LENGTH, prompt_tokens=4)], "read 4 prompt tokens of 3"),
        ([event([7, 8], finish=LENGTH, output_token_logprobs=[[-0.5, 7, None]])], "1 log-probs for 2"),
        ([event([7, 8], finish=LENGTH, output_token_logprobs=[[-1, 7, None], [-1, 9, None]])], "of other tokens"),
        ([event([7, 8], finish=LENGTH, weight_version="who-knows")], "no policy version"),
        (
            [event([7, 8], finish=LENGTH, weight_versions=[{"version": "1", "start": 0, "end": 1}])],
            "cover 1 tokens of 2",
        ),
        ([event([-7], finish=LENGTH)], "out of range"),
        ([event([7, 8], finish=LENGTH, output_top_logprobs=[[[-0.5, 7, None]]])], "1 positions for 2 tokens"),
        (
            [event([7, 8], finish=LENGTH, output_top_logprobs=[[[-0.5, 8, None]], [[-0.9, 8, None]]])],
            "another position",
        ),
        ([event([7, 8], finish=LENGTH, output_top_logprobs=[[-0.5, 7], None])], "unreadable event"),
        ([event([7], finish={"type": "bored"})], "unreadable event"),
        ([{"meta_info": {}}], "unreadable event"),
        ([[1]], "unreadable event"),
        ([b"{not json"], "not JSON"),
    ],
)
async def test_an_answer_that_contradicts_itself_is_a_protocol_error(events: list[Any], words: str) -> None:
    """I2, I9: lengths, ids and versions are checked, never repaired."""
    async with served(streaming(*events)) as engine:
        with pytest.raises(EngineProtocolError, match=words):
            await ask(engine, routed_experts_start=0, num_top_logprobs=2)


@pytest.mark.parametrize(("routing", "words"), [(rows(3), "expected 4 rows"), ("§§§", "not base64")])
async def test_routing_that_cannot_be_read_costs_the_rows_and_not_the_turn(
    routing: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """I6, I9: tokens and log-probs are sound; the rows are missing, and said to be."""
    async with served(streaming(event([7, 8], finish=LENGTH, routed_experts=routing))) as engine:
        chunks, end = await ask(engine, routed_experts_start=0)
    assert [token for chunk in chunks for token in chunk.token_ids.tolist()] == [7, 8]
    assert end.routed_experts is None
    assert words in caplog.text


async def test_a_row_with_an_expert_that_the_model_has_not_is_stored_as_invalid() -> None:
    """I9: that row alone."""
    async with served(streaming(event([7, 8], finish=LENGTH, routed_experts=rows(4, highest=9)))) as engine:
        _, end = await ask(engine, routed_experts_start=0)
    assert end.routed_experts is not None
    assert not valid_rows(end.routed_experts.ids, 4).all()


LONG = np.arange(30_000, dtype=np.int32) % 1000


async def ask_long(engine: SglangEngine) -> GenerateEnd:
    """A request whose rows come in many pieces."""
    request = GenerateRequest("r" * 32, LONG, SamplingParams(max_new_tokens=2), routed_experts_start=0)
    end = [item async for item in engine.generate(request)][-1]
    assert isinstance(end, GenerateEnd)
    return end


@pytest.mark.parametrize("slash", [b"/", rb"\/"])
async def test_rows_of_a_big_reply_are_the_same_as_those_of_a_small_one(slash: bytes) -> None:
    """I2, I8: they are taken out of the event while it arrives; what stands around them stays."""
    ids = np.random.default_rng(0).integers(0, 4, (len(LONG) + 1, 2, 2))
    encoded = base64.b64encode(ids.astype("<i4").tobytes()).decode()
    told = event([7, 8], finish=LENGTH, prompt_tokens=len(LONG), routed_experts=encoded, custom={"kept": [1, None]})
    written = orjson.dumps(told).replace(b"/", slash)
    async with served(streaming(event([7], prompt_tokens=len(LONG)), written)) as engine:
        end = await ask_long(engine)
    assert end.routed_experts is not None
    np.testing.assert_array_equal(end.routed_experts.ids, ids)
    assert end.routed_experts.ids.dtype == np.uint8
    assert end.meta_info == {"custom": {"kept": [1, None]}}


@pytest.mark.parametrize(("harm", "words"), [(b"!", "not base64"), (b"", "expected 30001 rows")])
async def test_damage_in_a_big_reply_costs_the_rows_and_not_the_turn(
    harm: bytes, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """I6, I9: the same as in a small one."""
    told = orjson.dumps(event([7, 8], finish=LENGTH, prompt_tokens=len(LONG), routed_experts=rows(len(LONG) + 1)))
    middle = len(told) // 2 // 4 * 4
    async with served(streaming(told[:middle] + harm + told[middle + 64 :])) as engine:
        end = await ask_long(engine)
    assert end.routed_experts is None
    assert words in caplog.text


async def test_a_big_string_of_that_name_at_another_place_is_not_lost_in_silence() -> None:
    """I8: it was taken for rows."""
    told = event([7, 8], finish=LENGTH, prompt_tokens=len(LONG), custom={"routed_experts": rows(len(LONG) + 1)})
    async with served(streaming(told)) as engine:
        with pytest.raises(EngineProtocolError, match="unknown place"):
            await ask_long(engine)


async def test_likeliest_tokens_are_read_from_both_kinds_of_stream() -> None:
    """I2, I9: cut to what was asked, a row that is missing stays missing, nothing of it is left in meta_info."""
    rows_told = [[[-0.1, 4, None], [-0.5, 7, None], [-0.9, 5, None]], None, [[-0.5, 9, "x"]]]
    cumulative = [
        event([7], output_top_logprobs=rows_told[:1]),
        event([7, 8, 9], finish=LENGTH, output_top_logprobs=rows_told, input_top_logprobs=[]),
    ]
    incremental = [
        event([7], output_top_logprobs=rows_told[:1]),
        event([8, 9], finish=LENGTH, completion_tokens=3, output_top_logprobs=rows_told[1:]),
    ]
    for events in (cumulative, incremental):
        async with served(streaming(*events)) as engine:
            chunks, end = await ask(engine, num_top_logprobs=2)
        told = [[top.token_id for top in row] for chunk in chunks for row in chunk.top_logprobs]
        assert told == [[4, 7], [], [9]]
        assert end.meta_info == {}
        async with served(streaming(*events)) as engine:
            unasked, _ = await ask(engine)
        assert not any(chunk.top_logprobs for chunk in unasked)


async def test_incremental_streams_say_the_same_as_cumulative_ones() -> None:
    """I2: deltas are taken as deltas; spans, rows and unknown fields come with the end (I8)."""
    spans = [{"version": "3", "start": 0, "end": 1}, {"version": "policy-000004", "start": 1, "end": 3}]
    last = {
        "weight_versions": spans,
        "routed_experts": rows(5),
        "completion_tokens": 3,
        "spec_accept": {"a": [1, None]},
    }
    cumulative = [event([7]), event([7, 8]), event([7, 8, 9], finish=LENGTH, **last)]
    incremental = [event([7]), event([8], completion_tokens=2), event([9], finish=LENGTH, **last)]
    seen = []
    for events in (cumulative, incremental):
        async with served(streaming(*events)) as engine:
            chunks, end = await ask(engine, routed_experts_start=0)
        assert end.version_spans == (VersionSpan(0, 1, 3), VersionSpan(1, 3, 4))
        assert end.routed_experts is not None
        assert end.routed_experts.ids.shape == (5, 2, 2)
        assert end.meta_info["spec_accept"] == {"a": [1, None]}
        # How many chunks it are depends on how the events arrive.
        seen.append([token for chunk in chunks for token in chunk.token_ids.tolist()])
    assert seen == [[7, 8, 9]] * 2


async def test_what_is_missing_stays_missing() -> None:
    """I9: no log-prob is NaN, no rows are None."""
    bare = event([7, 8], finish=LENGTH, output_token_logprobs=None)
    async with served(streaming(bare)) as engine:
        chunks, end = await ask(engine, routed_experts_start=0)
    assert np.isnan(chunks[0].logprobs).all()
    assert end.routed_experts is None


async def test_a_stream_that_ends_early_leaves_its_tokens_valid() -> None:
    """I3: what came before the break was yielded; then the engine counts as unavailable."""
    for done in (True, False):
        async with served(streaming(event([7]), done=done)) as engine:
            stream = engine.generate(GenerateRequest("r" * 32, PROMPT, SamplingParams(max_new_tokens=2)))
            first = await anext(stream)
            assert isinstance(first, GenerateChunk)
            assert first.token_ids.tolist() == [7]
            with pytest.raises(EngineUnavailable):
                await anext(stream)


async def test_silence_is_a_timeout() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"data: " + orjson.dumps(event([7])) + b"\n\n")
        await asyncio.sleep(1.5)
        return response

    async with served(answer, idle_timeout_seconds=0.3) as engine:
        with pytest.raises(EngineTimeout):
            await ask(engine)


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (503, "starting", EngineUnavailable),
        (500, '{"error":{"message":"scheduler died"}}', EngineUnavailable),
        (400, '{"error":"unknown field `x`"}', EngineRejected),
        (400, '{"object":"error","message":"1 validation error"}', EngineRejected),
        (404, "", EngineRejected),
    ],
)
async def test_refusals_and_failures_are_told_apart(status: int, body: str, error: type[EngineError]) -> None:
    async def answer(_request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, text=body)

    async with served(answer) as engine:
        with pytest.raises(error):
            await ask(engine)


async def test_an_agents_fields_cannot_change_what_is_captured() -> None:
    """I7: passed-through fields reach the engine, but never those that capture depends on."""
    bodies: list[Any] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        bodies.append(await request.json())
        return await streaming(event([7, 8], finish=LENGTH))(request)

    forged = {
        "return_logprob": False, "stream": False, "input_ids": [9], "rid": "x", "text": "other prompt",
        "return_routed_experts": True, "custom": {"kept": [1, None]}, "top_logprobs_num": 9,
    }  # fmt: skip
    async with served(answer) as engine:
        await ask(engine, passthrough=forged)
    (body,) = bodies
    assert body["custom"] == {"kept": [1, None]}
    assert body["input_ids"] == [1, 2, 3]
    assert body["rid"] == "r" * 32
    assert body["stream"] is body["return_logprob"] is True
    assert not {"text", "return_routed_experts", "top_logprobs_num"} & set(body)
