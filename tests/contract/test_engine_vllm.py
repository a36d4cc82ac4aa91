"""The vLLM client against servers of each shape that break their protocol, over real HTTP: nothing wrong passes."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
import pytest
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines.launch import free_port
from engines.vllm import VllmEngine
from engines.vllm_stream import VllmStream
from engines.weights.names import policy_version_of
from gateway.contracts.errors import (
    ContextOverflow,
    EngineError,
    EngineProtocolError,
    EngineRejected,
    EngineUnavailable,
    InvalidRequest,
)
from gateway.contracts.experts import RoutingShape, valid_rows
from gateway.contracts.generation import (
    Finish,
    FinishReason,
    GenerateChunk,
    GenerateEnd,
    GenerateRequest,
    LogprobKind,
    Pace,
    SamplingParams,
)
from gateway.contracts.versions import VersionSpan

SHAPE = RoutingShape(num_layers=2, num_experts=4, top_k=2)
PROMPT = np.array([1, 2, 3], dtype=np.int32)
SHAPES = ("0.30", "0.32", "completions")


def rows(count: int, *, highest: int = 3, dtype: str = "u1") -> str:
    """Base64 of a `.npy` file with `count` routing rows."""
    file = io.BytesIO()
    np.save(file, np.tile(np.array([[0, highest], [1, 2]], dtype=dtype), (count, 1, 1)))
    return base64.b64encode(file.getvalue()).decode()


def event(shape: str, new: Sequence[int], /, *, finish: str | None = None, **fields: Any) -> dict[str, Any]:
    """One event with new tokens, well-formed unless `fields` says otherwise."""
    choice: dict[str, Any] = {"index": 0, "token_ids": list(new), "finish_reason": finish}
    if shape == "completions":
        tokens = ["x" for _ in new]
        choice |= {"text": "x", "logprobs": {"tokens": tokens, "token_logprobs": [-0.5 for _ in new]}}
    elif shape == "0.32":
        choice |= {"logprobs": {"content": [{"token_id": i, "logprob": -0.5, "rank": 1} for i in new]}}
    else:
        choice |= {"logprobs": {"content": [{"token": f"token_id:{i}", "logprob": -0.5} for i in new]}}
    if finish is not None and shape == "0.32":
        choice |= {"stop_reason": None, "weight_versions": [{"version": "default", "start": 0, "end": 2}]}
    return {"request_id": "r", "choices": [choice | fields], "usage": None}


def usage(completion_tokens: int = 2, prompt_tokens: int = 3) -> dict[str, Any]:
    """The last event of a stream."""
    return {"choices": [], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}}


@dataclass
class Upstream:
    """A server of one shape: streams `events`, tells `labels` one after the other, keeps `bodies`."""

    shape: str
    events: Sequence[Any] = ()
    labels: list[str] = field(default_factory=lambda: ["default"])
    config: Mapping[str, Any] | None = field(
        default_factory=lambda: {
            "model_config": {"logprobs_mode": "raw_logprobs", "enable_return_routed_experts": True},
            "device_config": {"device": "cpu"},
        }
    )
    bodies: list[Any] = field(default_factory=list)
    refusal: tuple[int, str] | None = None

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes([web.get("/v1/models", self.models), web.post("/v1/completions", self.stream)])
        if self.shape != "completions":
            app.add_routes([web.post("/inference/v1/generate", self.stream)])
        if self.config is not None:
            app.add_routes([web.get("/server_info", self.info), web.get("/weight_info", self.label)])
        return app

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "tiny", "root": "", "max_model_len": 512}]})

    async def info(self, request: web.Request) -> web.Response:
        return web.json_response({"vllm_config": self.config})

    async def label(self, request: web.Request) -> web.Response:
        label = self.labels.pop(0) if len(self.labels) > 1 else self.labels[0]
        return web.json_response({"weight_version": label})

    async def stream(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        if self.refusal is not None:
            return web.Response(status=self.refusal[0], text=self.refusal[1])
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for content in self.events:
            await response.write(b"data: " + orjson.dumps(content) + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response


@asynccontextmanager
async def served(upstream: Upstream) -> AsyncIterator[VllmEngine]:
    """A client of it."""
    runner = web.AppRunner(upstream.app())
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    engine = VllmEngine(
        f"http://127.0.0.1:{port}",
        engine_id="v0",
        routing=SHAPE,
        policy_version_of=lambda label: policy_version_of(label, {}),
        idle_timeout_seconds=30.0,
    )
    try:
        yield engine
    finally:
        await engine.aclose()
        await runner.cleanup()


async def ask(
    upstream: Upstream, sampling: SamplingParams | None = None, **fields: Any
) -> tuple[list[GenerateChunk], GenerateEnd]:
    request = GenerateRequest("r" * 32, PROMPT, sampling or SamplingParams(max_new_tokens=2), **fields)
    async with served(upstream) as engine:
        items = [item async for item in engine.generate(request)]
    *chunks, end = items
    assert isinstance(end, GenerateEnd)
    return [chunk for chunk in chunks if isinstance(chunk, GenerateChunk)], end


def whole(shape: str, **fields: Any) -> list[dict[str, Any]]:
    """The events of two tokens that ended by length."""
    return [event(shape, [7]), event(shape, [8], finish="length", **fields), usage()]


@pytest.mark.parametrize("shape", SHAPES)
async def test_all_three_shapes_say_the_same(shape: str) -> None:
    """I1, I2, I8: ids, log-probs, counts and unknown fields of each, where they belong."""
    first = event(shape, [7], prompt_token_ids=[1, 2, 3]) | {"novel": {"a": [1, None]}}
    last = event(shape, [8], finish="length", sampling_mask=None)
    chunks, end = await ask(Upstream(shape, [first, last, usage()]))
    assert [chunk.token_ids.tolist() for chunk in chunks] == [[7], [8]]
    assert [chunk.logprobs.tolist() for chunk in chunks] == [[-0.5], [-0.5]]
    assert end.finish == Finish(FinishReason.LENGTH)
    assert (end.prompt_tokens, end.completion_tokens) == (3, 2)
    assert end.version_spans == (VersionSpan(0, 2, 0),)
    assert end.versions_certain
    assert end.reply_fields == {"novel": {"a": [1, None]}}
    assert end.meta_info == {"sampling_mask": None}


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([event("0.30", [7], prompt_token_ids=[1, 2, 4]), usage(1)], "other prompt ids"),
        ([event("0.30", [7]) | {"prompt_token_ids": [1, 2]}, usage(1)], "other prompt ids"),
        ([event("0.30", [7], token_ids=[9]), usage(1)], "of other tokens"),
        ([event("0.32", [7], token_ids=[9]), usage(1)], "of other tokens"),
        ([event("0.30", [7, 8], logprobs={"token_logprobs": [-1]}), usage()], "1 log-probs for 2"),
        ([event("0.30", [7], token_ids=None), usage(1)], "without token ids"),
        ([event("0.30", [-7]), usage(1)], "out of range"),
        ([event("0.30", [7], finish="bored"), usage(1)], "unknown finish reason"),
        ([event("0.30", [7, 8], finish="length"), usage(3)], "counts 3 completion_tokens, we 2"),
        ([event("0.30", [7, 8], finish="length"), usage(2, 4)], "counts 4 prompt_tokens, we 3"),
        ([event("0.30", [7], finish="length"), event("0.30", [8]), usage()], "tokens after the end"),
        (whole("0.32", weight_versions=[{"version": "1", "start": 0, "end": 1}]), "cover 1 tokens of 2"),
        (whole("0.32", weight_versions=[{"version": "who-knows", "start": 0, "end": 2}]), "no policy version"),
        (whole("0.32", weight_versions=[{"version": "1"}]), "unreadable end"),
        ([{"choices": [{}, {}]}], "unreadable event"),
        ([{"usage": None}], "unreadable event"),
        ([[1]], "unreadable event"),
    ],
)
async def test_an_answer_that_contradicts_itself_is_a_protocol_error(events: list[Any], words: str) -> None:
    """I1, I2, I5, I9: ids, counts and versions are checked, never repaired."""
    with pytest.raises(EngineProtocolError, match=words):
        await ask(Upstream("0.30", events), routed_experts_start=0)


@pytest.mark.parametrize(
    ("routing", "words"),
    [
        (rows(3), "expected integers"),
        (rows(4, dtype="f4"), "expected integers"),
        ("§§§", "not base64"),
        (base64.b64encode(b"\x80\x04pickle").decode(), "no base64 of a .npy"),
    ],
)
async def test_routing_that_cannot_be_read_costs_the_rows_and_not_the_turn(
    routing: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """I6, I9: tokens and log-probs are sound; the rows are missing, and said to be."""
    chunks, end = await ask(Upstream("0.30", whole("0.30", routed_experts=routing)), routed_experts_start=0)
    assert [token for chunk in chunks for token in chunk.token_ids.tolist()] == [7, 8]
    assert end.routed_experts is None
    assert words in caplog.text


async def test_a_row_with_an_expert_that_the_model_has_not_is_stored_as_invalid() -> None:
    """I9: that row alone."""
    upstream = Upstream("0.30", whole("0.30", routed_experts=rows(4, highest=9)))
    _, end = await ask(upstream, routed_experts_start=0)
    assert end.routed_experts is not None
    assert not valid_rows(end.routed_experts.ids, 4).all()


@pytest.mark.parametrize("dtype", ["u1", "u2", "i4", ">i2"])
async def test_routing_rows_of_any_integer_type_are_narrowed(dtype: str) -> None:
    """I2: prompt + completion - 1 - start rows, asked for among the sampling parameters."""
    upstream = Upstream("0.30", whole("0.30", routed_experts=rows(2, dtype=dtype)))
    _, end = await ask(upstream, routed_experts_start=2)
    assert end.routed_experts is not None
    assert (end.routed_experts.start, end.routed_experts.stop) == (2, 4)
    assert end.routed_experts.ids.dtype == np.uint8
    assert end.routed_experts.ids[0].tolist() == [[0, 3], [1, 2]]
    assert upstream.bodies[0]["sampling_params"]["routed_experts_prompt_start"] == 2


async def test_rows_of_a_big_reply_are_taken_while_it_arrives() -> None:
    """I2: a `.npy` file in many pieces."""
    ids = np.random.default_rng(0).integers(0, 4, (40_003, 2, 2), dtype=np.int16)
    file = io.BytesIO()
    np.save(file, ids)
    prompt = np.arange(40_002, dtype=np.int32) % 1000
    events = [event("0.30", [7, 8], finish="length", routed_experts=base64.b64encode(file.getvalue()).decode())]
    async with served(Upstream("0.30", [*events, usage(2, len(prompt))])) as engine:
        request = GenerateRequest("r" * 32, prompt, SamplingParams(max_new_tokens=2), routed_experts_start=0)
        end = [item async for item in engine.generate(request)][-1]
    assert isinstance(end, GenerateEnd)
    assert end.routed_experts is not None
    np.testing.assert_array_equal(end.routed_experts.ids, ids)


async def test_version_spans_of_032_are_taken_and_its_label_is_not_asked_again() -> None:
    """I5: the engine's own spans win over labels."""
    spans = [{"version": "3", "start": 0, "end": 1}, {"version": "policy-000004", "start": 1, "end": 2}]
    upstream = Upstream("0.32", whole("0.32", weight_versions=spans), labels=["default"] * 2 + ["asked too often"])
    request = GenerateRequest("r" * 32, PROMPT, SamplingParams(max_new_tokens=2))
    async with served(upstream) as engine:
        for _ in range(3):
            end = [item async for item in engine.generate(request)][-1]
            assert isinstance(end, GenerateEnd)
            assert end.version_spans == (VersionSpan(0, 1, 3), VersionSpan(1, 2, 4))
            assert end.versions_certain
    assert upstream.labels == ["default", "asked too often"]


