"""What every `Engine` of `gateway.contracts.ports` promises, asked of each implementation.

The clients of SGLang and vLLM talk to a real `verbatim engine` process over HTTP, which speaks both protocols, that of
smg to a real router in front of it; the scripted engine runs in this process. What a text-only upstream can promise is
in `test_engine_text.py`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from engines.launch import EngineProcess
from engines.scripted import ScriptedEngine, ScriptedReply
from engines.sglang import SglangEngine
from engines.smg import SmgRouter
from engines.vllm import VllmEngine
from engines.weights.names import policy_version_of
from gateway.contracts.experts import RoutingShape, valid_rows
from gateway.contracts.generation import (
    Finish,
    FinishReason,
    GenerateChunk,
    GenerateEnd,
    GenerateRequest,
    LogprobKind,
    SamplingParams,
    WrittenIds,
)
from gateway.contracts.ports import Engine, PauseMode
from gateway.contracts.versions import VersionSpan
from tests.smg_router import RouterProcess, running_router

SHAPE = RoutingShape(num_layers=4, num_experts=8, top_k=2)
PROMPT = np.arange(10, 30, dtype=np.int32)
DEADLINE_SECONDS = 150.0

_request_numbers = itertools.count()


@pytest.fixture(scope="session")
def router(engine_process: EngineProcess) -> Iterator[RouterProcess]:
    """A real smg in front of the engine."""
    with running_router(engine_process.url) as process:
        yield process


@pytest.fixture(params=["sglang", "vllm", "smg", "scripted"])
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    made: Engine
    if request.param == "scripted":
        made = ScriptedEngine(_scripted_reply, routing=SHAPE)
    else:
        process: EngineProcess | RouterProcess
        process = request.getfixturevalue("router" if request.param == "smg" else "engine_process")
        client = {"sglang": SglangEngine, "vllm": VllmEngine, "smg": SmgRouter}[request.param]
        made = client(
            process.url, engine_id="e0", routing=None, policy_version_of=lambda label: policy_version_of(label, {})
        )
    yield made
    await made.aclose()


def _scripted_reply(request: GenerateRequest) -> ScriptedReply:
    count = request.sampling.max_new_tokens
    return ScriptedReply(tuple(40 + i % 50 for i in range(count)), Finish(FinishReason.LENGTH), delay_seconds=0.01)


def request_for(
    *,
    new_tokens: int = 8,
    routed_start: int | None = 0,
    prompt: np.ndarray[tuple[int], np.dtype[np.int32]] = PROMPT,
    num_top_logprobs: int = 0,
    temperature: float = 1.0,
) -> GenerateRequest:
    sampling = SamplingParams(max_new_tokens=new_tokens, temperature=temperature, ignore_eos=True)
    name = f"request-{next(_request_numbers):08d}"
    return GenerateRequest(name, prompt, sampling, routed_start, num_top_logprobs=num_top_logprobs)


async def collect(engine: Engine, request: GenerateRequest) -> tuple[list[GenerateChunk], GenerateEnd]:
    chunks: list[GenerateChunk] = []
    ends: list[GenerateEnd] = []
    async with asyncio.timeout(DEADLINE_SECONDS):
        async for item in engine.generate(request):
            if isinstance(item, GenerateEnd):
                ends.append(item)
            else:
                assert not ends
                chunks.append(item)
    assert len(ends) == 1
    return chunks, ends[0]


async def test_texts_are_spelled_by_the_engines_own_tokenizer_or_not_at_all(
    engine: Engine, engine_process: EngineProcess, tiny_model: Path
) -> None:
    """Without a token of its own: what the gateway compares with its own spelling."""
    texts = ["What is 48/2?", "<|im_start|>user\n<think>", " two  spaces", "é😀"]
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    spelled = await engine.tokenize(texts)
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert spelled == (None if isinstance(engine, ScriptedEngine) else expected)


async def test_chunks_and_end_describe_the_same_tokens(engine: Engine) -> None:
    """I2: as many ids, log-probs and version entries as the end claims."""
    chunks, end = await collect(engine, request_for(new_tokens=12))
    assert sum(len(chunk.token_ids) for chunk in chunks) == end.completion_tokens == 12
    for chunk in chunks:
        assert chunk.token_ids.dtype == np.int32
        assert chunk.logprobs.dtype == np.float32
        assert len(chunk.logprobs) == len(chunk.token_ids) > 0
        assert (chunk.logprobs <= 0).all()
    assert end.prompt_tokens == len(PROMPT)
    assert end.finish.reason is FinishReason.LENGTH
    assert end.version_spans == (VersionSpan(0, 12, 0),)


async def test_a_prompt_that_is_written_already_is_the_prompt(engine: Engine) -> None:
    """I1: its JSON serves in its place, also where it was forgotten before the request left."""
    text = json.dumps(PROMPT.tolist()).encode()
    sampled = []
    for written in (None, WrittenIds(PROMPT, text), WrittenIds(PROMPT, b"")):
        chunks, end = await collect(engine, replace(request_for(temperature=0.0), written=written))
        assert end.prompt_tokens == len(PROMPT)
        sampled.append([i for chunk in chunks for i in chunk.token_ids.tolist()])
    assert sampled[0] == sampled[1] == sampled[2] != []


@pytest.mark.parametrize("number", [1, 5, 20])
async def test_likeliest_tokens_come_for_every_token_as_many_as_asked(engine: Engine, number: int) -> None:
    """I2: one row a token, likeliest first, and the sampled token's own log-prob where it is one of them."""
    chunks, end = await collect(engine, request_for(new_tokens=12, num_top_logprobs=number))
    assert end.completion_tokens == 12
    for chunk in chunks:
        assert len(chunk.top_logprobs) == len(chunk.token_ids)
        told = zip(chunk.token_ids.tolist(), chunk.logprobs.tolist(), chunk.top_logprobs, strict=True)
        for token_id, logprob, row in told:
            # vLLM grants 20 in all, and one of them is the sampled token, likely or not.
            assert number - (number == 20) <= len(row) <= number
            assert [top.logprob for top in row] == sorted((top.logprob for top in row), reverse=True)
            assert len({top.token_id for top in row}) == len(row)
            own = dict(row).get(token_id)
            assert logprob <= row[-1].logprob if own is None else own == pytest.approx(logprob, abs=1e-6)
    assert not {"output_top_logprobs", "input_top_logprobs"} & end.meta_info.keys()


