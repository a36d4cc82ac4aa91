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
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from gateway.contracts.errors import TemplateRaised
from gateway.contracts.generation import JsonValue
from gateway.contracts.media import media_kind
from gateway.contracts.records import SegmentReason
from gateway.tito.conversation import Conversation
from gateway.tito.lookalikes import Brackets, SaidTexts, absent_characters
from gateway.tito.parsing.call_ids import show_call
from gateway.tito.template import REASONING_KEYS, ChatTemplate

_WORDS = re.compile(r"(?:^|(?<=>))[^<]+")
_MIN_TELLING_CHARACTERS = 16
_MAX_COMPARED_CHARACTERS = 2**18
"""Beyond which looking for each text in all of them takes longer than a render."""

_LOCAL_SENTINEL = f"Sentinel{secrets.token_hex(8)}q"
"""Stands where no render tells which sentinel is free; nobody can know it, so nobody can write it."""


@dataclass(frozen=True, slots=True)
class Junction:
    """`stop`: text of the token that ends the sampled turn where more follows. `suffix`: what is added behind it.

    `is_engine_stop`: whether sampling ends at that token; else only the template's history has it there.
    `results_at`: where in the suffix the text of the last tool result stands; None where none was appended.
    """

    stop: str
    suffix: str
    is_engine_stop: bool
    results_at: int | None


@dataclass(frozen=True, slots=True)
class TurnTokens:
    """Texts of added tokens: `stops` end sampling, `special` are all control tokens. `brackets` stand around what is
    none of them but only looks it."""

    stops: tuple[str, ...]
    special: tuple[str, ...]
    brackets: Brackets | None


def learn_junction(
    template: ChatTemplate,
    conversation: Conversation,
    *,
    num_messages: int,
    full_text: str | None,
    tokens: TurnTokens,
    was_cut: bool = False,
) -> Junction | SegmentReason:
    """What follows the turn whose reply is message `num_messages - 1`, or why that cannot be certified.

    full_text: the template's render of `conversation` with the generation prompt, None where it refuses. was_cut: the
    reply was sampled without a stop token. Never raises TemplateRaised.
    """
    known_text = full_text if full_text is not None else json.dumps(conversation.messages, ensure_ascii=False)
    sentinel = _sentinel(known_text)
    marks = absent_characters(known_text, len(conversation.messages) - num_messages)
    if marks is None:
        return SegmentReason.UNCERTIFIED
    reply = conversation.messages[num_messages - 1]
    new_messages = conversation.messages[num_messages:]
    appended, used_marks = _marked_messages(new_messages, marks)
    results = [mark for message, mark in zip(new_messages, marks, strict=True) if _is_result(message)]
    before = conversation.messages[: num_messages - 1]
    raised = False
    for probe in _probes(template, reply, sentinel):
        try:
            text = template.render(replace(conversation, messages=(*before, probe.message, *appended)))
        except TemplateRaised:
            raised = True
            continue
        if sentinel in text:
            result_marks = "".join(mark for mark in results if mark in used_marks)
            tail = _Tail(text[text.rindex(sentinel) + len(sentinel) :], used_marks, result_marks)
            junction = _split(template, conversation, tail, probe, reply, tokens)
            if not isinstance(junction, Junction) or (
                full_text is not None and _is_end(template, full_text, junction, reply)
            ):
                return junction
            # A reply without text (cut in its reasoning, ended at once) may be shown without an end, or be refused.
            # What follows it is certified then by a reply with text, in context and out of it.
            if full_text is not None and (not was_cut or reply.get("content")):
                return SegmentReason.UNCERTIFIED
            alone = local_suffix(
                template, conversation, num_messages=num_messages, stop=junction.stop, tools=conversation.tools
            )
            return junction if alone == junction.suffix else SegmentReason.UNCERTIFIED
    return SegmentReason.TEMPLATE_RAISED if raised else SegmentReason.UNCERTIFIED


def local_suffix(
    template: ChatTemplate,
    conversation: Conversation,
    *,
    num_messages: int,
    stop: str,
    tools: Sequence[JsonValue],
    history: Sequence[JsonValue] | None = None,
) -> str | None:
    """What follows `stop`, learned behind a short made-up history instead of the real one; one short render.

    It is what `learn_junction` finds only for shapes that are certified to be so (`certificate`). tools: a stand-in for
    the conversation's. history: another one than a user's question. None where the template raises or shows no stop.
    """
    if history is None:
        history = made_up_history(conversation)
    probe = _probes(template, conversation.messages[num_messages - 1], _LOCAL_SENTINEL)[0]
    messages = (*history, probe.message, *conversation.messages[num_messages:])
    try:
        text = template.render(Conversation(messages, tuple(tools), conversation.template_arguments))
    except TemplateRaised:
        return None
    start = text.rfind(_LOCAL_SENTINEL)
    at = text.find(stop, start + len(_LOCAL_SENTINEL)) if start >= 0 else -1
    return text[at + len(stop) :] if at >= 0 else None


