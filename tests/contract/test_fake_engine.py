"""The benchmarks' compiled engine, as the project's own SGLang client and OpenAI's client read it.

It is no model, so it cannot take the engines' whole suite; what it says, it must say as SGLang says it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from benchmarks.load.programs import FakeEngine, running_engine
from benchmarks.load.script import Model, Reply, Workload, replies, write_script
from benchmarks.load.stage import told_flags
from engines.sglang import SglangEngine
from gateway.contracts.errors import EngineRejected
from gateway.contracts.experts import RoutingShape
from gateway.contracts.generation import (
    FinishReason,
    GenerateChunk,
    GenerateEnd,
    GenerateRequest,
    Pace,
    SamplingParams,
)
from gateway.contracts.versions import VersionSpan
from tests.waiting import until_async

WORKLOAD = Workload(turns=3)
VERSIONS = {"default": 0, "first": 1, "second": 2}
_numbers = itertools.count()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.made(tmp_path_factory.mktemp("load-model"))


@contextmanager
def engine_of(model: Model, *flags: str, workload: Workload = WORKLOAD) -> Iterator[FakeEngine]:
    script = write_script(model.folder.parent / f"script-{next(_numbers)}", model, workload)
    with running_engine(script, *told_flags(model), *flags) as engine:
        yield engine


@asynccontextmanager
async def client_of(engine: FakeEngine, *, routing: RoutingShape | None = None) -> AsyncIterator[SglangEngine]:
    client = SglangEngine(
        engine.url, engine_id="fake", routing=routing, policy_version_of=lambda label: VERSIONS[label]
    )
    try:
        yield client
    finally:
        await client.aclose()


def prompt_of(model: Model, turn: int) -> list[int]:
    """Ids in which `turn` replies have begun."""
    return [5, 6, *[*model.marker(), 7] * (turn - 1), *model.marker()]


async def ask(
    client: SglangEngine,
    prompt: list[int],
    *,
    limit: int = 4096,
    routed_from: int | None = None,
    name: str = "",
    pace: Pace | None = None,
    extra: Mapping[str, Any] | None = None,
) -> tuple[list[GenerateChunk], GenerateEnd]:
    request = GenerateRequest(
        name or f"r-{next(_numbers)}",
        np.array(prompt, dtype=np.int32),
        SamplingParams(max_new_tokens=limit, extra=extra or {}),
        routed_from,
        pace=pace,
    )
    chunks, ends = [], []
    async for item in client.generate(request):
        (ends if isinstance(item, GenerateEnd) else chunks).append(item)
    (end,) = ends
    return chunks, end


async def in_flight(engine: FakeEngine, number: int) -> None:
    await until_async(lambda: engine.statistics()["in_flight"] == number)


def ids_of(chunks: list[GenerateChunk]) -> list[int]:
    return [token_id for chunk in chunks for token_id in chunk.token_ids.tolist()]


def logprob_of(turn: int, n: int) -> float:
    """As engine.c has it."""
    return -1e-6 * ((turn * 104729 + n * 7919) % 1_000_000)


def expert_of(shape: RoutingShape, position: int, layer: int, k: int) -> int:
    """As engine.c has it; rows repeat every 6,144 positions."""
    mask = 2**64 - 1
    h = ((position % 6144) * 0x9E3779B97F4A7C15 + layer * 0xC2B2AE3D27D4EB4F) & mask
    h ^= h >> 29
    return (((h * 0xBF58476D1CE4E5B9) & mask) >> 33) % shape.num_experts + k


@pytest.mark.parametrize(
    ("flags", "tokens_per_event"),
    [(("--tokens-per-event", "1000"), 1000), (("--tokens-per-event", "10"), 10), ((), 1), (("--incremental",), 1)],
)
async def test_each_turn_gets_the_scripts_reply_with_its_logprobs(
    model: Model, flags: tuple[str, ...], tokens_per_event: int
) -> None:
    """I2: cumulative and incremental events, however many, add up to the same reply."""
    with engine_of(model, *flags) as engine:
        async with client_of(engine) as client:
            for turn, reply in enumerate(replies(model, WORKLOAD), start=1):
                prompt = prompt_of(model, turn)
                events = engine.statistics()["events"]
                chunks, end = await ask(client, prompt)
                assert ids_of(chunks) == reply.token_ids
                behind_first = len(reply.token_ids) - 1
                assert engine.statistics()["events"] - events == 1 - (-behind_first // tokens_per_event)
                said = np.concatenate([chunk.logprobs for chunk in chunks])
                assert said == pytest.approx([logprob_of(turn, n) for n in range(len(said))], abs=1e-6)
                assert (end.prompt_tokens, end.completion_tokens) == (len(prompt), len(reply.token_ids))
                assert (end.finish.reason, end.finish.matched) == (FinishReason.STOP, reply.token_ids[-1])
            last, _ = await ask(client, prompt_of(model, 9))
            assert ids_of(last) == replies(model, WORKLOAD)[-1].token_ids


@pytest.mark.parametrize(
    ("pace", "extra", "interval"),
    [
        (Pace(is_live=False), {}, 128),
        (Pace(is_live=True), {}, 1),
        (Pace(is_live=True, live_interval=8), {}, 8),
        (Pace(is_live=True, live_interval=8), {"stream_interval": 1}, 1),
        (None, {}, 1),
        (Pace(is_live=False), {"stream_interval": 7}, 7),
    ],
    ids=["nobody", "somebody", "somebody-at-ease", "agent-in-a-hurry", "unknown", "agent"],
)
async def test_replies_are_asked_for_in_as_few_events_as_who_waits_allows(
    model: Model, pace: Pace | None, extra: dict[str, Any], interval: int
) -> None:
    """The first token at once, then as many as the request says; an agent's own word holds (I8)."""
    workload = Workload(turns=1, reply_tokens=200)
    with engine_of(model, workload=workload) as engine:
        async with client_of(engine) as client:
            chunks, _ = await ask(client, prompt_of(model, 1), pace=pace, extra=extra)
            events = engine.statistics()["events"]
    (reply,) = replies(model, workload)
    assert ids_of(chunks) == reply.token_ids
    assert len(reply.token_ids) > 130
    assert events == 1 - (-(len(reply.token_ids) - 1) // interval)


async def test_a_reply_is_cut_at_the_limit_of_its_request(model: Model) -> None:
    with engine_of(model) as engine:
        async with client_of(engine) as client:
            chunks, end = await ask(client, prompt_of(model, 1), limit=7)
    assert ids_of(chunks) == replies(model, WORKLOAD)[0].token_ids[:7]
    assert end.finish.reason is FinishReason.LENGTH


async def test_versions_share_a_reply(model: Model) -> None:
    """I5: spans as an engine tells them whose weights changed meanwhile, also while events are still to come."""
    with engine_of(model, "--weight-versions", "first,second", "--tokens-per-event", "5") as engine:
        async with client_of(engine) as client:
            chunks, end = await ask(client, prompt_of(model, 1))
    total = len(ids_of(chunks))
    assert end.version_spans == (VersionSpan(0, total // 2, 1), VersionSpan(total // 2, total, 2))


@pytest.mark.parametrize("shape", [RoutingShape(48, 128, 8), RoutingShape(4, 8, 2), RoutingShape(2, 300, 1)])
async def test_routing_rows_are_those_of_their_positions_wherever_they_begin(model: Model, shape: RoutingShape) -> None:
    """I2: T-1 rows less those before the start; 300 experts do not fit into a byte; widths that base64 pads and not."""
    experts = f"{shape.num_layers},{shape.top_k},{shape.num_experts}"
    with engine_of(model, "--experts", experts, "--tokens-per-event", "9") as engine:
        async with client_of(engine, routing=shape) as client:
            for start in (0, 1, 5, 6):
                prompt = prompt_of(model, 2)
                chunks, end = await ask(client, prompt, routed_from=start)
                assert end.routed_experts is not None
                rows = end.routed_experts.ids
                stop = len(prompt) + len(ids_of(chunks)) - 1
                assert (end.routed_experts.start, len(rows)) == (start, stop - start)
                for position in (start, start + 1, stop - 1):
                    expected = [
                        [expert_of(shape, position, layer, k) % shape.num_experts for k in range(shape.top_k)]
                        for layer in range(shape.num_layers)
                    ]
                    assert rows[position - start].tolist() == expected


async def test_a_long_reply_with_routing_arrives_whole(model: Model) -> None:
    """Rows go out in pieces of a pool that positions share: 7,000 of them span its end."""
    shape = RoutingShape(48, 128, 8)
    with engine_of(model, "--experts", "48,8,128") as engine:
        async with client_of(engine, routing=shape) as client:
            prompt = [9] * 7000 + model.marker()
            chunks, end = await ask(client, prompt, routed_from=0)
    assert end.routed_experts is not None
    rows = end.routed_experts.ids
    assert len(rows) == len(prompt) + len(ids_of(chunks)) - 1
    assert (rows[6144:] == rows[: len(rows) - 6144]).all()
    assert rows[6143, 47, 7] == expert_of(shape, 6143, 47, 7) % 128


async def test_an_aborted_reply_ends_where_it_is(model: Model) -> None:
    with engine_of(model, "--tokens-per-event", "1", "--delay-ms", "60000", "--spread") as engine:
        async with client_of(engine) as client:
            asked = asyncio.create_task(ask(client, prompt_of(model, 1), name="to-abort"))
            async with asyncio.timeout(20):
                await in_flight(engine, 1)
                await client.abort("to-ab")
                chunks, end = await asked
        assert end.finish.reason is FinishReason.ABORT
        assert len(ids_of(chunks)) == end.completion_tokens < len(replies(model, WORKLOAD)[0].token_ids)
        assert engine.statistics()["in_flight"] == 0


async def test_a_client_that_goes_away_is_counted(model: Model) -> None:
    with engine_of(model, "--delay-ms", "60000") as engine:
        async with client_of(engine) as client:
            asked = asyncio.create_task(ask(client, prompt_of(model, 1)))
            async with asyncio.timeout(20):
                await in_flight(engine, 1)
                asked.cancel()
                await asyncio.gather(asked, return_exceptions=True)
                await in_flight(engine, 0)
        assert engine.statistics()["aborted"] == 1


async def test_it_says_whose_model_it_serves_and_does_not_tokenise(model: Model) -> None:
    with engine_of(model, "--context-length", "5000") as engine:
        async with client_of(engine) as client:
            who = await client.identity()
            assert (who.context_length, who.model_path) == (5000, str(model.folder))
            assert set(who.fingerprints) == {"tokenizer", "template"}
            assert await client.healthy()
            assert await client.tokenize(["some text"]) is None
            with pytest.raises(EngineRejected):
                await ask(client, [])


def told(reply: Reply) -> tuple[str, list[tuple[str, object]]]:
    return reply.text, [(call.name, call.arguments) for call in reply.calls]


@pytest.mark.parametrize("stream", [False, True])
def test_chats_say_what_the_tokens_say(model: Model, stream: bool) -> None:
    """Whole and streamed, read by OpenAI's client; calls have ids of their own."""
    tools = [{"type": "function", "function": {"name": "calculator", "parameters": {"type": "object"}}}]
    seen_ids = set()
    with (
        engine_of(model, "--delay-ms", "20", "--spread") as engine,
        openai.OpenAI(base_url=engine.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        for turn, reply in enumerate(replies(model, WORKLOAD), start=1):
            history = [{"role": "user", "content": "?"}, *[{"role": "assistant", "content": "yes"}] * (turn - 1)]
            if stream:
                with client.chat.completions.stream(model="fake", messages=history, tools=tools) as events:
                    answer = events.get_final_completion().choices[0]
            else:
                answer = client.chat.completions.create(model="fake", messages=history, tools=tools).choices[0]
            calls = answer.message.tool_calls or []
            read = [(call.function.name, json.loads(call.function.arguments)) for call in calls]
            assert (answer.message.content or "", read) == told(reply)
            assert answer.finish_reason == ("tool_calls" if reply.calls else "stop")
            seen_ids |= {call.id for call in calls}
    assert len(seen_ids) == WORKLOAD.turns - 1


def test_an_unreadable_script_is_refused(model: Model, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("reply\nids 1 2\nwhat is this\n")
    with pytest.raises(Exception, match="the fake engine ended with 2"), running_engine(script):
        pass
