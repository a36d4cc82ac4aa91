"""Shapes of a turn: what a chat template could branch on, without the texts; and conversations made to a shape.

A shape says what the sampled reply looked like and what was appended behind it. Conversations with made-up texts of
that shape, in several contexts, are what a certificate is tried on (`certificate`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from gateway.contracts.generation import JsonValue
from gateway.tito.conversation import Conversation
from gateway.tito.template import REASONING_KEYS

MAX_APPENDED = 12
"""Turns that append more messages are rare; each is certified by itself."""

_MAX_PARTS = 8

_KNOWN_KEYS = frozenset(("role", "content", "tool_calls", "tool_call_id", "name", *REASONING_KEYS))
_ROLES = frozenset(("system", "developer", "user", "assistant", "tool"))
_SYSTEMS = ("system", "developer")
_BEFORE_ROLES = frozenset(("user", "tool", "assistant"))
_UNKNOWN_CALL = -1


class ContentKind(StrEnum):
    """What a message's `content` is."""

    ABSENT = "absent"
    EMPTY = "empty"
    BLANK = "blank"
    TEXT = "text"
    PARTS = "parts"


_ABSENT, _EMPTY, _BLANK, _TEXT, _PARTS = ContentKind  # an enum's own names are slow to read


class MessageForm(NamedTuple):
    """One message without its texts. answers: position of the sampled call whose result it is, -1 for another one's,
    None if it names none. num_parts: of text, where the content consists of such."""

    role: str
    content: ContentKind = ContentKind.TEXT
    reasoning: bool = False
    num_calls: int = 0
    answers: int | None = None
    named: bool = False
    num_parts: int = 1

    @property
    def parts(self) -> str:
        """What it consists of: "reasoning, text, 2 calls"."""
        parts = ["reasoning"] if self.reasoning else []
        content = f"{self.num_parts} parts" if self.num_parts > 1 else self.content.value
        parts += [content] if self.content is not ContentKind.ABSENT else []
        parts += [f"{self.num_calls} calls" if self.num_calls > 1 else "call"] if self.num_calls else []
        return ", ".join(parts) or "nothing"

    def __str__(self) -> str:
        if self.role == "tool" and self.answers is not None:
            return f"tool {self.answers + 1}"
        is_plain = self == MessageForm(self.role)
        return self.role if is_plain else f"{self.role} ({self.parts})"


class Shape(NamedTuple):
    """A sampled reply and what follows it. before: role of the message that the reply answers."""

    starts_with_system: bool
    has_tools: bool
    before: str
    reply: MessageForm
    appended: tuple[MessageForm, ...]

    def __str__(self) -> str:
        return f"after {self.before}: {self.reply.parts} > {self.follows}"

    @property
    def follows(self) -> str:
        """What was appended: "tool 1, tool 2, user"."""
        return ", ".join(map(str, self.appended))


@dataclass(frozen=True, slots=True)
class Filling:
    """Texts for the messages of a shape: `text.format(n)`, whether past replies had reasoning, how many tools."""

    text: str
    past_reasoning: bool
    num_tools: int
    blank: str = " "


FILLINGS = (
    Filling("Word{0} answers it.", past_reasoning=True, num_tools=2),
    Filling("  \n Wörd{0}: <b>1 < 2</b>\nnext line \n", past_reasoning=False, num_tools=1, blank="\n"),
    Filling('{{"k{0}": [1, null]}}', past_reasoning=True, num_tools=1),
)


_Fields = tuple[str, ContentKind, bool, int, int | None, bool, int]
"""Of a `MessageForm`, in its order."""

Sketch = tuple[bool, bool, str, _Fields, tuple[_Fields, ...]]
"""Of a `Shape`, in its order: what tells shapes apart, told without making one."""


def shape_of(conversation: Conversation, num_messages: int, *, template_source: str) -> Shape | None:
    """The shape of a turn, where `sketch_of` has a sketch of it."""
    sketch = sketch_of(conversation, num_messages, template_source=template_source)
    return None if sketch is None else sketched_shape(sketch)


def sketched_shape(sketch: Sketch) -> Shape:
    """The shape that was sketched."""
    starts_with_system, has_tools, before, reply, appended = sketch
    forms = tuple(MessageForm(*fields) for fields in appended)
    return Shape(starts_with_system, has_tools, before, MessageForm(*reply), forms)


def sketch_of(conversation: Conversation, num_messages: int, *, template_source: str) -> Sketch | None:
    """A turn whose sampled reply is message `num_messages - 1`; None where no certificate can speak.

    That is: roles, contents or keys (which the template names) that this page does not know; too many messages.
    """
    messages = conversation.messages
    if num_messages < 2 or len(messages) - num_messages > MAX_APPENDED:
        return None
    first, before, reply = messages[0], messages[num_messages - 2], messages[num_messages - 1]
    if type(first) is not dict or type(before) is not dict or (role := before.get("role")) not in _BEFORE_ROLES:
        return None
    reply_fields = _fields_of(reply, (), template_source)
    if reply_fields is None:
        return None
    calls = reply.get("tool_calls") or ()
    appended: list[_Fields] = []
    for message in messages[num_messages:]:
        fields = _fields_of(message, calls, template_source)
        if fields is None:
            return None
        appended.append(fields)
    starts_with_system = first.get("role") in _SYSTEMS
    return starts_with_system, bool(conversation.tools), role, reply_fields, tuple(appended)


