"""Frames: a certified suffix as fixed text around the new messages' own texts, so that no template need be rendered.

A frame is learned from one short render with made-up texts, and kept only if it says what the template says for many
other ones: long and short, with space at their edges, with quotes, markup and code. It does not speak for a text that
is equal to a string in the template's source, or holds one that the template searches for: there a template may do
something else. Where numbers in the suffix change with what lies before, it is tried which of its counts (messages,
replies, calls, …) they follow; such a frame counts the history instead of rendering it. All that is evidence and no
proof; the audit of short paths (`prompt`) holds frames against the long way, as it does with the certificate that they
belong to.
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
from gateway.tito.shapes import ContentKind, MessageForm, Shape, conversations, histories
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

_NUMBER = re.compile(r"(\d+)")
_FEWEST_HISTORIES = 4
"""By fewer a number may follow a count by chance."""


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


class Counts(NamedTuple):
    """What a history has of each."""

    messages: int
    users: int
    replies: int
    results: int
    calls: int


class _Number(NamedTuple):
    """A number that is one of the counts, plus something: `differences` is by count, None for those that it is not.

    Where it could be several, these have never differed; it is known only where they agree.
    """

    differences: tuple[int | None, ...]

    def shown(self, counts: Counts) -> str | None:
        values = {count + more for count, more in zip(counts, self.differences, strict=True) if more is not None}
        return str(values.pop()) if len(values) == 1 else None


_Piece = str | _Slot | _Number


@dataclass(frozen=True, slots=True)
class Frame:
    """Fixed texts, slots and numbers, in order. spoken: strings of the template, for which a frame does not speak.

    is_numbered: whether there are numbers, for which `fill` needs counts.
    """

    pieces: tuple[_Piece, ...]
    spoken: frozenset[str]
    searched: tuple[str, ...]
    is_numbered: bool = False

    def fill(self, messages: Sequence[JsonValue], counts: Counts | None = None) -> str | None:
        """The suffix for these, the reply and what was appended; None where a text is one that the template names.

        counts: of what lies before, for a frame that is numbered; it is None where they do not tell a number.
        """
        parts: list[Any] = [*self.pieces]
        for i, piece in enumerate(self.pieces):
            if type(piece) is _Slot:
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
            elif type(piece) is _Number:
                parts[i] = None if counts is None else piece.shown(counts)
                if parts[i] is None:
                    return None
        return "".join(parts)


def counts_of(history: Sequence[JsonValue]) -> Counts | None:
    """None where a template may count otherwise: other roles, systems but the first, calls that are no list."""
    users = replies = results = calls = 0
    for i, message in enumerate(history):
        role = message.get("role") if type(message) is dict else None
        if role == "tool":
            results += 1
        elif role == "assistant":
            replies += 1
            called = message.get("tool_calls")
            if called:
                if type(called) is not list:
                    return None
                calls += len(called)
        elif role == "user":
            users += 1
        elif role != "system" or i > 0:
            return None
    return Counts(len(history), users, replies, results, calls)


def learn_frame(template: ChatTemplate, key: ShapeKey, arguments: Mapping[str, JsonValue], stop: str) -> Frame | None:
    """The frame of a certified shape, None if its suffix is none; some 30 short renders. stop: its certificate's."""
    shape = key.shape
    if not shape.appended or not all(map(_is_plain, shape.appended)):
        return None
    conversation, num_messages = next(conversations(shape, arguments))
    reply = conversation.messages[num_messages - 1]
    messages = (reply, *conversation.messages[num_messages:])
    leaves = tuple(_leaves(messages))
    tools = stand_in_tools(conversation)

    def suffix_of(messages: Sequence[JsonValue], history: Sequence[JsonValue] | None = None) -> str | None:
        made = Conversation((*conversation.messages[: num_messages - 1], *messages), conversation.tools, arguments)
        return local_suffix(template, made, num_messages=num_messages, stop=stop, tools=tools, history=history)

    frame = fitted_frame(template, messages, leaves, suffix_of)
    if frame is None:
        return None
    made, texts = _learned_from(messages, leaves)
    seen: list[tuple[Counts, tuple[_Piece, ...]]] = []
    for history in histories(shape):
        counts, suffix = counts_of(history), suffix_of(made, history)
        if counts is not None and suffix is not None:
            seen.append((counts, _pieces(suffix, texts)))
    if any(pieces != frame.pieces for _, pieces in seen):
        numbered = _numbered(seen)
        if numbered is None:
            return None
        frame = Frame(numbered, frame.spoken, frame.searched, is_numbered=True)
    return frame if _holds_in_context(frame, template, shape, arguments, stop) else None


