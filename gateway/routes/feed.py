"""The trainers' endpoints: leases on finished rollouts, rollouts as safetensors, acknowledgement, drop (design 5).

Bodies and replies are JSON with the fields of `gateway.contracts.rollouts`; a rollout is the body that
`gateway.contracts.codec` describes. Session ids stand percent-encoded in the path and may hold "/".
Errors leave as VerbatimError; the application turns them into the reply.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from gateway.contracts.codec import encode_rollout
from gateway.contracts.errors import InvalidRequest
from gateway.contracts.ports import Ledger
from gateway.contracts.rollouts import FinishedRollout, Lease
from gateway.routes import openapi
from gateway.routes.bodies import read_fields
from gateway.sessions.picks import PickChoice
from gateway.sessions.segments import load_rollout

MAX_WAIT_SECONDS = 60.0
_POLL_SECONDS = 0.1
_PIECE_BYTES = 2**18
_MAX_BODY_BYTES = 2**20


def feed_router(ledger: Ledger, *, authorize: Callable[[Request], Awaitable[None]], picks: PickChoice) -> APIRouter:
    """Routes under `/feed`; `authorize` raises Unauthorized or Forbidden before any of them runs."""

    async def authorized(request: Request) -> None:
        await authorize(request)

    feed = _Feed(ledger, picks)
    router = APIRouter(prefix="/feed", tags=["feed"], dependencies=[Depends(authorized)])
    router.add_api_route("/leases", feed.lease, methods=["POST"], openapi_extra=openapi.LEASE)
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
    router.add_api_route("/counts", feed.counts, methods=["GET"], openapi_extra=openapi.FEED_COUNTS)
    router.add_api_route("/picks", feed.picks, methods=["GET"], openapi_extra=openapi.PICKS)
    return router


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """Body of `POST /feed/leases`; `wait_seconds` is how long to wait for a first rollout (at most 60 s at a time)."""

    consumer: str
    limit: int
    wait_seconds: float = 0.0
    lease_seconds: float = 600.0
    whole_groups: bool = True
    labels: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        _require(isinstance(self.consumer, str) and self.consumer != "", "consumer: expected a non-empty string")
        _require(_is_integer(self.limit) and 1 <= self.limit < 2**63, "limit: expected a whole number of at least 1")
        _require(_is_seconds(self.wait_seconds), "wait_seconds: expected a number of seconds, 0 or more")
        _require(
            _is_seconds(self.lease_seconds) and self.lease_seconds > 0,
            "lease_seconds: expected seconds above 0",
        )
        _require(isinstance(self.whole_groups, bool), "whole_groups: expected true or false")
        _require(self.labels is None or _is_labels(self.labels), "labels: expected an object of strings")


class _Feed:
    """The routes' functions."""

    def __init__(self, ledger: Ledger, picks: PickChoice) -> None:
        self._ledger = ledger
        self._picks = picks

    async def lease(self, request: Request) -> Response:
        """200 with a lease, or 204 when nothing was there within `wait_seconds`."""
        known = tuple(field.name for field in fields(LeaseRequest))
        wanted = _lease_request(await read_fields(request, max_bytes=_MAX_BODY_BYTES, known=known))
        lease = await self._wait_for_lease(request, wanted)
        return Response(status_code=204) if lease is None else JSONResponse(asdict(lease))

    async def acknowledge(self, lease_id: str) -> Response:
        """`{"session_ids": […]}` of the rollouts that are consumed now."""
        return JSONResponse({"session_ids": list(await self._ledger.acknowledge(lease_id))})

    async def release(self, lease_id: str) -> Response:
        """Give a lease back."""
        await self._ledger.release(lease_id)
        return JSONResponse({"lease_id": lease_id})

    async def release_consumer(self, consumer: str) -> Response:
        """`{"released": n}`: a trainer that starts again gives back what its earlier self held."""
        return JSONResponse({"released": await self._ledger.release_consumer(consumer)})

    async def rollout(self, session_id: str, request: Request) -> Response:
        """The safetensors body, with its length, so that a cut transfer is noticed; `pick` chooses what trains."""
        pick = self._picks.named(request.query_params.get("pick"))
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

    async def counts(self, request: Request) -> Response:
        """Back-pressure figures for one consumer."""
        return JSONResponse(asdict(await self._ledger.counts(_query(request, "consumer"), time.time())))

    async def picks(self) -> Response:
        """`{"default": name, "picks": [names]}`: what `pick` of a rollout may be."""
        return JSONResponse({"default": self._picks.default.name, "picks": list(self._picks.names)})

    async def _wait_for_lease(self, request: Request, wanted: LeaseRequest) -> Lease | None:
        deadline = time.monotonic() + min(wanted.wait_seconds, MAX_WAIT_SECONDS)
        while not await request.is_disconnected():  # nothing is lent to a client that is gone
            lease = await self._ledger.lease(
                consumer=wanted.consumer,
                limit=wanted.limit,
                lease_seconds=wanted.lease_seconds,
                whole_groups=wanted.whole_groups,
                labels=wanted.labels,
                now=time.time(),
            )
            remaining = deadline - time.monotonic()
            if lease is not None or remaining <= 0:
                return lease
            await asyncio.sleep(min(_POLL_SECONDS, remaining))
        return None


def _lease_request(body: Mapping[str, Any]) -> LeaseRequest:
    missing = [name for name in ("consumer", "limit") if name not in body]
    _require(not missing, f"{', '.join(missing)}: is required")
    return LeaseRequest(**body)


def _query(request: Request, name: str) -> str:
    value = request.query_params.get(name)
    if not value:
        raise InvalidRequest(f"{name}: this query parameter is required")
    return value


def _pieces(rollout: FinishedRollout) -> list[bytes | memoryview]:
    return list(encode_rollout(rollout))


async def _bounded(pieces: list[bytes | memoryview]) -> AsyncIterator[bytes]:
    """Large arrays in slices, so that one write never holds the event loop for long."""
    for piece in pieces:
        for slice_ in _slices(piece):
            yield slice_


def _slices(piece: bytes | memoryview) -> Iterator[bytes]:
    for start in range(0, len(piece), _PIECE_BYTES):
        yield bytes(piece[start : start + _PIECE_BYTES])


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InvalidRequest(message)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9


def _is_labels(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
