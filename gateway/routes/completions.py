"""`/v1/completions`: prompts that are text or token ids, with or without a session in the path."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import Response

from gateway.routes import openapi
from gateway.routes.hot_path import ModelRoute
from gateway.routes.turns import Calls
from gateway.wire.completions import CompletionsWriter, parse_completions_request


def completions_router(calls: Calls, *, max_body_bytes: int) -> APIRouter:
    """The route; to be included before routes that take any path."""
    router = APIRouter(tags=["agents"])

    async def completions(request: Request) -> Response:
        """Text completions of one or several prompts."""
        body, session = await calls.receive(request, max_bytes=max_body_bytes)
        asked = parse_completions_request(body)
        make_writer = partial(CompletionsWriter, asked, calls.model.tokenizer.decode)
        return await (await calls.begin(request, asked.turns, make_writer, session=session)).reply()

    for prefix in ("", "/sessions/{session_id}"):
        router.add_api_route(
            prefix + "/v1/completions",
            completions,
            methods=["POST"],
            openapi_extra=openapi.COMPLETIONS,
            route_class_override=ModelRoute,
        )
    return router
