"""VerbatimError → OpenAI's error body, which every OpenAI-compatible client reads."""

from __future__ import annotations

from gateway.contracts.errors import (
    ContextOverflow,
    EngineError,
    Forbidden,
    NotFound,
    RequestError,
    TooManyRequests,
    Unauthorized,
    VerbatimError,
)
from gateway.contracts.generation import JsonValue

_TYPES: tuple[tuple[type[VerbatimError], str], ...] = (
    (Unauthorized, "authentication_error"),
    (Forbidden, "permission_error"),
    (NotFound, "not_found_error"),
    (TooManyRequests, "rate_limit_error"),
    (ContextOverflow, "invalid_request_error"),
    (RequestError, "invalid_request_error"),
    (EngineError, "engine_error"),
)
_RETRY_AFTER_SECONDS = 1


def error_body(error: VerbatimError) -> dict[str, JsonValue]:
    """`{"error": {message, type, param, code}}` as OpenAI spells it."""
    kind = next((name for known, name in _TYPES if isinstance(error, known)), "server_error")
    return {"error": {"message": error.message, "type": kind, "param": None, "code": error.code}}


def error_headers(error: VerbatimError) -> dict[str, str]:
    """`Retry-After` where a retry can help, `WWW-Authenticate` with 401."""
    headers: dict[str, str] = {}
    if error.retryable:
        headers["Retry-After"] = str(_RETRY_AFTER_SECONDS)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return headers
