"""`verbatim engine` as a process: SGLang's HTTP shapes and semantics, start and stop."""

from __future__ import annotations

import asyncio
import base64
import itertools
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import orjson
import pytest
import torch
from transformers import AutoModelForCausalLM

from engines.launch import EngineProcess, free_port, running_engine
from engines.sglang import SglangEngine
from engines.weights.disk import DiskTransport
from engines.weights.names import policy_version_of, weight_label
from gateway.contracts.errors import ContextOverflow, EngineRejected, EngineUnavailable, TransportError
from gateway.contracts.generation import GenerateChunk, GenerateEnd, GenerateRequest, SamplingParams
from gateway.contracts.ports import PauseMode
from gateway.contracts.versions import VersionSpan

PROMPT = [11, 12, 13, 14, 15, 16]
GREEDY = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}
LONG = {"max_new_tokens": 350, "temperature": 1.0, "ignore_eos": True}
ENTRY = "from gateway.cli import main; raise SystemExit(main())"

META_KEYS = {
    "id", "finish_reason", "prompt_tokens", "weight_version", "num_retractions", "reasoning_tokens",
    "completion_tokens", "cached_tokens", "cached_tokens_details", "dp_rank", "weight_versions", "e2e_latency",
    "response_sent_to_client_ts",
}  # fmt: skip
LOGPROB_KEYS = {"input_token_logprobs", "output_token_logprobs", "output_token_logprobs_length"}


