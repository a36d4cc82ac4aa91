"""What the template adds after a sampled turn, learned in context: the junction probe.

The real conversation is rendered with only the last assistant message replaced by a sentinel; behind the sentinel
stand the end of that turn (call syntax, stop token) and then exactly what the template adds for the new messages.
Each new message carries an invisible mark in the middle of its text, so that a message which the template drops, or
hoists to another place, is noticed. What comes out is certified against the full render of the real conversation:
it must end with the learned text. Nothing here knows any model family.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from gateway.contracts.errors import TemplateRaised
from gateway.contracts.generation import JsonValue
from gateway.contracts.records import SegmentReason
from gateway.tito.conversation import Conversation
from gateway.tito.lookalikes import Brackets, absent_characters
from gateway.tito.template import REASONING_KEYS, ChatTemplate

_WORDS = re.compile(r"(?:^|(?<=>))[^<]+")


@dataclass(frozen=True, slots=True)
class Junction:
    """`stop`: text of the token that ends the sampled turn where more follows. `suffix`: what is added behind it.

    `is_engine_stop`: whether sampling ends at that token; else only the template's history has it there.
    """

    stop: str
    suffix: str
    is_engine_stop: bool


@dataclass(frozen=True, slots=True)
class TurnTokens:
    """Texts of added tokens: `stops` end sampling, `special` are all control tokens. `brackets` stand around what is
    none of them but only looks it."""

    stops: tuple[str, ...]
    special: tuple[str, ...]
    brackets: Brackets | None


def learn_junction(
    template: ChatTemplate, conversation: Conversation, *, num_messages: int, full_text: str, tokens: TurnTokens
) -> Junction | SegmentReason:
    """What follows the turn whose reply is message `num_messages - 1`, or why that cannot be certified.

    full_text: the template's render of `conversation` with the generation prompt. Never raises TemplateRaised.
    """
    sentinel = _sentinel(full_text)
    marks = absent_characters(full_text, len(conversation.messages) - num_messages)
    if marks is None:
        return SegmentReason.UNCERTIFIED
    reply = conversation.messages[num_messages - 1]
    appended, used_marks = _marked_messages(conversation.messages[num_messages:], marks)
    before = conversation.messages[: num_messages - 1]
    raised = False
    for probe in _probes(template, reply, sentinel):
        try:
            text = template.render(replace(conversation, messages=(*before, probe.message, *appended)))
        except TemplateRaised:
            raised = True
            continue
        if sentinel in text:
            return _certified(text[text.rindex(sentinel) + len(sentinel) :], probe.kind, used_marks, full_text, tokens)
    return SegmentReason.TEMPLATE_RAISED if raised else SegmentReason.UNCERTIFIED


def text_turn_close(template: ChatTemplate, stops: Sequence[str]) -> str:
    """What the template writes between a reply's text and its stop token ("" for most, and where it shows none)."""
    sentinel = _sentinel("")
    messages = ({"role": "user", "content": "q"}, {"role": "assistant", "content": sentinel})
    try:
        text = template.render(Conversation((*messages, {"role": "user", "content": "q"})))
    except TemplateRaised:
        return ""
    _, found, tail = text.rpartition(sentinel)
    stop = _earliest(tail, stops, brackets=None) if found else None
    return tail[: stop.start()] if stop is not None else ""


def reasoning_close(template: ChatTemplate, *, closer: str) -> str:
    """What stands between a reply's reasoning and its text: the template's own, else `closer` on a line of its own."""
    thought, answer = _sentinel("") + "thought", _sentinel("") + "answer"
    reply = {"role": "assistant", "content": answer, "reasoning_content": thought}
    try:
        text = template.render(Conversation(({"role": "user", "content": "q"}, reply)), add_generation_prompt=False)
    except TemplateRaised:
        text = ""
    start, stop = text.find(thought), text.find(answer)
    between = text[start + len(thought) : stop] if 0 <= start < stop else ""
    return between if closer in between else f"\n{closer}\n\n"


class _ProbeKind(Enum):
    TEXT = "text"
    CALLS = "calls"


@dataclass(frozen=True, slots=True)
class _Probe:
    message: Mapping[str, JsonValue]
    kind: _ProbeKind


def _probes(template: ChatTemplate, reply: Mapping[str, JsonValue], sentinel: str) -> list[_Probe]:
    """The sentinel in place of the reply's calls where it has some that the template shows, else of its text."""
    bare = {key: value for key, value in reply.items() if key not in (*REASONING_KEYS, "tool_calls")}
    text_probe = _Probe({**bare, "content": sentinel}, _ProbeKind.TEXT)
    calls = reply.get("tool_calls")
    if not isinstance(calls, list) or not calls or not template.shows_tool_calls:
        return [text_probe]
    # Empty content: a template may print content behind the results. Same ids, names and order of calls.
    arguments = json.dumps({"k": sentinel})
    probed = [_with_arguments(call, arguments) for call in calls]
    return [_Probe({**bare, "content": "", "tool_calls": probed}, _ProbeKind.CALLS)]


