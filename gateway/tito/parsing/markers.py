"""Markers of a reply's markup, and the scanner that turns sampled tokens into text and markers.

A marker that is one added token is recognised by its id only, so the same characters sampled as ordinary tokens are
text; others are recognised in the text. The scanner works token by token, so its result does not depend on how a stream
was cut; it holds back bytes that are half a character, and text that may yet become a marker or a stop string.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gateway.tito.tokenizer import ChatTokenizer


class Marker(NamedTuple):
    """One piece of markup; `token_id` None where it is not a single added token."""

    text: str
    token_id: int | None


_MAX_UNDECIDED_TOKENS = 8
"""No character has more; a text that still ends in U+FFFD then really holds one."""

_MAX_KNOWN_STOPS = 256

Scanned = str | Marker
"""Visible text, or a marker that was recognised."""


def marker(tokenizer: ChatTokenizer, text: str) -> Marker:
    """The marker spelled `text` in this tokenizer's vocabulary."""
    return Marker(text, tokenizer.token_id(text))


class Markup:
    """What a scanner must know of one model: its markers, and which of its tokens are silent. Shared by its replies."""

    def __init__(self, tokenizer: ChatTokenizer, markers: Iterable[Marker]) -> None:
        known = list(dict.fromkeys(markers))
        self.tokenizer = tokenizer
        self.by_id = {m.token_id: m for m in known if m.token_id is not None}
        self.by_text = {m.text: m for m in known if m.token_id is None}
        special = {token.token_id for token in tokenizer.added_tokens.values() if token.special}
        self.silent = frozenset((special | set(tokenizer.eos_token_ids)) - self.by_id.keys())
        self._silent_with: dict[tuple[int, ...], tuple[frozenset[int], frozenset[int]]] = {}
        self._held_with: dict[tuple[str, ...], HeldTexts] = {}
        longest_first = sorted(self.by_text, key=len, reverse=True)
        self.search = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def silent_with(self, stop_token_ids: Iterable[int]) -> tuple[frozenset[int], frozenset[int]]:
        """The silent tokens of a request with these stop tokens, and those with the markers: all that is no plain text.

        Replies ask for the same ones again and again."""
        key = tuple(stop_token_ids)
        known = self._silent_with.get(key)
        if known is None:
            silent = self.silent | (set(key) - self.by_id.keys())
            known = silent, silent | self.by_id.keys()
            if len(self._silent_with) < _MAX_KNOWN_STOPS:
                self._silent_with[key] = known
        return known

    def held_with(self, stop: tuple[str, ...]) -> HeldTexts:
        """What may become a marker, or one of these stop strings."""
        known = self._held_with.get(stop)
        if known is None:
            patterns = (*self.by_text, *stop)
            beginnings = frozenset(text[:length] for text in patterns for length in range(1, len(text)))
            known = HeldTexts(beginnings, max((len(text) for text in patterns), default=0))
            if len(self._held_with) < _MAX_KNOWN_STOPS:
                self._held_with[stop] = known
        return known


class HeldTexts(NamedTuple):
    """Texts with which a pattern may begin, and the longest pattern's length, 0 where there is none."""

    beginnings: frozenset[str]
    longest: int


