"""Kimi-K2 calls: the call's id, which holds the function's name, and JSON arguments, each behind a marker.

The id is the model's own (`functions.NAME:0`), and agents get it as it is: the template prints it back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.contracts.generation import JsonValue
from gateway.tito.parsing.calls import CallFamily, CallFrame, Section, WrittenCall, split_at
from gateway.tito.parsing.json_text import object_text
from gateway.tito.parsing.markers import Marker, Scanned, marker
from gateway.tito.tokenizer import ChatTokenizer

_ARGUMENTS = "<|tool_call_argument_begin|>"
_ID = re.compile(r"\s*((?:functions\.)?([^\s:]+)(?::\d+)?)\s*")


@dataclass(frozen=True, slots=True)
class KimiCalls:
    """The syntax with this tokenizer's markers."""

    frame: CallFrame
    arguments_marker: Marker

    def read(self, body: Sequence[Scanned], tools: Sequence[JsonValue]) -> tuple[WrittenCall, ...] | None:
        """Id and name, and JSON arguments as written."""
        parts = split_at(body, self.arguments_marker)
        written_id = _ID.fullmatch(parts[0]) if parts is not None else None
        arguments = object_text(parts[1]) if parts is not None else None
        if written_id is None or arguments is None:
            return None
        return (WrittenCall(written_id.group(2), arguments, written_id.group(1)),)


def kimi_k2_calls(tokenizer: ChatTokenizer) -> KimiCalls:
    """The syntax with this tokenizer's markers."""
    arguments = marker(tokenizer, _ARGUMENTS)
    section = (marker(tokenizer, text) for text in ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"))
    frame = CallFrame(
        opener=marker(tokenizer, "<|tool_call_begin|>"),
        closer=marker(tokenizer, "<|tool_call_end|>"),
        inner=(arguments,),
        section=Section(*section),
    )
    return KimiCalls(frame, arguments)


KIMI_K2 = CallFamily(
    name="kimi_k2",
    written=re.compile(r"<\|tool_call_begin\|>.*" + re.escape(_ARGUMENTS), re.DOTALL),
    tokens=("<|tool_call_begin|>", _ARGUMENTS),
    make=kimi_k2_calls,
)