def _with_arguments(call: JsonValue, arguments: str) -> JsonValue:
    if not isinstance(call, Mapping):
        return call
    function = call.get("function")
    if isinstance(function, Mapping):
        return {**call, "function": {**function, "arguments": arguments}}
    return {**call, "arguments": arguments}


def _certified(tail: str, kind: _ProbeKind, marks: str, full_text: str, tokens: TurnTokens) -> Junction | SegmentReason:
    """Split `tail` = call syntax + stop + suffix, and hold it against the full render."""
    first_mark = min((at for mark in marks if (at := tail.find(mark)) >= 0), default=len(tail))
    region = tail[:first_mark]
    stop = _earliest(region, tokens.stops, brackets=tokens.brackets)
    is_engine_stop = stop is not None
    if stop is None and kind is _ProbeKind.TEXT:
        # A stop that only history has (gpt-oss <|end|>, the next role's opener after a GLM text turn).
        stop = _earliest(region, tokens.special, brackets=tokens.brackets)
    if stop is None:
        return SegmentReason.UNCERTIFIED
    marked_suffix = tail[stop.end() :]
    if any(mark not in marked_suffix for mark in marks):
        return SegmentReason.DROPPED_MESSAGE
    suffix = marked_suffix.translate(dict.fromkeys(map(ord, marks)))
    if not full_text.endswith(stop.group() + suffix):
        return SegmentReason.UNCERTIFIED
    return Junction(stop.group(), suffix, is_engine_stop)


def _earliest(text: str, tokens: Sequence[str], *, brackets: Brackets | None) -> re.Match[str] | None:
    """The first occurrence of any of `tokens` that is not bracketed; of two at one place the longer."""
    longest_first = sorted((token for token in tokens if token), key=len, reverse=True)
    if not longest_first:
        return None
    pattern = f"(?:{'|'.join(map(re.escape, longest_first))})"
    return re.search(f"(?<!{brackets.opening}){pattern}(?!{brackets.closing})" if brackets else pattern, text)


def _marked_messages(messages: Sequence[JsonValue], marks: str) -> tuple[list[JsonValue], str]:
    """Each message with its mark inside its text, and the marks that found a place (an empty message has none)."""
    marked: list[JsonValue] = []
    used = ""
    for message, mark in zip(messages, marks, strict=True):
        changed = _marked_message(message, mark)
        marked.append(message if changed is None else changed)
        used += mark if changed is not None else ""
    return marked, used


def _marked_message(message: JsonValue, mark: str) -> JsonValue | None:
    if not isinstance(message, Mapping):
        return None
    content = _marked_content(message.get("content"), mark)
    if content is not None:
        return {**message, "content": content}
    calls = message.get("tool_calls")
    if isinstance(calls, list) and calls and isinstance(calls[0], Mapping):
        function = calls[0].get("function", calls[0])
        name = _marked_text(function.get("name"), mark) if isinstance(function, Mapping) else None
        if name is not None:
            call = (
                {**calls[0], "function": {**function, "name": name}}
                if "function" in calls[0]
                else {
                    **calls[0],
                    "name": name,
                }
            )
            return {**message, "tool_calls": [call, *calls[1:]]}
    return None


def _marked_content(content: JsonValue, mark: str) -> JsonValue | None:
    """Content with the mark in its first text that is not blank: a string, a part's `text`, or a value of an object."""
    if isinstance(content, str):
        return _marked_text(content, mark)
    if isinstance(content, list):
        for i, part in enumerate(content):
            changed = _marked_content(part, mark)
            if changed is not None:
                return [*content[:i], changed, *content[i + 1 :]]
    if isinstance(content, Mapping):
        for key, value in content.items():
            changed = _marked_content(value, mark) if key != "type" else None
            if changed is not None:
                return {**content, key: changed}
    return None


def _marked_text(text: JsonValue, mark: str) -> str | None:
    """The mark goes into the middle of the last words outside of tags: templates look at how a text begins and ends,
    trim it there, and cut it at tags (reasoning is dropped, what follows it is not)."""
    if not isinstance(text, str) or not text.strip():
        return None
    words = [match for match in _WORDS.finditer(text) if match.group().strip()]
    start, stop = words[-1].span() if words else (0, len(text))
    start += len(text[start:stop]) - len(text[start:stop].lstrip())
    middle = start + max(1, len(text[start:stop].strip()) // 2)
    return text[:middle] + mark + text[middle:]


def _sentinel(text: str) -> str:
    """Letters and digits that are not in `text`."""
    number = 7
    while f"Sentinel{number}q" in text:
        number += 1
    return f"Sentinel{number}q"