@pytest.mark.parametrize(("labels", "certain"), [(["1", "1"], True), (["1", "2"], False), (["1", "unheard-of"], False)])
async def test_a_label_that_moved_under_030_makes_versions_uncertain(labels: list[str], certain: bool) -> None:
    """I5: 0.30 tells no versions; they are believed only if the label before and after is the same."""
    _, end = await ask(Upstream("0.30", whole("0.30"), labels=labels))
    assert end.version_spans == (VersionSpan(0, 2, 1),)
    assert end.versions_certain is certain


async def test_an_unknown_label_before_is_refused() -> None:
    """I5: a version is never guessed."""
    upstream = Upstream("0.30", whole("0.30"), labels=["who-knows"])
    with pytest.raises(EngineProtocolError, match="no policy version"):
        await ask(upstream)


@pytest.mark.parametrize("shape", SHAPES)
async def test_an_aborted_stream_without_its_last_event_is_an_abort(shape: str) -> None:
    """I3: vLLM leaves out the event that would say so; the usage still counts what was sampled."""
    chunks, end = await ask(Upstream("0.30", [event(shape, [7]), usage(1)]), routed_experts_start=0)
    assert end.finish == Finish(FinishReason.ABORT)
    assert end.completion_tokens == len(chunks) == 1
    assert end.routed_experts is None


