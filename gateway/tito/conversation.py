"""What goes into a prompt and what comes out: shared by `gateway.tito` and `gateway.sessions`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from gateway.contracts.errors import LengthMismatch
from gateway.contracts.generation import Finish, JsonValue, TokenIds
from gateway.contracts.records import SegmentReason


class HistoryPolicy(StrEnum):
    """What to do where a full render would rewrite history only by dropping old reasoning (design 4)."""

    KEEP = "keep"
    TEMPLATE = "template"


@dataclass(frozen=True, slots=True)
class Conversation:
    """What the chat template is given: the client's messages as sent (unknown keys too), tools, template arguments."""

    messages: tuple[JsonValue, ...]
    tools: tuple[JsonValue, ...] = ()
    template_arguments: Mapping[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class ParentTurn:
    """The recorded turn that a conversation continues.

    token_ids: int32[T], all recorded ids up to and including the parent's output. num_output_tokens: how many of them,
    at the end, it sampled. num_messages: how many of the conversation's messages the parent covers, its own reply (at
    index num_messages - 1) included.
    """

    token_ids: TokenIds
    num_output_tokens: int
    num_messages: int
    finish: Finish


@dataclass(frozen=True, slots=True, eq=False)
class BuiltPrompt:
    """Tokens for one turn. With `segment_reason` None they are added to the parent's ids; else they are a whole prompt.

    certified_by: how equality with the template was established ("full_render", "shape", "probe", "close" for a parent
    that was cut), with "_kept_history" where the template would have dropped old reasoning and the policy kept it.
    hidden_messages: indices of messages that the template does not show (the model never sees them), as far as a whole
    prompt was made.
    """

    token_ids: TokenIds
    segment_reason: SegmentReason | None
    certified_by: str
    hidden_messages: tuple[int, ...] = ()


class ReplyFlag(StrEnum):
    """What was wrong with the text of a reply; the reply is delivered all the same."""

    MALFORMED_TOOL_CALL = "malformed_tool_call"
    UNCLOSED_TOOL_CALL = "unclosed_tool_call"
    UNCLOSED_REASONING = "unclosed_reasoning"


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More reasoning text."""

    text: str


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More visible text."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """More of tool call `index`; `call_id` and `name` are set on its first delta only."""

    index: int
    call_id: str | None
    name: str | None
    arguments: str


ReplyDelta = ReasoningDelta | ContentDelta | ToolCallDelta


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One parsed call; `arguments` is the JSON text as the model wrote it."""

    call_id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ParsedReply:
    """Output tokens as a message. `content` None means no text at all; `num_reasoning_tokens` counts output tokens."""

    content: str | None
    reasoning: str | None
    tool_calls: tuple[ToolCall, ...]
    flags: tuple[ReplyFlag, ...]
    num_reasoning_tokens: int

    def message(self) -> dict[str, JsonValue]:
        """The assistant message as OpenAI's API spells it; reasoning under `reasoning_content`."""
        message: dict[str, JsonValue] = {"role": "assistant", "content": self.content}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return message


def check_parent(parent: ParentTurn, conversation: Conversation) -> None:
    """Raise LengthMismatch unless the parent's figures fit its ids and the conversation."""
    if not 0 < parent.num_output_tokens <= len(parent.token_ids):
        raise LengthMismatch(f"parent has {len(parent.token_ids)} tokens, {parent.num_output_tokens} of them sampled")
    if not 0 < parent.num_messages <= len(conversation.messages):
        raise LengthMismatch(
            f"parent covers {parent.num_messages} messages, the conversation has {len(conversation.messages)}"
        )
