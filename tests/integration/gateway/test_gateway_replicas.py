"""Engines that fail, abort and come back under running turns: the pool goes on from the tokens that it has."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest

from engines.scripted import ScriptedEngine, ScriptedReply, scripted_experts
from gateway.contracts.errors import EngineUnavailable, IdentityMismatch, WorkerUnavailable
from gateway.contracts.experts import RoutingShape
from gateway.contracts.generation import (
    EngineIdentity,
    Finish,
    FinishReason,
    GenerateChunk,
    GenerateEnd,
    GenerateRequest,
    SamplingParams,
)
from gateway.contracts.ports import Engine
from gateway.contracts.verification import Verification
from gateway.replicas.continuation import Continuation, Generated
from gateway.replicas.health import watch_health
from gateway.replicas.pause import GatewayPause, Pause
from gateway.replicas.pool import ReplicaPool, ReplicaSettings

ROUTING = RoutingShape(num_layers=4, num_experts=8, top_k=2)
PROMPT = np.arange(10, 20, dtype=np.int32)
REPLY = tuple(range(30, 42))
QUICK = ReplicaSettings(
    max_fruitless_attempts=3, retry_delay_seconds=0.01, wait_seconds=1.0, health_interval_seconds=0.02
)


async def accept_any(engine: Engine, identity: EngineIdentity, proven: Verification | None) -> Verification:
    return Verification()


@asynccontextmanager
async def pool_of(*engines: Engine, stops: frozenset[int] = frozenset()) -> AsyncIterator[ReplicaPool]:
    pool = ReplicaPool(QUICK, check_identity=accept_any, stop_token_ids=stops)
    for engine in engines:
        await pool.add(engine)
    watching = asyncio.create_task(watch_health(pool))
    yield pool
    watching.cancel()
    await asyncio.wait([watching])


async def pause(pool: ReplicaPool, mode: GatewayPause) -> None:
    await pool.hold(Pause(mode, time.time(), None))
    await pool.stand_still()


def rest_of_reply(request: GenerateRequest, **options: float) -> ScriptedReply:
    """What a deterministic model would say: the reply, from where the prompt already is."""
    said = len(request.token_ids) - len(PROMPT)
    return ScriptedReply(REPLY[said:], **options)  # type: ignore[arg-type]


async def generate(pool: ReplicaPool, *, start: int = 0, max_new_tokens: int = 50) -> Generated:
    sampling = SamplingParams(max_new_tokens=max_new_tokens)
    progress = Continuation(GenerateRequest("", PROMPT, sampling, routed_experts_start=start))
    streamed: list[int] = []

    def hear(chunk: GenerateChunk) -> None:
        streamed.extend(chunk.token_ids.tolist())

    finish = await pool.generate(progress, session_id="s", hear=hear)
    generated = progress.generated(finish)
    assert streamed == generated.token_ids.tolist()
    return generated


def assert_whole(generated: Generated, *, start: int = 0) -> None:
    """I3, I2: every token once, every row once, as one engine would have given them."""
    assert tuple(generated.token_ids) == REPLY
    assert generated.experts is not None
    assert generated.experts.start == start
    sequence = np.concatenate([PROMPT, generated.token_ids])
    np.testing.assert_array_equal(generated.experts.ids, scripted_experts(sequence[:-1], ROUTING, start=start))
    assert generated.version_spans[-1].stop == len(REPLY)


@pytest.mark.parametrize("start", [0, 9])
async def test_turn_goes_on_at_another_engine_when_its_stream_breaks(start: int) -> None:
    dying = ScriptedEngine(lambda request: rest_of_reply(request, fail_after=5), engine_id="a", routing=ROUTING)
    healthy = ScriptedEngine(rest_of_reply, engine_id="b", routing=ROUTING, policy_version=2)
    async with pool_of(dying, healthy) as pool:
        pool.replica("b").draining = True
        running = asyncio.create_task(generate(pool, start=start))
        while not dying.requests:  # noqa: ASYNC110 - the engine has no event for it
            await asyncio.sleep(0)
        pool.replica("a").draining, pool.replica("b").draining = True, False
        pool.replica("b").healthy = True
        generated = await running
    assert_whole(generated, start=start)
    assert [(span.stop, span.policy_version) for span in generated.version_spans] == [(5, 0), (12, 2)]
    assert (generated.num_attempts, generated.lost_attempts) == (2, 1)
    assert healthy.requests[0].token_ids.tolist() == [*PROMPT, *REPLY[:5]]
    assert healthy.requests[0].sampling.max_new_tokens == 45


async def test_aborted_turn_goes_on_under_the_new_weights_with_exact_versions() -> None:
    """I5: spans of both policies; rows of the first attempt are kept, not asked again."""
    engine = ScriptedEngine(lambda request: rest_of_reply(request, delay_seconds=0.01), routing=ROUTING)
    async with pool_of(engine) as pool:
        running = asyncio.create_task(generate(pool))
        await asyncio.sleep(0.045)
        await pause(pool, GatewayPause.ABORT)
        engine.load_policy(1)
        await asyncio.sleep(0.05)
        assert not running.done()
        await pool.resume()
        generated = await running
    assert_whole(generated)
    assert [span.policy_version for span in generated.version_spans] == [0, 1]
    cut = generated.version_spans[0].stop
    assert engine.requests[1].routed_experts_start == len(PROMPT) + cut - 1
    assert generated.versions_certain


async def test_abort_by_the_engine_itself_is_an_interruption_too() -> None:
    engine = ScriptedEngine(lambda request: rest_of_reply(request, delay_seconds=0.005), routing=ROUTING)
    async with pool_of(engine) as pool:
        running = asyncio.create_task(generate(pool))
        await asyncio.sleep(0.02)
        await engine.abort(engine.requests[0].request_id)
        assert_whole(await running)


async def test_finished_reply_whose_stream_broke_at_the_end_is_not_sampled_on() -> None:
    """A stop token that came is an end, also where the engine could not say so; its rows stay missing (I9)."""
    engine = ScriptedEngine([ScriptedReply((*REPLY, 7), fail_after=12)], routing=ROUTING)
    async with pool_of(engine, stops=frozenset((REPLY[-1],))) as pool:
        generated = await generate(pool)
    assert generated.finish == Finish(FinishReason.STOP, REPLY[-1])
    assert tuple(generated.token_ids) == REPLY
    assert generated.experts is None
    assert not generated.experts_complete


async def test_version_of_tokens_whose_stream_broke_across_an_update_is_uncertain() -> None:
    """I9: never guessed in silence."""
    engine = ScriptedEngine(
        lambda request: rest_of_reply(
            request, delay_seconds=0.005, **({"fail_after": 6} if len(request.token_ids) == len(PROMPT) else {})
        ),
        routing=ROUTING,
    )
    async with pool_of(engine) as pool:
        running = asyncio.create_task(generate(pool))
        await asyncio.sleep(0.015)
        engine.load_policy(1)
        await pool.refresh_identities()
        generated = await running
    assert_whole(generated)
    assert not generated.versions_certain


async def test_engine_that_comes_back_is_used_again() -> None:
    engine = ScriptedEngine(lambda request: rest_of_reply(request, delay_seconds=0.005), routing=ROUTING)
    async with pool_of(engine) as pool:
        running = asyncio.create_task(generate(pool))
        await asyncio.sleep(0.03)
        engine.fail()
        await asyncio.sleep(0.05)
        assert not pool.replica("scripted-0").healthy
        engine.recover()
        assert_whole(await running)
        assert pool.replica("scripted-0").healthy


async def test_error_is_told_when_no_engine_helps_and_tokens_stay() -> None:
    engine = ScriptedEngine([ScriptedReply(REPLY, fail_after=4), ScriptedReply(REPLY, fail_after=0)], routing=ROUTING)
    progress = Continuation(GenerateRequest("", PROMPT, SamplingParams(max_new_tokens=50), routed_experts_start=0))
    async with pool_of(engine) as pool:
        with pytest.raises(EngineUnavailable):
            await pool.generate(progress, session_id="s")
    assert tuple(progress.generated(Finish(FinishReason.ABORT)).token_ids) == REPLY[:4]
    assert len(engine.requests) == 1 + QUICK.max_fruitless_attempts


async def test_no_engine_at_all_is_told_after_the_wait() -> None:
    async with pool_of() as pool:
        with pytest.raises(EngineUnavailable, match="none is registered"):
            await generate(pool)


async def test_sessions_stay_with_their_engine_and_spread_over_all() -> None:
    engines = [ScriptedEngine([ScriptedReply((1,))], engine_id=f"engine-{i}") for i in range(3)]
    async with pool_of(*engines) as pool:
        for session in range(30):
            for _ in range(2):
                progress = Continuation(GenerateRequest("", PROMPT, SamplingParams(max_new_tokens=5)))
                await pool.generate(progress, session_id=f"session-{session}")
    assert sum(len(engine.requests) for engine in engines) == 60
    assert all(len(engine.requests) % 2 == 0 and len(engine.requests) >= 8 for engine in engines)


async def test_wrong_engine_is_refused_and_one_that_turns_wrong_is_ejected() -> None:
    async def check(engine: Engine, identity: EngineIdentity, proven: Verification | None) -> Verification:
        if identity.policy_version == 13:
            raise IdentityMismatch("not this one")
        return Verification()

    pool = ReplicaPool(QUICK, check_identity=check, stop_token_ids=frozenset())
    with pytest.raises(IdentityMismatch):
        await pool.add(ScriptedEngine([ScriptedReply((1,))], engine_id="wrong", policy_version=13))
    engine = ScriptedEngine([ScriptedReply((1,))])
    await pool.add(engine)
    engine.load_policy(13)
    await pool.refresh_identities()
    assert [replica.healthy for replica in pool.replicas] == [False]


async def test_drain_waits_for_running_turns_and_holds_new_ones() -> None:
    engine = ScriptedEngine(lambda request: rest_of_reply(request, delay_seconds=0.005), routing=ROUTING)
    async with pool_of(engine) as pool:
        first = asyncio.create_task(generate(pool))
        await asyncio.sleep(0.02)
        await pause(pool, GatewayPause.DRAIN)
        assert not engine.live_requests
        second = asyncio.create_task(generate(pool))
        await asyncio.sleep(0.03)
        assert len(engine.requests) == 1
        await pool.resume()
        assert_whole(await first)
        assert_whole(await second)


class RouterOfTwo(ScriptedEngine):
    """A router whose workers hold different weights, and which loses one of them in its first stream."""

    async def identity(self) -> EngineIdentity:
        return replace(await super().identity(), one_version=False)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk | GenerateEnd, None]:
        try:
            async with aclosing(super().generate(request)) as stream:
                async for item in stream:
                    yield item
        except EngineUnavailable as error:
            raise WorkerUnavailable(error.message) from error


async def test_a_lost_worker_does_not_eject_the_router_in_front_of_it() -> None:
    """The router is asked again at once; whose weights sampled what was lost is uncertain where workers differ (I9)."""
    router = RouterOfTwo(
        lambda request: rest_of_reply(request, **({} if len(request.token_ids) > len(PROMPT) else {"fail_after": 5})),
        routing=ROUTING,
    )
    async with pool_of(router) as pool:
        generated = await generate(pool)
        [replica] = pool.replicas
        assert (replica.healthy, replica.failures) == (True, 0)
    assert tuple(generated.token_ids) == REPLY
    assert generated.lost_attempts == 1
    assert not generated.versions_certain
