"""`/tokenize` and `/detokenize`: the ids that a call's prompt would be, and back; nothing is recorded.

In a session that means the session's own ids: a text or a conversation that begins with what is recorded keeps them.
"""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from gateway.contracts.generation import TokenIds
from gateway.routes import openapi
from gateway.routes.bodies import json_reply
from gateway.routes.turns import Calls
from gateway.wire.tokenization import (
    detokenize_reply,
    parse_detokenize_request,
    parse_tokenize_request,
    tokenize_reply,
)


def tokenize_router(calls: Calls, *, max_body_bytes: int) -> APIRouter:
    """The routes; to be included before routes that take any path."""
    routes = _TokenizeRoutes(calls, max_body_bytes=max_body_bytes)
    router = APIRouter(tags=["agents"])
    for prefix in ("", "/sessions/{session_id}"):
        for version in ("", "/v1"):
            path, listed = prefix + version, not version
            router.add_api_route(
                path + "/tokenize",
                routes.tokenize,
                methods=["POST"],
                openapi_extra=openapi.TOKENIZE,
                include_in_schema=listed,
            )
            router.add_api_route(
                path + "/detokenize",
                routes.detokenize,
                methods=["POST"],
                openapi_extra=openapi.DETOKENIZE,
                include_in_schema=listed,
            )
    return router


class _TokenizeRoutes:
    """The routes' functions."""

    def __init__(self, calls: Calls, *, max_body_bytes: int) -> None:
        self._calls = calls
        self._max_body_bytes = max_body_bytes

    async def tokenize(self, request: Request) -> Response:
        """Ids of texts, or of the prompt that a conversation would be."""
        asked = parse_tokenize_request(await self._calls.body(request, max_bytes=self._max_body_bytes))
        ids = [await self._calls.prompt_token_ids(request, turn) for turn in asked.turns]
        texts = [self._token_texts(each) for each in ids] if asked.token_texts else []
        context = self._calls.runner.parts.context_length
        return json_reply(tokenize_reply(asked, ids, texts, max_model_len=context))

    async def detokenize(self, request: Request) -> Response:
        """The text of ids."""
        asked = parse_detokenize_request(await self._calls.body(request, max_bytes=self._max_body_bytes))
        ids = [await self._calls.prompt_token_ids(request, turn) for turn in asked.turns]
        texts = [self._text(each, special_tokens=asked.special_tokens) for each in ids]
        return json_reply(detokenize_reply(asked, texts))

    def _token_texts(self, token_ids: TokenIds) -> list[str]:
        return [self._calls.model.tokenizer.token_text(token_id) for token_id in token_ids.tolist()]

    def _text(self, token_ids: TokenIds, *, special_tokens: bool) -> str:
        tokenizer = self._calls.model.tokenizer
        if special_tokens:
            return tokenizer.decode(token_ids)
        control = {token.token_id for token in tokenizer.added_tokens.values() if token.special}
        return tokenizer.decode(token_id for token_id in token_ids.tolist() if token_id not in control)
