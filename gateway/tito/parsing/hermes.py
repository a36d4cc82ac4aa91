"""Hermes and Qwen style calls: `<tool_call>`, a JSON object with name and arguments, `</tool_call>`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from gateway.contracts.errors import TemplateRaised
from gateway.tito.conversation import Conversation
from gateway.tito.parsing.calls import WrittenCall
from gateway.tito.parsing.markers import Marker, marker
from gateway.tito.template import ChatTemplate
from gateway.tito.tokenizer import ChatTokenizer

_OPENER, _CLOSER = "<tool_call>", "</tool_call>"
_WRITTEN_CALL = re.compile(re.escape(_OPENER) + r"""\s*\{\s*["']name["']\s*:""")
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class HermesCalls:
    """The syntax with this tokenizer's markers."""

    opener: Marker
    closer: Marker

    def read(self, body: str) -> WrittenCall | None:
        """Strict JSON: one object, a string `name`, an object `arguments` (or `parameters`), kept as written."""
        try:
            members = _members(body)
            name = json.loads(members["name"])
            arguments = members["arguments" if "arguments" in members else "parameters"]
            if isinstance(json.loads(arguments), str):
                arguments = json.loads(arguments)  # some models write the object as a JSON string
            is_call = isinstance(name, str) and bool(name) and isinstance(_strict_json(arguments), dict)
            name.encode()
        except (ValueError, KeyError, AttributeError, RecursionError):
            return None
        return WrittenCall(name, arguments) if is_call else None


def find_hermes(template: ChatTemplate, tokenizer: ChatTokenizer) -> HermesCalls | None:
    """The syntax if the template writes calls this way, else None."""
    if _OPENER not in template.source or _CLOSER not in template.source:
        return None
    call = {"id": "call00001", "type": "function", "function": {"name": "probe", "arguments": '{"key": "value"}'}}
    user = {"role": "user", "content": "question"}
    reply = {"role": "assistant", "content": "", "tool_calls": [call]}
    try:
        shown = template.render(Conversation((user, reply)), add_generation_prompt=False)
    except TemplateRaised:
        shown = template.source
    if _WRITTEN_CALL.search(shown) is None:
        return None
    return HermesCalls(marker(tokenizer, _OPENER), marker(tokenizer, _CLOSER))


def _members(text: str) -> dict[str, str]:
    """Key → JSON text of its value, as written, of the one object that `text` is; raises ValueError for all else."""
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    members: dict[str, str] = {}
    at = _expect(text, _skip_space(text, 0), "{")
    while True:
        key, after_key = decoder.raw_decode(text, at)
        if not isinstance(key, str) or key in members:
            raise ValueError(f"key {key!r} is no string or stands twice")
        start = _skip_space(text, _expect(text, _skip_space(text, after_key), ":"))
        _, stop = decoder.raw_decode(text, start)
        members[key] = text[start:stop]
        at = _skip_space(text, stop)
        if text[at : at + 1] != ",":
            break
        at = _skip_space(text, at + 1)
    if text[_expect(text, at, "}") :].strip():
        raise ValueError("text follows the object")
    return members


def _strict_json(text: str) -> object:
    return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match is not None else at


def _expect(text: str, at: int, character: str) -> int:
    """The place behind `character` and the space that follows it."""
    if text[at : at + 1] != character:
        raise ValueError(f"expected {character!r} at {at}")
    return _skip_space(text, at + 1)
