"""MiniMax-M2 calls, several in one frame:

<minimax:tool_call>
<invoke name="NAME">
<parameter name="KEY">VALUE</parameter>
</invoke>
</minimax:tool_call>
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

_OPENER, _CLOSER = "<minimax:tool_call>", "</minimax:tool_call>"
_INVOKE = re.compile(r"\s*<invoke name=\"([^\"\n]+)\">")
_PARAMETER = re.compile(r"\s*<parameter name=\"([^\"\n]+)\">")
# A value may hold the closing tag: it ends where the next parameter begins or the call ends.
_VALUE_END = re.compile(r"</parameter>(?=\s*(?:<parameter name=|</invoke>))")
_INVOKE_END = re.compile(r"\s*</invoke>")


@dataclass(frozen=True, slots=True)
class MiniMaxCalls:
    """The syntax with this tokenizer's markers."""

    frame: CallFrame

    def read(self, body: Sequence[Scanned], tools: Sequence[JsonValue]) -> tuple[WrittenCall, ...] | None:
        """Calls with their parameters, each closed; values are typed by the tool's schema."""
        text, at = body_text(body), 0
        calls: list[WrittenCall] = []
        while (invoke := _INVOKE.match(text, at)) is not None:
            parameters = _parameters(text, invoke.end())
            if parameters is None:
                return None
            values, at = parameters
            arguments = arguments_text(values, tools, function=invoke.group(1))
            if arguments is None:
                return None
            calls.append(WrittenCall(invoke.group(1), arguments))
        return tuple(calls) if calls and not text[at:].strip() else None


def minimax_m2_calls(tokenizer: ChatTokenizer) -> MiniMaxCalls:
    """The syntax with this tokenizer's markers."""
    return MiniMaxCalls(CallFrame(marker(tokenizer, _OPENER), marker(tokenizer, _CLOSER)))


def _parameters(text: str, at: int) -> tuple[list[tuple[str, str]], int] | None:
    """Keys and values from `at` to the end of the call, and the place behind it; None if something is not closed."""
    values: list[tuple[str, str]] = []
    while (parameter := _PARAMETER.match(text, at)) is not None:
        end = _VALUE_END.search(text, parameter.end())
        if end is None:
            return None
        values.append((parameter.group(1), text[parameter.end() : end.start()]))
        at = end.end()
    closed = _INVOKE_END.match(text, at)
    return None if closed is None else (values, closed.end())


MINIMAX_M2 = CallFamily(
    name="minimax_m2",
    written=re.compile(rf'{_OPENER}\s*<invoke name="{PROBE_NAME}">'),
    tokens=(_OPENER, _CLOSER),
    make=minimax_m2_calls,
)
