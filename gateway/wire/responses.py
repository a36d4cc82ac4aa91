"""OpenAI's responses, the asking side: items → messages as chat completions spell them, then chat's own reader.

One reply of a model is several items here (reasoning, messages, function calls) and one message there. Items of one
reply are put together again: by the ids that our replies give their items, and where a client has dropped those, by
where the items stand. `instructions` are a system message of this call only. What the API keeps on the server beyond
responses (conversations, prompts, background work, tools that run there) is refused, and so are references to items.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from msgspec.structs import replace

from gateway.contracts.errors import InvalidRequest
from gateway.contracts.generation import JsonValue
from gateway.wire.fields import check_nesting, flag, kind_of, objects, optional, within
from gateway.wire.json_text import load_json_object
from gateway.wire.openai import MAX_TOP_LOGPROBS, chat_request
from gateway.wire.request import TurnRequest

LOGPROBS = "message.output_text.logprobs"
"""In `include`: log-probs of the visible text."""

SEALED_REASONING = "reasoning.encrypted_content"
"""In `include`: reasoning items carry their text a second time, for clients that keep nothing else of them."""

_SEAL = "verbatim."
_TRANSLATED = frozenset(
    (
        "background", "conversation", "include", "input", "instructions", "max_output_tokens", "max_tool_calls",
        "metadata", "previous_response_id", "prompt", "reasoning", "store", "text", "tool_choice", "tools",
        "truncation",
    )
)  # fmt: skip
_ECHOED = (
    "include", "max_output_tokens", "max_tool_calls", "metadata", "model", "parallel_tool_calls",
    "previous_response_id", "prompt_cache_key", "reasoning", "safety_identifier", "store", "temperature", "text",
    "tool_choice", "top_logprobs", "top_p", "user",
)  # fmt: skip
_REFUSED = {
    "conversation": "send previous_response_id, or the whole input",
    "prompt": "send instructions and input",
}
_TEXT_PARTS = frozenset(("input_text", "output_text", "reasoning_text", "summary_text", "text"))
_DECORATION = frozenset(("annotations", "logprobs"))
_OPTIONAL = frozenset(("async", "caller", "namespace"))
_ITEM_ID = re.compile(r"(?:fc|msg|rs)_(turn-[0-9a-f]+)_[0-9]+")


@dataclass(frozen=True, slots=True, eq=False)
class ResponsesRequest:
    """A request as read; it becomes a turn's once what it continues is known.

    previous_turn_id: the recorded turn that `previous_response_id` names. fields: chat's, all but the messages.
    kept: what a later look at the response must say again.
    """

    instructions: str | None
    input_messages: Sequence[JsonValue]
    previous_turn_id: str | None
    fields: Mapping[str, JsonValue]
    kept: Mapping[str, JsonValue]
    body: bytes

    def turn(self, history: Sequence[JsonValue] = ()) -> TurnRequest:
        """The turn after `history`, the messages up to the reply that it continues; raises InvalidRequest."""
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        fields = {**self.fields, "messages": [*system, *history, *self.input_messages]}
        return replace(chat_request(fields, body=self.body), kept=self.kept)


def parse_responses_request(body: bytes) -> ResponsesRequest:
    """Read a request; raises InvalidRequest naming the field that is wrong."""
    fields = load_json_object(body)
    check_nesting(fields, body)
    _check_served(fields)
    instructions = optional(fields, "instructions", str)
    previous = optional(fields, "previous_response_id", str)
    echoed = {name: fields[name] for name in _ECHOED if fields.get(name) is not None}
    return ResponsesRequest(
        instructions=instructions,
        input_messages=_input_messages(fields, is_needed=previous is None),
        previous_turn_id=None if previous is None else turn_id_of(previous),
        fields=_chat_fields(fields),
        kept={"dialect": "responses", "has_instructions": bool(instructions), "fields": echoed},
        body=body,
    )


def response_id(turn_id: str) -> str:
    """The id of a turn's response."""
    return f"resp_{turn_id}"


def turn_id_of(response: str) -> str:
    """The turn that a response id names; it may not exist."""
    return response.removeprefix("resp_")


def item_id(prefix: str, turn_id: str, index: int) -> str:
    """The id of an output item: it names its turn, so that a replay shows what belongs together."""
    return f"{prefix}_{turn_id}_{index}"


def seal(reasoning: str) -> str:
    """Reasoning as the opaque text that clients carry for us; it is wrapped, not secret."""
    return _SEAL + base64.b64encode(reasoning.encode("utf-8", "surrogatepass")).decode("ascii")