@pytest.fixture(scope="module")
def process(tiny_model: Path) -> Iterator[EngineProcess]:
    flags = ("--dtype", "float32", "--context-length", "512", "--served-model-name", "tiny")
    with running_engine(tiny_model, flags=flags) as started:
        yield started


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model with other weights."""
    folder = tmp_path_factory.mktemp("other") / "model"
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


class Api:
    """Plain HTTP to the engine under test."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def get(self, path: str) -> tuple[int, Any]:
        async with self._session.get(path) as response:
            return response.status, _content(await response.read())

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        async with self._session.post(path, json=body) as response:
            return response.status, _content(await response.read())

    async def generate(self, **body: Any) -> Any:
        status, reply = await self.post("/generate", {"input_ids": PROMPT, "sampling_params": GREEDY} | body)
        assert status == 200, reply
        return reply

    async def events(self, **body: Any) -> list[Any]:
        body = {"input_ids": PROMPT, "sampling_params": GREEDY, "stream": True} | body
        async with self._session.post("/generate", json=body) as response:
            assert response.status == 200
            assert response.content_type == "text/event-stream"
            text = (await response.read()).decode()
        lines = [line for line in text.split("\n\n") if line]
        assert lines[-1] == "data: [DONE]"
        return [orjson.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def _content(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return body.decode()


@pytest.fixture
async def api(process: EngineProcess) -> AsyncIterator[Api]:
    async with aiohttp.ClientSession(process.url, timeout=aiohttp.ClientTimeout(total=60)) as session:
        yield Api(session)


def rows_of(reply: Any) -> np.ndarray[Any, np.dtype[np.int32]]:
    raw = base64.b64decode(reply["meta_info"]["routed_experts"], validate=True)
    return np.frombuffer(raw, dtype="<i4").reshape(-1, 4, 2)


async def test_a_reply_has_sglangs_fields_and_no_others(api: Api) -> None:
    """I8: what a client of SGLang reads is there under the same names."""
    plain = await api.generate()
    assert set(plain) == {"text", "output_ids", "meta_info"}
    assert set(plain["meta_info"]) == META_KEYS
    full = await api.generate(return_logprob=True, logprob_start_len=0, return_routed_experts=True)
    meta = full["meta_info"]
    assert set(meta) == META_KEYS | LOGPROB_KEYS | {"routed_experts"}
    assert full["output_ids"] == plain["output_ids"]
    assert meta["finish_reason"] == {"type": "length", "length": 6}
    assert [entry[1:] for entry in meta["output_token_logprobs"]] == [[token, None] for token in full["output_ids"]]
    assert [entry[1] for entry in meta["input_token_logprobs"]] == PROMPT
    assert meta["input_token_logprobs"][0][0] is None
    assert meta["weight_versions"] == [{"version": meta["weight_version"], "start": 0, "end": 6}]


async def test_routing_rows_start_where_asked_and_leave_out_the_last_token(api: Api) -> None:
    """I2: P + C - 1 - start rows of raw little-endian int32."""
    whole = rows_of(await api.generate(return_routed_experts=True))
    assert len(whole) == len(PROMPT) + 6 - 1
    for start in (1, len(PROMPT)):
        part = rows_of(await api.generate(return_routed_experts=True, routed_experts_start_len=start))
        np.testing.assert_array_equal(part, whole[start:])


async def test_streams_are_cumulative_and_only_the_last_event_is_complete(api: Api) -> None:
    events = await api.events(return_logprob=True, return_routed_experts=True)
    whole = await api.generate(return_logprob=True, return_routed_experts=True)
    for before, after in itertools.pairwise(events):
        assert after["output_ids"][: len(before["output_ids"])] == before["output_ids"]
        assert before["meta_info"]["finish_reason"] is None
        assert not {"routed_experts", "weight_versions", "e2e_latency"} & set(before["meta_info"])
    last = events[-1]
    assert last["output_ids"] == whole["output_ids"]
    assert last["text"] == whole["text"]
    np.testing.assert_array_equal(rows_of(last), rows_of(whole))


async def test_batches_and_copies_are_answered_by_lists(api: Api) -> None:
    batch = await api.generate(input_ids=[PROMPT, PROMPT[:3]])
    assert [reply["meta_info"]["prompt_tokens"] for reply in batch] == [6, 3]
    copies = await api.generate(sampling_params=GREEDY | {"n": 3})
    assert len({reply["meta_info"]["id"] for reply in copies}) == 3
    events = await api.events(input_ids=[PROMPT, PROMPT[:3]])
    ended = {event["index"]: event for event in events if event["meta_info"]["finish_reason"]}
    assert [ended[index]["output_ids"] for index in (0, 1)] == [reply["output_ids"] for reply in batch]


async def test_text_is_encoded_and_its_ids_come_back_when_asked_for(api: Api) -> None:
    status, reply = await api.post(
        "/generate", {"text": "What is 48/2?", "sampling_params": GREEDY, "return_prompt_token_ids": True}
    )
    assert status == 200
    assert reply["meta_info"]["prompt_tokens"] == len(reply["prompt_token_ids"]) > 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"sampling_params": {}}, "Either text, input_ids or input_embeds should be provided."),
        ({"input_ids": []}, "input_ids cannot be empty."),
        ({"input_ids": [1, 100_000]}, "Token id 100000 is out of vocabulary"),
        ({"input_ids": [-1]}, "Token id -1 is out of vocabulary"),
        ({"input_ids": [1] * 512}, "The input (512 tokens) is longer than the model's context length (512 tokens)."),
        (
            {"input_ids": [1] * 500, "sampling_params": {"max_new_tokens": 50}},
            "exceeds the model's maximum context length of 512 tokens",
        ),
        ({"input_ids": PROMPT, "sampling_params": {"temperature": -1}}, "temperature must be a non-negative finite"),
        ({"input_ids": PROMPT, "sampling_params": {"top_p": 3}}, "top_p must be in (0, 1], got 3."),
        ({"input_ids": PROMPT, "sampling_params": {"frobnicate": 1}}, "unknown field `frobnicate`"),
        ({"input_ids": PROMPT, "sampling_params": {"regex": "a+"}}, "does not implement regex"),
        (
            {"input_ids": PROMPT, "return_routed_experts": True, "routed_experts_start_len": 7},
            "routed_experts_start_len=7 is higher than the number of input tokens",
        ),
        ({"input_ids": PROMPT, "return_logprob": True, "logprob_start_len": 9}, "logprob_start_len=9 is higher"),
    ],
)
async def test_a_request_that_cannot_be_served_is_refused_with_sglangs_message(
    api: Api, body: dict[str, Any], message: str
) -> None:
    status, reply = await api.post("/generate", body)
    assert status == 400
    assert message in reply["error"]["message"]
    events = await api.events(**{"sampling_params": {}, "input_ids": None} | body)
    assert message in events[0]["error"]["message"]
    assert events[0]["error"]["code"] == 400


async def test_an_id_in_use_is_refused(api: Api) -> None:
    running = asyncio.create_task(api.generate(sampling_params=LONG, rid="twice"))
    await asyncio.sleep(0.1)
    status, reply = await api.post("/generate", {"input_ids": PROMPT, "rid": "twice"})
    assert status == 400
    assert "Duplicate request ID" in reply["error"]["message"]
    await api.post("/abort_request", {"rid": "twice"})
    assert (await running)["meta_info"]["finish_reason"]["type"] == "abort"


