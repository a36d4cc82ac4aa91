"""How single tokens are shown beside their log-probs: a text for people, and the bytes that they stand for.

A token of a byte-level vocabulary may be a part of a character: its text is then U+FFFD, and only its bytes say which
part. Where the tokenizer does not work by bytes, none are known.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple, Protocol

from gateway.wire.json_text import dump_json

MANY_TOKENS = 16_384
"""Whose spelling is kept: nearly all of what a model samples."""


class Spelling(NamedTuple):
    """One token as it is shown. `raw`: its bytes, None where the tokenizer cannot tell them."""

    text: str
    raw: bytes | None


class SpellingJson(NamedTuple):
    """JSON of a token's text, and of its bytes as numbers or null."""

    text: bytes
    raw: bytes


class TokenDecoder(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids."""
        ...

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes that a token stands for inside a text; None where the decoder does not work by bytes."""
        ...


def spelling(tokenizer: TokenDecoder, token_id: int) -> Spelling:
    """How a tokenizer spells one token: as inside of a text, spaces before it kept."""
    raw = tokenizer.token_bytes(token_id)
    return Spelling(tokenizer.decode([token_id]) if raw is None else raw.decode(errors="replace"), raw)


@lru_cache(MANY_TOKENS)
def spelling_json(text: str, raw: bytes | None) -> SpellingJson:
    """Made once for each token: every token of a reply is shown so beside its log-prob."""
    return SpellingJson(dump_json(text), dump_json(None if raw is None else list(raw)))


def unknown_spelling(token_id: int) -> Spelling:
    """Of a token where there is no tokenizer."""
    return Spelling("", None)
