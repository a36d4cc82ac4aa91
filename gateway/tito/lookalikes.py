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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from msgspec import Struct

from gateway.contracts.errors import TemplateRaised
from gateway.contracts.generation import JsonValue, TokenIds
from gateway.tito.conversation import Conversation
from gateway.tito.template import ChatTemplate
from gateway.tito.tokenizer import ChatTokenizer

_NONCHARACTERS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))
_TEXTLESS = frozenset((type(None), bool, int, float))
_CONTROL_SHAPE = re.compile(r"<[|｜].+[|｜]>")


@dataclass(frozen=True, slots=True)
class Brackets:
    """What stands around a lookalike. `open_edges`: not outside one that begins or ends its text, because the template
    looks at how texts begin and end."""

    opening: str
    closing: str
    open_edges: bool


@dataclass(frozen=True, slots=True)
class GuardedConversation:
    """A conversation for the template; `brackets` None: it has no lookalikes and is the agent's own."""

    conversation: Conversation
    brackets: Brackets | None


class AnyOf:
    """Any of some texts: as a pattern, and as a quick question.

    A pattern of a hundred alternatives tries each at every character. Control tokens begin alike (`<|`), and most text
    has none of the beginnings, which a plain search tells a hundred times faster.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        longest_first = sorted((text for text in texts if text), key=len, reverse=True)
        self.texts = tuple(longest_first)
        self.pattern = re.compile("|".join(re.escape(text) for text in longest_first) or "(?!)")
        self._beginnings = sorted({text[:2] for text in longest_first})

    def are_in(self, text: str) -> bool:
        """Whether one of them is in `text`."""
        for start in self._beginnings:
            if start in text:
                return self.pattern.search(text) is not None
        return False


class SaidTexts(Struct, frozen=True):
    """All texts of some messages, a line each: of the messages of assistants, and of all others."""

    by_models: str
    by_others: str

    @classmethod
    def of(cls, messages: Iterable[JsonValue], others: Iterable[JsonValue] = ()) -> SaidTexts:
        """others: what no model said besides."""
        by_models: list[JsonValue] = []
        by_others: list[JsonValue] = [*others]
        for message in messages:
            if type(message) is dict and message.get("role") == "assistant":
                by_models.append(message)
            else:
                by_others.append(message)
        return cls("\n".join(_strings_in(by_models)), "\n".join(_strings_in(by_others)))


class LookalikeGuard:
    """Brackets lookalikes in a conversation, and encodes the text that the template makes of it.

    Control tokens are the added tokens that are special or look it, `markup` (what replies are parsed by), and those
    that the template writes. Other added tokens (runs of space, HTML in some vocabularies) are language.
    control: what nobody but models may write; turn: of these, what models may not write either.
    """

    def __init__(self, tokenizer: ChatTokenizer, template: ChatTemplate, *, markup: Iterable[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._template = template
        added = {token.text for token in tokenizer.added_tokens.values()}
        turn = {token.text for token in tokenizer.added_tokens.values() if token.special}
        turn |= {tokenizer.token_text(token_id) for token_id in tokenizer.eos_token_ids} & added
        shaped = {text for text in added if _CONTROL_SHAPE.fullmatch(text)}
        written = {text for text in added if text in template.source and not text.isspace()}
        self.control = AnyOf(turn | shaped | written | (set(markup) & added))
        self.turn = AnyOf(turn)

    def guard(self, conversation: Conversation) -> GuardedConversation:
        """The conversation with its lookalikes bracketed, so that the template makes the same text of it.

        Where no bracketing does, what stays is the brackets, never the lookalike.
        """
        given = (*conversation.tools, conversation.template_arguments)
        said = SaidTexts.of(conversation.messages, given)
        if not self.has_lookalikes(said):
            return GuardedConversation(conversation, None)
        expected = self._template.render(conversation)
        opening, closing = _absent_pair(said)
        candidates: list[GuardedConversation] = []
        for open_edges in (False, True):
            brackets = Brackets(opening, closing, open_edges)
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

    def has_lookalikes(self, said: SaidTexts) -> bool:
        """Whether anything in these texts looks like a control token."""
        return self.control.are_in(said.by_others) or self.turn.are_in(said.by_models)

    def encode(self, text: str, brackets: Brackets | None) -> TokenIds:
        """int32[T] ids of rendered text; bracketed tokens are spelled as ordinary text."""
        if brackets is None:
            return self._tokenizer.encode(text)
        parts: list[TokenIds] = []
        for piece, is_lookalike in self._pieces(text, brackets):
            if parts:
                parts.append(self._tokenizer.encode_after(piece, plain=is_lookalike))
            else:
                parts.append(self._tokenizer.encode_plain(piece) if is_lookalike else self._tokenizer.encode(piece))
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)

    def _pieces(self, text: str, brackets: Brackets) -> Iterator[tuple[str, bool]]:
        """(piece, is_lookalike) in order; brackets that lost their token vanish."""
        at = 0
        for match in self._bracketed_tokens(brackets).finditer(text):
            if match.start() > at:
                yield text[at : match.start()], False
            if match.lastgroup is not None:
                yield match.group(match.lastgroup), True
            at = match.end()
        if at < len(text):
            yield text[at:], False

    def _bracketed_tokens(self, brackets: Brackets) -> re.Pattern[str]:
        opening, closing, token = (
            _as_printed(brackets.opening),
            _as_printed(brackets.closing),
            self.control.pattern.pattern,
        )
        forms = [f"{opening}(?P<inside>{token}){closing}"]
        if brackets.open_edges:
            forms += [f"(?P<first>{token}){closing}", f"{opening}(?P<last>{token})"]
        return re.compile("|".join([*forms, opening, closing]))

    def _bracketed(self, conversation: Conversation, brackets: Brackets) -> Conversation:
        def bracket(value: JsonValue, tokens: AnyOf) -> JsonValue:
            return _map_strings(value, lambda text: _bracketed_text(text, tokens.pattern, brackets))

        return Conversation(
            messages=tuple(bracket(message, self._pattern_for(message)) for message in conversation.messages),
            tools=tuple(bracket(tool, self.control) for tool in conversation.tools),
            template_arguments=bracket(dict(conversation.template_arguments), self.control),
        )

    def _pattern_for(self, message: JsonValue) -> AnyOf:
        return self.turn if _is_models(message) else self.control


def absent_characters(text: str, count: int) -> str | None:
    """`count` distinct private-use characters, none of which is in `text`; None if every range tried is taken."""
    # All of them are two units of UTF-16; a text of as many units as characters has none, and is not searched.
    may_have_some = len(text.encode("utf-16-le", "surrogatepass")) > 2 * len(text)
    for start in (0x10E000, 0x10D000, 0xFE000, 0xF8000):
        if not may_have_some or not re.search(f"[{chr(start)}-{chr(start + count)}]", text):
            return "".join(chr(start + i) for i in range(count))
    return None


def _bracketed_text(text: str, pattern: re.Pattern[str], brackets: Brackets) -> str:
    def bracket(match: re.Match[str]) -> str:
        is_first = brackets.open_edges and not text[: match.start()].strip()
        is_last = brackets.open_edges and not is_first and not text[match.end() :].strip()
        return ("" if is_first else brackets.opening) + match.group() + ("" if is_last else brackets.closing)

    return pattern.sub(bracket, text)


def _as_printed(character: str) -> str:
    """A pattern for one bracket as a template may print it: itself, or as JSON's escape."""
    return f"(?:{character}|\\\\u{ord(character):04x})"


