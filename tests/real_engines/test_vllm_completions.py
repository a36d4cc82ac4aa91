"""The real vLLM 0.30.0 started without its ids route, and with processed log-probs: our client falls back.

Runs where `tests/real_engines/install.sh vllm` has made `.venv-vllm` (`make test-engines`); fails where it has not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.openai_text import OpenAiTextEngine
from engines.vllm import VllmEngine
from engines.weights.names import policy_version_of
from gateway.contracts.generation import (
    Finish,
    FinishReason,
    GenerateChunk,
    GenerateEnd,
    GenerateRequest,
    LogprobKind,
    SamplingParams,
)
from gateway.tito.tokenizer import ChatTokenizer
from tests.real_engines.servers import real_vllm
from tests.real_engines.transcripts import Reference

pytestmark = [pytest.mark.real_engine, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def url(memorised: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    flags = ("--logprobs-mode", "processed_logprobs", "--enable-prompt-tokens-details")
    with real_vllm(memorised, log, *flags) as url:
        yield url


@pytest.fixture
async def engine(url: str) -> AsyncIterator[VllmEngine]:
    made = VllmEngine(url, engine_id="v", routing=None, policy_version_of=lambda label: policy_version_of(label, {}))
    yield made
    await made.aclose()


def request_for(prompt: list[int], rid: str, **sampling: Any) -> GenerateRequest:
    params = SamplingParams(**({"max_new_tokens": 40, "ignore_eos": True} | sampling))
    return GenerateRequest(rid * 32, np.array(prompt, dtype=np.int32), params)


async def test_completions_give_the_same_tokens_and_scaled_log_probs(engine: VllmEngine, reference: Reference) -> None:
    """I1, I2: ids in and out, log-probs of the temperature-scaled distribution within 1e-4, and it says so; no rows."""
    identity = await engine.identity()
    assert identity.logprob_kind is LogprobKind.KEPT_SET
    assert not identity.captures_experts
    prompt = np.random.default_rng(1).integers(3, 300, 300).tolist()  # its cache holds blocks of 128
    *chunks, end = [item async for item in engine.generate(request_for(prompt, "a", temperature=0.6))]
    assert isinstance(end, GenerateEnd)
    kept = [chunk for chunk in chunks if isinstance(chunk, GenerateChunk)]
    ids = [i for chunk in kept for i in chunk.token_ids.tolist()]
    assert len(ids) == 40
    assert end.finish == Finish(FinishReason.LENGTH)
    wanted, _ = reference.score(prompt + ids, temperature=0.6)
    np.testing.assert_allclose(np.concatenate([chunk.logprobs for chunk in kept]), wanted[299:], atol=1e-4)
    *_, again = [item async for item in engine.generate(request_for(prompt, "b", temperature=0.6))]
    assert isinstance(again, GenerateEnd)
    assert again.cached_tokens > 0


async def test_completions_give_top_logprobs_by_id(engine: VllmEngine, reference: Reference) -> None:
    """I2: of the temperature-scaled distribution, as the log-probs are; as many as were asked for, everywhere."""
    prompt = np.random.default_rng(2).integers(3, 300, 40).tolist()
    request = dataclasses.replace(request_for(prompt, "e", temperature=0.6), num_top_logprobs=20)
    kept = [item async for item in engine.generate(request) if isinstance(item, GenerateChunk)]
    ids = [i for chunk in kept for i in chunk.token_ids.tolist()]
    rows = [row for chunk in kept for row in chunk.top_logprobs]
    assert {len(row) for row in rows} == {20}
    reference.check_likeliest(prompt, ids, rows, temperature=0.6)


async def test_an_aborted_completion_is_an_answer(engine: VllmEngine) -> None:
    """I3."""
    request = request_for([5, 6, 7], "c", max_new_tokens=2000)
    stream = engine.generate(request)
    await anext(stream)
    await engine.abort(request.request_id)
    *_, end = [item async for item in stream]
    assert isinstance(end, GenerateEnd)
    assert end.finish.reason is FinishReason.ABORT


async def test_text_alone_is_text_alone(url: str, memorised: Path) -> None:
    """I1: the same server as a text upstream: the text of a greedy reply, log-probs missing, and it says so."""
    tokenizer = ChatTokenizer.load(memorised)
    engine = OpenAiTextEngine(url, engine_id="t", decode=tokenizer.decode, encode=tokenizer.encode_after)
    prompt = tokenizer.encode("What is the weather in Oslo?").tolist()
    *chunks, end = [item async for item in engine.generate(request_for(prompt, "d", temperature=0.0))]
    assert isinstance(end, GenerateEnd)
    kept = [chunk for chunk in chunks if isinstance(chunk, GenerateChunk)]
    assert sum(len(chunk.token_ids) for chunk in kept) == end.completion_tokens > 0
    assert all(np.isnan(chunk.logprobs).all() for chunk in kept)
    assert not (await engine.identity()).token_exact
    await engine.aclose()