async def test_a_stream_that_says_nothing_of_its_end_has_none() -> None:
    """I3: tokens, then the closing line, but neither a reason nor a count: the engine counts as unavailable."""
    with pytest.raises(EngineUnavailable, match="ended before the request did"):
        await ask(Upstream("0.30", [event("0.30", [7])]))


async def test_what_is_missing_stays_missing() -> None:
    """I9: vLLM writes -9999 where it has no log-prob; that is no log-prob."""
    entries = [{"token": "token_id:7", "logprob": -9999.0}, {"token": "token_id:8"}]
    bare = event("0.30", [7, 8], finish="length", logprobs={"content": entries})
    chunks, end = await ask(Upstream("0.30", [bare, usage()]), routed_experts_start=0)
    assert np.isnan(chunks[0].logprobs).all()
    assert end.routed_experts is None


def tops(shape: str, sampled: int, *rows: Mapping[int, float], logprob: float = -2.0) -> dict[str, Any]:
    """One event with the token `sampled` of every row, its likeliest tokens in the order of the row."""
    if shape == "completions":
        named = [{f"token_id:{token}": value for token, value in row.items()} for row in rows]
        names = [f"token_id:{sampled}"] * len(rows)
        told = {"tokens": names, "token_logprobs": [logprob] * len(rows), "top_logprobs": named}
        return event(shape, [sampled] * len(rows), logprobs=told)
    content = []
    for row in rows:
        ranks = {token: rank for rank, token in enumerate(sorted(row, key=lambda token: -row[token]), 1)}
        entries = [
            {"token_id": token, "logprob": value, "rank": 9 if value < -5 else ranks[token]}
            if shape == "0.32"
            else {"token": f"token_id:{token}", "logprob": value}
            for token, value in row.items()
        ]
        of_sampled = {"token_id": sampled, "rank": 1} if shape == "0.32" else {"token": f"token_id:{sampled}"}
        content.append(of_sampled | {"logprob": logprob, "top_logprobs": entries})
    return event(shape, [sampled] * len(rows), logprobs={"content": content})


