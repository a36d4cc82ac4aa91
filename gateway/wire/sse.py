"""Server-sent events as OpenAI's clients read them: `data: <json>` frames and a last `data: [DONE]`."""

from __future__ import annotations

from gateway.contracts.generation import JsonValue
from gateway.wire.json_text import dump_json

DONE = b"data: [DONE]\n\n"
"""The last frame of a stream that ended well."""


def event(value: JsonValue) -> bytes:
    """One frame."""
    return b"data: " + dump_json(value) + b"\n\n"
