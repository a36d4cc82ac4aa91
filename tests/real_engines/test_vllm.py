"""The real vLLM 0.30.0 behind our client and a real gateway, held against a transformers forward of the same weights.

Runs where `tests/real_engines/install.sh vllm` has made `.venv-vllm` (`make test-engines`); fails where it has not.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import orjson
import pytest

from engines.launch import running_engine
from engines.vllm import VllmEngine
from engines.weights.names import policy_version_of
from gateway.contracts.errors import ContextOverflow, EngineRejected
from gateway.contracts.generation import (
    Capability,
    Finish,
    FinishReason,
    GenerateChunk,
    GenerateEnd,
    GenerateRequest,
    LogprobKind,
    SamplingParams,
)
from gateway.contracts.ports import PauseMode
from gateway.tito.tokenizer import ChatTokenizer
from tests.integration.gateway.conftest import RunningGateway
from tests.real_engines.conftest import gateway_before
from tests.real_engines.known_model import check_is_known
from tests.real_engines.servers import real_vllm
from tests.real_engines.transcripts import TRANSCRIPTS, Reference, check_rows, repeat_transcript

pytestmark = [pytest.mark.real_engine, pytest.mark.timeout(600)]

OPENING = "<|im_start|>user\nWhat is the weather in Oslo?<|im_end|>\n<|im_start|>assistant\n"

LONG = 2000
"""Tokens, nearly all of the context: they take seconds, so what a test does meanwhile happens meanwhile."""

_request_numbers = itertools.count()


@pytest.fixture(scope="module")
def url(memorised: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    flags = ("--enable-scale-out", "--enable-return-routed-experts")
    with real_vllm(memorised, tmp_path_factory.mktemp("log") / "vllm.log", *flags) as url:
        yield url


@pytest.fixture
async def engine(url: str) -> AsyncIterator[VllmEngine]:
    made = VllmEngine(url, engine_id="v", routing=None, policy_version_of=lambda label: policy_version_of(label, {}))
    yield made
    await made.aclose()


@pytest.fixture(scope="module")
def gateway(url: str, memorised: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with gateway_before(f"vllm={url}", memorised, tmp_path_factory.mktemp("ledger")) as running:
        yield running


def prompt_of(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 300, length).tolist()


def request_for(prompt: Sequence[int], *, start: int | None = 0, **sampling: Any) -> GenerateRequest:
    fields: dict[str, Any] = {"max_new_tokens": 24, "ignore_eos": True} | sampling
    name = f"request-{next(_request_numbers):024d}"
    return GenerateRequest(name, np.array(prompt, dtype=np.int32), SamplingParams(**fields), start)


async def collect(engine: VllmEngine, request: GenerateRequest) -> tuple[list[int], list[float], GenerateEnd]:
    items = [item async for item in engine.generate(request)]
    *chunks, end = items
    assert isinstance(end, GenerateEnd)
    kept = [chunk for chunk in chunks if isinstance(chunk, GenerateChunk)]
    ids = [i for chunk in kept for i in chunk.token_ids.tolist()]
    return ids, [v for chunk in kept for v in chunk.logprobs.tolist()], end


@pytest.mark.parametrize("number", range(len(TRANSCRIPTS)))
def test_a_tool_conversation_is_captured_as_the_model_computes_it(
    gateway: RunningGateway, reference: Reference, session_id: str, number: int
) -> None:
    """I1, I2, I3: reasoning, calls and answers parsed; one segment, log-probs and incremental experts as computed."""
    repeat_transcript(gateway, session_id, TRANSCRIPTS[number])
    turns = gateway.turns(session_id)
    assert [turn["untrainable_reason"] for turn in turns] == [None] * len(turns)
    assert {turn["finish"]["reason"] for turn in turns} == {"stop"}
    starts = [turn["experts_start"] for turn in turns]
    assert starts[0] == 0
    assert all(later > earlier for earlier, later in itertools.pairwise(starts))
    [segment] = gateway.get(f"/sessions/{session_id}/segments?arrays=1")["segments"]
    assert segment["logprob_kind"] == "raw"
    reference.check_segment(segment)


def test_a_sampled_conversation_cut_by_length_trains_every_token(
    gateway: RunningGateway, reference: Reference, session_id: str
) -> None:
    """I1, I2: three turns at a temperature, each cut short: raw log-probs, one segment."""
    messages: list[Any] = [{"role": "user", "content": "What is 12*7?"}]
    for i in range(3):
        body = {"messages": messages, "max_tokens": 9, "temperature": 0.7, "ignore_eos": True}
        choice = gateway.post(f"/sessions/{session_id}/v1/chat/completions", body)["choices"][0]
        assert choice["finish_reason"] == "length"
        messages = [*messages, choice["message"], {"role": "user", "content": f"again {i}"}]
    [segment] = gateway.get(f"/sessions/{session_id}/segments?arrays=1")["segments"]
    assert segment["num_trained_tokens"] == 27
    reference.check_segment(segment)


@pytest.mark.parametrize("number", [1, 5, 20])
def test_top_logprobs_are_those_of_the_models_own_softmax(
    gateway: RunningGateway, reference: Reference, session_id: str, number: int
) -> None:
    """I2: of the unscaled distribution, as the record's log-probs are; as many as were asked for, at every position."""
    body = {"messages": [{"role": "user", "content": "What is 12*7?"}], "max_tokens": 24, "temperature": 0.7}
    wanted = {"ignore_eos": True, "logprobs": True, "top_logprobs": number, "return_token_ids": True}
    reply = gateway.post(f"/sessions/{session_id}/v1/chat/completions", body | wanted)
    [turn] = gateway.turns(session_id)
    rows = [list(zip(row[::2], row[1::2], strict=True)) for row in turn["meta"]["top_logprobs"]]
    reference.check_likeliest(reply["prompt_token_ids"], turn["output_token_ids"], rows, temperature=1.0)
    least = number - (number == 20)  # 20 is all that vLLM grants, and one of them is the sampled token, likely or not
    assert all(least <= len(row) <= number for row in rows)
    shown = reply["choices"][0]["logprobs"]["content"]
    assert [[top["logprob"] for top in entry["top_logprobs"]] for entry in shown] == [
        [p for _, p in row] for row in rows
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
async def test_log_probs_are_raw_at_every_temperature(
    engine: VllmEngine, reference: Reference, temperature: float
) -> None:
    """I2: within 1e-4 of a forward pass; rows equal to its router's."""
    for length in (1, 20, 300):
        prompt = prompt_of(length, seed=length)
        ids, logprobs, end = await collect(engine, request_for(prompt, temperature=temperature))
        wanted, experts = reference.score(prompt + ids)
        np.testing.assert_allclose(logprobs, wanted[length - 1 :], atol=1e-4)
        assert end.routed_experts is not None
        check_rows(end.routed_experts.ids, experts)


async def test_rows_come_from_where_they_are_asked(engine: VllmEngine, reference: Reference) -> None:
    """I2: incremental rows of a growing conversation, prefix cached, eight at once."""

    async def converse(seed: int) -> None:
        recorded, start, rows = prompt_of(30, seed), 0, []
        for turn in range(3):
            ids, _, end = await collect(engine, request_for(recorded, start=start, max_new_tokens=11))
            assert end.routed_experts is not None
            assert end.routed_experts.start == start
            rows.append(end.routed_experts.ids)
            recorded = [*recorded, *ids]
            start = len(recorded) - 1
            recorded += prompt_of(7, seed + turn) if turn < 2 else []
        check_rows(np.concatenate(rows), reference.score(recorded)[1])

    await asyncio.gather(*(converse(100 * seed) for seed in range(8)))


async def test_stopping_is_told_as_it_was(engine: VllmEngine, memorised: Path) -> None:
    """I1: stop tokens stay among the ids and are named; a stop string ends the text, and its tokens are kept."""
    tokenizer = ChatTokenizer.load(memorised)
    # Text, as vLLM shows the end of a prompt that is none with the first token, and looks for stop strings in it.
    prompt = tokenizer.encode(OPENING).tolist()
    free, _, end = await collect(engine, request_for(prompt, temperature=0.0))
    assert end.finish == Finish(FinishReason.LENGTH)
    at = next(i for i in range(3, len(free)) if free[i] not in free[:i])
    sampling: dict[str, Any] = {"temperature": 0.0, "ignore_eos": False}
    ids, _, end = await collect(engine, request_for(prompt, stop_token_ids=(free[at],), **sampling))
    assert ids == free[: at + 1]
    assert end.finish == Finish(FinishReason.STOP, free[at])
    word = next(text for text in map(tokenizer.token_text, free) if text.isalpha())
    ids, _, end = await collect(engine, request_for(prompt, stop=(word,), **sampling))
    assert end.finish.reason is FinishReason.STOP
    assert ids == next(free[:n] for n in range(1, len(free)) if word in tokenizer.decode(free[:n]))


@pytest.mark.parametrize("mode", list(PauseMode))
async def test_a_request_that_ran_through_a_pause_is_what_the_model_computes(
    engine: VllmEngine, reference: Reference, mode: PauseMode
) -> None:
    """I2, I3: held in place, computed anew, or ended with what it has; its tokens and rows are right either way."""
    prompt = prompt_of(20, seed=15)
    stream = engine.generate(request_for(prompt, max_new_tokens=LONG))
    first = await anext(stream)
    await engine.pause(mode)
    waiting = asyncio.create_task(collect(engine, request_for(prompt_of(5, seed=16))))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    assert await engine.healthy()
    await engine.resume()
    assert (await waiting)[2].completion_tokens == 24
    *chunks, end = [first, *[item async for item in stream]]
    assert isinstance(end, GenerateEnd)
    kept = [chunk for chunk in chunks if isinstance(chunk, GenerateChunk)]
    ids = [i for chunk in kept for i in chunk.token_ids.tolist()]
    wanted, experts = reference.score(prompt + ids)
    np.testing.assert_allclose(np.concatenate([chunk.logprobs for chunk in kept]), wanted[19:], atol=1e-4)
    assert end.versions_certain
    if mode is PauseMode.ABORT:
        assert end.finish.reason is FinishReason.ABORT
        assert end.routed_experts is None
    else:
        assert len(ids) == LONG
        assert end.routed_experts is not None
        check_rows(end.routed_experts.ids, experts)


async def test_a_label_that_moves_under_a_request_makes_its_versions_uncertain(engine: VllmEngine, url: str) -> None:
    """I5: 0.30 does not say which token which weights sampled."""
    stream = engine.generate(request_for(prompt_of(20, seed=17), max_new_tokens=LONG))
    await anext(stream)
    await engine.pause(PauseMode.IN_PLACE)
    async with aiohttp.ClientSession() as session:
        for label in ("policy-000003", "default"):
            async with session.post(f"{url}/update_weight_version", json={"new_version": label}) as reply:
                assert reply.status == 200
            if label != "default":
                assert (await engine.identity()).policy_version == 3
                await engine.resume()
                *_, end = [item async for item in stream]
    assert isinstance(end, GenerateEnd)
    assert not end.versions_certain
    assert (await engine.identity()).policy_version == 0


async def test_aborts_and_refusals(engine: VllmEngine) -> None:
    """I3: whole ids only; an aborted request is an answer."""
    request = request_for(prompt_of(9, seed=19), max_new_tokens=LONG)
    other = engine.generate(request_for(prompt_of(9, seed=20), max_new_tokens=60))
    await anext(other)
    stream = engine.generate(request)
    await anext(stream)
    await engine.abort(request.request_id[:-1])  # no request of ours: the name of none, the beginning of all
    await anext(stream)
    await engine.abort(request.request_id)
    *_, end = [item async for item in stream]
    assert isinstance(end, GenerateEnd)
    assert end.finish.reason is FinishReason.ABORT
    *_, end = [item async for item in other]
    assert isinstance(end, GenerateEnd)
    assert end.completion_tokens == 60
    with pytest.raises(ContextOverflow, match="maximum context length"):
        await collect(engine, request_for([5] * 2048))
    with pytest.raises(EngineRejected, match="out of vocabulary"):
        await collect(engine, request_for([5, 60_000]))


async def test_sampling_fields_take_effect(engine: VllmEngine) -> None:
    """I7: each name arrives where it counts; a seed is left out and the reply says so."""
    prompt, free = prompt_of(20, seed=21), {"temperature": 1.0, "ignore_eos": False}
    ids, _, _ = await collect(engine, request_for(prompt, extra={"logit_bias": {"12": 100.0}}, **free))
    assert set(ids) == {12}
    ids, _, _ = await collect(engine, request_for(prompt, top_k=1, **free))
    assert ids == (await collect(engine, request_for(prompt, temperature=0.0, ignore_eos=False)))[0]
    biased = {"logit_bias": {str(ids[0]): -100.0}, "min_new_tokens": 5}
    ids, _, _ = await collect(engine, request_for(prompt, extra=biased, **free))
    assert len(ids) >= 5
    ids, _, end = await collect(engine, request_for(prompt, extra={"regex": "[0-9]{3}"}, **free))
    assert end.finish.reason is FinishReason.STOP
    assert len(ids) >= 2
    _, _, end = await collect(engine, request_for(prompt_of(1500, seed=22), seed=5, max_new_tokens=3))
    assert end.meta_info["seed_left_out"] is True


async def test_identity_is_read_from_the_server_and_its_folder(engine: VllmEngine, memorised: Path) -> None:
    identity = await engine.identity()
    assert identity.kind == "vllm"
    assert identity.model_path == str(memorised)
    assert identity.logprob_kind is LogprobKind.RAW
    assert identity.captures_experts
    assert identity.routing is not None
    assert (identity.routing.num_layers, identity.routing.num_experts, identity.routing.top_k) == (4, 8, 2)
    assert identity.context_length == 2048
    assert set(identity.fingerprints) == {"tokenizer", "template"}


async def test_the_server_is_known_by_its_spelling(engine: VllmEngine, memorised: Path, tmp_path: Path) -> None:
    """I1: vLLM says no fingerprint, and tokenises one text a request."""
    await check_is_known(engine, memorised, tmp_path / "changed")


async def test_capabilities_are_read_from_the_server(engine: VllmEngine) -> None:
    identity = await engine.identity()
    can = {each for each in Capability if identity.can(each)}
    assert can == {"routed_experts", "token_ids", "raw_logprobs", "top_logprobs", "pause", "grammar"}


async def test_the_embedded_engine_streams_the_same_events(url: str, memorised: Path) -> None:
    """I8: keys, ids, log-probs and rows of a greedy request, for each route that both have."""
    sampling = {"max_tokens": 12, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    common = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True, "request_id": "r1"}
    prompt = ChatTokenizer.load(memorised).encode(OPENING).tolist()
    bodies: dict[str, dict[str, Any]] = {
        "/inference/v1/generate": common | {"token_ids": prompt, "sampling_params": sampling},
        "/v1/completions": common | sampling | {"prompt": prompt, "model": "tiny"},
    }
    with running_engine(memorised, flags=("--dtype", "float32", "--served-model-name", "tiny")) as process:
        for route, body in bodies.items():
            real, ours = [await events(address + route, body) for address in (url, process.url)]
            # Tokens that come while the reader is slow share an event: only first and last ones, and all joined.
            assert set(real[0]) == set(ours[0])
            choices = [[event["choices"][0] for event in side if event["choices"]] for side in (real, ours)]
            for at in (0, -1):
                theirs, own = choices[0][at], choices[1][at]
                assert set(theirs) == set(own)
                assert set(own["logprobs"]) <= set(theirs["logprobs"])
                for key in ("finish_reason", "prompt_token_ids", "routed_experts"):
                    assert theirs.get(key) == own.get(key), key
            for key in ("token_ids", "text"):
                joined = [list(itertools.chain(*(choice.get(key, ()) for choice in side))) for side in choices]
                assert joined[0] == joined[1], key
            assert real[-1]["usage"] == ours[-1]["usage"]


async def events(address: str, body: Any) -> list[Any]:
    async with aiohttp.ClientSession() as session, session.post(address, json=body) as response:
        text = (await response.read()).decode()
    lines = [line for line in text.split("\n\n") if line.strip()]
    assert lines[-1] == "data: [DONE]"
    return [orjson.loads(line.removeprefix("data: ")) for line in lines[:-1]]