@pytest.mark.parametrize("shape", SHAPES)
async def test_the_likeliest_are_cut_to_what_was_asked_and_the_sampled_one_is_no_extra(shape: str) -> None:
    """I2, I9: vLLM puts the sampled token first whatever its rank; entries of -9999 are none."""
    rows_told = [{7: -2.0, 4: -0.5, 5: -1.0, 6: -1.5}, {7: -2.0, 4: -9999.0, 5: -3.0}]
    upstream = Upstream(shape, [tops(shape, 7, *rows_told), event(shape, [], finish="length"), usage(2)])
    chunks, end = await ask(upstream, num_top_logprobs=3)
    told = [[top.token_id for top in row] for chunk in chunks for row in chunk.top_logprobs]
    assert told == [[4, 5, 6], [7, 5]]
    assert end.meta_info == {}
    unasked, _ = await ask(Upstream(shape, upstream.events))
    assert [chunk.top_logprobs for chunk in unasked] == [()]


@pytest.mark.parametrize("shape", ["0.30", "0.32"])
async def test_a_sampled_token_that_takes_the_place_of_a_likelier_one_is_left_out(shape: str) -> None:
    """I9: where the server grants no more entries than are wanted, only 0.32 says the rank; nothing is guessed."""
    row = {7: -6.0, 4: -0.5, 5: -1.0}
    upstream = Upstream(shape, [tops(shape, 7, row, row, logprob=-6.0), event(shape, [], finish="length"), usage(2)])
    chunks, _ = await ask(upstream, num_top_logprobs=3)
    assert [[top.token_id for top in row] for chunk in chunks for row in chunk.top_logprobs] == [[4, 5], [4, 5]]


