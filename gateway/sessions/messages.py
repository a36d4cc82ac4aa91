"""Canonical forms of chat messages, and the rolling hashes that find a conversation in the turn tree (design 4).

Three forms a message: *exact* (JSON with sorted keys), *semantic* (null, "" and absent are one; one text part is its
text; tool-call arguments compare as JSON values; tool-call ids compare by position; `index` is ignored) and *core*
(semantic without reasoning). Two conversations can be the same only if their core hashes are equal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TypeAlias

from gateway.contracts.generation import JsonValue
from gateway.contracts.records import RootContext

_REASONING = ("reasoning_content", "thinking", "reasoning")
_CLIENT_DECORATION = frozenset(("provider_specific_fields", "annotations", "audio", "refusal"))
"""What client libraries add to an assistant message when they replay it; no template reads it."""

CallPositions: TypeAlias = Mapping[str, int]
"""Tool-call id → its position in the latest assistant message."""


@dataclass(frozen=True, slots=True)
class MessageKey:
    """Digests of one message's forms, 16 bytes each."""

    exact: bytes
    semantic: bytes
    core: bytes
    has_reasoning: bool


@dataclass(frozen=True, slots=True)
class ChainHash:
    """Rolling digests of a conversation's first messages, in the three forms."""

    exact: bytes = b""
    semantic: bytes = b""
    core: bytes = b""

    def extend(self, key: MessageKey) -> ChainHash:
        """The hash with one more message."""
        return ChainHash(
            _digest(self.exact + key.exact),
            _digest(self.semantic + key.semantic),
            _digest(self.core + key.core),
        )


def message_keys(
    messages: Sequence[JsonValue], *, calls: CallPositions
) -> tuple[tuple[MessageKey, ...], CallPositions]:
    """Keys of messages that follow an assistant message with `calls`, and the calls that hold after them."""
    keys: list[MessageKey] = []
    for message in messages:
        keys.append(_message_key(message, calls))
        if message.get("role") == "assistant":
            calls = {
                str(call.get("id")): position
                for position, call in enumerate(message.get("tool_calls") or ())
                if call.get("id")
            }
    return tuple(keys), calls


def root_digest(root: RootContext) -> bytes:
    """Of tools and template arguments, which are part of a root's identity; the order of keys does not matter."""
    return _digest(_json(list(root.tools)) + _json(root.template_arguments))


def arguments_digest(root: RootContext) -> bytes:
    """Of the template arguments alone."""
    return _digest(_json(root.template_arguments))


def reasoning_of(message: Mapping[str, JsonValue]) -> str | None:
    """A message's reasoning under either of its names, None for none or an empty one."""
    for name in _REASONING:
        if message.get(name):
            return str(message[name])
    return None


def _message_key(message: Mapping[str, JsonValue], calls: CallPositions) -> MessageKey:
    core = _core(message, calls)
    core_bytes = _json(core)
    reasoning = reasoning_of(message)
    semantic_bytes = core_bytes if reasoning is None else _json(core | {"reasoning_content": reasoning})
    return MessageKey(
        exact=_digest(_json(message)),
        semantic=_digest(semantic_bytes),
        core=_digest(core_bytes),
        has_reasoning=reasoning is not None,
    )


def _core(message: Mapping[str, JsonValue], calls: CallPositions) -> dict[str, JsonValue]:
    dropped = set(_REASONING)
    if message.get("role") == "assistant":
        dropped |= _CLIENT_DECORATION
    core = {name: value for name, value in message.items() if name not in dropped and not _is_empty(value)}
    if "content" in core:
        core["content"] = _content(core["content"])
        if _is_empty(core["content"]):
            del core["content"]
    if "tool_calls" in core:
        core["tool_calls"] = [_tool_call(call) for call in core["tool_calls"]]
    call_id = core.get("tool_call_id")
    if isinstance(call_id, str) and call_id in calls:
        core["tool_call_id"] = calls[call_id]
    return core


def _content(content: JsonValue) -> JsonValue:
    """One text part is its text; other parts stay, without their nulls."""
    if not isinstance(content, list):
        return content
    parts = [_without_empty(part) for part in content]
    if len(parts) == 1 and isinstance(parts[0], dict) and parts[0].get("type") == "text":
        part = parts[0]
        if part.keys() <= {"type", "text"}:
            return part.get("text", "")
    return parts


def _tool_call(call: Mapping[str, JsonValue]) -> JsonValue:
    kept = {name: value for name, value in call.items() if name not in ("id", "index") and not _is_empty(value)}
    kept.setdefault("type", "function")
    function = kept.get("function")
    if isinstance(function, dict):
        function = _without_empty(function)
        kept["function"] = function | {"arguments": _arguments(function.get("arguments"))}
    return kept


def _arguments(arguments: JsonValue) -> JsonValue:
    """Arguments as a JSON value of tagged numbers; text that is not JSON stays text, marked as such."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    try:
        value = json.loads(
            text, parse_float=_number, parse_int=_number, parse_constant=_refuse, object_pairs_hook=_unique
        )
    except (ValueError, ArithmeticError, RecursionError):
        return {"text": text}
    return {"json": value}


def _number(text: str) -> JsonValue:
    """A number as its exact digits, so that 1 and 1.0 are equal and nothing is rounded."""
    sign, digits, exponent = Decimal(text).as_tuple()
    trimmed = "".join(map(str, digits)).lstrip("0")
    significant = trimmed.rstrip("0")
    if not significant or not isinstance(exponent, int):
        return {"number": "0"}
    return {"number": f"{'-' if sign else ''}{significant}e{exponent + len(trimmed) - len(significant)}"}


def _refuse(name: str) -> JsonValue:
    raise ValueError(f"{name} is no JSON number")


def _unique(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    """Objects get a tag of their own, so that they never equal a tagged number."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("an object names a key twice")
    return {"object": value}


def _without_empty(value: JsonValue) -> JsonValue:
    if not isinstance(value, dict):
        return value
    return {name: item for name, item in value.items() if not _is_empty(item)}


def _is_empty(value: JsonValue) -> bool:
    return value is None or (isinstance(value, str | list) and not value)


def _json(value: JsonValue) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
