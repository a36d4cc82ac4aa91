"""Anthropic's Messages: bytes → TurnRequest (its blocks are `anthropic_blocks`, its replies `anthropic_reply`).

A request is put into the words of chat completions and read as one, so that both dialects mean the same: unknown fields
go on to the engine (I8), and none can switch off or forge what is recorded (I7). Where it continues a message thread,
which sends only what is new, the conversation so far is put before it as it was recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from msgspec.structs import replace

from gateway.contracts.errors import InvalidRequest
from gateway.contracts.generation import JsonValue
from gateway.wire.anthropic_blocks import chat_messages, system_message
from gateway.wire.fields import check_nesting, flag, inside, kind_of, objects, optional
from gateway.wire.json_text import load_json_object
from gateway.wire.openai import chat_request
from gateway.wire.request import TurnRequest

_OURS = frozenset(
    (
        "cache_control", "messages", "output_config", "stop_sequences", "system", "thinking", "thread", "tool_choice",
        "tools",
    )
)  # fmt: skip
_CHAT_ONLY = frozenset(
    (
        "documents", "logprobs", "max_completion_tokens", "n", "parallel_tool_calls", "reasoning_effort",
        "response_format", "stop", "stream_options", "top_logprobs",
    )
)  # fmt: skip
"""Fields of chat completions that this API does not have: one reply a call, and no log-probs in it."""

_KEPT = ("output_config", "thinking", "thread", "tool_choice")
_TOOL_KEYS = frozenset(("cache_control", "description", "eager_input_streaming", "input_schema", "name", "type"))
"""Keys of a tool that chat completions spell otherwise, or that say how to cache and deliver only."""

_THINKING: Mapping[str, bool | None] = {"enabled": True, "disabled": False, "adaptive": None, "between_tools": None}
"""Kinds of thinking → `enable_thinking`; None leaves it to the template."""

_TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_MESSAGE_ID = "msg_"
_BYTES_OF_TOKEN = 4


class Earlier(NamedTuple):
    """What a thread holds: its messages and tools as chat completions spell them; num_tokens of them in all."""

    messages: Sequence[JsonValue]
    tools: Sequence[JsonValue]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class MessagesRequest:
    """One call. previous_turn_id: the turn whose conversation it continues, None where it sends all of its own."""

    fields: Mapping[str, JsonValue]
    body: bytes
    previous_turn_id: str | None

    @property
    def shows_thinking(self) -> bool:
        """Whether the text of thinking goes into the reply."""
        return _object(self.fields, "thinking").get("display") != "omitted"

    def turn(self, earlier: Earlier | None = None) -> TurnRequest:
        """The turn that is asked for, behind what its thread holds; raises InvalidRequest naming what is wrong."""
        fields = self.fields
        system = system_message(fields.get("system"))
        tools = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(objects(fields, "tools"))]
        messages = [*system.messages, *chat_messages(objects(fields, "messages"))]
        if earlier is not None:
            messages, tools = [*earlier.messages, *messages], [*earlier.tools]
        turn = chat_request(_chat_fields(fields, messages, tools), body=self.body)
        ignored = {*turn.ignored_fields, *(_CHAT_ONLY & fields.keys())}
        if system.had_billing:
            ignored.add("system.x-anthropic-billing-header")
        return replace(
            turn,
            ignored_fields=tuple(sorted(ignored)),
            kept={name: fields[name] for name in _KEPT if name in fields},
            num_bytes=turn.num_bytes + (0 if earlier is None else _BYTES_OF_TOKEN * earlier.num_tokens),
        )


def parse_messages_request(body: bytes) -> MessagesRequest:
    """Read a call of `/v1/messages`; raises InvalidRequest naming the field that is wrong."""
    request = parse_count_request(body)
    if (optional(request.fields, "max_tokens", int) or 0) < 1:
        raise InvalidRequest(f"max_tokens: expected at least 1, got {request.fields.get('max_tokens', 'none')}")
    return request


def parse_count_request(body: bytes) -> MessagesRequest:
    """Read a call of `/v1/messages/count_tokens`: the same without a limit of the reply."""
    fields = load_json_object(body)
    check_nesting(fields, body)
    return MessagesRequest(fields, body, _previous_turn_id(fields))


def _previous_turn_id(fields: Mapping[str, JsonValue]) -> str | None:
    thread = _object(fields, "thread")
    if not thread or thread.get("type") == "create":  # every turn is held anyway
        return None
    if thread.get("type") != "continue":
        raise InvalidRequest(f"thread.type: {thread.get('type')!r} is none of create, continue")
    previous = thread.get("previous_message_id")
    if not isinstance(previous, str):
        raise InvalidRequest(f"thread.previous_message_id: expected a string, got {kind_of(previous)}")
    for name in ("system", "tools"):
        if fields.get(name) is not None:
            raise InvalidRequest(f"{name}: a thread that is continued keeps its own; leave it out")
    return previous.removeprefix(_MESSAGE_ID)


def _chat_fields(
    fields: Mapping[str, JsonValue], messages: Sequence[JsonValue], tools: Sequence[JsonValue]
) -> dict[str, JsonValue]:
    """The request in the words of chat completions, unknown fields in their order."""
    chat = {name: value for name, value in fields.items() if name not in _OURS | _CHAT_ONLY}
    chat |= {"messages": list(messages), "tools": list(tools), "logprobs": False}
    chat |= _tool_choice(fields, tools) | _output(_object(fields, "output_config")) | _stop(fields)
    chat["chat_template_kwargs"] = {
        **_thinking(_object(fields, "thinking")),
        **_object(fields, "chat_template_kwargs"),
    }
    if chat.get("top_k") == 0:  # no limit, which engines write otherwise
        del chat["top_k"]
    return chat


def _tool(tool: Mapping[str, JsonValue], at: str) -> JsonValue:
    """A tool of the agent's own as a function; those that Anthropic runs or trained, this model cannot know."""
    if not isinstance(tool.get("name"), str):
        raise InvalidRequest(f"{at}.name: expected a string, got {kind_of(tool.get('name'))}")
    if not isinstance(tool.get("input_schema"), dict):
        raise InvalidRequest(
            f"{at}.input_schema: expected an object, got {kind_of(tool.get('input_schema'))}; a tool of type "
            f"{tool.get('type')!r} has to be described to this model"
        )
    function: dict[str, JsonValue] = {"name": tool["name"]}
    if tool.get("description") is not None:
        function["description"] = tool["description"]
    function["parameters"] = tool["input_schema"]
    unknown = {name: value for name, value in tool.items() if name not in _TOOL_KEYS}
    return {"type": "function", "function": function | unknown}


