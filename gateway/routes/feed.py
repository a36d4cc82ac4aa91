"""The trainers' endpoints: leases on finished rollouts, rollouts as safetensors, acknowledgement, drop (design 5).

Bodies and replies are JSON with the fields of `gateway.contracts.rollouts`; a rollout is the body that
`gateway.contracts.codec` describes. Session ids stand percent-encoded in the path and may hold "/".
Errors leave as VerbatimError; the application turns them into the reply.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from gateway.contracts.codec import encode_rollout
from gateway.contracts.errors import InvalidRequest
from gateway.contracts.ports import Ledger
from gateway.contracts.rollouts import FinishedRollout
from gateway.routes import openapi
from gateway.routes.bodies import read_fields
from gateway.routes.feed_requests import ExtendRequest, LeaseRequest, field_names
from gateway.routes.leasing import LeaseQueue, LeaseReply
from gateway.sessions.picks import PickChoice
from gateway.sessions.segments import load_rollout

MAX_WAIT_SECONDS = 60.0
_PIECE_BYTES = 2**20
"""Of one write: some tenths of a millisecond of the event loop, while what each costs besides does not show."""

_MOST_BUILT_AT_ONCE = 4
"""Rollouts that are read and put together at the same time, which takes twice their size."""

_MAX_BODY_BYTES = 2**20
_MAX_LISTED = 1000


def feed_router(
    ledger: Ledger,
    queue: LeaseQueue,
    *,
    authorize: Callable[[Request], Awaitable[None]],
    picks: PickChoice,
) -> APIRouter:
    """Routes under `/feed`; `authorize` raises Unauthorized or Forbidden before any of them runs."""

    async def authorized(request: Request) -> None:
        await authorize(request)

    feed = _Feed(ledger, queue, picks)
    router = APIRouter(prefix="/feed", tags=["feed"], dependencies=[Depends(authorized)])
    router.add_api_route("/leases", feed.lease, methods=["POST"], openapi_extra=openapi.LEASE)
    router.add_api_route("/leases", feed.leases, methods=["GET"], openapi_extra=openapi.LEASES)
    router.add_api_route("/leases/{lease_id}/extend", feed.extend, methods=["POST"], openapi_extra=openapi.EXTEND)
    router.add_api_route(
        "/leases/{lease_id}/ack", feed.acknowledge, methods=["POST"], openapi_extra=openapi.ACKNOWLEDGE
    )
    router.add_api_route("/leases/{lease_id}/release", feed.release, methods=["POST"], openapi_extra=openapi.RELEASE)
    router.add_api_route("/rollouts/{session_id:path}", feed.rollout, methods=["GET"], openapi_extra=openapi.ROLLOUT)
    router.add_api_route(
        "/rollouts/{session_id:path}", feed.drop, methods=["DELETE"], openapi_extra=openapi.DROP_ROLLOUT
    )
    router.add_api_route(
        "/consumers/{consumer:path}/release",
        feed.release_consumer,
        methods=["POST"],
        openapi_extra=openapi.RELEASE_CONSUMER,
    )
    router.add_api_route("/consumers", feed.consumers, methods=["GET"], openapi_extra=openapi.CONSUMERS)
    router.add_api_route("/counts", feed.counts, methods=["GET"], openapi_extra=openapi.FEED_COUNTS)
    router.add_api_route("/picks", feed.picks, methods=["GET"], openapi_extra=openapi.PICKS)
    return router


class _Feed:
    """The routes' functions."""

    def __init__(self, ledger: Ledger, queue: LeaseQueue, picks: PickChoice) -> None:
        self._ledger = ledger
        self._queue = queue
        self._picks = picks
        self._building = asyncio.Semaphore(_MOST_BUILT_AT_ONCE)

    async def lease(self, request: Request) -> Response:
        """200 with a lease, or 204 when nothing was there within `wait_seconds`."""
        body = await read_fields(request, max_bytes=_MAX_BODY_BYTES, known=field_names(LeaseRequest))
        wanted = LeaseRequest.of_body(body)
        wait_seconds = min(wanted.wait_seconds, MAX_WAIT_SECONDS)
        lease = await self._queue.lease(wanted, wait_seconds=wait_seconds, is_gone=request.is_disconnected)
        return Response(status_code=204) if lease is None else LeaseReply(lease, self._queue)

    async def leases(self, request: Request) -> Response:
        """`{"leases": […]}`: those that are held now; `consumer` of the query selects."""
        consumer = request.query_params.get("consumer")
        held = await self._ledger.leases(now=time.time(), consumer=consumer, limit=_MAX_LISTED)
        return JSONResponse({"leases": [asdict(lease) for lease in held]})

    async def extend(self, lease_id: str, request: Request) -> Response:
        """`{"lease_id", "expires_at"}` of a lease that runs on."""
        body = await read_fields(request, max_bytes=_MAX_BODY_BYTES, known=field_names(ExtendRequest))
        wanted = ExtendRequest.of_body(body)
        until = await self._ledger.extend_lease(lease_id, lease_seconds=wanted.lease_seconds, now=time.time())
        return JSONResponse({"lease_id": lease_id, "expires_at": until})

    async def acknowledge(self, lease_id: str) -> Response:
        """`{"session_ids": […]}` of the rollouts that are consumed now."""
        return JSONResponse({"session_ids": list(await self._ledger.acknowledge(lease_id))})

    async def release(self, lease_id: str) -> Response:
        """Give a lease back."""
        await self._ledger.release(lease_id)
        self._queue.look_again()
        return JSONResponse({"lease_id": lease_id})

    async def release_consumer(self, consumer: str) -> Response:
        """`{"released": n}`: a trainer that starts again gives back what its earlier self held."""
        released = await self._ledger.release_consumer(consumer)
        self._queue.look_again()
        return JSONResponse({"released": released})

    async def rollout(self, session_id: str, request: Request) -> Response:
        """The safetensors body, with its length, so that a cut transfer is noticed; `pick` chooses what trains."""
        pick = self._picks.named(request.query_params.get("pick"))
        async with self._building:
            rollout = await load_rollout(self._ledger, session_id, _query(request, "snapshot"), pick)
            pieces = await asyncio.to_thread(_pieces, rollout)
        length = sum(len(piece) for piece in pieces)
        return StreamingResponse(
            _bounded(pieces), media_type="application/octet-stream", headers={"Content-Length": str(length)}
        )

    async def drop(self, session_id: str, request: Request) -> Response:
        """Free a rollout's data; needs the snapshot that was read."""
        await self._ledger.drop_rollout(session_id, _query(request, "snapshot"))
        return JSONResponse({"session_id": session_id})

    async def consumers(self) -> Response:
        """`{"consumers": [names]}`: who leases or has leased."""
        return JSONResponse({"consumers": list(await self._ledger.consumers(limit=_MAX_LISTED))})

    async def counts(self, request: Request) -> Response:
        """Back-pressure figures for one consumer."""
        return JSONResponse(asdict(await self._ledger.counts(_query(request, "consumer"), time.time())))

    async def picks(self) -> Response:
        """`{"default": name, "picks": [names]}`: what `pick` of a rollout may be."""
        return JSONResponse({"default": self._picks.default.name, "picks": list(self._picks.names)})


def _query(request: Request, name: str) -> str:
    value = request.query_params.get(name)
    if not value:
        raise InvalidRequest(f"{name}: this query parameter is required")
    return value


def _pieces(rollout: FinishedRollout) -> list[bytes | memoryview]:
    return list(encode_rollout(rollout))


async def _bounded(pieces: list[bytes | memoryview]) -> AsyncIterator[memoryview]:
    """Large arrays in slices, so that one write never holds the event loop for long; none is copied."""
    for piece in pieces:
        for start in range(0, len(piece), _PIECE_BYTES):
            yield memoryview(piece)[start : start + _PIECE_BYTES]
