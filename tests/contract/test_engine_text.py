"""What a text-only upstream can promise: its text, whole, as ids of ours that nobody will train on."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines.launch import EngineProcess
from engines.openai_text import OpenAiTextEngine, TextStream
from gateway.contracts.errors import EngineProtocolError, EngineRejected, EngineUnavailable, InvalidRequest
from gateway.contracts.generation import (
    Finish,
    FinishReason,
    GenerateChunk,
    GenerateEnd,
    GenerateRequest,
    SamplingParams,
    TokenIds,
)
from gateway.contracts.ports import PauseMode
from gateway.tito.tokenizer import ChatTokenizer

DEADLINE_SECONDS = 150.0
MARKUP = ("<think>", "</think>", "<tool_call>", "</tool_call>")


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_model)


@pytest.fixture
async def engine(engine_process: EngineProcess, tokenizer: ChatTokenizer) -> AsyncIterator[OpenAiTextEngine]:
    made = OpenAiTextEngine(engine_process.url, engine_id="t0", decode=tokenizer.decode, encode=tokenizer.encode_after)
    yield made
    await made.aclose()


def request_for(tokenizer: ChatTokenizer, *, rid: str = "r" * 32, **sampling: Any) -> GenerateRequest:
    fields = {"max_new_tokens": 12} | sampling
    return GenerateRequest(rid, tokenizer.encode("What is 48/2?"), SamplingParams(**fields))


async def collect(engine: OpenAiTextEngine, request: GenerateRequest) -> tuple[TokenIds, GenerateEnd]:
    chunks: list[GenerateChunk] = []
    async with asyncio.timeout(DEADLINE_SECONDS):
        async for item in engine.generate(request):
            if isinstance(item, GenerateEnd):
                assert all(np.isnan(chunk.logprobs).all() for chunk in chunks)
                return np.concatenate([np.zeros(0, dtype=np.int32), *(chunk.token_ids for chunk in chunks)]), item
            chunks.append(item)
    raise AssertionError("no end")


async def test_the_text_comes_whole_and_without_log_probs(engine: OpenAiTextEngine, tokenizer: ChatTokenizer) -> None:
    """I9: ids of ours, counted as they are; log-probs and routing that we do not have are missing."""
    token_ids, end = await collect(engine, request_for(tokenizer, temperature=0.0))
    assert end.completion_tokens == len(token_ids)
    assert end.prompt_tokens == len(tokenizer.encode("What is 48/2?"))
    assert end.routed_experts is None
    again, _ = await collect(engine, request_for(tokenizer, temperature=0.0))
    assert tokenizer.decode(again) == tokenizer.decode(token_ids) != ""


async def test_it_says_that_its_ids_are_not_what_was_sampled(engine: OpenAiTextEngine) -> None:
    """I1."""
    identity = await engine.identity()
    assert not identity.token_exact
    assert not identity.captures_experts
    assert await engine.healthy()


async def test_an_abort_ends_the_stream_with_the_text_so_far(
    engine: OpenAiTextEngine, tokenizer: ChatTokenizer
) -> None:
    """I3."""
    request = request_for(tokenizer, max_new_tokens=400)
    count = 0
    async with asyncio.timeout(DEADLINE_SECONDS):
        async for item in engine.generate(request):
            if isinstance(item, GenerateEnd):
                assert item.completion_tokens == count
                assert item.finish.reason in (FinishReason.ABORT, FinishReason.STOP)
            else:
                count += len(item.token_ids)
                await engine.abort(request.request_id)
    await engine.abort("nobody")


@pytest.mark.parametrize("mode", list(PauseMode))
async def test_a_pause_holds_new_requests_back(
    engine: OpenAiTextEngine, tokenizer: ChatTokenizer, mode: PauseMode
) -> None:
    """I3: none is lost."""
    await engine.pause(mode)
    waiting = asyncio.create_task(collect(engine, request_for(tokenizer)))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    await engine.resume()
    _, end = await waiting
    assert end.completion_tokens > 0


async def test_a_constraint_that_would_be_lost_is_refused(engine: OpenAiTextEngine, tokenizer: ChatTokenizer) -> None:
    """I7."""
    with pytest.raises(InvalidRequest, match="regex"):
        await collect(engine, request_for(tokenizer, extra={"regex": "a+"}))


def stream_of(tokenizer: ChatTokenizer) -> TextStream:
    return TextStream(tokenizer.encode_after, "engine t0")


def choice(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish}]}


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.lists(
        st.one_of(st.sampled_from([*MARKUP, " ", "\n", "48/2", "ä", "the"]), st.text(max_size=4)), max_size=10
    ),
    cuts=st.lists(st.integers(0, 80), max_size=10),
)
def test_however_text_is_cut_nothing_is_lost_and_no_markup_is_cut_in_two(
    tokenizer: ChatTokenizer, words: list[str], cuts: list[int]
) -> None:
    """I2: the ids read as the upstream's text, and markup is the one id that parsers look for."""
    text = "".join(words)
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    stream = stream_of(tokenizer)
    chunks = [stream.read(choice(text[a:b])) for a, b in itertools.pairwise(edges)]
    stream.read(choice("", "stop"))
    chunks.append(stream.rest())
    token_ids = [i for chunk in chunks if chunk is not None for i in chunk.token_ids.tolist()]
    assert tokenizer.decode(token_ids) == tokenizer.decode(tokenizer.encode(text)) == text
    for markup in MARKUP:
        assert token_ids.count(tokenizer.token_id(markup)) == tokenizer.encode(text).tolist().count(
            tokenizer.token_id(markup)
        )
    end = stream.end(GenerateRequest("r", np.zeros(1, np.int32), SamplingParams(max_new_tokens=1)), aborted=False)
    assert end.completion_tokens == len(token_ids)
    assert end.finish == Finish(FinishReason.STOP)


def test_a_stream_without_a_reason_has_not_ended(tokenizer: ChatTokenizer) -> None:
    """I3."""
    stream = stream_of(tokenizer)
    stream.read(choice("half a"))
    stream.rest()
    with pytest.raises(EngineUnavailable, match="before the request did"):
        stream.end(request_for(tokenizer), aborted=False)


@pytest.mark.parametrize(
    ("event", "error"),
    [
        ({"error": {"message": "no", "code": 400}}, EngineRejected),
        ({"error": {"message": "down", "code": 503}}, EngineUnavailable),
        ({"nothing": 1}, EngineProtocolError),
        ([1], EngineProtocolError),
    ],
)
def test_errors_inside_a_stream_are_never_text(tokenizer: ChatTokenizer, event: Any, error: type[Exception]) -> None:
    """I3."""
    with pytest.raises(error):
        stream_of(tokenizer).read(event)
