"""GLM-4.5 style calls: `<tool_call>NAME`, then `<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>` for each argument.

GLM-4.5 and 4.6 break the line after each part, GLM-4.7 does not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.contracts.generation import JsonValue
from gateway.tito.parsing.calls import PROBE_NAME, CallFamily, CallFrame, WrittenCall
from gateway.tito.parsing.markers import Marker, Scanned, marker
from gateway.tito.parsing.typed_values import arguments_text
from gateway.tito.tokenizer import ChatTokenizer

_NAME = re.compile(r"[^\s<>{}\[\]\"'=]+")


@dataclass(frozen=True, slots=True)
class GlmCalls:
    """The syntax with this tokenizer's markers."""

    frame: CallFrame
    key_opener: Marker
    key_closer: Marker
    value_opener: Marker
    value_closer: Marker

    def read(self, body: Sequence[Scanned], tools: Sequence[JsonValue]) -> tuple[WrittenCall, ...] | None:
        """A name and pairs of keys and values; values are typed by the tool's schema."""
        name, at = _text_at(body, 0)
        if _NAME.fullmatch(name.strip()) is None:
            return None
        values: list[tuple[str, str]] = []
        while at < len(body):
            pair = self._pair(body, at)
            if pair is None:
                return None
            key, value, at = pair
            values.append((key.strip(), value))
        arguments = arguments_text(values, tools, function=name.strip())
        return None if arguments is None else (WrittenCall(name.strip(), arguments),)

    def _pair(self, body: Sequence[Scanned], at: int) -> tuple[str, str, int] | None:
        """The key and the value that begin at `at`, and where the next ones do."""
        texts: list[str] = []
        for expected in (self.key_opener, self.key_closer, self.value_opener, self.value_closer):
            if at >= len(body) or body[at] != expected:
                return None
            text, at = _text_at(body, at + 1)
            texts.append(text)
        key, between, value, after = texts
        return None if between.strip() or after.strip() else (key, value, at)


def glm45_calls(tokenizer: ChatTokenizer) -> GlmCalls:
    """The syntax with this tokenizer's markers."""
    inner = tuple(marker(tokenizer, text) for text in ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"))
    frame = CallFrame(marker(tokenizer, "<tool_call>"), marker(tokenizer, "</tool_call>"), inner)
    return GlmCalls(frame, *inner)


def _text_at(body: Sequence[Scanned], at: int) -> tuple[str, int]:
    """The text from `at` to the next marker, and that marker's place."""
    pieces: list[str] = []
    while at < len(body) and isinstance(piece := body[at], str):
        pieces.append(piece)
        at += 1
    return "".join(pieces), at


GLM45 = CallFamily(
    name="glm45",
    written=re.compile(rf"<tool_call>\s*{PROBE_NAME}\s*<arg_key>"),
    tokens=("<tool_call>", "<arg_key>", "<arg_value>"),
    make=glm45_calls,
)
