"""What a reply consists of, and what a dialect makes of it.

`gateway.routes` runs turns and feeds a `ReplyWriter` with what comes; a writer knows its dialect and nothing of turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from gateway.contracts.errors import VerbatimError
from gateway.contracts.experts import RoutedExperts
from gateway.contracts.generation import Finish, JsonValue, TokenIds, TopLogprob
from gateway.contracts.replies import ParsedReply, ReplyDelta
from gateway.contracts.versions import VersionSpan
from gateway.wire.token_texts import Spelling, unknown_spelling


class ReplyTokens(msgspec.Struct, frozen=True, eq=False):
    """Captured arrays of new tokens; `texts[i]` is what token i alone decodes to (needed for log-probs only).

    top_logprobs: the likeliest tokens at each position, likeliest first; () where none were asked for. spell: how any
    token is spelled (needed for log-probs only).
    """

    token_ids: TokenIds
    logprobs: npt.NDArray[np.float32]
    texts: Sequence[str]
    top_logprobs: Sequence[Sequence[TopLogprob]] = ()
    spell: Callable[[int], Spelling] = unknown_spelling

    @property
    def top_rows(self) -> Sequence[Sequence[TopLogprob]]:
        """`top_logprobs`, one row for each token also where none were asked for."""
        return self.top_logprobs or [()] * len(self.token_ids)


class Usage(msgspec.Struct, frozen=True):
    """Token counts of one reply."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int


class FinishedChoice(msgspec.Struct, frozen=True, eq=False):
    """One whole reply. `meta_info`, `reply_fields`: what we do not know of the engine's reply, of its meta_info object
    and of the reply itself (I8). version_spans: the policy that sampled each output token (I5)."""

    reply: ParsedReply
    finish: Finish
    prompt_token_ids: TokenIds
    tokens: ReplyTokens
    experts: RoutedExperts | None
    meta_info: Mapping[str, JsonValue]
    reply_fields: Mapping[str, JsonValue]
    usage: Usage
    version_spans: tuple[VersionSpan, ...] = ()


class ReplyWriter(Protocol):
    """Writes the reply to one request: whole, or as the frames of a stream, in the order in which it is called."""

    def whole(self, choices: Sequence[FinishedChoice]) -> JsonValue:
        """The body of a reply that is not streamed; at least one choice."""
        ...

    def opening(self, index: int, prompt_token_ids: TokenIds) -> Iterator[bytes]:
        """Choice `index` begins; its prompt is int32[P]."""
        ...

    def progress(self, index: int, deltas: Sequence[ReplyDelta], tokens: ReplyTokens) -> Iterator[bytes]:
        """New tokens of a choice, and what of them can be shown."""
        ...

    def closing(self, index: int, choice: FinishedChoice) -> Iterator[bytes]:
        """A choice is whole and on disk (I4)."""
        ...

    def end(self, choices: Sequence[FinishedChoice]) -> Iterator[bytes]:
        """All are."""
        ...

    def failure(self, error: VerbatimError) -> Iterator[bytes]:
        """The reply ends here, with this error."""
        ...
