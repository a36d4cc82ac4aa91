"""The embedded engine beside the real SGLang 0.5.23 on one float32 checkpoint: the same requests, compared.

Runs where `tests/real_engines/install.sh sglang` has made `.venv-sglang` (`make test-engines`); fails where it has not.
"""

from __future__ import annotations

import asyncio
import base64
import shutil
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import numpy.typing as npt
import orjson
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from engines.launch import running_engine
from engines.sglang import SglangEngine
from engines.weights.disk import DiskTransport
from engines.weights.names import policy_version_of
from gateway.contracts.errors import ContextOverflow, EngineRejected
from gateway.contracts.experts import RoutingShape
from gateway.contracts.generation import (
    Capability,
    FinishReason,
    GenerateChunk,
    GenerateEnd,
    GenerateRequest,
    SamplingParams,
)
from gateway.contracts.ports import PauseMode
from tests.real_engines.known_model import check_is_known
from tests.real_engines.servers import real_sglang

pytestmark = [pytest.mark.real_engine, pytest.mark.timeout(600)]

SHAPE = RoutingShape(num_layers=4, num_experts=8, top_k=2)
GREEDY = {"max_new_tokens": 48, "temperature": 0, "ignore_eos": True}
LONG = {"max_new_tokens": 400, "temperature": 1.0, "ignore_eos": True}
ROW_TOLERANCE = 0.005
"""Share of routing rows that may differ: experts of nearly equal weight change places in another summation order."""


@dataclass(frozen=True)
class Server:
    """One of the two engines, over plain HTTP."""

    name: str
    url: str
    session: aiohttp.ClientSession

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        async with self.session.post(self.url + path, json=body) as response:
            return response.status, _content(await response.read())

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.session.get(self.url + path) as response:
            return response.status, _content(await response.read())

    async def generate(self, input_ids: Any, sampling: Any = None, **wanted: Any) -> Any:
        status, reply = await self.post(
            "/generate", {"input_ids": input_ids, "sampling_params": sampling or GREEDY} | wanted
        )
        assert status == 200, (self.name, reply)
        return reply

    async def events(self, input_ids: Any, sampling: Any = None, **wanted: Any) -> list[Any]:
        body = {"input_ids": input_ids, "sampling_params": sampling or GREEDY, "stream": True} | wanted
        async with self.session.post(self.url + "/generate", json=body) as response:
            text = (await response.read()).decode()
        lines = [line for line in text.split("\n\n") if line.strip()]
        assert lines[-1] == "data: [DONE]"
        return [orjson.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def _content(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return body.decode()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("parity") / "first", tiny_model, seed=0)


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("parity") / "second", tiny_model, seed=1)