@pytest.mark.parametrize(
    ("shape", "most", "wanted", "asked"),
    [
        ("0.30", None, 5, 6),
        ("0.30", None, 20, 20),
        ("0.30", 5, 9, 5),
        ("0.30", -1, 50, 51),
        ("completions", None, 5, 5),
    ],
)
async def test_no_more_likeliest_tokens_are_asked_for_than_the_server_grants(
    shape: str, most: int | None, wanted: int, asked: int
) -> None:
    """A server refuses the whole request else; the one more is for the sampled token."""
    model = {"logprobs_mode": "raw_logprobs"} | ({} if most is None else {"max_logprobs": most})
    upstream = Upstream(shape, whole(shape), config={"model_config": model})
    await ask(upstream, num_top_logprobs=wanted)
    [body] = upstream.bodies
    assert body.get("sampling_params", body)["logprobs"] == asked
    assert body.get("return_tokens_as_token_ids", False) is (shape == "completions")


async def test_likeliest_tokens_named_by_texts_are_missing() -> None:
    """I9: several tokens may read the same, so no id is guessed from a text."""
    named = {"tokens": ["x"], "token_logprobs": [-0.5], "top_logprobs": [{"x": -0.5, "y": -1.0}]}
    upstream = Upstream("completions", [event("completions", [7], finish="length", logprobs=named), usage(1)])
    chunks, _ = await ask(upstream, num_top_logprobs=2)
    assert [chunk.top_logprobs for chunk in chunks] == [()]


@pytest.mark.parametrize("shape", SHAPES)
async def test_likeliest_tokens_of_another_position_are_refused(shape: str) -> None:
    """I2."""
    with pytest.raises(EngineProtocolError, match="another position"):
        await ask(Upstream(shape, [tops(shape, 7, {8: -3.0, 9: -4.0}), usage(1)]), num_top_logprobs=2)


@pytest.mark.parametrize(
    ("given", "matched"),
    [({"stop_reason": "END"}, "END"), ({"stop_reason": 9}, 9), ({"stop_reason": None}, 8), ({}, 8)],
)
async def test_the_stop_that_matched_is_told(given: dict[str, Any], matched: int | str) -> None:
    """I1: an end token is told by being the last token where the engine does not name it."""
    events = [event("0.30", [7, 8], finish="stop", **given), usage()]
    _, end = await ask(Upstream("0.30", events), SamplingParams(max_new_tokens=2, stop_token_ids=(8, 9)))
    assert end.finish == Finish(FinishReason.STOP, matched)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ({"error": {"message": "Token id 999 is out of vocabulary", "code": 400}}, EngineRejected),
        ({"error": {"message": "EngineCore encountered an issue.", "code": 500}}, EngineUnavailable),
        ({"error": {"message": "The prompt (9) is longer than the maximum model length of 8", "code": 400}}, None),
    ],
)
async def test_an_error_inside_a_stream_is_never_taken_for_success(
    content: Any, error: type[EngineError] | None
) -> None:
    """I3: vLLM answers 200, then an error event, then the closing line of a success."""
    with pytest.raises(error or ContextOverflow):
        await ask(Upstream("0.30", [content]))


async def test_a_refusal_of_the_whole_request_is_told() -> None:
    body = '{"error":{"message":"max_tokens must be at least 1","type":"BadRequestError","code":400}}'
    with pytest.raises(EngineRejected, match="must be at least 1"):
        await ask(Upstream("0.30", refusal=(400, body)))


