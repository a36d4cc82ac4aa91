"""Qwen3-Coder style calls (and Seed-OSS's, which differ in the markers and have no line breaks around values):

<tool_call>
<function=NAME>
<parameter=KEY>
VALUE
</parameter>
</function>
</tool_call>
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.contracts.generation import JsonValue
from gateway.tito.parsing.calls import PROBE_NAME, CallFamily, CallFrame, WrittenCall, body_text
from gateway.tito.parsing.markers import Scanned, marker
from gateway.tito.parsing.typed_values import arguments_text
from gateway.tito.tokenizer import ChatTokenizer

_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>")
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>")
# A value may hold the closing tag: it ends where the next parameter begins or the function ends.
_VALUE_END = re.compile(r"</parameter>(?=\s*(?:<parameter=|</function>))")
_END = re.compile(r"\s*</function>\s*\Z")


@dataclass(frozen=True, slots=True)
class TaggedCalls:
    """Parameters in tags. breaks_lines: one line break before and one after a value are layout."""

    frame: CallFrame
    breaks_lines: bool

    def read(self, body: Sequence[Scanned], tools: Sequence[JsonValue]) -> tuple[WrittenCall, ...] | None:
        """One function with its parameters, each closed; values are typed by the tool's schema."""
        text = body_text(body)
        function = _FUNCTION.match(text)
        if function is None:
            return None
        values: list[tuple[str, str]] = []
        at = function.end()
        while (parameter := _PARAMETER.match(text, at)) is not None:
            end = _VALUE_END.search(text, parameter.end())
            if end is None:
                return None
            values.append((parameter.group(1), self._trimmed(text[parameter.end() : end.start()])))
            at = end.end()
        if _END.match(text, at) is None:
            return None
        arguments = arguments_text(values, tools, function=function.group(1))
        return None if arguments is None else (WrittenCall(function.group(1), arguments),)

    def _trimmed(self, value: str) -> str:
        return value.removeprefix("\n").removesuffix("\n") if self.breaks_lines else value


def qwen3_coder_calls(tokenizer: ChatTokenizer) -> TaggedCalls:
    """The syntax with this tokenizer's markers."""
    frame = CallFrame(marker(tokenizer, "<tool_call>"), marker(tokenizer, "</tool_call>"))
    return TaggedCalls(frame, breaks_lines=True)


def seed_oss_calls(tokenizer: ChatTokenizer) -> TaggedCalls:
    """The syntax with this tokenizer's markers."""
    frame = CallFrame(marker(tokenizer, "<seed:tool_call>"), marker(tokenizer, "</seed:tool_call>"))
    return TaggedCalls(frame, breaks_lines=False)


QWEN3_CODER = CallFamily(
    name="qwen3_coder",
    written=re.compile(rf"<tool_call>\s*<function={PROBE_NAME}>"),
    tokens=(),
    make=qwen3_coder_calls,
)
SEED_OSS = CallFamily(
    name="seed_oss",
    written=re.compile(rf"<seed:tool_call>\s*<function={PROBE_NAME}>"),
    tokens=("<seed:tool_call>", "</seed:tool_call>"),
    make=seed_oss_calls,
)
