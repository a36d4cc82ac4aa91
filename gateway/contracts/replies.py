"""A reply as text: what is read from sampled tokens (`gateway.tito.parsing`) and written to agents (`gateway.wire`)."""

from __future__ import annotations

from enum import StrEnum

from gateway.contracts.frozen import frozen_dataclass
from gateway.contracts.generation import JsonValue


class ReplyFlag(StrEnum):
    """What was wrong with the text of a reply; the reply is delivered all the same."""

    MALFORMED_TOOL_CALL = "malformed_tool_call"
    UNCLOSED_TOOL_CALL = "unclosed_tool_call"
    UNCLOSED_REASONING = "unclosed_reasoning"


@frozen_dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More reasoning text."""

    text: str


@frozen_dataclass(frozen=True, slots=True)
class ContentDelta:
    """More visible text."""

    text: str


@frozen_dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """More of tool call `index`; `call_id` and `name` are set on its first delta only."""

    index: int
    call_id: str | None
    name: str | None
    arguments: str


ReplyDelta = ReasoningDelta | ContentDelta | ToolCallDelta


@frozen_dataclass(frozen=True, slots=True)
class ToolCall:
    """One parsed call; `arguments` is the JSON text as the model wrote it."""

    call_id: str
    name: str
    arguments: str


@frozen_dataclass(frozen=True, slots=True)
class ParsedReply:
    """Output tokens as a message. `content` None means no text at all; `num_reasoning_tokens` counts output tokens."""

    content: str | None
    reasoning: str | None
    tool_calls: tuple[ToolCall, ...]
    flags: tuple[ReplyFlag, ...]
    num_reasoning_tokens: int

    def deltas(self) -> list[ReplyDelta]:
        """The whole reply at once, as if it had just been sampled."""
        deltas: list[ReplyDelta] = []
        if self.reasoning:
            deltas.append(ReasoningDelta(self.reasoning))
        if self.content:
            deltas.append(ContentDelta(self.content))
        return deltas + [ToolCallDelta(i, c.call_id, c.name, c.arguments) for i, c in enumerate(self.tool_calls)]

    def message(self) -> dict[str, JsonValue]:
        """The assistant message as OpenAI's API spells it; reasoning under `reasoning_content`."""
        message: dict[str, JsonValue] = {"role": "assistant", "content": self.content}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            calls: list[JsonValue] = []
            for call in self.tool_calls:
                function = {"name": call.name, "arguments": call.arguments}
                calls.append({"id": call.call_id, "type": "function", "function": function})
            message["tool_calls"] = calls
        return message
