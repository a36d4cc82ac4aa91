"""What makes two chat messages the same message, as digests: the ground that attachment stands on (design 4).

A message of a request is held against a recorded one in three tiers. *Exact*: equal JSON, whatever the order of keys,
with or without a null `refusal`. *Semantic*: null, "" and absent are one, one text part is its text, tool-call
arguments compare as JSON values. *Projection*: the same, but the reasoning was left out. Everything here is a function
of the message and of the tool calls before it, so that a tree that is rebuilt from the ledger has the same keys.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from decimal import Decimal
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import orjson

from gateway.contracts.generation import JsonValue
from gateway.contracts.records import MatchTier, RootContext

_REASONING = ("reasoning_content", "thinking", "reasoning")
_KNOWN = frozenset(("role", "content", "name", "tool_calls", "tool_call_id", "function_call", *_REASONING))
_DECORATION = frozenset(("annotations", "cache_control", "provider_specific_fields", "refusal"))
"""What client libraries put on messages and content parts, and take away again, for other servers than ours."""

_MAX_ARGUMENT_DEPTH = 100
"""Arguments nested deeper compare as text: how deep a JSON reader gets must not depend on who calls it."""

_SHORT_TEXT = 1024
_TOOL_ROLE = b'"tool"'

_NO_EXTRAS: Mapping[str, bytes] = MappingProxyType({})

CallPositions: TypeAlias = Mapping[str, int]
"""Tool-call id → its position in the latest assistant message that has calls."""

NO_CALLS: CallPositions = MappingProxyType({})


class MessageKey(NamedTuple):
    """What of a message counts, as digests of 16 bytes (a tuple, because every request makes one a message).

    exact: of the JSON with sorted keys. core: of what must be equal in any tier. reasoning: b"" for none.
    result_of: for a tool result, which call it answers: a position, or the id where no call has it. call_ids: of the
    message's own calls, "" for a call without. extras: unknown keys, see `compare`.
    """

    exact: bytes
    core: bytes
    reasoning: bytes = b""
    result_of: int | str | None = None
    call_ids: tuple[str, ...] = ()
    extras: Mapping[str, bytes] = _NO_EXTRAS


def compare(recorded: MessageKey, sent: MessageKey) -> MatchTier | None:
    """In which tier a sent message is the recorded one, None if it is another message.

    Absent reasoning is forgiven, other reasoning is another message. Tool results name calls by position, so that a
    client may rewrite ids or drop them. Unknown keys: on an assistant message they never count, for what was sampled
    has none, and whatever stands there on replay was put there by a client. On other messages the agent may mean
    something by them, so a value that changes is another message; but bookkeeping comes and goes between calls, so a
    key that only one side has is forgiven.
    """
    if not _may_answer_one_call(recorded.result_of, sent.result_of):
        return None
    if recorded.exact == sent.exact:
        return MatchTier.EXACT
    if recorded.core != sent.core or not _agree(recorded.extras, sent.extras):
        return None
    if recorded.reasoning == sent.reasoning:
        return MatchTier.SEMANTIC
    return None if sent.reasoning else MatchTier.PROJECTION


def calls_behind(message: Mapping[str, JsonValue], calls: CallPositions) -> CallPositions:
    """The calls that hold after a message, `calls` before it."""
    if "tool_calls" not in message or message.get("role") != "assistant":
        return calls
    if not (call_ids := _call_ids(message["tool_calls"])):
        return calls
    positions: dict[str, int] = {}
    for position, call_id in enumerate(call_ids):
        if call_id:
            positions[call_id] = position
    return positions or NO_CALLS


def is_surely(message: Mapping[str, JsonValue], recorded: Mapping[str, JsonValue]) -> bool:
    """Whether two messages at one place are exactly equal, as far as that is seen without their keys: one object, or
    texts that are the same (of numbers Python has another notion of equality than JSON)."""
    if message is recorded:
        return True
    sent = _without_null_refusal(message)
    return sent == recorded and _has_texts_only(sent)


def root_digest(root: RootContext) -> bytes:
    """Of tools and template arguments, which are part of a root's identity; the order of keys does not matter."""
    return _digest(_json(list(root.tools)) + _json(dict(root.template_arguments)))


def arguments_digest(root: RootContext) -> bytes:
    """Of the template arguments alone."""
    return _digest(_json(dict(root.template_arguments)))


