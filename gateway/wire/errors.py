"""VerbatimError → OpenAI's error body, which every OpenAI-compatible client reads."""

from __future__ import annotations

from gateway.contracts.errors import (
    Conflict,
    ContextOverflow,
    EngineError,
    EngineProtocolError,
    EngineRejected,
    EngineTimeout,
    EngineUnavailable,
    Forbidden,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    RequestError,
    TooManyRequests,
    Unauthorized,
    UnsupportedEncoding,
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
    (EngineRejected, "invalid_request_error"),
    (EngineError, "engine_error"),
)
_AGENTS_WORDS: tuple[tuple[type[EngineError], str], ...] = (
    (EngineTimeout, "no engine answered in time; try again"),
    (EngineUnavailable, "no engine could finish the reply; try again"),
    (EngineProtocolError, "the engine's answer is unusable"),
)
_RETRY_AFTER_SECONDS = 1
_MAX_MESSAGE_CHARACTERS = 4096


def error_body(error: VerbatimError) -> dict[str, JsonValue]:
    """`{"error": {message, type, param, code}}` as OpenAI spells it."""
    kind = next((name for known, name in _TYPES if isinstance(error, known)), "server_error")
    param = error.param if isinstance(error, InvalidRequest) else None
    return {"error": {"message": shown_message(error), "type": kind, "param": param, "code": error.code}}


def shown_message(error: VerbatimError) -> str:
    """The message, cut where it quotes too much of a request."""
    message = error.message
    if len(message) <= _MAX_MESSAGE_CHARACTERS:
        return message
    return f"{message[:_MAX_MESSAGE_CHARACTERS]}… ({len(message)} characters)"


def agents_error(error: EngineError, reference: str) -> EngineError:
    """An engine's failure as its agent is told of it: where engines are and how they are called is the operator's.

    reference: what the log names it by.
    """
    if isinstance(error, EngineRejected):
        return EngineRejected(f"the engine refused the request: {error.reason}", reason=error.reason)
    for kind, words in _AGENTS_WORDS:
        if isinstance(error, kind):
            return kind(f"{words} ({reference})")
    return EngineError(f"the engine failed ({reference})")


def error_headers(error: VerbatimError) -> dict[str, str]:
    """`Retry-After` where a retry can help, `x-should-retry: false` with a 409 where none can; what goes with 401, 405
    and 415."""
    headers: dict[str, str] = {}
    if error.retryable:
        headers["Retry-After"] = str(_RETRY_AFTER_SECONDS)
    elif error.http_status == Conflict.http_status:
        headers["x-should-retry"] = "false"  # clients of OpenAI's kind take every 409 for a lock
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, MethodNotAllowed):
        headers["Allow"] = ", ".join(error.allowed)
    if isinstance(error, UnsupportedEncoding):
        headers["Accept-Encoding"] = "identity"
    return headers