def made_up_history(conversation: Conversation) -> list[JsonValue]:
    """A user's question, behind a system message where the conversation begins with one."""
    first = conversation.messages[0]
    history: list[JsonValue] = [{"role": "user", "content": "q"}]
    if isinstance(first, dict) and first.get("role") in ("system", "developer"):
        history.insert(0, {"role": first["role"], "content": "s"})
    return history


def unseen_messages(template: ChatTemplate, conversation: Conversation, full_text: str) -> tuple[int, ...]:
    """Indices of messages whose text the template does not show at all: the model will not see them.

    A message without text is never among them. One render, or none where each text is found and can have come from its
    message alone.
    """
    if _all_are_found(template, conversation, full_text):
        return ()
    marks = absent_characters(full_text, len(conversation.messages))
    if marks is None:
        return ()
    marked = [_marked_message(message, mark) for message, mark in zip(conversation.messages, marks, strict=True)]
    messages = tuple(
        sent if changed is None else changed for sent, changed in zip(conversation.messages, marked, strict=True)
    )
    try:
        text = template.render(replace(conversation, messages=messages))
    except TemplateRaised:
        return ()
    return tuple(
        i
        for i, (changed, mark) in enumerate(zip(marked, marks, strict=True))
        if changed is not None and _find_mark(text, mark) < 0
    )


def _all_are_found(template: ChatTemplate, conversation: Conversation, full_text: str) -> bool:
    """Whether the text of every message stands in the render, and nothing else in the conversation or the template has
    it. Short texts and single words may be anything (a role, a key of a tool's schema)."""
    messages = conversation.messages
    if len(messages) * len(full_text) > _MAX_COMPARED_CHARACTERS:
        return False
    texts = [message.get("content") if isinstance(message, dict) else None for message in messages]
    said = SaidTexts.of(messages, (*conversation.tools, conversation.template_arguments))
    all_said = f"{said.by_models}\n{said.by_others}"
    for text in texts:
        text = text.strip() if isinstance(text, str) else ""
        if len(text) < _MIN_TELLING_CHARACTERS or " " not in text or text not in full_text:
            return False
        if all_said.count(text) != 1 or text in template.source:
            return False
    return True


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


def call_close(template: ChatTemplate, closers: str) -> str:
    """The markup that closes a call, on a line of its own where the template writes it so; "" stays ""."""
    if not closers:
        return ""
    return f"\n{closers}" if f"\n{closers}" in show_call(template) else closers


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
    if not isinstance(call, dict):
        return call
    function = call.get("function")
    if isinstance(function, dict):
        return {**call, "function": {**function, "arguments": arguments}}
    return {**call, "arguments": arguments}


@dataclass(frozen=True, slots=True)
class _Tail:
    """What a probe's render shows behind its sentinel, with the marks that its appended messages carry, and those among
    them that are of tool results."""

    text: str
    marks: str
    result_marks: str

    @property
    def region(self) -> str:
        """The part before the first appended message's own text."""
        return self.text[: min((at for mark in self.marks if (at := _find_mark(self.text, mark)) >= 0), default=None)]


def _split(
    template: ChatTemplate,
    conversation: Conversation,
    tail: _Tail,
    probe: _Probe,
    reply: Mapping[str, JsonValue],
    tokens: TurnTokens,
) -> Junction | SegmentReason:
    """Split a tail into call syntax + stop + suffix."""
    stop = _earliest(tail.region, tokens.stops, brackets=tokens.brackets)
    is_engine_stop = stop is not None
    if stop is None:
        # A stop that only history has (gpt-oss <|end|>, the next role's opener behind a GLM turn).
        close = "" if probe.kind is _ProbeKind.TEXT else _call_close(template, conversation, reply, tokens)
        if close is None or not tail.region.startswith(close):
            return SegmentReason.UNCERTIFIED
        stop = _earliest(tail.region, tokens.special, brackets=tokens.brackets, start=len(close))
    if stop is None:
        return SegmentReason.UNCERTIFIED
    marked_suffix = tail.text[stop.end() :]
    if any(_find_mark(marked_suffix, mark) < 0 for mark in tail.marks):
        return SegmentReason.DROPPED_MESSAGE
    last_result = max((_find_mark(marked_suffix, mark) for mark in tail.result_marks), default=None)
    results_at = None if last_result is None else len(_without_marks(marked_suffix[:last_result], tail.marks))
    return Junction(stop.group(), _without_marks(marked_suffix, tail.marks), is_engine_stop, results_at)