async def test_information_routes_answer(api: Api) -> None:
    for path in ("/model_info", "/get_model_info"):
        status, info = await api.get(path)
        assert status == 200
        assert info["served_model_name"] == "tiny"
        assert info["architectures"] == ["Qwen3MoeForCausalLM"]
    status, server = await api.get("/server_info")
    assert server["enable_return_routed_experts"] is True
    assert server["weight_version"] == "default"
    status, models = await api.get("/v1/models")
    assert models["data"][0]["max_model_len"] == 512
    for path in ("/health", "/ready", "/health_generate"):
        assert (await api.get(path))[0] == 200


async def test_flushing_is_refused_while_requests_run(api: Api) -> None:
    running = asyncio.create_task(api.generate(sampling_params=LONG, rid="flush"))
    await asyncio.sleep(0.1)
    assert (await api.get("/flush_cache"))[0] == 400
    await api.post("/abort_request", {"abort_all": True})
    await running
    assert (await api.post("/flush_cache", {}))[0] == 200
    assert (await api.generate())["meta_info"]["cached_tokens"] == 0
    assert (await api.generate())["meta_info"]["cached_tokens"] == len(PROMPT) - 1


async def test_a_client_that_goes_away_frees_its_request(api: Api, process: EngineProcess) -> None:
    async with aiohttp.ClientSession(process.url) as session:
        body = {"input_ids": PROMPT, "sampling_params": LONG, "rid": "gone"}
        with pytest.raises(TimeoutError):
            await session.post("/generate", json=body, timeout=aiohttp.ClientTimeout(total=0.1))
    await asyncio.sleep(0.2)
    assert (await api.get("/flush_cache"))[0] == 200


async def test_an_update_under_in_place_pause_keeps_the_cache_and_says_so(
    api: Api, tiny_model: Path, other_model: Path
) -> None:
    """I5: one reply, two versions; the scalar is the last one. Flushing was asked for and could not be done."""
    running = asyncio.create_task(api.generate(sampling_params=LONG, return_routed_experts=True))
    await asyncio.sleep(0.15)
    await api.post("/pause_generation", {"mode": "in_place"})
    status, answer = await api.post(
        "/update_weights_from_disk", {"model_path": str(other_model), "weight_version": "w1"}
    )
    assert status == 400
    assert "cache was not flushed" in answer["message"]
    await api.post("/continue_generation", {})
    meta = (await running)["meta_info"]
    assert [span["version"] for span in meta["weight_versions"]] == ["default", "w1"]
    assert meta["weight_versions"][0]["end"] == meta["weight_versions"][1]["start"]
    assert meta["weight_version"] == "w1"
    assert meta["num_retractions"] == 0
    status, answer = await api.post(
        "/update_weights_from_disk", {"model_path": str(tiny_model), "weight_version": "default"}
    )
    assert (status, answer["success"]) == (200, True)


async def test_a_bad_checkpoint_is_refused_and_the_engine_lives_on(api: Api, tmp_path: Path) -> None:
    before = await api.generate()
    status, answer = await api.post(
        "/update_weights_from_disk", {"model_path": str(tmp_path / "none"), "weight_version": "x"}
    )
    assert status == 400
    assert answer["success"] is False
    after = await api.generate()
    assert after["output_ids"] == before["output_ids"]
    assert after["meta_info"]["weight_version"] == before["meta_info"]["weight_version"]


async def test_relabelling_weights_shows_in_replies(api: Api) -> None:
    assert (await api.post("/update_weight_version", {"new_version": "again"}))[0] == 200
    assert (await api.generate())["meta_info"]["weight_version"] == "again"
    assert (await api.post("/update_weight_version", {"new_version": "default"}))[1]["success"] is True


async def test_an_unknown_pause_mode_is_refused(api: Api) -> None:
    assert (await api.post("/pause_generation", {"mode": "bogus"}))[0] == 400


def client(url: str) -> SglangEngine:
    return SglangEngine(
        url, engine_id="e0", routing=None, policy_version_of=lambda label: policy_version_of(label, {"default": 0})
    )


def request_for(prompt: list[int], **sampling: Any) -> GenerateRequest:
    parameters = SamplingParams(**({"max_new_tokens": 200, "ignore_eos": True} | sampling))
    return GenerateRequest("r" * 32, np.array(prompt, dtype=np.int32), parameters, 0)