def conversations(shape: Shape, arguments: Mapping[str, JsonValue]) -> Iterator[tuple[Conversation, int]]:
    """Conversations of this shape in several contexts and fillings, each with the number of messages to its reply."""
    for filling in FILLINGS:
        for context in _CONTEXTS[shape.before]:
            yield _written(shape, context, filling, arguments)


def _written(
    shape: Shape, context: Sequence[str], filling: Filling, arguments: Mapping[str, JsonValue]
) -> tuple[Conversation, int]:
    writer = _Writer(filling)
    messages = [*writer.history(shape, context), writer.message(shape.reply)]
    num_messages = len(messages)
    messages += [writer.message(form) for form in shape.appended]
    tools = example_tools(filling.num_tools) if shape.has_tools else ()
    return Conversation(tuple(messages), tools, arguments), num_messages


def conversations_behind_systems(
    shape: Shape, arguments: Mapping[str, JsonValue]
) -> Iterator[tuple[Conversation, int]]:
    """The same with a system's or a developer's words in the middle of what lies before the reply."""
    for role in _SYSTEMS:
        for context in _CONTEXTS[shape.before]:
            last_user = max(i for i, word in enumerate(context) if word == "user")
            at = last_user or 1  # not in front of all, where they are the system message
            if at < len(context):
                yield _written(shape, (*context[:at], role, *context[at:]), FILLINGS[0], arguments)


def follows_systems(messages: Sequence[JsonValue]) -> bool:
    """Whether a system or a developer speaks in these messages behind the first."""
    return any(type(message) is dict and message.get("role") in _SYSTEMS for message in messages[1:])


def histories(shape: Shape) -> Iterator[tuple[JsonValue, ...]]:
    """What may stand before a reply of this shape, if a user's message does: as little as possible first, then more of
    each kind of message, so that what a template counts can be told from how its numbers change."""
    for context in _COUNTED:
        yield tuple(_Writer(FILLINGS[0]).history(shape, (*context, "user")))


def example_tools(count: int) -> tuple[JsonValue, ...]:
    """`count` tool definitions."""
    return tuple(
        {
            "type": "function",
            "function": {
                "name": f"probe{i}" if i else "probe",
                "description": f"Tool {i}.",
                "parameters": {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]},
            },
        }
        for i in range(count)
    )


def standard_shapes(*, starts_with_system: bool = True, has_tools: bool = True) -> tuple[Shape, ...]:
    """The grid that is certified at start-up and shown by `verbatim doctor`."""
    text, user, tool = ContentKind.TEXT, MessageForm("user"), MessageForm("tool", answers=0)
    thought_text = MessageForm("assistant", text, reasoning=True)
    plain_text = MessageForm("assistant", text)
    assistant = MessageForm("assistant", text)
    call = MessageForm("assistant", ContentKind.ABSENT, num_calls=1)
    thought_call = MessageForm("assistant", ContentKind.ABSENT, reasoning=True, num_calls=1)
    said_call = MessageForm("assistant", text, num_calls=1)
    two_calls = MessageForm("assistant", ContentKind.ABSENT, num_calls=2)
    second = MessageForm("tool", answers=1)
    system, developer = MessageForm("system"), MessageForm("developer")
    after_text = [(user,), (assistant, user), (system, user), (developer, user), (user, user)]
    after_call = [(tool,), (tool, user), (user,), (assistant, tool), (tool, system)]
    after_two = [(tool, second), (second, tool), (tool,), (tool, second, user)]
    pairs = [(reply, appended) for reply in (plain_text, thought_text) for appended in after_text]
    if has_tools:
        pairs += [(reply, appended) for reply in (call, thought_call, said_call) for appended in after_call]
        pairs += [(two_calls, appended) for appended in after_two]
    return tuple(
        Shape(starts_with_system, has_tools, before, reply, appended)
        for reply, appended in pairs
        for before in (("user", "tool") if has_tools else ("user",))
    )


_CONTEXTS: Mapping[str, Sequence[Sequence[str]]] = {
    "user": (
        ("user",),
        ("user", "text", "user"),
        ("user", "call", "text", "user"),
        ("user", "text", "user", "call", "call2", "text", "user"),
    ),
    "tool": (
        ("user", "call"),
        ("user", "call", "call"),
        ("user", "text", "user", "call2"),
        ("user", "call", "text", "user", "call2", "call"),
    ),
    "assistant": (("user", "text"), ("user", "call", "text", "user", "text"), ("user", "call", "text")),
}
"""What may stand before a reply, by the role right before it; `call` is a call and its result."""

_COUNTED: Sequence[Sequence[str]] = (
    (),
    ("user", "text"),
    ("user", "text", "user", "text", "user", "text"),
    ("user", "call", "text"),
    ("user", "call2", "text"),
    ("user", "call", "call", "call2", "text", "user", "text"),
)


