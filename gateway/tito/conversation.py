"""What a prompt is made of: shared by `gateway.tito` and `gateway.sessions`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from enum import StrEnum

from msgspec import Struct

from gateway.contracts.errors import LengthMismatch
from gateway.contracts.frozen import frozen_dataclass
from gateway.contracts.generation import Finish, JsonValue, TokenIds
from gateway.contracts.records import SegmentReason


class HistoryPolicy(StrEnum):
    """What to do where a full render would rewrite history only by dropping old reasoning (design 4)."""

    KEEP = "keep"
    TEMPLATE = "template"


@frozen_dataclass(frozen=True, slots=True)
class Conversation:
    """What the chat template is given: the client's messages as sent (unknown keys too), tools, template arguments."""

    messages: tuple[JsonValue, ...]
    tools: tuple[JsonValue, ...] = ()
    template_arguments: Mapping[str, JsonValue] = field(default_factory=dict)


class ParentTurn:
    """The recorded turn that a conversation continues.

    token_ids: int32[T], all recorded ids up to and including the parent's output, or how to get them: the short path
    needs the last one only (`last_token_id`), so that a long history need not be put together. num_tokens: T, to be
    given where token_ids is a function. num_output_tokens: how many of them, at the end, it sampled. num_messages: how
    many of the conversation's messages the parent covers, its own reply (at index num_messages - 1) included.
    """

    __slots__ = ("_ids", "finish", "last_token_id", "num_messages", "num_output_tokens", "num_tokens")

    def __init__(
        self,
        token_ids: TokenIds | Callable[[], TokenIds],
        num_output_tokens: int,
        num_messages: int,
        finish: Finish,
        *,
        num_tokens: int | None = None,
        last_token_id: int | None = None,
    ) -> None:
        self._ids = token_ids
        self.num_output_tokens = num_output_tokens
        self.num_messages = num_messages
        self.finish = finish
        self.num_tokens: int = len(self.token_ids) if num_tokens is None else num_tokens
        last = last_token_id
        self.last_token_id: int = (int(self.token_ids[-1]) if self.num_tokens else -1) if last is None else last

    @property
    def token_ids(self) -> TokenIds:
        """int32[T], put together when first asked for."""
        if callable(self._ids):
            self._ids = self._ids()
        return self._ids


class BuiltPrompt(Struct, frozen=True, eq=False):
    """Tokens for one turn. With `segment_reason` None they are added to the parent's ids; else they are a whole prompt.

    certified_by: how equality with the template was established ("full_render", "opening", "shape", "probe", "close"
    for a parent that was cut), with "_kept_history" where the template would have dropped old reasoning and the policy
    kept it.
    hidden_messages: indices of messages that the template does not show (the model never sees them), as far as a whole
    prompt was made.
    """

    token_ids: TokenIds
    segment_reason: SegmentReason | None
    certified_by: str
    hidden_messages: tuple[int, ...] = ()


def check_parent(parent: ParentTurn, conversation: Conversation) -> None:
    """Raise LengthMismatch unless the parent's figures fit its ids and the conversation."""
    if not 0 < parent.num_output_tokens <= parent.num_tokens:
        raise LengthMismatch(f"parent has {parent.num_tokens} tokens, {parent.num_output_tokens} of them sampled")
    if not 0 < parent.num_messages <= len(conversation.messages):
        raise LengthMismatch(
            f"parent covers {parent.num_messages} messages, the conversation has {len(conversation.messages)}"
        )
