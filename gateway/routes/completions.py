"""`/v1/completions`: prompts that are text or token ids, with or without a session in the path."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import Response

from gateway.routes import openapi
from gateway.routes.turns import Calls
from gateway.wire.completions import CompletionsWriter, parse_completions_request


def completions_router(calls: Calls, *, max_body_bytes: int) -> APIRouter:
    """The route; to be included before routes that take any path."""
    router = APIRouter(tags=["agents"])

    async def completions(request: Request) -> Response:
        """Text completions of one or several prompts."""
        asked = parse_completions_request(await calls.body(request, max_bytes=max_body_bytes))
        return await calls.answer_all(
            request, asked.turns, partial(CompletionsWriter, asked, calls.model.tokenizer.decode)
        )

    for prefix in ("", "/sessions/{session_id}"):
        router.add_api_route(
            prefix + "/v1/completions", completions, methods=["POST"], openapi_extra=openapi.COMPLETIONS
        )
    return router