def _tool_choice(fields: Mapping[str, JsonValue], tools: Sequence[JsonValue]) -> dict[str, JsonValue]:
    choice = _object(fields, "tool_choice")
    if not choice:
        return {}
    kind, name = choice.get("type"), choice.get("name")
    if kind == "tool":
        if name not in [tool["function"]["name"] for tool in tools]:
            raise InvalidRequest(f"tool_choice.name: {name!r} is none of the tools")
        chosen: JsonValue = {"type": "function", "function": {"name": name}}
    elif isinstance(kind, str) and kind in _TOOL_CHOICES:
        chosen = _TOOL_CHOICES[kind]
    else:
        raise InvalidRequest(f"tool_choice.type: {kind!r} is none of {', '.join((*_TOOL_CHOICES, 'tool'))}")
    with inside("tool_choice"):
        one_call = {"parallel_tool_calls": False} if flag(choice, "disable_parallel_tool_use") else {}
    return {"tool_choice": chosen, **one_call}


def _output(output: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Effort and format; what else there is goes on to the engine."""
    chat: dict[str, JsonValue] = {}
    with inside("output_config"):
        if (effort := optional(output, "effort", str)) is not None:
            chat["reasoning_effort"] = effort
    if layout := _object(output, "format", path="output_config.format"):
        if layout.get("type") != "json_schema" or "schema" not in layout:
            raise InvalidRequest("output_config.format: expected type json_schema and a schema")
        chat["response_format"] = {"type": "json_schema", "json_schema": {"name": "output", "schema": layout["schema"]}}
    unknown = {name: value for name, value in output.items() if name not in ("effort", "format")}
    return chat | ({"output_config": unknown} if unknown else {})


def _stop(fields: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    stops = fields.get("stop_sequences")
    if stops is None:
        return {}
    if not isinstance(stops, list) or not all(isinstance(text, str) for text in stops):
        raise InvalidRequest("stop_sequences: expected a list of strings")
    return {"stop": stops}


def _thinking(thinking: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    if not thinking:
        return {}
    kind = thinking.get("type")
    if not isinstance(kind, str) or kind not in _THINKING:
        raise InvalidRequest(f"thinking.type: {kind!r} is none of {', '.join(_THINKING)}")
    return {} if _THINKING[kind] is None else {"enable_thinking": _THINKING[kind]}


def _object(fields: Mapping[str, JsonValue], name: str, *, path: str = "") -> Mapping[str, JsonValue]:
    """An object, {} where absent or null."""
    value = fields.get(name)
    if not isinstance(value, dict | None):
        raise InvalidRequest(f"{path or name}: expected an object, got {kind_of(value)}")
    return value or {}
