"""The client of an smg router against the real router, in front of workers that are served here or are real engines."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from aiohttp import web
from aiohttp.typedefs import Handler

from engines.echo import EchoServer
from engines.launch import EngineProcess, free_port
from engines.smg import SmgRouter
from engines.weights.disk import DiskTransport
from engines.weights.names import policy_version_of
from gateway.contracts.errors import (
    EngineProtocolError,
    EngineRejected,
    EngineUnavailable,
    IdentityMismatch,
    TransportError,
    WorkerUnavailable,
)
from gateway.contracts.generation import GenerateChunk, GenerateEnd, GenerateRequest, JsonValue, SamplingParams
from gateway.contracts.ports import PauseMode
from tests.smg_router import VERBATIM_MODE, RouterProcess, running_router
from tests.waiting import until_async

PROMPT = np.array([1, 2, 3], dtype=np.int32)
REPLY = list(range(50, 58))
NUM_SESSIONS = 32
"""The router hashes them onto workers, in other shares for other ports: of 8, one of two got none once in 100 runs."""


@asynccontextmanager
async def serving(app: web.Application, port: int) -> AsyncIterator[str]:
    """Serve an application; leaving breaks its connections off, as a process that dies does."""
    transports: set[asyncio.Transport] = set()

    @web.middleware
    async def remember(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.transport is not None:
            transports.add(request.transport)
        return await handler(request)

    app.middlewares.append(remember)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await site.stop()
        for transport in transports:
            transport.abort()
        await runner.cleanup()


@asynccontextmanager
async def routed(
    *servers: EchoServer, flags: Sequence[str] = VERBATIM_MODE, api_key: str | None = None
) -> AsyncIterator[tuple[SmgRouter, list[AsyncExitStack]]]:
    """A client of a router with these workers, and for each worker what stops it."""
    async with AsyncExitStack() as all_workers:
        stops, urls = [], []
        for server in servers:
            stop = await all_workers.enter_async_context(AsyncExitStack())
            urls.append(await stop.enter_async_context(serving(server.app(), free_port())))
            stops.append(stop)
        router = running_router(*urls, flags=flags)
        process = await asyncio.to_thread(router.__enter__)
        engine = client(process.url, api_key=api_key)
        try:
            yield engine, stops
        finally:
            await engine.aclose()
            router.__exit__(None, None, None)


def client(url: str, *, api_key: str | None = None) -> SmgRouter:
    return SmgRouter(
        url,
        engine_id="r0",
        routing=None,
        policy_version_of=lambda label: policy_version_of(label, {}),
        api_key=api_key,
    )


def request_of(session: str, **passthrough: JsonValue) -> GenerateRequest:
    return GenerateRequest(
        "r" * 32, PROMPT, SamplingParams(max_new_tokens=50), passthrough=passthrough, routing_key=session
    )


async def ask(engine: SmgRouter, session: str) -> list[int]:
    """The tokens of one reply."""
    token_ids: list[int] = []
    async for item in engine.generate(request_of(session)):
        if isinstance(item, GenerateChunk):
            token_ids += item.token_ids.tolist()
    return token_ids


async def rest_of(stream: AsyncIterator[GenerateChunk | GenerateEnd]) -> None:
    async for item in stream:
        assert not isinstance(item, GenerateEnd)


async def ask_until_a_worker_lives(engine: SmgRouter, session: str) -> list[int]:
    """As the pool does; each failure sends the session elsewhere, by chance to the dead one again.

    After ten failures the router itself would notice, so fewer must do.
    """
    for _ in range(8):
        try:
            return await ask(engine, session)
        except WorkerUnavailable:
            continue
    raise AssertionError("the session never came to the living worker")


async def test_a_router_that_would_change_requests_is_refused_and_told_how_to_start() -> None:
    """I8: with retries, or a policy that reads the prompt, the router drops fields that it does not know."""
    for flags in ((), ("--disable-retries",), ("--policy", "consistent_hashing")):
        async with routed(EchoServer(REPLY), flags=flags) as (engine, _):
            with pytest.raises(EngineRejected, match="--disable-retries --policy consistent_hashing"):
                await engine.identity()


async def test_a_router_that_scatters_a_session_is_taken_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    flags = ("--disable-retries", "--policy", "round_robin")
    async with routed(EchoServer(REPLY), EchoServer(REPLY), flags=flags) as (engine, _):
        with caplog.at_level(logging.WARNING):
            await engine.identity()
    assert "sends one session to different workers" in caplog.text


async def test_a_session_stays_at_one_worker_and_sessions_spread() -> None:
    servers = EchoServer(REPLY), EchoServer(REPLY)
    async with routed(*servers) as (engine, _):
        for _ in range(3):
            for number in range(NUM_SESSIONS):
                assert await ask(engine, f"s%2F{number}") == REPLY
    keys = [[headers["x-smg-routing-key"] for headers in server.headers] for server in servers]
    assert not set(keys[0]) & set(keys[1])
    assert set(keys[0]) | set(keys[1]) == {f"s%2F{number}" for number in range(NUM_SESSIONS)}
    assert min(map(len, keys)) > 0


async def test_a_session_with_a_very_long_name_is_served() -> None:
    """An agent chooses it; workers refuse headers of that length."""
    server = EchoServer(REPLY)
    async with routed(server) as (engine, _):
        for name in ("a" * 20_000, "b" * 20_000, "a" * 20_000):
            assert await ask(engine, name) == REPLY
    keys = [headers["x-smg-routing-key"] for headers in server.headers]
    assert keys[0] == keys[2] != keys[1]


async def test_the_engines_key_reaches_the_workers_through_the_router() -> None:
    server = EchoServer(REPLY)
    async with routed(server, api_key="engine-secret") as (engine, _):
        assert await ask(engine, "s") == REPLY
    assert {name.lower(): value for name, value in server.headers[0].items()}["authorization"] == "Bearer engine-secret"


async def test_a_worker_lost_in_a_stream_is_no_end_and_the_session_moves_on() -> None:
    """I3: the router ends such a stream with `[DONE]`; its tokens stay, and the next request finds a living worker."""
    servers = [EchoServer(REPLY, delay_seconds=0.05) for _ in range(3)]
    async with routed(*servers) as (engine, stops):
        await engine.identity()
        stream = engine.generate(request_of("s"))
        chunk = await anext(stream)
        assert isinstance(chunk, GenerateChunk)
        assert chunk.token_ids.tolist() == REPLY[:1]
        lost = next(number for number, server in enumerate(servers) if server.requests)
        await stops[lost].aclose()
        with pytest.raises(WorkerUnavailable):
            await rest_of(stream)
        assert await ask_until_a_worker_lives(engine, "s") == REPLY
        assert await ask(engine, "s") == REPLY
    assert sorted(len(server.requests) for server in servers) == [0, 1, 2]


async def test_the_last_worker_lost_takes_the_router_with_it() -> None:
    """The pool then waits for it instead of trying again at once."""
    async with routed(EchoServer(REPLY)) as (engine, [stop]):
        await engine.identity()
        await stop.aclose()
        with pytest.raises(EngineUnavailable) as lost:
            await ask(engine, "s")
        assert not isinstance(lost.value, WorkerUnavailable)
        with pytest.raises(EngineUnavailable, match="none of its workers answers"):
            await engine.identity()


async def test_a_worker_that_is_gone_does_not_hold_the_others(caplog: pytest.LogCaptureFixture) -> None:
    """The router still lists it; identity, pauses and aborts go on without it, and say so once."""
    async with routed(EchoServer(REPLY), EchoServer(REPLY)) as (engine, stops):
        await stops[0].aclose()
        with caplog.at_level(logging.WARNING):
            assert (await engine.identity()).served_model_name == "echo"
            await engine.identity()
        assert caplog.text.count("does not answer here") == 1
        assert await engine.healthy()
        await engine.pause(PauseMode.ABORT)
        await engine.resume()
        await engine.abort("nobody")


@pytest.mark.parametrize(
    ("infos", "words"),
    [
        (({"enable_return_routed_experts": True}, {}), "differ in captures_experts"),
        (({"return_original_logprob": True}, {}), "differ in logprob_kind"),
    ],
)
async def test_workers_that_differ_are_refused_by_name(infos: Sequence[Mapping[str, JsonValue]], words: str) -> None:
    servers = [EchoServer(REPLY, server_info=info) for info in infos]
    async with routed(*servers) as (engine, _):
        with pytest.raises(IdentityMismatch, match=words) as refused:
            await engine.identity()
    assert refused.value.message.count("http://127.0.0.1:") == 2


async def test_workers_with_different_weights_serve_and_each_answer_says_its_own(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """I5: a rolling update; the version of what an answer does not say is uncertain meanwhile."""
    servers = EchoServer(REPLY), EchoServer(REPLY)
    servers[1].weight_version = "policy-000003"
    async with routed(*servers) as (engine, _):
        with caplog.at_level(logging.WARNING):
            identity = await engine.identity()
        assert (identity.policy_version, identity.one_version) == (0, False)
        assert "hold different weights" in caplog.text
        versions = set()
        for number in range(NUM_SESSIONS):
            items = [item async for item in engine.generate(request_of(f"s{number}"))]
            assert isinstance(items[-1], GenerateEnd)
            [span] = items[-1].version_spans
            versions.add(span.policy_version)
        assert versions == {0, 3}
        servers[0].weight_version = "policy-000003"
        identity = await engine.identity()
        assert (identity.policy_version, identity.one_version) == (3, True)


async def test_a_worker_whose_weights_nobody_knows_is_named() -> None:
    """I9: its label means no policy version."""
    server = EchoServer(REPLY)
    server.weight_version = "who-knows"
    async with routed(server) as (engine, _):
        with pytest.raises(EngineProtocolError, match="who-knows"):
            await engine.identity()


async def test_an_abort_reaches_the_worker_that_has_the_request() -> None:
    """The router has no such route; the connection that closes says it as well."""
    servers = EchoServer(REPLY, delay_seconds=0.05), EchoServer(REPLY, delay_seconds=0.05)
    async with routed(*servers) as (engine, _):
        await engine.identity()
        stream = engine.generate(request_of("s"))
        await anext(stream)
        await stream.aclose()
        await until_async(lambda: any(server.left for server in servers))
    for server in servers:
        expected = ["r" * 32] if server.requests else []
        assert server.aborted == server.left == expected


async def test_a_router_whose_workers_have_not_registered_is_waited_for() -> None:
    """Listening before it knows its workers, it says that there is no such model."""
    process = RouterProcess([f"http://127.0.0.1:{free_port()}"], VERBATIM_MODE)
    engine = client(process.url)
    try:
        process.start()
        await asyncio.to_thread(process.wait_listening)
        for _ in range(3):
            with pytest.raises(EngineUnavailable):
                await ask(engine, "s")
            with pytest.raises(EngineUnavailable):
                await engine.identity()
        assert not await engine.healthy()
    finally:
        process.kill()
        await engine.aclose()


async def test_weights_for_a_router_reach_each_of_its_workers(engine_process: EngineProcess, tiny_model: Path) -> None:
    """The router has no route for them; a worker that cannot take them is named."""
    async with httpx.AsyncClient(timeout=10) as http:
        with running_router(engine_process.url) as process:
            label = await DiskTransport().publish(tiny_model, policy_version=0, engine_urls=[process.url])
            served = (await http.get(engine_process.url + "/model_info")).json()
            assert served["weight_version"] == label == "policy-000000"
            with pytest.raises(TransportError, match=engine_process.url):
                await DiskTransport().publish(tiny_model / "none", policy_version=1, engine_urls=[process.url])


async def test_a_worker_that_the_operator_takes_out_counts_no_more() -> None:
    servers = EchoServer(REPLY), EchoServer(REPLY, server_info={"return_original_logprob": True})
    async with routed(*servers) as (engine, _), httpx.AsyncClient(base_url=engine.url, timeout=10) as http:
        with pytest.raises(IdentityMismatch) as refused:
            await engine.identity()
        for worker in (await http.get("/workers")).json()["workers"]:
            if (await http.get(worker["url"] + "/server_info")).json().get("return_original_logprob"):
                assert worker["url"] in refused.value.message
                await http.delete(f"/workers/{worker['id']}")
        async with asyncio.timeout(20):
            while len((await http.get("/workers")).json()["workers"]) > 1:  # noqa: ASYNC110 (the router drains it)
                await asyncio.sleep(0.05)
        assert (await engine.identity()).one_version
        assert await ask(engine, "s") == REPLY


async def test_a_router_that_comes_back_with_other_flags_is_refused() -> None:
    """I8: it was verbatim before."""
    async with serving(EchoServer(REPLY).app(), free_port()) as worker:
        process = RouterProcess([worker], VERBATIM_MODE)
        engine = client(process.url)
        try:
            for flags in (VERBATIM_MODE, ()):
                process.flags = flags
                process.start()
                await asyncio.to_thread(process.wait_ready)
                if flags:
                    await engine.identity()
                    process.kill()
            with pytest.raises(EngineRejected, match="does not pass requests on"):
                await engine.identity()
        finally:
            process.kill()
            await engine.aclose()


async def test_workers_are_paused_and_resumed_each_even_when_the_router_is_away() -> None:
    """A router that ends in a pause must not leave its workers paused."""
    servers = EchoServer(REPLY), EchoServer(REPLY)
    async with AsyncExitStack() as workers:
        urls = [await workers.enter_async_context(serving(server.app(), free_port())) for server in servers]
        process = RouterProcess(urls, VERBATIM_MODE)
        engine = client(process.url)
        try:
            process.start()
            await asyncio.to_thread(process.wait_ready)
            await engine.pause(PauseMode.ABORT)
            assert [server.paused for server in servers] == [True, True]
            process.kill()
            await engine.resume()
        finally:
            process.kill()
            await engine.aclose()
    assert [server.paused for server in servers] == [False, False]


@pytest.mark.parametrize(("kind", "protocol"), [("prefill", "http"), ("regular", "grpc")])
async def test_workers_that_are_not_spoken_to_verbatim_are_refused(kind: str, protocol: str) -> None:
    """I8, I9: over gRPC no routing rows come back; split prefill and decode, the router takes requests apart."""
    listed = {"workers": [{"id": "1", "url": "http://w:1", "worker_type": kind, "connection_mode": protocol}]}

    async def workers(_request: web.Request) -> web.Response:
        return web.json_response(listed)

    app = web.Application()
    app.router.add_get("/workers", workers)
    async with serving(app, free_port()) as url:
        engine = client(url)
        with pytest.raises(EngineRejected, match=f"worker http://w:1 is {kind} over {protocol}"):
            await engine.identity()
        await engine.aclose()


async def test_an_engine_in_the_place_of_a_router_is_told_apart() -> None:
    async with serving(EchoServer(REPLY).app(), free_port()) as url:
        engine = client(url)
        with pytest.raises(EngineRejected, match="is it an smg router"):
            await engine.identity()
        await engine.aclose()
