"""Frames: a certified suffix as fixed text around the new messages' own texts, so that no template need be rendered.

A frame is learned from one short render with made-up texts, and kept only if it says what the template says for many
other ones: long and short, with space at their edges, with quotes, markup and code. It does not speak for a text that
is equal to a string in the template's source, or holds one that the template searches for: there a template may do
something else. All that is evidence and no proof; the audit of short paths (`prompt`) holds frames against the long
way, as it does with the certificate that they belong to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

from gateway.contracts.generation import JsonValue
from gateway.tito.certificate import ShapeKey, stand_in_tools
from gateway.tito.conversation import Conversation
from gateway.tito.junction import local_suffix
from gateway.tito.shapes import ContentKind, MessageForm, conversations
from gateway.tito.template import ChatTemplate

TextPath = tuple[str | int, ...]
"""Where a text is found in a value: ("content", 0, "text")."""

_LEARNED_FROM = ' \n  Frame{n}q says "a\\b"\n<i>{n}</i>  \n\n'
_TRIED = (
    "Plain words {n}.",
    "{n}",
    "x",
    "\n\n\tlead {n} and trail \t\r\n",
    "a{n}\n\nb\r\n  c\n",
    '{{"k": [{n}, null], "s": "a\\"b\\\\"}}',
    "<b>{n} < 2 && 3 > 1</b>",
    "\u00a0Ünï{n} 🙂\u200d漢字 e\u0301\u00a0",
    "true",
    "0",
    "None {n}",
    "[{n}]",
    "'single' `code` {n}\\n &amp; &lt;",
    "%s {{}} {{{{x}}}} {n} {{% if %}}",
    "# Title {n}\n- item\n\n```python\nprint({n})\n```",
    "word {n} " * 4_000,
    "line {n}\n" * 1_000,
    "error: failed {n}",
)
"""Texts that a frame must hold for; `{n}` is another number in each message."""

NUM_TRIED = len(_TRIED)


class _Form(Enum):
    """How a text stands in the suffix."""

    AS_IS = "as_is"
    STRIPPED = "stripped"
    AS_JSON = "as_json"

    def shown(self, text: str) -> str:
        if self is _Form.AS_IS:
            return text
        return text.strip() if self is _Form.STRIPPED else json.dumps(text, ensure_ascii=False)[1:-1]


class _Slot(NamedTuple):
    """Where the text that stands here is found in the reply and the messages behind it: (1, "content")."""

    path: TextPath
    form: _Form


@dataclass(frozen=True, slots=True)
class Frame:
    """Fixed texts and slots, in order. spoken: strings of the template, for which a frame does not speak."""

    pieces: tuple[str | _Slot, ...]
    spoken: frozenset[str]
    searched: tuple[str, ...]

    def fill(self, messages: Sequence[JsonValue]) -> str | None:
        """The suffix for these, the reply and what was appended; None where a text is one that the template names."""
        parts: list[Any] = [*self.pieces]
        for i, piece in enumerate(self.pieces):
            if type(piece) is not _Slot:
                continue
            path, form = piece
            text: JsonValue = messages
            for step in path:
                text = text[step]
            if text.strip().lower() in self.spoken:
                return None
            for part in self.searched:
                if part in text:
                    return None
            parts[i] = text if form is _Form.AS_IS else form.shown(text)
        return "".join(parts)


def learn_frame(template: ChatTemplate, key: ShapeKey, arguments: Mapping[str, JsonValue], stop: str) -> Frame | None:
    """The frame of a certified shape, None if its suffix is none; some 20 short renders. stop: its certificate's."""
    shape = key.shape
    if not shape.appended or not all(map(_is_plain, shape.appended)):
        return None
    conversation, num_messages = next(conversations(shape, arguments))
    reply = conversation.messages[num_messages - 1]
    messages = (reply, *conversation.messages[num_messages:])
    leaves = tuple(_leaves(messages))

    def suffix_of(messages: Sequence[JsonValue]) -> str | None:
        made = Conversation((*conversation.messages[: num_messages - 1], *messages), conversation.tools, arguments)
        tools = stand_in_tools(conversation)
        return local_suffix(template, made, num_messages=num_messages, stop=stop, tools=tools)

    return fitted_frame(template, messages, leaves, suffix_of)