async def test_the_likeliest_of_greedy_tokens_is_the_token(engine: Engine) -> None:
    chunks, _ = await collect(engine, request_for(new_tokens=6, num_top_logprobs=3, temperature=0.0))
    firsts = [row[0].token_id for chunk in chunks for row in chunk.top_logprobs]
    assert firsts == [i for chunk in chunks for i in chunk.token_ids.tolist()]


async def test_likeliest_tokens_that_were_not_asked_for_are_absent(engine: Engine) -> None:
    """I7: no engine is asked for more than the agent wants to see."""
    chunks, _ = await collect(engine, request_for())
    assert all(not chunk.top_logprobs for chunk in chunks)


async def test_routing_rows_cover_every_input_token(engine: Engine) -> None:
    """I2: prompt + completion - 1 rows, each with distinct experts, in the narrow type."""
    _, end = await collect(engine, request_for(new_tokens=6))
    rows = end.routed_experts
    assert rows is not None
    assert rows.ids.shape == (len(PROMPT) + 6 - 1, SHAPE.num_layers, SHAPE.top_k)
    assert rows.ids.dtype == np.uint8
    assert valid_rows(rows.ids, SHAPE.num_experts).all()


async def test_a_next_turn_brings_the_rows_from_where_it_asked(engine: Engine) -> None:
    """I2: turn n+1 asks from the last recorded row on, and gets the row of turn n's last token first."""
    chunks, first = await collect(engine, request_for(new_tokens=6))
    recorded = np.concatenate([PROMPT, *(chunk.token_ids for chunk in chunks)])
    assert first.routed_experts is not None
    prompt = np.concatenate([recorded, np.arange(3, dtype=np.int32)])
    _, whole = await collect(engine, request_for(new_tokens=1, prompt=prompt))
    _, rest = await collect(engine, request_for(new_tokens=1, prompt=prompt, routed_start=first.routed_experts.stop))
    assert whole.routed_experts is not None
    assert rest.routed_experts is not None
    assert rest.routed_experts.start == len(recorded) - 1
    shared = first.routed_experts.stop
    np.testing.assert_array_equal(whole.routed_experts.ids[:shared], first.routed_experts.ids)
    np.testing.assert_array_equal(whole.routed_experts.ids[shared : shared + 4], rest.routed_experts.ids[:4])


