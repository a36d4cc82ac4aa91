"""`/v1/chat/completions` and `/v1/models`, with or without a session in the path."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import Response

from gateway.routes.bodies import json_reply, read_body
from gateway.routes.turns import Calls
from gateway.wire.openai import ChatWriter, parse_chat_request


def chat_router(calls: Calls, *, max_body_bytes: int) -> APIRouter:
    """The agents' routes."""
    routes = _ChatRoutes(calls, max_body_bytes=max_body_bytes)
    router = APIRouter(tags=["agents"])
    for prefix in ("", "/sessions/{session_id}"):
        router.add_api_route(prefix + "/v1/chat/completions", routes.chat, methods=["POST"])
        router.add_api_route(prefix + "/v1/models", routes.models, methods=["GET"])
    return router


class _ChatRoutes:
    """The routes' functions."""

    def __init__(self, calls: Calls, *, max_body_bytes: int) -> None:
        self._calls = calls
        self._max_body_bytes = max_body_bytes

    async def chat(self, request: Request) -> Response:
        """One chat completion."""
        wanted = parse_chat_request(await read_body(request, max_bytes=self._max_body_bytes))
        return await self._calls.answer(request, wanted, partial(ChatWriter, wanted.wanted))

    async def models(self, request: Request) -> Response:
        """The one model that is served."""
        model = self._calls.model
        context = self._calls.runner.parts.pool.context_length or model.context_length
        entry = {"id": model.name, "object": "model", "created": 0, "owned_by": "verbatim", "max_model_len": context}
        return json_reply({"object": "list", "data": [entry]})