class _Writer:
    """Writes messages of given forms with texts that differ everywhere."""

    def __init__(self, filling: Filling) -> None:
        self._filling = filling
        self._num_texts = 0
        self._call_ids: list[str] = []
        self._num_calls = 0

    def history(self, shape: Shape, context: Sequence[str]) -> list[JsonValue]:
        """What stands before a shape's reply."""
        messages = [self.message(MessageForm("system"))] if shape.starts_with_system else []
        for word in context:
            messages += self.past(word)
        return messages

    def past(self, word: str) -> list[JsonValue]:
        """Messages of a context's word."""
        reasoning = self._filling.past_reasoning
        if word == "user" or word in _SYSTEMS:
            return [self.message(MessageForm(word))]
        if word == "text":
            return [self.message(MessageForm("assistant", reasoning=reasoning))]
        num_calls = 2 if word == "call2" else 1
        call = MessageForm("assistant", ContentKind.ABSENT, reasoning=reasoning, num_calls=num_calls)
        results = [MessageForm("tool", answers=i) for i in range(num_calls)]
        return [self.message(form) for form in (call, *results)]

    def message(self, form: MessageForm) -> JsonValue:
        message: dict[str, JsonValue] = {"role": form.role}
        if form.reasoning:
            message["reasoning_content"] = f"Thought {self._text()}"
        if form.content is ContentKind.TEXT:
            message["content"] = self._text()
        elif form.content is ContentKind.EMPTY:
            message["content"] = ""
        elif form.content is ContentKind.BLANK:
            message["content"] = self._filling.blank
        elif form.content is ContentKind.PARTS:
            message["content"] = [{"type": "text", "text": self._text()} for _ in range(form.num_parts)]
        if form.num_calls:
            message["tool_calls"] = self._calls(form.num_calls)
        if form.role == "tool" and form.answers is not None:
            known = 0 <= form.answers < len(self._call_ids)
            message["tool_call_id"] = self._call_ids[form.answers] if known else "call99999"
        if form.named:
            message["name"] = "probe"
        return message

    def _calls(self, count: int) -> list[JsonValue]:
        self._call_ids = [f"call{self._num_calls + i:05}" for i in range(count)]
        self._num_calls += count
        return [
            {
                "id": call_id,
                "type": "function",
                "function": {"name": "probe", "arguments": json.dumps({"key": self._text()}, ensure_ascii=False)},
            }
            for call_id in self._call_ids
        ]

    def _text(self) -> str:
        self._num_texts += 1
        return self._filling.text.format(self._num_texts)


def _fields_of(message: JsonValue, calls: Sequence[JsonValue], template_source: str) -> _Fields | None:
    """One message, in one pass over its keys. calls: of the sampled reply, whose results may follow."""
    if type(message) is not dict:
        return None
    role, content, reasoning, num_calls, answers, named, num_parts = None, _ABSENT, False, 0, None, False, 1
    for key, value in message.items():
        if key == "role":
            role = value
        elif value is None:
            if key not in _KNOWN_KEYS and key in template_source:
                return None
        elif key == "content":
            if type(value) is list:
                if not _are_texts(value, template_source):
                    return None
                content, num_parts = _PARTS, len(value)
            elif type(value) is str:
                content = _kind_of_text(value)
            else:
                return None
        elif key == "tool_calls":
            if type(value) is not list:
                return None
            for call in value:
                if not _is_plain_call(call):
                    return None
                num_calls += 1
        elif key == "tool_call_id":
            answers = _UNKNOWN_CALL
            for i, call in enumerate(calls):
                if call.get("id") == value:
                    answers = i
                    break
        elif key == "name":
            named = type(value) is str
        elif key in REASONING_KEYS:
            if value and type(value) is not str:
                return None
            reasoning = reasoning or bool(value)
        elif key in template_source:  # the template may read it
            return None
    return (role, content, reasoning, num_calls, answers, named, num_parts) if role in _ROLES else None


def _kind_of_text(text: str) -> ContentKind:
    if text.isspace():
        return _BLANK
    return _TEXT if text else _EMPTY


def _are_texts(parts: Sequence[JsonValue], template_source: str) -> bool:
    """Whether these are parts of text that say something, with nothing beside it that the template may read."""
    if not 0 < len(parts) <= _MAX_PARTS:
        return False
    for part in parts:
        if type(part) is not dict or part.get("type") != "text":
            return False
        text = part.get("text")
        if type(text) is not str or not text or text.isspace():
            return False
        if len(part) > 2 and any(key in template_source for key in part if key not in ("type", "text")):
            return False
    return True


def _is_plain_call(call: JsonValue) -> bool:
    """A call with a name and arguments that are the JSON text of an object."""
    function = call.get("function") if type(call) is dict else None
    if type(function) is not dict or type(function.get("name")) is not str:
        return False
    arguments = function.get("arguments")
    return type(arguments) is str and (arguments[:1] == "{" or arguments.lstrip()[:1] == "{")
