"""What an engine's refusals stand for: its statuses and its words, as the errors of ours.

5xx, 408, 425 → EngineUnavailable; 429 → EngineUnavailable too, which who knows how long to wait makes EngineBusy; other
4xx → ContextOverflow or EngineRejected; redirects → EngineProtocolError.
"""

from __future__ import annotations

import email.utils
import time
from typing import Any

import orjson

from gateway.contracts.errors import (
    ContextOverflow,
    EngineProtocolError,
    EngineRejected,
    EngineUnavailable,
    VerbatimError,
)

_OVERFLOW_MARKS = ("maximum context length", "longer than the model's context length", "is longer than the maximum")
_PASSING_STATUSES = frozenset((408, 425, 429))
"""Refusals of now, not of the request."""


def refusal(status: int, body: bytes, named: str) -> VerbatimError:
    """The error that an engine's answer of 300 and above stands for."""
    message = _message(body) or f"HTTP {status}"
    if status < 400:
        return EngineProtocolError(f"{named} redirects ({status}), which is not followed: give its own address")
    if status >= 500 or status in _PASSING_STATUSES:
        return EngineUnavailable(f"{named} failed with {status}: {message}")
    return refused(message, named)


def refused(message: str, named: str) -> ContextOverflow | EngineRejected:
    """The error of a request that the engine will not serve; a context overflow is told by its message."""
    if any(mark in message for mark in _OVERFLOW_MARKS):
        hint = "" if "maximum context length" in message else " (maximum context length exceeded)"
        return ContextOverflow(f"{message}{hint}")
    return EngineRejected(f"{named} refused the request: {message}", reason=message)


def failure(error: Any, named: str) -> VerbatimError:
    """The error that an `error` inside a stream stands for: `{"message", "code"}`, or its text."""
    message = error["message"] if isinstance(error, dict) else str(error)
    code = error.get("code", 400) if isinstance(error, dict) else 400
    if isinstance(code, int) and (code >= 500 or code in _PASSING_STATUSES):
        return EngineUnavailable(f"{named}: {message}")
    return refused(message, named)


def retry_after_seconds(header: str | None) -> float | None:
    """What a `Retry-After` says, a number of seconds or a date; None where there is none that can be read."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


def _message(body: bytes) -> str:
    """The text of SGLang's or OpenAI's error body; the body itself where it is neither."""
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body.decode(errors="replace").strip()[:500]
    if isinstance(content, dict):
        error = content.get("error", content)
        if isinstance(error, dict):
            error = error.get("message") or error.get("detail")
        if isinstance(error, str):
            return error
    return body.decode(errors="replace").strip()[:500]