def fitted_frame(
    template: ChatTemplate,
    messages: Sequence[JsonValue],
    leaves: Sequence[tuple[TextPath, str]],
    shown: Callable[[Sequence[JsonValue]], str | None],
) -> Frame | None:
    """The frame of what a template shows of some messages, learned from one set of texts and tried on many others.

    None where there is none. leaves: where texts stand in `messages`, and which. shown: None where nothing is shown.
    """

    def messages_with(texts: Sequence[str]) -> Sequence[JsonValue]:
        changed: Sequence[JsonValue] = list(messages)
        for (path, _), text in zip(leaves, texts, strict=True):
            changed = with_text(changed, path, text)
        return changed

    texts = [_text_for(path, _LEARNED_FROM, n) for n, (path, _) in enumerate(leaves)]
    learned = shown(messages_with(_with_same_ids(leaves, texts)))
    if learned is None:
        return None
    pieces = _pieces(learned, {path: text for (path, _), text in zip(leaves, texts, strict=True)})
    # What stands in the fixed part may be a date.
    if template.tells_time and any(isinstance(piece, str) and re.search(r"\d", piece) for piece in pieces):
        return None
    frame = Frame(pieces, frozenset(), ())
    for i in range(NUM_TRIED):
        tried = [_text_for(path, _TRIED[(i + n) % NUM_TRIED], 10 * n + i) for n, (path, _) in enumerate(leaves)]
        made = messages_with(_with_same_ids(leaves, tried))
        if frame.fill(made) != shown(made):
            return None
    return Frame(pieces, template.strings, template.searched)


def _is_plain(form: MessageForm) -> bool:
    """A message whose text may be anything that is not blank, or that has none."""
    return form.content is not ContentKind.BLANK and not form.reasoning and not form.num_calls


def _leaves(messages: Sequence[JsonValue]) -> Iterator[tuple[TextPath, str]]:
    """Paths and values of what a suffix may show: names and ids of the reply's calls, and what was appended."""
    for i, call in enumerate(messages[0].get("tool_calls") or ()):
        yield (0, "tool_calls", i, "id"), call["id"]
        yield (0, "tool_calls", i, "function", "name"), call["function"]["name"]
    for i, message in enumerate(messages[1:], start=1):
        content = message.get("content")
        if isinstance(content, list):
            yield (i, "content", 0, "text"), content[0]["text"]
        elif content:
            yield (i, "content"), content
        for key in ("tool_call_id", "name"):
            if message.get(key):
                yield (i, key), message[key]


def _text_for(path: TextPath, pattern: str, number: int) -> str:
    """Ids as every template takes them; names of various lengths."""
    if path[-1] in ("id", "tool_call_id"):
        return f"q{number:08}"
    if path[-1] == "name":
        return "get_" * (number % 3) + f"name{number}q"
    return pattern.format(n=number)


def _with_same_ids(leaves: Sequence[tuple[TextPath, str]], texts: Sequence[str]) -> list[str]:
    """Results name the calls that they named: one id stays one id."""
    by_id: dict[str, str] = {}
    same: list[str] = []
    for (path, value), text in zip(leaves, texts, strict=True):
        same.append(by_id.setdefault(value, text) if path[-1] in ("id", "tool_call_id") else text)
    return same


def with_text(value: Any, path: TextPath, text: str) -> Any:
    """`value` with another text at `path`."""
    if not path:
        return text
    step, rest = path[0], path[1:]
    if isinstance(value, list):
        return [with_text(entry, rest, text) if i == step else entry for i, entry in enumerate(value)]
    return {**value, step: with_text(value[step], rest, text)}


def _pieces(suffix: str, texts: Mapping[TextPath, str]) -> tuple[str | _Slot, ...]:
    """Fixed texts and slots; the form that explains most of the suffix is taken."""
    slots: dict[str, _Slot] = {}
    for path, text in texts.items():
        for form in _Form:
            slots.setdefault(form.shown(text), _Slot(path, form))
    longest_first = sorted(slots, key=len, reverse=True)
    pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if slots else None
    split = pattern.split(suffix) if pattern is not None else [suffix]
    return tuple(slots.get(piece, piece) for piece in split if piece)