class TokenScanner:
    """Sampled token ids → text and markers, token by token, or a run of plain tokens at once where that is the same.

    Tokens that are special or in `stop_token_ids`, and no marker, are silent. `stop` are strings at which the engine
    ends: text that may belong to one waits until it is clear whether the reply ended there. What waits is never longer
    than the longest of them and the newest token.
    """

    __slots__ = (
        "_beginnings",
        "_by_id",
        "_by_text",
        "_detokenizer",
        "_edges",
        "_held",
        "_longest",
        "_search",
        "_silent",
        "_stop",
        "_takes_runs",
    )

    def __init__(self, markup: Markup, *, stop_token_ids: Iterable[int], stop: Iterable[str]) -> None:
        self._detokenizer = _Detokenizer(markup.tokenizer)
        self._by_id, self._by_text, self._search = markup.by_id, markup.by_text, markup.search
        self._silent, self._edges = markup.silent_with(stop_token_ids)
        self._stop = tuple(text for text in stop if text)
        self._beginnings, self._longest = markup.held_with(self._stop)
        self._held = ""
        # Without patterns in the text nothing is ever held, and bytes join as their tokens do.
        self._takes_runs = not self._longest and markup.tokenizer.works_by_bytes

    def push(self, token_id: int) -> list[Scanned]:
        """What one more token makes certain."""
        found = self._by_id.get(token_id)
        if found is None and token_id not in self._silent:
            return self._take(self._detokenizer.push(token_id))
        scanned = self._take(self._detokenizer.flush())
        if found is not None:
            # A marker ends whatever was waiting: half characters, half markers, a stop string that did not stop.
            if self._held:
                scanned += self._release(len(self._held))
            scanned.append(found)
        return scanned

    def run_end(self, token_ids: Sequence[int], start: int) -> int:
        """Where the run of tokens from `start` on ends that `push_run` may take: one token, or several plain ones."""
        is_edge = self._edges.__contains__
        if not self._takes_runs or is_edge(token_ids[start]):
            return start + 1
        edge = next(filter(is_edge, token_ids[start + 1 :]), None)
        return len(token_ids) if edge is None else token_ids.index(edge, start + 1)

    def push_run(self, token_ids: Sequence[int]) -> list[Scanned]:
        """What the tokens of one run make certain; the same as of `push` for each."""
        if len(token_ids) == 1:
            return self.push(token_ids[0])
        text = self._detokenizer.push_bytes(token_ids)
        return [text] if text else []

    def finish(self, stop_string: str | None) -> list[Scanned]:
        """What was held back, up to the stop string that ended the reply, if one did."""
        self._held += self._detokenizer.flush()
        if not self._held:
            return []
        cut = self._held.find(stop_string) if stop_string else -1
        if cut >= 0:
            self._held = self._held[:cut]
        return self._release(len(self._held))

    def _take(self, text: str) -> list[Scanned]:
        if not text:
            return []
        if not self._longest:
            return [text]
        before = len(self._held)
        self._held += text
        return self._release(self._certain_length(before))

    def _certain_length(self, num_old: int) -> int:
        """How much of the held text can neither start a pattern nor be a stop string that the newest text completed."""
        held = self._held
        certain = len(held)
        for length in range(min(self._longest - 1, len(held)), 0, -1):
            if held[-length:] in self._beginnings:
                certain -= length
                break
        for stop in self._stop:
            at = held.find(stop, max(0, num_old - len(stop) + 1))
            if at >= 0:
                certain = min(certain, at)
        return certain

    def _release(self, length: int) -> list[Scanned]:
        """Emit `length` characters of the held text, more where a marker recognised in it reaches further."""
        scanned: list[Scanned] = []
        at = 0
        while (match := self._search.search(self._held, at)) is not None and match.start() < length:
            if match.start() > at:
                scanned.append(self._held[at : match.start()])
            scanned.append(self._by_text[match.group()])
            at = match.end()
        if at < length:
            scanned.append(self._held[at:length])
        self._held = self._held[max(at, length) :]
        return scanned


_UTF8 = codecs.getincrementaldecoder("utf-8")


class _Detokenizer:
    """Token ids → text, never half a character."""

    __slots__ = ("_bytes", "_shown", "_tokenizer", "_window")

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = _UTF8(errors="replace")
        self._window: list[int] = []
        self._shown = ""

    def push(self, token_id: int) -> str:
        piece = self._tokenizer.token_bytes(token_id)
        if piece is not None:
            return self._bytes.decode(piece)
        return self._push_to_window(token_id)

    def push_bytes(self, token_ids: Sequence[int]) -> str:
        """Of a tokenizer that works by bytes."""
        return self._bytes.decode(self._tokenizer.bytes_of(token_ids))

    def flush(self) -> str:
        """What is still half a character, as U+FFFD."""
        rest = self._bytes.decode(b"", final=True) if self._bytes.getstate()[0] else ""
        if self._window:
            rest += self._tokenizer.decode(self._window)[len(self._shown) :]
            self._window, self._shown = [], ""
        return rest

    def _push_to_window(self, token_id: int) -> str:
        """For decoders that do not work by bytes: decode the last few tokens again, and show what is new and whole."""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        if text.endswith("�") and len(self._window) < _MAX_UNDECIDED_TOKENS:
            return ""
        new = text[len(self._shown) :]
        # One token of context is enough for the spacing rules of such decoders.
        self._window = self._window[-1:]
        self._shown = self._tokenizer.decode(self._window)
        return new
