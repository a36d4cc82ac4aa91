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

_KNOWN_KEYS = frozenset(("role", "content", "tool_calls", "tool_call_id", "name", *REASONING_KEYS))
_ROLES = frozenset(("system", "developer", "user", "assistant", "tool"))
_BEFORE_ROLES = frozenset(("user", "tool", "assistant"))
_UNKNOWN_CALL = -1


class ContentKind(StrEnum):
    """What a message's `content` is."""

    ABSENT = "absent"
    EMPTY = "empty"
    BLANK = "blank"
    TEXT = "text"
    PARTS = "parts"


class MessageForm(NamedTuple):
    """One message without its texts. answers: position of the sampled call whose result it is, -1 for another one's,
    None if it names none."""

    role: str
    content: ContentKind = ContentKind.TEXT
    reasoning: bool = False
    num_calls: int = 0
    answers: int | None = None
    named: bool = False

    @property
    def parts(self) -> str:
        """What it consists of: "reasoning, text, 2 calls"."""
        parts = ["reasoning"] if self.reasoning else []
        parts += [self.content.value] if self.content is not ContentKind.ABSENT else []
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


def shape_of(conversation: Conversation, num_messages: int, *, template_source: str) -> Shape | None:
    """The shape of a turn whose sampled reply is message `num_messages - 1`; None where no certificate can speak.

    That is: roles, contents or keys (which the template names) that this page does not know; too many messages.
    """
    messages = conversation.messages
    appended = messages[num_messages:]
    if num_messages < 2 or len(appended) > MAX_APPENDED:
        return None
    first, before, reply = messages[0], messages[num_messages - 2], messages[num_messages - 1]
    if not isinstance(first, dict) or not isinstance(before, dict) or before.get("role") not in _BEFORE_ROLES:
        return None
    reply_form = _form_of(reply, (), template_source)
    if reply_form is None or not isinstance(reply, dict):
        return None
    call_ids = [call.get("id") if isinstance(call, dict) else None for call in reply.get("tool_calls") or ()]
    forms: list[MessageForm] = []
    for message in appended:
        form = _form_of(message, call_ids, template_source)
        if form is None:
            return None
        forms.append(form)
    return Shape(
        starts_with_system=first.get("role") in ("system", "developer"),
        has_tools=bool(conversation.tools),
        before=str(before["role"]),
        reply=reply_form,
        appended=tuple(forms),
    )


def conversations(shape: Shape, arguments: Mapping[str, JsonValue]) -> Iterator[tuple[Conversation, int]]:
    """Conversations of this shape in several contexts and fillings, each with the number of messages to its reply."""
    for filling in FILLINGS:
        for context in _CONTEXTS[shape.before]:
            writer = _Writer(filling)
            messages = [writer.message(MessageForm("system"))] if shape.starts_with_system else []
            for word in context:
                messages += writer.past(word)
            messages.append(writer.message(shape.reply))
            num_messages = len(messages)
            messages += [writer.message(form) for form in shape.appended]
            tools = example_tools(filling.num_tools) if shape.has_tools else ()
            yield Conversation(tuple(messages), tools, arguments), num_messages


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


class _Writer:
    """Writes messages of given forms with texts that differ everywhere."""

    def __init__(self, filling: Filling) -> None:
        self._filling = filling
        self._num_texts = 0
        self._call_ids: list[str] = []
        self._num_calls = 0

    def past(self, word: str) -> list[JsonValue]:
        """Messages of a context."""
        reasoning = self._filling.past_reasoning
        if word == "user":
            return [self.message(MessageForm("user"))]
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
            message["content"] = [{"type": "text", "text": self._text()}]
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


def _form_of(message: JsonValue, call_ids: Sequence[JsonValue], template_source: str) -> MessageForm | None:
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        return None
    if not message.keys() <= _KNOWN_KEYS and any(str(key) in template_source for key in message.keys() - _KNOWN_KEYS):
        return None  # the template may read it
    content, calls = _content_kind(message.get("content")), message.get("tool_calls")
    if content is None or not (calls is None or (isinstance(calls, list) and all(map(_is_plain_call, calls)))):
        return None
    reasons = False
    for key in REASONING_KEYS:
        if text := message.get(key):
            if not isinstance(text, str):
                return None
            reasons = True
    call_id = message.get("tool_call_id")
    return MessageForm(
        message["role"],
        content,
        reasons,
        len(calls) if calls else 0,
        None if call_id is None else _position(call_ids, call_id),
        isinstance(message.get("name"), str),
    )


def _position(call_ids: Sequence[JsonValue], call_id: JsonValue) -> int:
    return call_ids.index(call_id) if call_id in call_ids else _UNKNOWN_CALL


def _content_kind(content: JsonValue) -> ContentKind | None:
    if content is None:
        return ContentKind.ABSENT
    if isinstance(content, str):
        if content.isspace():
            return ContentKind.BLANK
        return ContentKind.TEXT if content else ContentKind.EMPTY
    is_one_text = (
        isinstance(content, list)
        and len(content) == 1
        and isinstance(content[0], dict)
        and content[0].get("type") == "text"
        and isinstance(content[0].get("text"), str)
        and bool(content[0]["text"].strip())
    )
    return ContentKind.PARTS if is_one_text else None


def _is_plain_call(call: JsonValue) -> bool:
    """A call with a name and arguments that are the JSON text of an object."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return False
    arguments = function.get("arguments")
    return isinstance(arguments, str) and arguments.lstrip().startswith("{")