def reasoning_of(message: Mapping[str, JsonValue]) -> str | None:
    """A message's reasoning text under any of its names, None for none or an empty one."""
    for name in _REASONING:
        text = message.get(name)
        if text and isinstance(text, str):
            return text
    return None


def message_key(message: Mapping[str, JsonValue], calls: CallPositions) -> MessageKey:
    """Of a message that follows an assistant message with `calls`."""
    message = _without_null_refusal(message)
    content = message.get("content")
    text = _text_digest(content) if isinstance(content, str) and content else None
    if text is not None and len(message) == 2 and "role" in message:  # most messages, and most bytes
        digest = _digest(_json(message["role"]) + text)
        return MessageKey(digest, digest)
    if text is not None and len(message) == 3 and message.get("role") == "tool" and "tool_call_id" in message:
        call_id = message["tool_call_id"]  # most of the others, as below
        exact = _digest(_json({"role": "tool", "tool_call_id": call_id}) + text)
        return MessageKey(exact, _digest(_TOOL_ROLE + text), result_of=_result_of(message, calls))
    written = message if text is None else {name: value for name, value in message.items() if name != "content"}
    reasoning = reasoning_of(message)
    return MessageKey(
        exact=_digest(_json(written) + (text or b"")),
        core=_core_digest(message, text),
        reasoning=b"" if reasoning is None else _text_digest(reasoning),
        result_of=_result_of(message, calls),
        call_ids=_call_ids(message.get("tool_calls")),
        extras=_extras(message),
    )


def _without_null_refusal(message: Mapping[str, JsonValue]) -> Mapping[str, JsonValue]:
    """Our replies have one, and records do not."""
    if "refusal" in message and message["refusal"] is None:
        message = {**message}
        del message["refusal"]
    return message


def _has_texts_only(value: JsonValue) -> bool:
    """Whether all values in it are texts or null."""
    found = [value]
    for value in found:  # which grows meanwhile
        kind = type(value)
        if kind is dict:
            found += value.values()
        elif kind is list:
            found += value
        elif kind is not str and value is not None:
            return False
    return True


def _core_digest(message: Mapping[str, JsonValue], text: bytes | None) -> bytes:
    """`text`: digest of the content where that is a text."""
    core: dict[str, JsonValue] = {}
    names = ("tool_calls", "function_call") if _is_assistant(message) else ("tool_calls", "function_call", "name")
    for name in names:
        if not _is_empty(message.get(name)):
            core[name] = message[name]
    if isinstance(core.get("tool_calls"), list):
        core["tool_calls"] = [_tool_call(call) for call in core["tool_calls"]]
    if text is None:
        content = _content(message.get("content"))
        if isinstance(content, str) and content:
            text = _text_digest(content)
        elif not _is_empty(content):
            core["content"] = content
    role = _json(message.get("role"))
    return _digest(role + (_json(core) if core else b"") + (text or b""))


def _content(content: JsonValue) -> JsonValue:
    """One text part is its text; other parts stay, without their nulls and what client libraries put on them."""
    if not isinstance(content, list):
        return content
    parts = [_part(part) for part in content]
    if len(parts) == 1 and isinstance(parts[0], dict) and parts[0].get("type") == "text":
        part = parts[0]
        if part.keys() <= {"type", "text"} and isinstance(part.get("text", ""), str):
            return part.get("text", "")
    return parts


def _part(part: JsonValue) -> JsonValue:
    if not isinstance(part, dict):
        return part
    return {name: value for name, value in part.items() if name not in _DECORATION and not _is_empty(value)}


def _tool_call(call: JsonValue) -> JsonValue:
    """A function call is its name and arguments; what is no function call stays as it is, without id and index."""
    if not isinstance(call, dict):
        return call
    function = call.get("function")
    if not isinstance(function, dict):
        return {name: value for name, value in call.items() if name not in ("id", "index") and not _is_empty(value)}
    arguments = function.get("arguments")
    return {
        "type": call.get("type") or "function",
        "name": function.get("name"),
        "arguments": {"json": {"object": {}}} if _is_empty(arguments) else _arguments(arguments),
    }


def _arguments(arguments: JsonValue) -> JsonValue:
    """Arguments as a JSON value of tagged numbers; text that is not JSON stays text, marked as such."""
    text = arguments if isinstance(arguments, str) else _json(arguments).decode()
    return _short_arguments(text) if len(text) <= _SHORT_TEXT else _read_arguments(text)