def _call_close(
    template: ChatTemplate, conversation: Conversation, reply: Mapping[str, JsonValue], tokens: TurnTokens
) -> str | None:
    """The end of the call syntax, learned where an engine's stop follows it: before the calls' own results."""
    calls = [call for call in reply.get("tool_calls") or () if isinstance(call, dict)]
    results, marks = _marked_messages(
        [
            {"role": "tool", "tool_call_id": call.get("id"), "name": _name_of(call), "content": "result"}
            for call in calls
        ],
        absent_characters("", len(calls)) or "",
    )
    probe = _probes(template, reply, _LOCAL_SENTINEL)[0]
    messages = ({"role": "user", "content": "q"}, probe.message, *results)
    try:
        text = template.render(replace(conversation, messages=messages))
    except TemplateRaised:
        return None
    _, found, rest = text.rpartition(_LOCAL_SENTINEL)
    region = _Tail(rest, marks, marks).region if found else ""
    stop = _earliest(region, tokens.stops, brackets=tokens.brackets)
    return region[: stop.start()] if stop is not None else None


def _name_of(call: Mapping[str, JsonValue]) -> JsonValue:
    function = call.get("function", call)
    return function.get("name") if isinstance(function, dict) else None


def _is_result(message: JsonValue) -> bool:
    return isinstance(message, dict) and message.get("role") == "tool"


def _is_end(template: ChatTemplate, full_text: str, junction: Junction, reply: Mapping[str, JsonValue]) -> bool:
    """Whether the full render ends with stop and suffix, as they are or with the reply's own text behind its results.

    Some templates print the text of a reply with calls there, and some end the turn behind it; in the recorded tokens
    it stands already. Text that is printed ahead of results may be a turn of its own, which an empty text leaves empty.
    """
    end = junction.stop + junction.suffix
    if full_text.endswith(end):
        return True
    content = reply.get("content")
    if junction.results_at is None or not reply.get("tool_calls") or not isinstance(content, str):
        return False
    start = len(junction.stop) + junction.results_at
    printed = [text for text in dict.fromkeys((content, content.strip())) if text.strip()]
    close = _turn_close(template)
    return any(_ends_around(full_text, end, text, start) or full_text.endswith(end + text + close) for text in printed)


def _turn_close(template: ChatTemplate) -> str:
    """All that the template writes behind a text turn that is the last message."""
    messages = ({"role": "user", "content": "q"}, {"role": "assistant", "content": _LOCAL_SENTINEL})
    try:
        text = template.render(Conversation(messages), add_generation_prompt=False)
    except TemplateRaised:
        return ""
    return text.rpartition(_LOCAL_SENTINEL)[2]


def _ends_around(full_text: str, end: str, inserted: str, start: int) -> bool:
    """Whether `full_text` ends with `end` into which `inserted` was put at one place, `start` or behind it."""
    tail = full_text[-(len(end) + len(inserted)) :]
    at = tail.find(inserted, start)
    while at >= 0:
        if tail[:at] + tail[at + len(inserted) :] == end:
            return True
        at = tail.find(inserted, at + 1)
    return False


def _earliest(text: str, tokens: Sequence[str], *, brackets: Brackets | None, start: int = 0) -> re.Match[str] | None:
    """The first occurrence of any of `tokens` that is not bracketed; of two at one place the longer."""
    longest_first = sorted((token for token in tokens if token), key=len, reverse=True)
    if not longest_first:
        return None
    pattern = f"(?:{'|'.join(map(re.escape, longest_first))})"
    if brackets is not None:
        pattern = f"(?<!{brackets.opening}){pattern}(?!{brackets.closing})"
    return re.compile(pattern).search(text, start)


def _find_mark(text: str, mark: str) -> int:
    """Where a mark is, printed as it is or as JSON's escape; -1 if nowhere."""
    at = text.find(mark)
    return at if at >= 0 else text.find(_escaped(mark))


def _without_marks(text: str, marks: str) -> str:
    for mark in marks:
        text = text.replace(mark, "").replace(_escaped(mark), "")
    return text


def _escaped(mark: str) -> str:
    return json.dumps(mark)[1:-1]


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
    if not isinstance(message, dict):
        return None
    content = _marked_content(message.get("content"), mark)
    if content is not None:
        return {**message, "content": content}
    calls = message.get("tool_calls")
    if isinstance(calls, list) and calls and isinstance(calls[0], dict):
        function = calls[0].get("function", calls[0])
        name = _marked_text(function.get("name"), mark) if isinstance(function, dict) else None
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
    if isinstance(content, dict) and media_kind(content) is None:  # whose URL no template shows
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
