"""Mistral's calls, behind `[TOOL_CALLS]`, up to the next one or the reply's end.

Older models write a JSON array of objects; newer ones a name, `[ARGS]` and JSON arguments, some with a `[CALL_ID]`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.contracts.generation import JsonValue
from gateway.tito.parsing.calls import CallFamily, CallFrame, WrittenCall, body_text, split_at
from gateway.tito.parsing.json_text import object_text, read_items, read_members
from gateway.tito.parsing.markers import Marker, Scanned, marker
from gateway.tito.parsing.named_object import call_of_members
from gateway.tito.tokenizer import ChatTokenizer

_OPENER = "[TOOL_CALLS]"
_NAME = re.compile(r"\s*([^\s{}\[\]\"]+)\s*")
_NINE_ALPHANUMERICS = re.compile(r"[0-9A-Za-z]{9}")
_ID = re.compile(r"\s*([\w-]+)\s*")


@dataclass(frozen=True, slots=True)
class MistralCalls:
    """The syntax with this tokenizer's markers."""

    frame: CallFrame
    id_marker: Marker
    arguments_marker: Marker

    def read(self, body: Sequence[Scanned], tools: Sequence[JsonValue]) -> tuple[WrittenCall, ...] | None:
        """Either form; arguments and ids as written (in JSON, ids that are not Mistral's are left out)."""
        parts = split_at(body, self.arguments_marker)
        if parts is None:
            return _calls_of_json(body_text(body).strip())
        head = split_at(body[: body.index(self.arguments_marker)], self.id_marker)
        call_id = _ID.fullmatch(head[1]) if head is not None else None
        name, arguments = _NAME.fullmatch(parts[0] if head is None else head[0]), object_text(parts[1])
        if name is None or arguments is None or (head is not None and call_id is None):
            return None
        return (WrittenCall(name.group(1), arguments, None if call_id is None else call_id.group(1)),)


def mistral_calls(tokenizer: ChatTokenizer) -> MistralCalls:
    """The syntax with this tokenizer's markers."""
    inner = (marker(tokenizer, "[CALL_ID]"), marker(tokenizer, "[ARGS]"))
    return MistralCalls(CallFrame(opener=marker(tokenizer, _OPENER), inner=inner), *inner)


def _calls_of_json(text: str) -> tuple[WrittenCall, ...] | None:
    try:
        items = read_items(text) if text.startswith("[") else [read_members(text)]
        calls = [call_of_members(members) for members in items]
    except (ValueError, KeyError, RecursionError):
        return None
    return tuple(WrittenCall(call.name, call.arguments, _usable_id(call.call_id)) for call in calls)


def _usable_id(written: str | None) -> str | None:
    return written if written is not None and _NINE_ALPHANUMERICS.fullmatch(written) else None


MISTRAL = CallFamily(
    name="mistral",
    written=re.compile(re.escape(_OPENER)),
    tokens=(_OPENER,),
    make=mistral_calls,
)
