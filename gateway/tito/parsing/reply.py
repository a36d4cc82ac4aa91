"""How a model's replies are read: the two Protocols that every family of markup implements.

Promises: the deltas, joined, are exactly the final message, under every split of the tokens; nothing raises; text is
never lost (a call that is malformed or cut becomes content, and the reply carries a flag). White space that is layout
of the markup (newlines around reasoning, space between text and calls) is not part of the message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from gateway.contracts.generation import Finish, JsonValue, TokenIds
from gateway.contracts.replies import ParsedReply, ReplyDelta
from gateway.tito.parsing.markers import Marker
from gateway.tito.parsing.reasoning import ReasoningMarkers


@dataclass(frozen=True, slots=True)
class OpenMarkup:
    """What is open at this point of a reply.

    in_reasoning: the reasoning's closer is due. closing_text: what closes open calls and their section, in order; ""
    where none is open. The reasoning's own closer is not in it.
    """

    in_reasoning: bool
    closing_text: str


class ReplyParser(Protocol):
    """Reads one reply; made by `ReplyParsing.start`."""

    def feed(self, token_ids: Sequence[int]) -> list[ReplyDelta]:
        """Deltas that the next sampled tokens make certain; may be empty."""
        ...

    def finish(self, finish: Finish) -> tuple[list[ReplyDelta], ParsedReply]:
        """The last deltas, and the whole reply; the parser takes no more tokens."""
        ...

    @property
    def open_markup(self) -> OpenMarkup:
        """What would have to be closed if the reply ended now."""
        ...


class ReplyParsing(Protocol):
    """How one model's replies are read; safe to share between sessions and threads."""

    @property
    def name(self) -> str:
        """The call syntax and the reasoning style, for people."""
        ...

    @property
    def markers(self) -> tuple[Marker, ...]:
        """All of this model's markup."""
        ...

    @property
    def reasoning(self) -> ReasoningMarkers | None:
        """What opens and closes reasoning; None for a model that shows none."""
        ...

    def opens_reasoning(self, prompt_ids: Sequence[int] | TokenIds) -> bool:
        """Whether a prompt, all of its ids, ends inside reasoning that the template opened."""
        ...

    def start(
        self,
        *,
        prompt_ids: Sequence[int] | TokenIds,
        tools: Sequence[JsonValue],
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
    ) -> ReplyParser:
        """A parser for one reply.

        prompt_ids: the whole prompt, int32[P]; the parser begins in the state in which it ends. tools: the definitions
        that the request offered; without any, call markup is text. stop, stop_token_ids: of the request, so that they
        can be kept out of streamed text.
        """
        ...
