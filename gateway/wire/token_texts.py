"""How single tokens are shown beside their log-probs: a text for people, and the bytes that they stand for.

A token of a byte-level vocabulary may be a part of a character: its text is then U+FFFD, and only its bytes say which
part. Where the tokenizer does not work by bytes, none are known.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol


class Spelling(NamedTuple):
    """One token as it is shown. `raw`: its bytes, None where the tokenizer cannot tell them."""

    text: str
    raw: bytes | None


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


def unknown_spelling(token_id: int) -> Spelling:
    """Of a token where there is no tokenizer."""
    return Spelling("", None)