def _absent_pair(said: SaidTexts) -> tuple[str, str]:
    free = [one for one in _NONCHARACTERS if one not in said.by_models and one not in said.by_others]
    # All 32 in one conversation is somebody's test of us; two of them then break text but build no token.
    opening, closing = [*free, *_NONCHARACTERS][:2]
    return opening, closing


def _is_models(message: JsonValue) -> bool:
    return isinstance(message, dict) and message.get("role") == "assistant"


def num_characters(messages: Sequence[JsonValue]) -> int:
    """Of all texts in some messages."""
    return sum(map(len, _strings_in(list(messages))))


def _strings_in(values: list[JsonValue]) -> list[str]:
    """All strings in some values but the names of keys, in any order; what is inside the values is added to them."""
    found: list[str] = []
    for value in values:  # which grow meanwhile
        kind = type(value)
        if kind is str:
            found.append(value)
        elif kind is dict:
            values += value.values()
        elif kind is list or kind is tuple:
            values += value
        elif kind not in _TEXTLESS:
            if isinstance(value, str):
                found.append(value)
            elif isinstance(value, Mapping):
                values += value.values()
            elif isinstance(value, list | tuple):
                values += value
    return found


def _map_strings(value: JsonValue, change: Callable[[str], str]) -> JsonValue:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_strings(entry, change) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(entry, change) for entry in value]
    return value
