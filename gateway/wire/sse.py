"""Server-sent events as OpenAI's clients read them: `data: <json>` frames and a last `data: [DONE]`."""

from __future__ import annotations

from collections.abc import Iterator

from gateway.contracts.generation import JsonValue
from gateway.wire.json_text import Base64, dump_json, json_text

DONE = b"data: [DONE]\n\n"
"""The last frame of a stream that ended well."""

_LINE_ENDS = {character.encode(): f"\\u{ord(character):04x}".encode() for character in "\x85\u2028\u2029"}
"""Unicode's line ends, at which clients cut that read lines of text (httpx's, and so LiteLLM); JSON may escape them."""


def event(value: JsonValue) -> bytes:
    """One frame, of one line to every reader."""
    return b"data: " + _on_one_line(dump_json(value)) + b"\n\n"


def event_pieces(value: JsonValue, *, kind: str = "") -> Iterator[bytes]:
    """A frame, whole, or piece by piece where it holds `Base64`; `kind`: the event's name where the dialect has one."""
    head = f"event: {kind}\ndata: ".encode() if kind else b"data: "
    first, *others = json_text(value).parts
    if not others and isinstance(first, bytes):
        yield head + _on_one_line(first) + b"\n\n"
        return
    yield head
    for part in (first, *others):
        if isinstance(part, Base64):
            yield from part.pieces()
        else:
            yield _on_one_line(part)
    yield b"\n\n"


def _on_one_line(text: bytes) -> bytes:
    if text.isascii():
        return text
    for character, escaped in _LINE_ENDS.items():
        text = text.replace(character, escaped)
    return text
