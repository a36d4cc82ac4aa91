"""The trainers' endpoints over real HTTP, used through `gateway.client`: a real server, a real ledger on disk."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import safetensors.numpy
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from yarl import URL

from engines.launch import free_port
from gateway.client import GatewayClient
from gateway.client_calls import error_of_reply, path_segment
from gateway.contracts.errors import (
    Conflict,
    InvalidRequest,
    LedgerError,
    NotFound,
    Unauthorized,
    VerbatimError,
)
from gateway.contracts.examples import example_turn
from gateway.contracts.experts import RoutedExperts
from gateway.contracts.generation import Finish, FinishReason
from gateway.contracts.records import (
    SessionOrigin,
    SessionRecord,
    TurnRecord,
    snapshot_of,
)
from gateway.contracts.versions import VersionSpan
from gateway.ledger.sqlite import SqliteLedger
from gateway.routes.feed import feed_router
from gateway.routes.leasing import LeaseQueue
from gateway.routes.limits import BodyBudget, RequestEdge
from gateway.sessions.picks import DeliveredTurns, PickChoice
from gateway.sessions.segments import load_rollout
from tests.waiting import until_async

KEY = "operator-key"
AWKWARD_IDS = ["a/b/c", "späß 🙂", "a b?c#d&e=f%2F+g", "..", "x/../y", "rollouts/ack", "/leading//double/"]


@dataclass(frozen=True)
class Served:
    """A running server and its ledger."""

    url: str
    ledger: SqliteLedger
    client: GatewayClient


async def authorize(request: Request) -> None:
    if request.headers.get("authorization") != f"Bearer {KEY}":
        raise Unauthorized("give the operator's key")


async def as_openai(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, VerbatimError)
    return JSONResponse(error_reply(error), status_code=error.http_status)


def error_reply(error: VerbatimError) -> dict[str, Any]:
    return {"error": {"message": error.message, "type": "error", "code": error.code}}


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    ledger = SqliteLedger.open(tmp_path / "data")
    app = FastAPI()
    app.include_router(feed_router(ledger, LeaseQueue(ledger), authorize=authorize, picks=PickChoice.load()))
    app.add_exception_handler(VerbatimError, as_openai)
    app.add_api_route("/health", lambda: PlainTextResponse("not JSON"))
    edge = RequestEdge(app, budget=BodyBudget(2**20), read_timeout_seconds=20.0)
    port = free_port()
    config = uvicorn.Config(edge, host="127.0.0.1", port=port, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    await until_async(lambda: server.started)
    url = f"http://127.0.0.1:{port}"
    async with GatewayClient(url, api_key=KEY, timeout_seconds=20.0) as client:
        yield Served(url, ledger, client)
    server.should_exit = True
    await serving
    await ledger.aclose()


def a_turn(session_id: str, *, num_output: int = 3) -> TurnRecord:
    return example_turn(
        session_id=session_id,
        turn_id="t0",
        added_messages=({"role": "user", "content": "48/2?"},),
        reply={"role": "assistant", "content": "24"},
        prompt_token_ids=np.array([1, 2], dtype=np.int32),
        output_token_ids=np.arange(num_output, dtype=np.int32),
        output_logprobs=np.full(num_output, -0.25, dtype=np.float32),
        version_spans=(VersionSpan(0, num_output, 5),),
        finish=Finish(FinishReason.STOP, 2),
        sampling={"temperature": 1.0},
        num_layers=4,
        num_experts=8,
        top_k=2,
        experts_stop=num_output + 1,
        engine_id="sglang-0",
        model="tiny",
        created_at=1.0,
        delivered_at=1.5,
    )


async def finished(ledger: SqliteLedger, session_id: str, *, num_output: int = 3, group: str | None = None) -> None:
    session = SessionRecord(
        session_id, group, None, {"n": 1}, {"run": "1"}, {}, {}, None, "", SessionOrigin.CREATED, True, 1.0
    )
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(8, dtype=np.uint8), (num_output + 1, 4, 1)), axis=-1)
    await ledger.create_session(session)
    turn = a_turn(session_id, num_output=num_output)
    await ledger.append_turn(turn, RoutedExperts(np.ascontiguousarray(ids[..., :2]), 0))
    await ledger.finish(session_id, reward=0.5, outcome="completed", metadata={}, finished_at=2.0)


@pytest.mark.parametrize("session_id", AWKWARD_IDS)
async def test_a_rollout_goes_through_the_feed_whatever_its_id(served: Served, session_id: str) -> None:
    """I1, I2: leased, read, acknowledged and dropped; the arrays are those that the ledger holds."""
    await finished(served.ledger, session_id)
    lease = await served.client.lease(consumer="trainer", limit=8, labels={"run": "1"})
    assert lease is not None
    (lent,) = lease.rollouts
    assert (lent.session_id, lent.reward, lent.num_tokens, lent.num_sampled_tokens) == (session_id, 0.5, 5, 3)

    rollout = await served.client.rollout(session_id, lent.snapshot)
    expected = await load_rollout(served.ledger, session_id, lent.snapshot, DeliveredTurns())
    assert (rollout.session, rollout.finish, rollout.num_experts) == (expected.session, expected.finish, 8)
    assert rollout.num_sampled_tokens == lent.num_sampled_tokens
    (segment,), (stored,) = rollout.segments, expected.segments
    assert segment.token_ids.tolist() == [1, 2, 0, 1, 2]
    assert segment.policy_version.tolist() == [-1, -1, 5, 5, 5]
    np.testing.assert_array_equal(segment.routed_experts, stored.routed_experts)
    assert segment.routed_valid.all()

    assert await served.client.acknowledge(lease.lease_id) == [session_id]
    assert await served.client.lease(consumer="trainer", limit=8) is None
    await served.client.drop(session_id, lent.snapshot)
    with pytest.raises(NotFound, match="dropped"):
        await served.client.rollout(session_id, lent.snapshot)


async def test_a_large_rollout_arrives_whole_with_its_length_said(served: Served) -> None:
    """A cut transfer would be noticed; safetensors reads what came."""
    await finished(served.ledger, "big", num_output=400_000)
    url = f"{served.url}/feed/rollouts/big?snapshot={snapshot_of('big', ['t0'])}"
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as http,
        http.get(url) as response,
    ):
        body = await response.read()
        assert int(response.headers["Content-Length"]) == len(body)
    tensors = safetensors.numpy.load(body)
    assert tensors["segments.0.routed_experts"].shape == (400_001, 4, 2)


async def test_a_long_poll_returns_as_soon_as_a_rollout_is_there(served: Served) -> None:
    clock = asyncio.get_running_loop().time
    begin = clock()
    waiting = asyncio.create_task(served.client.lease(consumer="trainer", limit=1, wait_seconds=10.0))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    await finished(served.ledger, "s")
    lease = await waiting
    assert lease is not None
    assert clock() - begin < 5.0


async def test_a_long_poll_ends_with_nothing_after_its_time(served: Served) -> None:
    begin = asyncio.get_running_loop().time()
    assert await served.client.lease(consumer="trainer", limit=1, wait_seconds=0.4) is None
    assert 0.4 <= asyncio.get_running_loop().time() - begin < 5.0


async def test_nothing_is_lent_to_a_client_that_went_away(served: Served) -> None:
    """I3: an orphan lease would hide rollouts until it expires."""
    waiting = asyncio.create_task(served.client.lease(consumer="trainer", limit=1, wait_seconds=10.0))
    await asyncio.sleep(0.3)
    waiting.cancel()
    await asyncio.wait([waiting])
    await asyncio.sleep(0.3)
    await finished(served.ledger, "s")
    lease = await served.client.lease(consumer="trainer", limit=1, wait_seconds=2.0)
    assert lease is not None
    assert lease.rollouts[0].session_id == "s"


async def test_groups_releases_and_counts_over_http(served: Served) -> None:
    for n in range(3):
        await finished(served.ledger, f"g/{n}", group="g")
    lease = await served.client.lease(consumer="team/trainer é", limit=1)
    assert lease is not None
    assert len(lease.rollouts) == 3
    counts = await served.client.counts("team/trainer é")
    assert (counts.finished, counts.leased, counts.acknowledged) == (3, 3, 0)
    await served.client.release(lease.lease_id)
    assert await served.client.lease(consumer="team/trainer é", limit=9) is not None
    assert await served.client.release_consumer("team/trainer é") == 3
    counts = await served.client.counts("team/trainer é")
    assert (counts.leased, counts.oldest_seconds > 0) == (0, True)


async def test_errors_come_back_as_the_errors_they_were(served: Served) -> None:
    await finished(served.ledger, "s")
    with pytest.raises(Conflict, match=f"snapshot {snapshot_of('s', ['t0'])}, not other"):
        await served.client.rollout("s", "other")
    with pytest.raises(Conflict):
        await served.client.drop("s", "other")
    with pytest.raises(NotFound):
        await served.client.rollout("unknown", "x")
    with pytest.raises(NotFound, match="no lease"):
        await served.client.acknowledge("unknown")


async def test_every_error_of_the_tree_is_found_again_by_its_code() -> None:
    """Codes that two classes share come back as the one that names them."""
    for kind in _all_errors(VerbatimError):
        found = error_of_reply(kind.http_status, json.dumps(error_reply(kind("why"))).encode(), where="GET /x")
        assert (found.code, found.message) == (kind.code, "why")
        assert isinstance(kind("why"), type(found)) or isinstance(found, InvalidRequest)


def _all_errors(kind: type[VerbatimError]) -> list[type[VerbatimError]]:
    return [kind, *(found for child in kind.__subclasses__() for found in _all_errors(child))]


async def test_every_route_wants_the_operators_key(served: Served) -> None:
    await finished(served.ledger, "s")
    async with GatewayClient(served.url) as stranger:
        for call in (
            stranger.lease(consumer="trainer", limit=1),
            stranger.rollout("s", "snap s"),
            stranger.acknowledge("x"),
            stranger.release("x"),
            stranger.release_consumer("trainer"),
            stranger.drop("s", "snap s"),
            stranger.counts("trainer"),
        ):
            with pytest.raises(Unauthorized, match="operator"):
                await call


WRONG_LEASE_REQUESTS = [
    (b"{", "not JSON"),
    (b"\xff", "not UTF-8"),
    (b"[]", "JSON object"),
    (b"{}", "consumer, limit: is required"),
    (b'{"consumer": "c"}', "limit: is required"),
    (b'{"consumer": "", "limit": 1}', "consumer"),
    (b'{"consumer": 3, "limit": 1}', "consumer"),
    (b'{"consumer": "c", "limit": 0}', "limit"),
    (b'{"consumer": "c", "limit": true}', "limit"),
    (b'{"consumer": "c", "limit": 1.5}', "limit"),
    (b'{"consumer": "c", "limit": 1, "wait_seconds": "1"}', "wait_seconds"),
    (b'{"consumer": "c", "limit": 1, "wait_seconds": NaN}', "NaN"),
    (b'{"consumer": "c", "limit": 1, "lease_seconds": 0}', "lease_seconds"),
    (b'{"consumer": "c", "limit": 1, "whole_groups": "yes"}', "whole_groups"),
    (b'{"consumer": "c", "limit": 1, "labels": {"a": 1}}', "labels"),
    (b'{"consumer": "c", "limit": 1, "lables": {}}', "lables: unknown field"),
]


async def test_a_wrong_lease_request_says_in_one_line_what_is_wrong(served: Served) -> None:
    for body, message in WRONG_LEASE_REQUESTS:
        status, reply = await raw(served, "POST", "/feed/leases", body)
        assert status == 400, body
        assert message in reply["error"]["message"], body
        assert "\n" not in reply["error"]["message"], body


async def test_a_missing_query_parameter_is_named(served: Served) -> None:
    for method, path in (("GET", "/feed/rollouts/s"), ("DELETE", "/feed/rollouts/s"), ("GET", "/feed/counts")):
        status, reply = await raw(served, method, path, None)
        assert status == 400, path
        assert "required" in reply["error"]["message"]


async def raw(served: Served, method: str, path: str, body: bytes | None) -> tuple[int, Any]:
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as http,
        http.request(method, URL(served.url + path, encoded=True), data=body) as response,
    ):
        return response.status, await response.json()


async def test_a_gateway_that_cannot_be_reached_is_named() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    async with GatewayClient(url, retry_seconds=0.0) as client:
        with pytest.raises(LedgerError, match=f"cannot reach the gateway at {url}"):
            await client.health()


async def test_a_server_that_is_no_gateway_is_said_to_be_none(served: Served) -> None:
    with pytest.raises(LedgerError, match="is it a gateway"):
        await served.client.health()
    with pytest.raises(InvalidRequest, match="404"):
        await served.client.engines()


async def test_a_client_that_was_not_opened_says_so() -> None:
    with pytest.raises(LedgerError, match="async with"):
        await GatewayClient("http://127.0.0.1:1").health()


def test_ids_are_one_path_segment_each() -> None:
    assert path_segment("a/b é") == "a%2Fb%20%C3%A9"
    assert path_segment("..") == "%2E%2E"
