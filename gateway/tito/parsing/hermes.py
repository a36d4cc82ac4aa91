"""Hermes and Qwen style calls: `<tool_call>`, a JSON object with name and arguments, `</tool_call>`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.contracts.generation import JsonValue
from gateway.tito.parsing.calls import CallFamily, CallFrame, WrittenCall, body_text
from gateway.tito.parsing.json_text import read_members
from gateway.tito.parsing.markers import Scanned, marker
from gateway.tito.parsing.named_object import call_of_members
from gateway.tito.tokenizer import ChatTokenizer

_OPENER, _CLOSER = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class HermesCalls:
    """The syntax with this tokenizer's markers."""

    frame: CallFrame

    def read(self, body: Sequence[Scanned], tools: Sequence[JsonValue]) -> tuple[WrittenCall, ...] | None:
        """Strict JSON: one object, a string `name`, an object `arguments` (or `parameters`), kept as written."""
        try:
            call = call_of_members(read_members(body_text(body)))
        except (ValueError, KeyError, RecursionError):
            return None
        return (call if call.call_id is None else WrittenCall(call.name, call.arguments),)


def hermes_calls(tokenizer: ChatTokenizer) -> HermesCalls:
    """The syntax with this tokenizer's markers."""
    return HermesCalls(CallFrame(marker(tokenizer, _OPENER), marker(tokenizer, _CLOSER)))


HERMES = CallFamily(
    name="hermes",
    written=re.compile(rf"""{_OPENER}\s*\{{\s*["']name["']\s*:"""),
    tokens=(_OPENER, _CLOSER),
    make=hermes_calls,
)