async def test_the_disk_transport_gives_a_running_turn_its_second_version(
    process: EngineProcess, tiny_model: Path, other_model: Path
) -> None:
    """I5: published weights split a turn that runs on; every routing row is there (I2)."""
    engine, transport = client(process.url), DiskTransport()
    stream = engine.generate(request_for(PROMPT, max_new_tokens=350))
    first = await anext(stream)
    assert isinstance(first, GenerateChunk)
    label = await transport.publish(other_model, policy_version=7, engine_urls=[process.url])
    assert label == weight_label(7)
    assert (await engine.identity()).policy_version == 7
    items = [first, *[item async for item in stream]]
    end = items[-1]
    assert isinstance(end, GenerateEnd)
    split = end.version_spans[0].stop
    assert end.version_spans == (VersionSpan(0, split, 0), VersionSpan(split, 350, 7))
    assert end.num_retractions == 1
    assert end.routed_experts is not None
    assert len(end.routed_experts.ids) == len(PROMPT) + 350 - 1
    with pytest.raises(TransportError, match="did not reach"):
        await transport.publish(other_model / "none", policy_version=8, engine_urls=[process.url])
    await transport.publish(tiny_model, policy_version=0, engine_urls=[process.url])
    await engine.aclose()


async def test_the_client_tells_refusals_apart(process: EngineProcess) -> None:
    engine = client(process.url)
    with pytest.raises(ContextOverflow, match="maximum context length"):
        await anext(engine.generate(request_for([1] * 512)))
    with pytest.raises(EngineRejected, match="vocabulary"):
        await anext(engine.generate(request_for([100_000])))
    await engine.aclose()


async def test_an_engine_that_is_not_there_is_unavailable() -> None:
    engine = client(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(EngineUnavailable):
        await anext(engine.generate(request_for(PROMPT)))
    assert not await engine.healthy()
    await engine.aclose()


async def test_the_clients_fingerprints_are_of_the_engines_own_files(process: EngineProcess) -> None:
    engine = client(process.url)
    identity = await engine.identity()
    assert set(identity.fingerprints) == {"tokenizer", "template"}
    assert identity.context_length == 512
    assert identity.vocab_size > 0
    await engine.aclose()


async def test_sigterm_ends_open_streams_and_the_process_with_zero(tiny_model: Path) -> None:
    """I3: what was sampled is delivered; incremental streams and other intervals say the same tokens."""
    settings = ("--set", "incremental_streaming_output=true", "--set", "stream_interval=7", "--dtype", "float32")
    with running_engine(tiny_model, flags=settings) as started:
        engine = client(started.url)
        items = [item async for item in engine.generate(request_for(PROMPT, max_new_tokens=30))]
        assert isinstance(items[-1], GenerateEnd)
        assert items[-1].completion_tokens == 30
        stream = engine.generate(request_for(PROMPT, max_new_tokens=1500))
        count = len((await anext(stream)).token_ids)  # type: ignore[union-attr]
        stopped = asyncio.create_task(asyncio.to_thread(started.stop))
        async for item in stream:
            if isinstance(item, GenerateChunk):
                count += len(item.token_ids)
            else:
                assert item.completion_tokens == count < 1500
        await engine.aclose()
        assert await stopped == 0


@pytest.mark.parametrize("broken", ["model", "port", "key"])
def test_bad_input_is_one_clear_line_and_exit_code_two(broken: str, tiny_model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        arguments = {
            "model": ["--model", str(tmp_path / "none")],
            "port": ["--model", str(tiny_model), "--port", str(taken.getsockname()[1])],
            "key": ["--model", str(tiny_model), "--set", "contxt_length=5"],
        }[broken]
        result = subprocess.run(
            [sys.executable, "-c", ENTRY, "engine", *arguments], capture_output=True, text=True, timeout=60, check=False
        )
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    expected = {"model": "no such folder", "port": "cannot listen on", "key": "did you mean 'context_length'"}
    assert expected[broken] in result.stderr


def test_the_settings_print_as_toml_that_reads_back(tiny_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", ENTRY, "engine", "--model", str(tiny_model), "--seed", "5", "--print-config"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    (tmp_path / "engine.toml").write_text(printed)
    again = [sys.executable, "-c", ENTRY, "engine", "--config", str(tmp_path / "engine.toml"), "--print-config"]
    assert subprocess.run(again, capture_output=True, text=True, timeout=60, check=True).stdout == printed


def test_engine_and_pause_words_are_sglangs() -> None:
    assert {mode.value for mode in PauseMode} == {"abort", "in_place", "retract"}
