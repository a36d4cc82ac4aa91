"""Markers of a reply's markup, and the scanner that turns sampled tokens into text and markers.

A marker that is one added token is recognised by its id only, so the same characters sampled as ordinary tokens are
text; others are recognised in the text. The scanner works token by token, so its result does not depend on how a stream
was cut; it holds back bytes that are half a character, and text that may yet become a marker or a stop string.
"""

from __future__ import annotations

import re
from codecs import utf_8_decode
from collections.abc import Iterable, Mapping, Sequence
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
    """What a scanner must know of one model: its markers, and which of its tokens are silent. Shared by its replies.

    edges: the marker of each id that is one, None for silent tokens.
    """

    def __init__(self, tokenizer: ChatTokenizer, markers: Iterable[Marker]) -> None:
        known = list(dict.fromkeys(markers))
        self.tokenizer = tokenizer
        self.by_text = {m.text: m for m in known if m.token_id is None}
        special = {token.token_id for token in tokenizer.added_tokens.values() if token.special}
        self.edges: dict[int, Marker | None] = dict.fromkeys((*special, *tokenizer.eos_token_ids))
        self.edges |= {m.token_id: m for m in known if m.token_id is not None}
        self._stops: dict[tuple[tuple[int, ...], tuple[str, ...]], Stops] = {}
        longest_first = sorted(self.by_text, key=len, reverse=True)
        self.search = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def with_stops(self, stop_token_ids: Iterable[int], stop: Iterable[str]) -> Stops:
        """What a request's own stops come to; replies ask for the same ones again and again."""
        key = tuple(stop_token_ids), tuple(stop)
        known = self._stops.get(key)
        if known is None:
            known = self._made_with(*key)
            if len(self._stops) < _MAX_KNOWN_STOPS:
                self._stops[key] = known
        return known

    def _made_with(self, stop_token_ids: Sequence[int], stop: Sequence[str]) -> Stops:
        more_silent = [token_id for token_id in stop_token_ids if token_id not in self.edges]
        texts = tuple(text for text in stop if text)
        patterns = (*self.by_text, *texts)
        longest = max(map(len, patterns), default=0)
        return Stops(
            edges=self.edges | dict.fromkeys(more_silent) if more_silent else self.edges,
            texts=texts,
            beginnings=frozenset(text[:length] for text in patterns for length in range(1, len(text))),
            longest=longest,
            # Without patterns in the text nothing is ever held, and bytes join as their tokens do.
            takes_runs=not longest and self.tokenizer.works_by_bytes,
        )


class Stops(NamedTuple):
    """What is no plain text in the replies to a request that has some stop tokens and stop strings.

    edges: as in `Markup`, stop tokens among them. texts: the stop strings. beginnings: texts with which a pattern (a
    stop string, a marker that is found in the text) may begin. longest: the longest pattern's length, 0 where there is
    none. takes_runs: whether plain tokens may be read several at once.
    """

    edges: Mapping[int, Marker | None]
    texts: tuple[str, ...]
    beginnings: frozenset[str]
    longest: int
    takes_runs: bool


