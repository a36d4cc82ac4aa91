"""Llama-3 calls: the whole reply is `{"name": …, "parameters": {…}}`, several joined by `;`, maybe after a marker."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.contracts.generation import JsonValue
from gateway.tito.parsing.calls import PROBE_NAME, CallFamily, CallFrame, WrittenCall, body_text
from gateway.tito.parsing.json_text import members_at, skip_space
from gateway.tito.parsing.markers import Scanned, marker
from gateway.tito.parsing.named_object import call_of_members
from gateway.tito.tokenizer import ChatTokenizer


@dataclass(frozen=True, slots=True)
class Llama3Calls:
    """The syntax with this tokenizer's marker."""

    frame: CallFrame

    def read(self, body: Sequence[Scanned], tools: Sequence[JsonValue]) -> tuple[WrittenCall, ...] | None:
        """JSON objects, arguments kept as written; any other text makes none of it a call."""
        text = body_text(body)
        calls: list[WrittenCall] = []
        try:
            at = skip_space(text, 0)
            while at < len(text):
                members, at = members_at(text, at)
                call = call_of_members(members)
                calls.append(WrittenCall(call.name, call.arguments))
                at = skip_space(text, at)
                if text[at : at + 1] == ";":
                    at = skip_space(text, at + 1)
        except (ValueError, KeyError, RecursionError):
            return None
        return tuple(calls) or None


def llama3_json_calls(tokenizer: ChatTokenizer) -> Llama3Calls:
    """The syntax with this tokenizer's marker."""
    beginnings = ('{"name":', '{"type":"function"', '{"parameters":', '{"arguments":')
    return Llama3Calls(CallFrame(opener=marker(tokenizer, "<|python_tag|>"), beginnings=beginnings))


LLAMA3_JSON = CallFamily(
    name="llama3_json",
    written=re.compile(rf'\{{\s*"name":\s*"{PROBE_NAME}",\s*"parameters":'),
    tokens=("<|python_tag|>",),
    make=llama3_json_calls,
)