def _read_arguments(text: str) -> JsonValue:
    try:
        value = _decode(text)
    except (ValueError, ArithmeticError, RecursionError):
        return {"text": text}
    if text.count("[") + text.count("{") > _MAX_ARGUMENT_DEPTH and _depth(value) > 2 * _MAX_ARGUMENT_DEPTH:
        return {"text": text}
    return {"json": value}


def _fraction(text: str) -> JsonValue:
    """A number that clients read as a double, and write back with the digits that a double needs."""
    number = float(text)
    value = Decimal(repr(number) if math.isfinite(number) else text).as_tuple()
    return _number(value.sign == 1, "".join(map(str, value.digits)), int(value.exponent))


def _integer(text: str) -> JsonValue:
    """Integers are exact at any size."""
    return _number(text.startswith("-"), text.lstrip("-"), 0)


def _number(negative: bool, digits: str, exponent: int) -> JsonValue:
    """A number as its significant digits and the exponent of the last of them: 1, 1.0 and 1e0 are equal."""
    significant = digits.strip("0")
    if not significant:
        return {"number": "0"}
    trailing_zeros = len(digits) - len(digits.rstrip("0"))
    return {"number": f"{'-' if negative else ''}{significant}e{exponent + trailing_zeros}"}


def _refuse(name: str) -> JsonValue:
    raise ValueError(f"{name} is no JSON number")


def _unique(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    """Objects get a tag of their own, so that they never equal a tagged number."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("an object names a key twice")
    return {"object": value}


def _depth(value: JsonValue) -> int:
    """Levels of lists and objects, counted without recursion."""
    depth, level = 0, [value]
    while level:
        nested = [item for item in level if isinstance(item, dict | list)]
        depth += bool(nested)
        level = [child for item in nested for child in (item.values() if isinstance(item, dict) else item)]
    return depth


def _result_of(message: Mapping[str, JsonValue], calls: CallPositions) -> int | str | None:
    call_id = _identifier(message.get("tool_call_id"))
    return calls.get(call_id, call_id) if call_id else None


def _may_answer_one_call(recorded: int | str | None, sent: int | str | None) -> bool:
    """A position and an id that no call has may mean the same call: the client renamed the one, but not the other."""
    return recorded == sent or recorded is None or sent is None or type(recorded) is not type(sent)


def _call_ids(calls: JsonValue) -> tuple[str, ...]:
    if not isinstance(calls, list):
        return ()
    call_ids = []
    for call in calls:
        call_id = call.get("id") if isinstance(call, dict) else ""
        call_ids.append(call_id if type(call_id) is str else _identifier(call_id))
    return tuple(call_ids)


def _identifier(value: JsonValue) -> str:
    """An id as text, "" for what cannot be one."""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else ""


def _extras(message: Mapping[str, JsonValue]) -> Mapping[str, bytes]:
    if _is_assistant(message) or message.keys() <= _KNOWN:
        return _NO_EXTRAS
    unknown = message.keys() - _KNOWN - _DECORATION
    return {name: _digest(_json(message[name])) for name in unknown if not _is_empty(message[name])}


def _agree(recorded: Mapping[str, bytes], sent: Mapping[str, bytes]) -> bool:
    return all(recorded[name] == sent[name] for name in recorded.keys() & sent.keys())


def _is_assistant(message: Mapping[str, JsonValue]) -> bool:
    return bool(message.get("role") == "assistant")


def _is_empty(value: JsonValue) -> bool:
    return value is None or (isinstance(value, str | list) and not value)


_decode = json.JSONDecoder(
    parse_float=_fraction, parse_int=_integer, parse_constant=_refuse, object_pairs_hook=_unique
).decode
_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


@lru_cache(maxsize=1024)
def _short_arguments(text: str) -> JsonValue:
    """A call is read twice: as it was sampled, and when the agent sends it back."""
    return _read_arguments(text)


def _json(value: JsonValue) -> bytes:
    """Equal values have equal text, whichever of the two writes it: what one cannot write never equals what it can."""
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # integers beyond 64 bits, halves of surrogate pairs
        return _encode(value).encode()


def _text_digest(text: str) -> bytes:
    # Lone surrogates, which UTF-8 has no place for, are texts like any other here.
    return _digest(text.encode("utf-8", "surrogatepass"))


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