def write_checkpoint(folder: Path, tokenizer_folder: Path, *, seed: int) -> Path:
    """A Qwen3-MoE whose output layer is its own: SGLang's model of that name does not tie it to the embedding.

    Weights are larger than usual, so that log-probs differ enough for a wrong row or token to show.
    """
    config = Qwen3MoeConfig(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=SHAPE.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=SHAPE.num_experts,
        num_experts_per_tok=SHAPE.top_k,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        initializer_range=0.08,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer_folder / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def sglang_url(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with real_sglang(checkpoint, tmp_path_factory.mktemp("log") / "sglang.log") as url:
        yield url


@pytest.fixture(scope="module")
def embedded_url(checkpoint: Path) -> Iterator[str]:
    with running_engine(checkpoint, flags=("--dtype", "float32", "--served-model-name", "tiny")) as process:
        yield process.url


@pytest.fixture
async def both(sglang_url: str, embedded_url: str) -> AsyncIterator[tuple[Server, Server]]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        yield Server("sglang", sglang_url, session), Server("embedded", embedded_url, session)


def prompt_of(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 300, length).tolist()


def rows_of(reply: Any) -> npt.NDArray[np.int32]:
    raw = base64.b64decode(reply["meta_info"]["routed_experts"], validate=True)
    return np.frombuffer(raw, dtype="<i4").reshape(-1, SHAPE.num_layers, SHAPE.top_k)


def assert_same_rows(real: npt.NDArray[np.int32], ours: npt.NDArray[np.int32]) -> None:
    assert real.shape == ours.shape
    differing = (real != ours).any(axis=(1, 2)).mean()
    assert differing <= ROW_TOLERANCE


def assert_same_logprobs(real: Sequence[Any], ours: Sequence[Any]) -> None:
    assert [entry[1:] for entry in real] == [entry[1:] for entry in ours]
    values = [[np.nan if entry[0] is None else entry[0] for entry in side] for side in (real, ours)]
    np.testing.assert_allclose(values[1], values[0], atol=1e-4)


@pytest.mark.parametrize(
    ("length", "wanted"),
    [
        (20, {}),
        (20, {"return_logprob": True}),
        (33, {"return_logprob": True, "logprob_start_len": 0}),
        (33, {"return_logprob": True, "logprob_start_len": 12}),
        (60, {"return_routed_experts": True}),
        (60, {"return_logprob": True, "return_routed_experts": True, "routed_experts_start_len": 45}),
        (700, {"return_logprob": True, "return_routed_experts": True, "return_prompt_token_ids": True}),
    ],
)
async def test_replies_are_equal(both: tuple[Server, Server], length: int, wanted: dict[str, Any]) -> None:
    """I1, I2, I8: keys, ids, log-probs and experts of a greedy reply; twice, so that the second finds its prefix."""
    for _ in range(2):
        real, ours = [await server.generate(prompt_of(length, seed=length), **wanted) for server in both]
        assert set(real) == set(ours)
        assert set(real["meta_info"]) == set(ours["meta_info"])
        assert real["output_ids"] == ours["output_ids"]
        assert real["text"] == ours["text"]
        for key in ("finish_reason", "prompt_tokens", "completion_tokens", "weight_versions", "num_retractions"):
            assert real["meta_info"][key] == ours["meta_info"][key]
        if "return_logprob" in wanted:
            for key in ("input_token_logprobs", "output_token_logprobs"):
                assert_same_logprobs(real["meta_info"][key], ours["meta_info"][key])
        if "return_routed_experts" in wanted:
            assert_same_rows(rows_of(real), rows_of(ours))


@pytest.mark.parametrize("wanted", [{}, {"logprob_start_len": 0}, {"logprob_start_len": 12}])
async def test_top_logprobs_are_equal(both: tuple[Server, Server], wanted: dict[str, Any]) -> None:
    """I8: keys, order and values of the likeliest tokens, of output and prompt, whole and streamed."""
    asked = {"return_logprob": True, "top_logprobs_num": 5, **wanted}
    real, ours = [await server.generate(prompt_of(33, seed=3), **asked) for server in both]
    last_real, last_ours = [(await server.events(prompt_of(33, seed=3), **asked))[-1] for server in both]
    for theirs, embedded in ((real, ours), (last_real, last_ours)):
        assert set(theirs["meta_info"]) == set(embedded["meta_info"])
        for key in ("output_top_logprobs", "input_top_logprobs"):
            rows = [side["meta_info"][key] for side in (theirs, embedded)]
            assert [row is None for row in rows[0]] == [row is None for row in rows[1]]
            for row, own in zip(*rows, strict=True):
                assert_same_logprobs(row or [], own or [])


async def test_sampled_logprobs_mean_the_same(both: tuple[Server, Server]) -> None:
    """Each engine's sampled tokens, scored by the other as a prompt: equal at temperature 1, and not at another."""
    for temperature in (1.0, 0.6):
        sampling = {"max_new_tokens": 40, "temperature": temperature, "ignore_eos": True}
        for sampler, scorer in (both, both[::-1]):
            prompt = prompt_of(25, seed=7)
            reply = await sampler.generate(prompt, sampling, return_logprob=True)
            scored = await scorer.generate(
                prompt + reply["output_ids"],
                {"max_new_tokens": 0},
                return_logprob=True,
                logprob_start_len=len(prompt) - 1,
            )
            raw = np.array([entry[0] for entry in scored["meta_info"]["input_token_logprobs"][1:]])
            sampled = np.array([entry[0] for entry in reply["meta_info"]["output_token_logprobs"]])
            difference = np.abs(raw - sampled).max()
            assert difference < 1e-4 if temperature == 1.0 else difference > 1e-2


async def test_a_second_turn_is_equal(both: tuple[Server, Server]) -> None:
    """I2: the row of the first turn's last token comes with the second turn."""
    prompt = prompt_of(50, seed=9)
    first = await both[0].generate(prompt)
    await both[1].generate(prompt)
    longer = prompt + first["output_ids"] + prompt_of(9, seed=10)
    start = len(prompt) + len(first["output_ids"]) - 1
    wanted = {"return_logprob": True, "return_routed_experts": True, "routed_experts_start_len": start}
    real, ours = [await server.generate(longer, **wanted) for server in both]
    assert real["meta_info"]["cached_tokens"] == ours["meta_info"]["cached_tokens"] == start
    assert_same_logprobs(real["meta_info"]["output_token_logprobs"], ours["meta_info"]["output_token_logprobs"])
    assert_same_rows(rows_of(real), rows_of(ours))


async def test_streams_have_the_same_events(both: tuple[Server, Server]) -> None:
    """I8: the same fields while streaming, the same ones added by the last event, cumulative in both."""
    wanted = {"return_logprob": True, "return_routed_experts": True}
    real, ours = [await server.events(prompt_of(20, seed=11), **wanted) for server in both]
    for at in (0, -1):
        assert set(real[at]) == set(ours[at])
        assert set(real[at]["meta_info"]) == set(ours[at]["meta_info"])
    for key in ("output_ids", "text"):
        assert real[-1][key] == ours[-1][key]
    # Both join tokens into one event when the reader is slow, so events are compared with the whole, not one by one.
    for events in (real, ours):
        for event in events:
            assert events[-1]["output_ids"][: len(event["output_ids"])] == event["output_ids"]
            assert events[-1]["text"].startswith(event["text"])
            assert event["meta_info"]["completion_tokens"] == len(event["output_ids"])
    batch = [await server.events([prompt_of(5, seed=1), prompt_of(6, seed=2)]) for server in both]
    ends = [{event["index"]: event["output_ids"] for event in side} for side in batch]
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    "body",
    [
        {"sampling_params": GREEDY},
        {"input_ids": []},
        {"input_ids": [5] * 2048},
        {"input_ids": [5] * 2040, "sampling_params": {"max_new_tokens": 100}},
        {"input_ids": [5, 6], "sampling_params": {"temperature": -1}},
        {"input_ids": [5, 6], "sampling_params": {"top_p": 3}},
        {"input_ids": [5, 6], "return_routed_experts": True, "routed_experts_start_len": 3},
        {"input_ids": [5, 6], "return_routed_experts": True, "routed_experts_start_len": -1},
        {"input_ids": [5, 6], "return_logprob": True, "logprob_start_len": 3},
    ],
)
async def test_refusals_have_the_same_words(both: tuple[Server, Server], body: dict[str, Any]) -> None:
    real, ours = [await server.post("/generate", body) for server in both]
    assert real == ours
    assert real[0] == 400


async def test_stopping_is_equal(both: tuple[Server, Server]) -> None:
    """I1: the stop token stays among the ids; text is trimmed the same way."""
    prompt = prompt_of(30, seed=13)
    free = await both[0].generate(prompt)
    stop = free["output_ids"][7]
    for sampling in (
        {"max_new_tokens": 40, "temperature": 0, "stop_token_ids": [stop]},
        {"max_new_tokens": 40, "temperature": 0, "stop_token_ids": [stop], "no_stop_trim": True},
        {"max_new_tokens": 40, "temperature": 0, "stop_token_ids": [stop], "ignore_eos": True},
        {"max_new_tokens": 40, "temperature": 0, "stop_token_ids": [stop], "min_new_tokens": 15},
        {"max_new_tokens": 0},
    ):
        real, ours = [await server.generate(prompt, sampling) for server in both]
        assert real["output_ids"] == ours["output_ids"]
        assert real["text"] == ours["text"]
        assert real["meta_info"]["finish_reason"] == ours["meta_info"]["finish_reason"]


async def test_information_is_shaped_alike(both: tuple[Server, Server]) -> None:
    (_, real), (_, ours) = [await server.get("/model_info") for server in both]
    # What SGLang does not say, and a gateway compares.
    assert set(ours) - set(real) == {"tokenizer_sha256", "chat_template_sha256", "dimensions"}
    for key in set(ours) & set(real):
        assert real[key] == ours[key], key
    (_, real), (_, ours) = [await server.get("/v1/models") for server in both]
    assert set(real["data"][0]) == set(ours["data"][0])
    assert real["data"][0]["max_model_len"] == ours["data"][0]["max_model_len"]
    (_, real), (_, ours) = [await server.get("/server_info") for server in both]
    for key in ("enable_return_routed_experts", "weight_version", "disaggregation_mode", "version", "stream_interval"):
        assert real[key] == ours[key]


@pytest.mark.parametrize("mode", ["abort", "in_place", "retract"])
async def test_pauses_and_updates_answer_alike(
    both: tuple[Server, Server], checkpoint: Path, other_checkpoint: Path, mode: str
) -> None:
    """I5: flush, update and resume under each pause; finish reasons, spans and retractions of the request that ran."""
    seen = [await _through_a_pause(server, other_checkpoint, mode) for server in both]
    assert seen[0] == seen[1]
    for server in both:
        status, answer = await server.post(
            "/update_weights_from_disk", {"model_path": str(checkpoint), "weight_version": "default"}
        )
        assert (status, answer["success"]) == (200, True)


async def _through_a_pause(server: Server, checkpoint: Path, mode: str) -> dict[str, Any]:
    running = asyncio.create_task(server.generate(prompt_of(20, seed=15), LONG, return_routed_experts=True))
    await asyncio.sleep(0.3)
    paused = await server.post("/pause_generation", {"mode": mode})
    waiting = asyncio.create_task(server.generate(prompt_of(5, seed=16), rid=f"waits-{mode}"))
    await asyncio.sleep(0.2)
    flushed, _ = await server.get("/flush_cache")
    updated = await server.post("/update_weights_from_disk", {"model_path": str(checkpoint), "weight_version": mode})
    held = not waiting.done()
    resumed = await server.post("/continue_generation", {})
    reply, after = await running, await waiting
    meta = reply["meta_info"]
    return {
        "answers": (paused, flushed, updated, resumed, held),
        "finish": meta["finish_reason"],
        "versions": [span["version"] for span in meta["weight_versions"]],
        "scalar": meta["weight_version"],
        "retractions": meta["num_retractions"],
        "rows_fit": len(rows_of(reply)) == meta["prompt_tokens"] + meta["completion_tokens"] - 1,
        "after": after["meta_info"]["weight_version"],
    }


async def test_updates_are_equal_on_the_new_weights(
    both: tuple[Server, Server], checkpoint: Path, other_checkpoint: Path
) -> None:
    """What a reload serves is what the checkpoint holds, in both."""
    wanted = {"return_logprob": True, "return_routed_experts": True}
    for folder, label in ((other_checkpoint, "second"), (checkpoint, "default")):
        replies = []
        for server in both:
            body = {"model_path": str(folder), "weight_version": label}
            status, answer = await server.post("/update_weights_from_disk", body)
            assert (status, answer["success"]) == (200, True)
            replies.append(await server.generate(prompt_of(40, seed=17), **wanted))
        real, ours = replies
        assert real["output_ids"] == ours["output_ids"]
        assert_same_logprobs(real["meta_info"]["output_token_logprobs"], ours["meta_info"]["output_token_logprobs"])
        assert_same_rows(rows_of(real), rows_of(ours))
    for server in both:
        status, answer = await server.post("/update_weights_from_disk", {"model_path": str(checkpoint / "none")})
        assert (status, answer["success"]) == (400, False)
        assert (await server.generate(prompt_of(5, seed=18)))["output_ids"]


async def test_aborting_is_equal(both: tuple[Server, Server]) -> None:
    """SGLang's prefix matching and its abort reply."""
    seen = []
    for server in both:
        running = [
            asyncio.create_task(server.generate(prompt_of(9, seed=19), LONG, rid=rid)) for rid in ("a-1", "a-10")
        ]
        await asyncio.sleep(0.3)
        unknown = await server.post("/abort_request", {"rid": "zzz"})
        known = await server.post("/abort_request", {"rid": "a-1"})
        replies = [await task for task in running]
        seen.append((unknown, known, [reply["meta_info"]["finish_reason"] for reply in replies]))
    assert seen[0] == seen[1]
    assert seen[0][2][0]["type"] == "abort"


@pytest.fixture(params=[0, 1], ids=["sglang", "embedded"])
async def engine(both: tuple[Server, Server], request: pytest.FixtureRequest) -> AsyncIterator[SglangEngine]:
    def version(label: str) -> int:
        return policy_version_of(label, {"default": 0})

    made = SglangEngine(both[request.param].url, engine_id="e", routing=None, policy_version_of=version)
    yield made
    await made.aclose()


def request_for(prompt: list[int], *, rid: str, **sampling: Any) -> GenerateRequest:
    parameters = SamplingParams(**({"max_new_tokens": 60, "temperature": 0.0, "ignore_eos": True} | sampling))
    return GenerateRequest(rid.ljust(32, "0"), np.array(prompt, dtype=np.int32), parameters, 0)


async def test_either_engine_is_known_by_its_spelling(engine: SglangEngine, checkpoint: Path, tmp_path: Path) -> None:
    """I1: an engine that does not say its tokenizer's fingerprint."""
    await check_is_known(engine, checkpoint, tmp_path / "changed")


async def test_capabilities_are_read_from_either_engine(engine: SglangEngine) -> None:
    identity = await engine.identity()
    can = {each for each in Capability if identity.can(each)}
    both = {"routed_experts", "token_ids", "scaled_logprobs", "top_logprobs", "version_spans", "pause"}
    assert can - {Capability.GRAMMAR} == both
    assert identity.can(Capability.GRAMMAR) == (not identity.told)  # the embedded engine tells, and has none
    assert identity.dimensions.moe_layers == (0, 1, 2, 3)
    assert identity.process


async def test_our_client_reads_either_engine(engine: SglangEngine, checkpoint: Path, other_checkpoint: Path) -> None:
    """I2, I5: tokens, rows, versions, pause, update, abort, refusals and identity through `ports.Engine`."""
    identity = await engine.identity()
    assert identity.routing == SHAPE
    assert identity.captures_experts
    assert identity.context_length == 2048
    assert set(identity.fingerprints) == {"tokenizer", "template"}
    assert await engine.healthy()
    items = [item async for item in engine.generate(request_for(prompt_of(30, seed=20), rid="one"))]
    end = items[-1]
    assert isinstance(end, GenerateEnd)
    assert end.completion_tokens == 60 == sum(len(i.token_ids) for i in items if isinstance(i, GenerateChunk))
    assert end.routed_experts is not None
    assert end.routed_experts.ids.shape == (89, 4, 2)
    stream = engine.generate(request_for(prompt_of(30, seed=21), rid="two", max_new_tokens=400, temperature=1.0))
    await anext(stream)
    transport = DiskTransport(pause=PauseMode.RETRACT)
    await transport.publish(other_checkpoint, policy_version=3, engine_urls=[engine.url])
    *_, end = [item async for item in stream]
    assert isinstance(end, GenerateEnd)
    assert [span.policy_version for span in end.version_spans] == [0, 3]
    assert end.num_retractions == 1
    await engine.pause(PauseMode.IN_PLACE)
    assert await engine.healthy()
    await engine.resume()
    request = request_for(prompt_of(30, seed=22), rid="three", max_new_tokens=400)
    stream = engine.generate(request)
    await anext(stream)
    await engine.abort(request.request_id)
    *_, end = [item async for item in stream]
    assert isinstance(end, GenerateEnd)
    assert end.finish.reason is FinishReason.ABORT
    with pytest.raises(ContextOverflow, match="maximum context length"):
        await anext(engine.generate(request_for([5] * 2048, rid="four")))
    with pytest.raises(EngineRejected):
        await anext(engine.generate(request_for([5, 6], rid="five", extra={"frobnicate": 1})))
    await transport.publish(checkpoint, policy_version=0, engine_urls=[engine.url])