@pytest.mark.parametrize("shape", ["0.30", "completions"])
async def test_an_agents_fields_cannot_change_what_is_captured(shape: str) -> None:
    """I7: passed-through fields reach the engine, but never those that prompt or capture depend on."""
    forged = {
        "stream": False, "request_id": "x", "token_ids": [9], "prompt": "other", "sampling_params": {"logprobs": None},
        "return_token_ids": False, "stream_options": None, "model": "other", "custom": {"kept": [1, None]},
    }  # fmt: skip
    dropped = {
        "features": {}, "content_parts": [], "echo": True, "n": 3, "truncate_prompt_tokens": 1,
        "trace_decode_token_ids": [5], "logprob_token_ids": [5],
    }  # fmt: skip
    upstream = Upstream(shape, whole(shape))
    await ask(upstream, passthrough=forged | dropped)
    (body,) = upstream.bodies
    assert body["custom"] == {"kept": [1, None]}
    assert body["request_id"] == "r" * 32
    assert body["stream"] is body["return_token_ids"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert not dropped.keys() & body.keys()
    if shape == "completions":
        assert (body["prompt"], body["model"], body["logprobs"]) == ([1, 2, 3], "tiny", 0)
    else:
        assert (body["token_ids"], body["sampling_params"]["logprobs"]) == ([1, 2, 3], 0)
        assert "model" not in body


@pytest.mark.parametrize("shape", ["0.30", "completions"])
async def test_sampling_is_told_in_vllms_words(shape: str) -> None:
    """I7: names that vLLM would ignore without a word are translated, and nothing is left to its model folder."""
    extra = {
        "min_new_tokens": 3, "json_schema": '{"type":"object"}', "custom_params": {"a": 1}, "frequency_penalty": 0.5,
    }  # fmt: skip
    sampling = SamplingParams(
        max_new_tokens=9,
        temperature=0.3,
        top_p=0.9,
        top_k=4,
        min_p=0.1,
        stop=("END",),
        stop_token_ids=(8,),
        extra=extra,
    )
    upstream = Upstream(shape, whole(shape))
    await ask(upstream, sampling, passthrough={"bad_words": ["no"]})
    (body,) = upstream.bodies
    told = body if shape == "completions" else body["sampling_params"]
    wanted = {
        "max_tokens": 9, "temperature": 0.3, "top_p": 0.9, "top_k": 4, "min_p": 0.1, "stop": ["END"],
        "stop_token_ids": [8], "ignore_eos": False, "min_tokens": 3, "frequency_penalty": 0.5, "bad_words": ["no"],
        "structured_outputs": {"json": '{"type":"object"}'},
        "vllm_xargs" if shape == "completions" else "extra_args": {"a": 1},
    }  # fmt: skip
    assert {name: told.get(name) for name in wanted} == wanted
    assert not {"min_new_tokens", "json_schema", "custom_params", "max_new_tokens"} & set(told)
    assert shape != "completions" or body["repetition_penalty"] == 1.0


@pytest.mark.parametrize(
    ("pace", "extra", "told"),
    [
        (Pace(is_live=False), {}, 128),
        (Pace(is_live=False), {"stream_interval": 5}, 5),
        (Pace(is_live=True), {}, None),
        (Pace(is_live=True, live_interval=8), {}, 8),
        (None, {}, None),
    ],
)
async def test_replies_are_asked_for_in_as_few_events_as_who_waits_allows(
    pace: Pace | None, extra: dict[str, Any], told: int | None
) -> None:
    """The ids route takes it among the sampling parameters (0.30); an agent's own word holds (I8)."""
    upstream = Upstream("0.30", whole("0.30"))
    await ask(upstream, SamplingParams(max_new_tokens=2, extra=extra), pace=pace)
    assert upstream.bodies[0]["sampling_params"].get("stream_interval") == told


async def test_what_vllm_would_ignore_is_refused() -> None:
    sampling = SamplingParams(max_new_tokens=2, extra={"stop_regex": "a+"})
    with pytest.raises(InvalidRequest, match="stop_regex"):
        await ask(Upstream("0.30", whole("0.30")), sampling)


@pytest.mark.parametrize(("device", "sent"), [("cpu", False), ("cuda", True), (None, False)])
async def test_a_seed_never_reaches_a_server_that_may_die_of_it(device: str | None, sent: bool) -> None:
    """I3: a seed and a prompt computed in parts end vLLM on a CPU, with everybody's requests; the reply says so."""
    config = {"model_config": {}, "device_config": {"device": device}}
    upstream = Upstream("0.30", whole("0.30"), config=config)
    _, end = await ask(upstream, SamplingParams(max_new_tokens=2, seed=5))
    assert ("seed" in upstream.bodies[0]["sampling_params"]) is sent
    assert end.meta_info.get("seed_left_out", False) is not sent


async def test_a_server_with_closed_routes_is_taken_for_what_it_shows() -> None:
    """I9: no configuration, no promise of routing; weights that nobody can relabel are those of the start."""
    upstream = Upstream("0.30", whole("0.30"), config=None)
    async with served(upstream) as engine:
        identity = await engine.identity()
        with pytest.raises(EngineRejected):
            await engine.abort("r" * 32)
    assert not identity.captures_experts
    assert (identity.logprob_kind, identity.policy_version) == (LogprobKind.RAW, 0)
    assert (identity.served_model_name, identity.context_length) == ("tiny", 512)
    _, end = await ask(upstream)
    assert end.versions_certain


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("raw_logprobs", LogprobKind.RAW),
        ("processed_logprobs", LogprobKind.KEPT_SET),
        ("raw_logits", None),
    ],
)
async def test_log_probs_have_the_meaning_that_the_server_gives_them(mode: str, kind: LogprobKind | None) -> None:
    """I2: and a server that returns logits under their name is refused."""
    config = {"model_config": {"logprobs_mode": mode, "enable_return_routed_experts": True}}
    async with served(Upstream("0.30", config=config)) as engine:
        if kind is None:
            with pytest.raises(EngineProtocolError, match="gives no log-probs"):
                await engine.identity()
        else:
            identity = await engine.identity()
            assert identity.logprob_kind is kind
            assert identity.captures_experts


