"""Server-sent events as OpenAI's clients read them: `data: <json>` frames and a last `data: [DONE]`."""

from __future__ import annotations

from gateway.contracts.generation import JsonValue
from gateway.wire.json_text import dump_json

DONE = b"data: [DONE]\n\n"
"""The last frame of a stream that ended well."""

_LINE_ENDS = {character.encode(): f"\\u{ord(character):04x}".encode() for character in "\x85\u2028\u2029"}
"""Unicode's line ends, at which clients cut that read lines of text (httpx's, and so LiteLLM); JSON may escape them."""


def event(value: JsonValue) -> bytes:
    """One frame, of one line to every reader."""
    text = dump_json(value)
    for character, escaped in _LINE_ENDS.items():
        text = text.replace(character, escaped)
    return b"data: " + text + b"\n\n"
