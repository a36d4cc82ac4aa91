"""`/v1/chat/completions` and `/v1/models`, with or without a session in the path."""

from __future__ import annotations

import time
from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import Response

from gateway.routes import openapi
from gateway.routes.bodies import json_reply, path_id
from gateway.routes.hot_path import ModelRoute
from gateway.routes.turns import Begun, Calls
from gateway.wire.models import ModelCard, anthropic_list, openai_list
from gateway.wire.openai import ChatWriter, parse_chat_request


def chat_router(calls: Calls, *, max_body_bytes: int) -> APIRouter:
    """The agents' routes."""
    routes = _ChatRoutes(calls, max_body_bytes=max_body_bytes)
    router = APIRouter(tags=["agents"])
    for prefix in ("", "/sessions/{session_id}"):
        router.add_api_route(
            prefix + "/v1/chat/completions",
            routes.chat,
            methods=["POST"],
            openapi_extra=openapi.CHAT,
            route_class_override=ModelRoute,
        )
        router.add_api_route(prefix + "/v1/models", routes.models, methods=["GET"], openapi_extra=openapi.MODELS)
        router.add_api_route(
            prefix + "/v1/models/{model:path}", routes.model, methods=["GET"], openapi_extra=openapi.MODEL
        )
    return router


class _ChatRoutes:
    """The routes' functions."""

    def __init__(self, calls: Calls, *, max_body_bytes: int) -> None:
        self._calls = calls
        self._max_body_bytes = max_body_bytes
        self._started_at = time.time()

    async def chat(self, request: Request) -> Response:
        """One chat completion."""
        return await (await self._begun(request)).reply()

    async def _begun(self, request: Request) -> Begun:
        body, session = await self._calls.receive(request, max_bytes=self._max_body_bytes)
        wanted = parse_chat_request(body, None if session is None else session.recent.texts)
        return await self._calls.begin(request, [wanted], partial(ChatWriter, wanted.wanted), session=session)

    async def models(self, request: Request) -> Response:
        """The one model that is served."""
        await self._calls.check_caller(request)
        card = self._card()
        return json_reply(anthropic_list(card) if _is_anthropic(request) else openai_list(card))

    async def model(self, request: Request) -> Response:
        """It, under the name that is asked for: every name is served."""
        await self._calls.check_caller(request)
        card, name = self._card(), path_id(request, "model")
        return json_reply(card.anthropic(name) if _is_anthropic(request) else card.openai(name))

    def _card(self) -> ModelCard:
        model = self._calls.model
        context = self._calls.runner.parts.context_length
        return ModelCard(model.name, self._started_at, context)


def _is_anthropic(request: Request) -> bool:
    """Whether it is an Anthropic client that asks, which sends this header always."""
    return "anthropic-version" in request.headers