def _numbered(seen: Sequence[tuple[Counts, tuple[_Piece, ...]]]) -> tuple[_Piece, ...] | None:
    """Pieces of a suffix behind different histories as one, with numbers for what changes; None if more does."""
    if len(seen) < _FEWEST_HISTORIES or len({len(pieces) for _, pieces in seen}) > 1:
        return None
    merged: list[_Piece] = []
    for alternatives in zip(*(pieces for _, pieces in seen), strict=True):
        if len(set(alternatives)) == 1:
            merged.append(alternatives[0])
            continue
        texts = [_NUMBER.split(piece) for piece in alternatives if isinstance(piece, str)]
        if len(texts) < len(seen) or len({len(parts) for parts in texts}) > 1:
            return None
        for parts in zip(*texts, strict=True):
            if len(set(parts)) == 1:
                merged += [parts[0]] if parts[0] else []
                continue
            number = _number([counts for counts, _ in seen], parts)
            if number is None:
                return None
            merged.append(number)
    return tuple(merged)


def _number(counts: Sequence[Counts], shown: Sequence[str]) -> _Number | None:
    """The counts that these numbers follow, None if they follow none."""
    if any(not text.isdecimal() or text != str(int(text)) for text in shown):
        return None
    differences: list[int | None] = []
    for column in zip(*counts, strict=True):
        more = {int(text) - count for text, count in zip(shown, column, strict=True)}
        differences.append(more.pop() if len(more) == 1 else None)
    return None if set(differences) == {None} else _Number(tuple(differences))


def _holds_in_context(
    frame: Frame, template: ChatTemplate, shape: Shape, arguments: Mapping[str, JsonValue], stop: str
) -> bool:
    """Whether a frame says what the template says in all conversations that its certificate was tried on, as far as it
    speaks for their texts; one that is numbered has to for some."""
    num_held = 0
    for conversation, num_messages in conversations(shape, arguments):
        history, messages = conversation.messages[: num_messages - 1], conversation.messages[num_messages - 1 :]
        filled = frame.fill(messages, counts_of(history))
        if filled is None:
            continue
        tools = stand_in_tools(conversation)
        shown = local_suffix(template, conversation, num_messages=num_messages, stop=stop, tools=tools, history=history)
        if shown is not None and filled != shown:
            return False
        num_held += shown is not None
    return num_held > 0 or not frame.is_numbered


def fitted_frame(
    template: ChatTemplate,
    messages: Sequence[JsonValue],
    leaves: Sequence[tuple[TextPath, str]],
    shown: Callable[[Sequence[JsonValue]], str | None],
) -> Frame | None:
    """The frame of what a template shows of some messages, learned from one set of texts and tried on many others.

    None where there is none. leaves: where texts stand in `messages`, and which. shown: None where nothing is shown.
    """

    made, texts = _learned_from(messages, leaves)
    learned = shown(made)
    if learned is None:
        return None
    pieces = _pieces(learned, texts)
    # What stands in the fixed part may be a date.
    if template.tells_time and any(isinstance(piece, str) and re.search(r"\d", piece) for piece in pieces):
        return None
    frame = Frame(pieces, frozenset(), ())
    for i in range(NUM_TRIED):
        tried = [_text_for(path, _TRIED[(i + n) % NUM_TRIED], 10 * n + i) for n, (path, _) in enumerate(leaves)]
        made = _messages_with(messages, leaves, tried)
        if frame.fill(made) != shown(made):
            return None
    return Frame(pieces, template.strings, template.searched)


def _learned_from(
    messages: Sequence[JsonValue], leaves: Sequence[tuple[TextPath, str]]
) -> tuple[Sequence[JsonValue], dict[TextPath, str]]:
    """The messages with the texts that a frame is learned from, and which stands where."""
    texts = [_text_for(path, _LEARNED_FROM, n) for n, (path, _) in enumerate(leaves)]
    return _messages_with(messages, leaves, texts), {path: text for (path, _), text in zip(leaves, texts, strict=True)}


def _messages_with(
    messages: Sequence[JsonValue], leaves: Sequence[tuple[TextPath, str]], texts: Sequence[str]
) -> Sequence[JsonValue]:
    changed: Sequence[JsonValue] = list(messages)
    for (path, _), text in zip(leaves, _with_same_ids(leaves, texts), strict=True):
        changed = with_text(changed, path, text)
    return changed


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
            for k, part in enumerate(content):
                yield (i, "content", k, "text"), part["text"]
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


def _pieces(suffix: str, texts: Mapping[TextPath, str]) -> tuple[_Piece, ...]:
    """Fixed texts and slots; the form that explains most of the suffix is taken."""
    slots: dict[str, _Slot] = {}
    for path, text in texts.items():
        for form in _Form:
            slots.setdefault(form.shown(text), _Slot(path, form))
    longest_first = sorted(slots, key=len, reverse=True)
    pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if slots else None
    split = pattern.split(suffix) if pattern is not None else [suffix]
    return tuple(slots.get(piece, piece) for piece in split if piece)