def flat_tools(tools: Sequence[JsonValue]) -> list[JsonValue]:
    """Tools as responses spell them, from chat's spelling."""
    defaults = {"description": None, "parameters": None, "strict": None}
    return [
        {**_without(tool, ("function",)), **defaults, **tool["function"]}
        for tool in tools
        if isinstance(tool.get("function"), dict)
    ]


def _check_served(fields: Mapping[str, JsonValue]) -> None:
    for name, instead in _REFUSED.items():
        if fields.get(name) is not None:
            raise InvalidRequest(f"{name}: is not kept here; {instead}")
    if flag(fields, "background"):
        raise InvalidRequest("background: responses are answered on their own connection here; leave it out or false")
    if fields.get("n") not in (None, 1):
        raise InvalidRequest("n: a response is one reply; ask several times, or use chat completions")
    truncation = optional(fields, "truncation", str)
    if truncation not in (None, "auto", "disabled"):
        raise InvalidRequest(f"truncation: {truncation!r} is none of auto, disabled")
    for name in ("metadata", "reasoning", "text"):
        if not isinstance(fields.get(name), dict | None):
            raise InvalidRequest(f"{name}: expected an object, got {kind_of(fields[name])}")
    flag(fields, "store")


def _chat_fields(fields: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """All but the messages as chat completions have it; unknown fields stay as they are (I8)."""
    chat = {name: value for name, value in fields.items() if name not in _TRANSLATED}
    if (limit := optional(fields, "max_output_tokens", int)) is not None:
        if limit < 1:
            raise InvalidRequest(f"max_output_tokens: expected at least 1, got {limit}")
        chat["max_completion_tokens"] = limit
    if fields.get("tools") is not None:
        chat["tools"] = [_tool(f"tools[{i}]", tool) for i, tool in enumerate(objects(fields, "tools"))]
    if fields.get("tool_choice") is not None:
        chat["tool_choice"] = _tool_choice(fields["tool_choice"])
    if (effort := (fields.get("reasoning") or {}).get("effort")) is not None:
        if not isinstance(effort, str):
            raise InvalidRequest(f"reasoning.effort: expected a string, got {kind_of(effort)}")
        chat["reasoning_effort"] = effort
    if (wanted := (fields.get("text") or {}).get("format")) is not None:
        chat["response_format"] = _response_format(wanted)
    within(fields, "top_logprobs", 0, MAX_TOP_LOGPROBS)
    if LOGPROBS in _include(fields):
        chat["logprobs"] = True
    elif not flag(fields, "return_token_ids"):
        chat.pop("top_logprobs", None)  # this API asks for them beside `include`; without it they are not shown
    return chat


def _include(fields: Mapping[str, JsonValue]) -> Sequence[str]:
    """What the client wants to see besides; what does not exist here is no error."""
    include = fields.get("include")
    if not isinstance(include, list | None) or not all(isinstance(name, str) for name in include or ()):
        raise InvalidRequest("include: expected a list of strings")
    return include or ()


def _tool(name: str, tool: Mapping[str, JsonValue]) -> JsonValue:
    """A function; nulls of its optional fields mean what their absence means, in chat's root too."""
    kind = tool.get("type")
    if kind != "function":
        raise InvalidRequest(f"{name}.type: {kind!r} tools are not run here; known is function")
    if isinstance(tool.get("function"), dict):
        return tool
    if not isinstance(tool.get("name"), str):
        raise InvalidRequest(f"{name}.name: expected a string, got {kind_of(tool.get('name'))}")
    optional_names = ("description", "parameters", "strict")
    described = {k: v for k, v in tool.items() if k != "type" and not (v is None and k in optional_names)}
    return {"type": "function", "function": described}


def _tool_choice(choice: JsonValue) -> JsonValue:
    if isinstance(choice, str):
        if choice not in ("auto", "none", "required"):
            raise InvalidRequest(f"tool_choice: {choice!r} is none of auto, none, required")
        return choice
    if not isinstance(choice, dict):
        raise InvalidRequest(f"tool_choice: expected a string or an object, got {kind_of(choice)}")
    if choice.get("type") == "function":
        return choice if "function" in choice else {"type": "function", "function": _without(choice, ("type",))}
    if choice.get("type") == "allowed_tools":
        allowed = [_tool_choice(tool) for tool in objects(choice, "tools")]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode", "auto"), "tools": allowed}}
    raise InvalidRequest(f"tool_choice.type: {choice.get('type')!r} is none of function, allowed_tools")


def _response_format(wanted: JsonValue) -> JsonValue:
    if not isinstance(wanted, dict):
        raise InvalidRequest(f"text.format: expected an object, got {kind_of(wanted)}")
    kind = wanted.get("type")
    if kind in ("text", "json_object"):
        return wanted
    if kind == "json_schema":
        if "schema" not in wanted:
            raise InvalidRequest("text.format.schema: is missing")
        return {"type": kind, "json_schema": _without(wanted, ("type",))}
    raise InvalidRequest(f"text.format.type: {kind!r} is none of text, json_object, json_schema")


def _input_messages(fields: Mapping[str, JsonValue], *, is_needed: bool) -> Sequence[JsonValue]:
    asked = fields.get("input")
    if isinstance(asked, str):
        return [{"role": "user", "content": asked}]
    if not isinstance(asked, list | None):
        raise InvalidRequest(f"input: expected text or a list of items, got {kind_of(asked)}")
    if not asked and is_needed:
        raise InvalidRequest("input: text or at least one item is needed")
    reader = _ItemReader()
    for i, item in enumerate(objects(fields, "input")):
        reader.add(f"input[{i}]", item)
    return reader.messages


class _Reply(NamedTuple):
    """An assistant message that items are put into: where it stands, and the turn that its items name, if they do.

    is_foreign: it came with calls or reasoning of its own, as chat completions write it, and is whole.
    """

    position: int
    turn_id: str | None
    is_foreign: bool = False


class _ItemReader:
    """Items, one after the other → messages. `name`: of an item, for errors."""

    def __init__(self) -> None:
        self.messages: list[dict[str, JsonValue]] = []
        self._reply: _Reply | None = None

    def add(self, name: str, item: Mapping[str, JsonValue]) -> None:
        """Take one more item; raises InvalidRequest for one that no message can hold."""
        kind = item.get("type") or ("message" if "role" in item else None)
        if kind == "message":
            self._add_message(name, item)
        elif kind == "reasoning":
            self._add_reasoning(name, item)
        elif kind == "function_call":
            self._add_call(name, item)
        elif kind == "function_call_output":
            self._add_output(name, item)
        elif kind == "item_reference":
            raise InvalidRequest(f"{name}: items are not kept one by one; send the item, or previous_response_id")
        else:
            known = "message, reasoning, function_call, function_call_output"
            raise InvalidRequest(f"{name}.type: {kind!r} is none of {known}")

    def _add_message(self, name: str, item: Mapping[str, JsonValue]) -> None:
        if not isinstance(item.get("role"), str):
            raise InvalidRequest(f"{name}.role: expected a string, got {kind_of(item.get('role'))}")
        content = _content(f"{name}.content", item.get("content"))
        others = _without(item, ("type", "id", "status", "phase", "content"))
        if item["role"] != "assistant":
            self.messages.append({**others, "content": content})
            return
        message = self._message_of(item, kind="message")
        message |= {**others, "content": _joined(message["content"], content)}
        if self._reply is not None and others.keys() & {"reasoning_content", "tool_calls"}:
            self._reply = self._reply._replace(is_foreign=True)

    def _add_reasoning(self, name: str, item: Mapping[str, JsonValue]) -> None:
        if text := _reasoning_text(name, item):  # other servers' sealed reasoning says nothing to us
            message = self._message_of(item, kind="reasoning")
            message["reasoning_content"] = message.get("reasoning_content", "") + text

    def _add_call(self, name: str, item: Mapping[str, JsonValue]) -> None:
        for field in ("call_id", "name", "arguments"):
            if not isinstance(item.get(field), str):
                raise InvalidRequest(f"{name}.{field}: expected a string, got {kind_of(item.get(field))}")
        call = {
            **_without(item, ("type", "id", "status", "call_id", "name", "arguments")),
            "id": item["call_id"],
            "type": "function",
            "function": {"name": item["name"], "arguments": item["arguments"]},
        }
        self._message_of(item, kind="function_call").setdefault("tool_calls", []).append(call)

    def _add_output(self, name: str, item: Mapping[str, JsonValue]) -> None:
        call_id = item.get("call_id")
        if not isinstance(call_id, str):
            raise InvalidRequest(f"{name}.call_id: expected a string, got {kind_of(call_id)}")
        others = _without(item, ("type", "id", "status", "call_id", "output"))
        content = _content(f"{name}.output", item.get("output"))
        self.messages.append({**others, "role": "tool", "tool_call_id": call_id, "content": content})

    def _message_of(self, item: Mapping[str, JsonValue], *, kind: str) -> dict[str, JsonValue]:
        """The assistant message that an item is part of: the latest, or a new one."""
        found = _ITEM_ID.fullmatch(str(item.get("id")))
        turn_id = None if found is None else found.group(1)
        reply = self._reply
        if reply is None or not self._goes_on(reply, turn_id, kind):
            reply = _Reply(len(self.messages), turn_id)
            self.messages.append({"role": "assistant", "content": None})
        self._reply = reply._replace(turn_id=turn_id or reply.turn_id)
        return self.messages[reply.position]

    def _goes_on(self, reply: _Reply, turn_id: str | None, kind: str) -> bool:
        """Whether an item is part of `reply`. Ids decide, also where results of its calls stand between its items."""
        since = self.messages[reply.position + 1 :]
        if reply.is_foreign:
            return False
        if turn_id is not None and reply.turn_id is not None:
            return turn_id == reply.turn_id and all(message.get("role") == "tool" for message in since)
        message = self.messages[reply.position]
        has_text, has_calls = message["content"] is not None, "tool_calls" in message
        if since or (kind == "reasoning" and (has_text or has_calls)):
            return False
        return kind != "message" or has_calls or not has_text  # two texts in a row are two replies


def _reasoning_text(name: str, item: Mapping[str, JsonValue]) -> str:
    """What was thought: as text, or sealed by us, or at least the summary."""
    return (
        "".join(_texts(name, item, "content"))
        or _unsealed(item.get("encrypted_content"))
        or "\n\n".join(_texts(name, item, "summary"))
    )


def _texts(name: str, item: Mapping[str, JsonValue], field: str) -> list[str]:
    parts = objects({f"{name}.{field}": item.get(field)}, f"{name}.{field}")
    texts = [part.get("text") for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise InvalidRequest(f"{name}.{field}: expected parts with a text")
    return texts


def _unsealed(sealed: JsonValue) -> str:
    if not isinstance(sealed, str) or not sealed.startswith(_SEAL):
        return ""
    try:
        return base64.b64decode(sealed.removeprefix(_SEAL), validate=True).decode("utf-8", "surrogatepass")
    except (binascii.Error, UnicodeDecodeError):
        return ""


def _content(name: str, content: JsonValue) -> JsonValue:
    """Text, or parts as chat completions spell them; one plain text part is its text."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{name}: expected text or parts, got {kind_of(content)}")
    parts = [_part(f"{name}[{i}]", part) for i, part in enumerate(content)]
    if len(parts) == 1 and _is_plain(parts[0]):
        return parts[0]["text"]
    return parts


def _part(name: str, part: JsonValue) -> dict[str, JsonValue]:
    if not isinstance(part, dict):
        raise InvalidRequest(f"{name}: expected an object, got {kind_of(part)}")
    kind = part.get("type")
    if isinstance(kind, str) and (kind in _TEXT_PARTS or kind == "refusal"):
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise InvalidRequest(f"{name}: expected a text, got {kind_of(text)}")
        return {**_without(part, ("type", "text", "refusal", *_DECORATION)), "type": "text", "text": text}
    if kind == "input_image" and isinstance(part.get("image_url"), str):
        image = {"url": part["image_url"]} | ({"detail": part["detail"]} if part.get("detail") else {})
        return {**_without(part, ("image_url", "detail")), "type": "image_url", "image_url": image}
    if kind == "input_file":
        return {"type": "file", "file": _without(part, ("type",))}
    return part


def _joined(content: JsonValue, more: JsonValue) -> JsonValue:
    """Content of one reply that came in several items; its text is one text."""
    more = "".join(part["text"] for part in more) if _is_text(more) else more
    if content is None or more is None:
        return content or more or ""
    if isinstance(content, str) and isinstance(more, str):
        return content + more
    return [*_as_parts(content), *_as_parts(more)]


def _is_text(content: JsonValue) -> bool:
    return isinstance(content, list) and all(_is_plain(part) for part in content)


def _is_plain(part: Mapping[str, JsonValue]) -> bool:
    return part.keys() == {"type", "text"} and part["type"] == "text"


def _as_parts(content: JsonValue) -> list[JsonValue]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _without(fields: Mapping[str, JsonValue], names: Sequence[str]) -> dict[str, JsonValue]:
    """What is left; optional fields of the API that are null say nothing."""
    return {k: v for k, v in fields.items() if k not in names and not (v is None and k in _OPTIONAL)}