async def test_a_server_without_the_ids_route_promises_no_routing() -> None:
    """I9: completions do not stream any."""
    async with served(Upstream("completions")) as engine:
        assert not (await engine.identity()).captures_experts


async def test_another_server_at_the_same_address_is_asked_anew() -> None:
    """I9: what is known of a process ends with it."""
    upstream = Upstream("0.30", whole("0.30"))
    async with served(upstream) as engine:
        assert (await engine.identity()).captures_experts
        assert upstream.config is not None
        upstream.config = {"model_config": {}}
        assert (await engine.identity()).captures_experts  # one process does not change
        assert not await engine.healthy()  # there is no /health here: it counts as gone
        assert not (await engine.identity()).captures_experts


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=12),
    cuts=st.lists(st.integers(0, 12), max_size=6),
    shape=st.sampled_from(SHAPES),
    idle=st.integers(0, 2),
)
def test_however_tokens_are_cut_into_events_they_are_the_same(
    token_ids: list[int], cuts: list[int], shape: str, idle: int
) -> None:
    """I1, I2: speculative decoding and slow readers bring any number of tokens an event, or none."""
    request = GenerateRequest("r", PROMPT, SamplingParams(max_new_tokens=20))
    stream = VllmStream(request, routing=None, policy_version_of=int, named="engine")
    edges = sorted({0, len(token_ids), *(cut for cut in cuts if cut < len(token_ids))})
    pieces = [token_ids[a:b] for a, b in itertools.pairwise(edges)] + [[]] * idle
    chunks = [stream.read(event(shape if shape != "0.32" else "0.30", piece)) for piece in pieces]
    stream.read(usage(len(token_ids)))
    stream.check_over()
    end = stream.end(labels=("3", "3"), notes={})
    assert [i for chunk in chunks if chunk is not None for i in chunk.token_ids.tolist()] == token_ids
    assert end.completion_tokens == len(token_ids)
    assert end.version_spans == ((VersionSpan(0, len(token_ids), 3),) if token_ids else ())
