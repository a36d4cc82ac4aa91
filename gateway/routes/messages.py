"""`/v1/messages` and `/v1/messages/count_tokens` as Anthropic's clients call them, errors in Anthropic's shape."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Awaitable
from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import Response

from gateway.contracts.errors import UnknownPrevious, VerbatimError
from gateway.routes import openapi
from gateway.routes.bodies import json_reply
from gateway.routes.hot_path import ModelRoute
from gateway.routes.turns import Calls
from gateway.sessions.registry import Session
from gateway.wire.anthropic import Earlier, MessagesRequest, parse_count_request, parse_messages_request
from gateway.wire.anthropic_reply import MessagesWriter, error_body, error_status
from gateway.wire.errors import error_headers

_log = logging.getLogger(__name__)


def messages_router(calls: Calls, *, max_body_bytes: int) -> APIRouter:
    """The routes, with or without a session before them; to be included before routes that take any path."""
    routes = _MessagesRoutes(calls, max_body_bytes=max_body_bytes)
    router = APIRouter(tags=["agents"])
    for prefix in ("", "/sessions/{session_id}"):
        # Anthropic's clients put /v1 behind their base URL, OpenAI's have it in there: both may be given the same one.
        for version in ("/v1", "/v1/v1"):
            listed = version == "/v1"
            path = f"{prefix}{version}/messages"
            router.add_api_route(
                path,
                routes.create,
                methods=["POST"],
                openapi_extra=openapi.MESSAGES,
                include_in_schema=listed,
                route_class_override=ModelRoute,
            )
            router.add_api_route(
                f"{path}/count_tokens",
                routes.count,
                methods=["POST"],
                openapi_extra=openapi.COUNT_TOKENS,
                include_in_schema=listed,
            )
    return router


class _MessagesRoutes:
    """The routes' functions."""

    def __init__(self, calls: Calls, *, max_body_bytes: int) -> None:
        self._calls = calls
        self._max_body_bytes = max_body_bytes

    async def create(self, request: Request) -> Response:
        """One message."""
        return await _answered(request, self._message(request))

    async def count(self, request: Request) -> Response:
        """Length of the prompt that a message would have; nothing is sampled or recorded."""
        return await _answered(request, self._count(request))

    async def _message(self, request: Request) -> Response:
        body, session = await self._calls.receive(request, max_bytes=self._max_body_bytes)
        asked = parse_messages_request(body)
        turn = asked.turn(_earlier(session, asked))
        make_writer = partial(MessagesWriter, turn.wanted, shows_thinking=asked.shows_thinking)
        return await (await self._calls.begin(request, [turn], make_writer, session=session)).reply()

    async def _count(self, request: Request) -> Response:
        body, session = await self._calls.receive(request, max_bytes=self._max_body_bytes)
        asked = parse_count_request(body)
        turn = asked.turn(_earlier(session, asked))
        return json_reply({"input_tokens": await self._calls.count_prompt_tokens(request, turn)})


def _earlier(session: Session | None, asked: MessagesRequest) -> Earlier | None:
    """What the thread holds that a request continues, read from its session's record; None where it sends all."""
    if asked.previous_turn_id is None:
        return None
    for node in session.tree if session is not None else ():
        if node.record.turn_id == asked.previous_turn_id:
            return Earlier(node.messages(), node.root.tools, node.num_tokens)
    raise UnknownPrevious(f"no message msg_{asked.previous_turn_id} in this session; send the whole conversation")


async def _answered(request: Request, work: Awaitable[Response]) -> Response:
    """The reply with an id of the request, or the error in Anthropic's shape, which holds on these routes only."""
    request_id = f"req_{uuid.uuid4().hex}"
    try:
        reply = await work
    except VerbatimError as error:
        if error.http_status >= 500:
            _log.warning("%s %s: %s", request.method, request.scope["path"], error)
        body = error_body(error) | {"request_id": request_id}
        reply = json_reply(body, status=error_status(error), headers=error_headers(error))
    reply.headers["request-id"] = request_id
    return reply
