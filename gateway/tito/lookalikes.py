"""Text of agents, tools and users that merely looks like a control token, kept text on its way through the template.

The template sees a conversation whose lookalikes are bracketed by two code points that Unicode reserves as
noncharacters and that occur nowhere in the conversation. The rendered text then tells what the template itself wrote
from what it was given, and the encoder spells bracketed tokens as ordinary text. A conversation without lookalikes,
which is nearly every one, is passed as it is.

Messages of assistants keep their markup (`<think>`, `<tool_call>`: models write it and templates look for it); only
tokens that build turns are text there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from gateway.contracts.errors import TemplateRaised
from gateway.contracts.generation import JsonValue, TokenIds
from gateway.tito.conversation import Conversation
from gateway.tito.template import ChatTemplate
from gateway.tito.tokenizer import ChatTokenizer

_FIRST_NONCHARACTER, _NUM_NONCHARACTERS = 0xFDD0, 32


@dataclass(frozen=True, slots=True)
class Brackets:
    """What stands around a lookalike in the rendered text; `opening` "" where a template looks at how texts begin."""

    opening: str
    closing: str


@dataclass(frozen=True, slots=True)
class GuardedConversation:
    """A conversation for the template; `brackets` None: it has no lookalikes and is the agent's own."""

    conversation: Conversation
    brackets: Brackets | None


class LookalikeGuard:
    """Brackets lookalikes in a conversation, and encodes the text that the template makes of it.

    Control tokens are the added tokens that are special, plus those that the template writes.
    """

    def __init__(self, tokenizer: ChatTokenizer, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._template = template
        added = tokenizer.added_tokens.values()
        turn_tokens = {t.text for t in added if t.special} | {tokenizer.token_text(i) for i in tokenizer.eos_token_ids}
        written = {t.text for t in added if t.text in template.source and not t.text.isspace()}
        self._control = _any_of(turn_tokens | written)
        self._turn = _any_of(turn_tokens)

    def guard(self, conversation: Conversation) -> GuardedConversation:
        """The conversation with its lookalikes bracketed so that the template makes the same text of it.

        A template that looks into texts (`startswith`) may not; then the brackets are what stays, never the lookalike.
        """
        if not any(pattern.search(text) for pattern, text in self._texts(conversation)):
            return GuardedConversation(conversation, None)
        expected = self._template.render(conversation)
        pair = _absent_pair(text for _, text in self._texts(conversation))
        candidates: list[GuardedConversation] = []
        for brackets in (pair, replace(pair, opening="")):
            guarded = GuardedConversation(self._bracketed(conversation, brackets), brackets)
            try:
                rendered = self._template.render(guarded.conversation)
            except TemplateRaised:
                continue
            candidates.append(guarded)
            if "".join(text for text, _ in self._pieces(rendered, brackets)) == expected:
                return guarded
        # I6: a template that refuses every bracketed form still gets its conversation.
        return candidates[0] if candidates else GuardedConversation(conversation, None)

    def encode(self, text: str, brackets: Brackets | None) -> TokenIds:
        """int32[T] ids of rendered text; bracketed tokens are spelled as ordinary text."""
        if brackets is None:
            return self._tokenizer.encode(text)
        parts: list[TokenIds] = []
        for piece, is_lookalike in self._pieces(text, brackets):
            if is_lookalike:
                parts.append(self._tokenizer.encode_plain(piece))
            elif piece:
                parts.append(self._tokenizer.encode_after(piece) if parts else self._tokenizer.encode(piece))
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)

    def _pieces(self, text: str, brackets: Brackets) -> Iterator[tuple[str, bool]]:
        """(piece, is_lookalike) in order; brackets that lost their partner vanish."""
        opening, closing = _as_written(brackets.opening), _as_written(brackets.closing)
        lone = f"{opening}|{closing}" if brackets.opening else closing
        split = re.split(f"{opening}({self._control.pattern}){closing}|{lone}", text)
        for i, piece in enumerate(split):
            if piece:
                yield piece, i % 2 == 1

    def _texts(self, conversation: Conversation) -> Iterator[tuple[re.Pattern[str], str]]:
        for message in conversation.messages:
            pattern = self._pattern_for(message)
            for text in _strings(message):
                yield pattern, text
        for value in (*conversation.tools, dict(conversation.template_arguments)):
            for text in _strings(value):
                yield self._control, text

    def _bracketed(self, conversation: Conversation, brackets: Brackets) -> Conversation:
        def bracket(value: JsonValue, pattern: re.Pattern[str]) -> JsonValue:
            return _map_strings(value, lambda text: pattern.sub(rf"{brackets.opening}\g<0>{brackets.closing}", text))

        return Conversation(
            messages=tuple(bracket(message, self._pattern_for(message)) for message in conversation.messages),
            tools=tuple(bracket(tool, self._control) for tool in conversation.tools),
            template_arguments=bracket(dict(conversation.template_arguments), self._control),
        )

    def _pattern_for(self, message: JsonValue) -> re.Pattern[str]:
        is_assistant = isinstance(message, Mapping) and message.get("role") == "assistant"
        return self._turn if is_assistant else self._control


def absent_characters(text: str, count: int) -> str | None:
    """`count` distinct private-use characters, none of which is in `text`; None if every range tried is taken."""
    for start in (0x10E000, 0x10D000, 0xFE000, 0xF8000):
        if not re.search(f"[{chr(start)}-{chr(start + count)}]", text):
            return "".join(chr(start + i) for i in range(count))
    return None


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted((text for text in texts if text), key=len, reverse=True)
    return re.compile("|".join(re.escape(text) for text in longest_first) or "(?!)")


def _as_written(character: str) -> str:
    """A pattern for one bracket as a template may print it: itself, or as JSON's escape."""
    return f"(?:{character}|\\\\u{ord(character):04x})" if character else ""


def _absent_pair(texts: Iterable[str]) -> Brackets:
    taken: set[str] = set()
    noncharacters = [chr(_FIRST_NONCHARACTER + i) for i in range(_NUM_NONCHARACTERS)]
    for text in texts:
        taken.update(character for character in noncharacters if character in text)
    free = [character for character in noncharacters if character not in taken]
    # All 32 in one conversation is somebody's test of us; two of them then break text but build no token.
    opening, closing = (free + noncharacters)[:2]
    return Brackets(opening, closing)


def _strings(value: JsonValue) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _strings(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _strings(entry)


def _map_strings(value: JsonValue, change: Callable[[str], str]) -> JsonValue:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_strings(entry, change) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(entry, change) for entry in value]
    return value