class TokenScanner:
    """Sampled token ids → text and markers, token by token, or a run of plain tokens at once where that is the same.

    Tokens that are special or in `stop_token_ids`, and no marker, are silent. `stop` are strings at which the engine
    ends: text that may belong to one waits until it is clear whether the reply ended there. What waits is never longer
    than the longest of them and the newest token.
    """

    __slots__ = ("_bytes_by_id", "_cut_character", "_held", "_markup", "_shown", "_stops", "_window")

    def __init__(self, markup: Markup, *, stop_token_ids: Iterable[int], stop: Iterable[str]) -> None:
        self._markup = markup
        self._stops = markup.with_stops(stop_token_ids, stop)
        self._bytes_by_id = markup.tokenizer.bytes_by_id
        self._cut_character = b""  # what came so far of a character
        self._held = ""  # what may yet become a pattern
        self._window: list[int] = []  # the last few tokens, for decoders that do not work by bytes
        self._shown = ""  # what was given out of the window's text

    def take(self, token_ids: Sequence[int], start: int, stop: int) -> tuple[list[Scanned], int]:
        """What the tokens from `start` on make certain, and where it read on to: behind one token, or behind several
        plain ones before `stop` where those, one by one, come to the same."""
        stops = self._stops
        edges, token_id, end = stops.edges, token_ids[start], start + 1
        if token_id in edges:
            marker = edges[token_id]
            if self._cut_character or self._window or self._held:
                return self._end_what_waits(marker), end
            return [] if marker is None else [marker], end
        if stops.takes_runs:
            while end < stop and token_ids[end] not in edges:
                end += 1
        if end == start + 1:
            content = self._bytes_by_id[token_id]
            if content is None:
                return self._hold_back(self._push_to_window(token_id)), end
        else:
            content = b"".join(map(self._bytes_by_id.__getitem__, token_ids[start:end]))  # type: ignore[arg-type]
        if self._cut_character:
            content = self._cut_character + content
        text, length = utf_8_decode(content, "replace")
        self._cut_character = content[length:]
        if stops.longest:
            return self._hold_back(text), end
        return [text] if text else [], end

    def finish(self, stop_string: str | None) -> list[Scanned]:
        """What was held back, up to the stop string that ended the reply, if one did."""
        if self._cut_character or self._window:
            self._held += self._rest()
        if not self._held:
            return []
        cut = self._held.find(stop_string) if stop_string else -1
        if cut >= 0:
            self._held = self._held[:cut]
        return self._release(len(self._held))

    def _end_what_waits(self, marker: Marker | None) -> list[Scanned]:
        """What is certain once this marker, None for a silent token, has come."""
        scanned = self._hold_back(self._rest()) if self._cut_character or self._window else []
        if marker is None:
            return scanned
        # A marker ends whatever was waiting: half characters, half markers, a stop string that did not stop.
        if self._held:
            scanned += self._release(len(self._held))
        return [*scanned, marker]

    def _hold_back(self, text: str) -> list[Scanned]:
        """What is certain once `text` has come too."""
        if not text:
            return []
        if not self._stops.longest:
            return [text]
        before = len(self._held)
        self._held += text
        return self._release(self._certain_length(before))

    def _certain_length(self, num_old: int) -> int:
        """How much of the held text can neither start a pattern nor be a stop string that the newest text completed."""
        held = self._held
        certain = len(held)
        for length in range(min(self._stops.longest - 1, len(held)), 0, -1):
            if held[-length:] in self._stops.beginnings:
                certain -= length
                break
        for stop in self._stops.texts:
            at = held.find(stop, max(0, num_old - len(stop) + 1))
            if at >= 0:
                certain = min(certain, at)
        return certain

    def _release(self, length: int) -> list[Scanned]:
        """Emit `length` characters of the held text, more where a marker recognised in it reaches further."""
        scanned: list[Scanned] = []
        at = 0
        while (match := self._markup.search.search(self._held, at)) is not None and match.start() < length:
            if match.start() > at:
                scanned.append(self._held[at : match.start()])
            scanned.append(self._markup.by_text[match.group()])
            at = match.end()
        if at < length:
            scanned.append(self._held[at:length])
        self._held = self._held[max(at, length) :]
        return scanned

    def _rest(self) -> str:
        """What is still half a character, as U+FFFD."""
        rest = ""
        if self._cut_character:
            rest, _ = utf_8_decode(self._cut_character, "replace", True)
            self._cut_character = b""
        if self._window:
            rest += self._markup.tokenizer.decode(self._window)[len(self._shown) :]
            self._window, self._shown = [], ""
        return rest

    def _push_to_window(self, token_id: int) -> str:
        """For decoders that do not work by bytes: decode the last few tokens again, and show what is new and whole."""
        decode = self._markup.tokenizer.decode
        self._window.append(token_id)
        text = decode(self._window)
        if text.endswith("�") and len(self._window) < _MAX_UNDECIDED_TOKENS:
            return ""
        new = text[len(self._shown) :]
        # One token of context is enough for the spacing rules of such decoders.
        self._window = self._window[-1:]
        self._shown = decode(self._window)
        return new