async def test_routing_that_was_not_asked_for_is_absent(engine: Engine) -> None:
    """I9: missing is missing, not zeros."""
    _, end = await collect(engine, request_for(routed_start=None))
    assert end.routed_experts is None


async def test_abort_ends_a_stream_with_the_tokens_so_far(engine: Engine) -> None:
    """I3: an aborted generation is an answer, with all that was sampled."""
    request = request_for(new_tokens=400)
    count = 0
    async with asyncio.timeout(DEADLINE_SECONDS):
        async for item in engine.generate(request):
            if isinstance(item, GenerateEnd):
                assert item.finish.reason is FinishReason.ABORT
                assert item.completion_tokens == count < 400
                assert item.routed_experts is None or item.routed_experts.stop == len(PROMPT) + count - 1
            else:
                count += len(item.token_ids)
                await engine.abort(request.request_id)
    await engine.abort("request-of-nobody")


async def test_closing_a_stream_early_leaves_the_engine_free(engine: Engine) -> None:
    """A client that goes away does not keep its request running."""
    stream = engine.generate(request_for(new_tokens=400))
    await anext(stream)
    await stream.aclose()
    _, end = await collect(engine, request_for(new_tokens=3))
    assert end.completion_tokens == 3


@pytest.mark.parametrize("mode", list(PauseMode))
async def test_a_paused_engine_holds_new_requests_until_it_resumes(engine: Engine, mode: PauseMode) -> None:
    """I3: a pause loses no request; running ones end (abort) or go on (in place, retract)."""
    stream = engine.generate(request_for(new_tokens=150))
    started = await anext(stream)
    assert isinstance(started, GenerateChunk)
    await engine.pause(mode)
    waiting = asyncio.create_task(collect(engine, request_for(new_tokens=3)))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    assert await engine.healthy()
    await engine.resume()
    _, end = await waiting
    assert end.completion_tokens == 3
    async with asyncio.timeout(DEADLINE_SECONDS):
        items = [item async for item in stream]
    last = items[-1]
    assert isinstance(last, GenerateEnd)
    if mode is PauseMode.ABORT:
        assert last.finish.reason is FinishReason.ABORT
    else:
        assert last.completion_tokens == 150


async def test_an_engine_says_who_it_is(engine: Engine) -> None:
    identity = await engine.identity()
    assert identity.engine_id == engine.engine_id
    assert identity.url == engine.url
    assert identity.routing == SHAPE
    assert identity.captures_experts
    assert identity.policy_version == 0
    scaled, kept_set = LogprobKind.TEMPERATURE_SCALED, LogprobKind.KEPT_SET
    assert identity.logprob_kind is (kept_set if isinstance(engine, VllmEngine) else scaled)
    assert await engine.healthy()


async def test_many_requests_at_once_are_kept_apart(engine: Engine) -> None:
    """I2 under concurrency."""
    sizes = [1, 2, 3, 5, 8, 13, 21, 34]
    ask: Callable[[int], Awaitable[tuple[list[GenerateChunk], GenerateEnd]]] = lambda size: collect(  # noqa: E731
        engine, request_for(new_tokens=size, prompt=np.arange(size + 4, dtype=np.int32))
    )
    results = await asyncio.gather(*(ask(size) for size in sizes))
    for size, (chunks, end) in zip(sizes, results, strict=True):
        assert end.completion_tokens == size == sum(len(chunk.token_ids) for chunk in chunks)
        assert end.prompt_tokens == size + 4
