"""A reply as it grows: what has been read of it so far, and what of that has not been shown yet."""

from __future__ import annotations

from gateway.contracts.replies import (
    ContentDelta,
    ParsedReply,
    ReasoningDelta,
    ReplyDelta,
    ReplyFlag,
    ToolCall,
    ToolCallDelta,
)
from gateway.tito.parsing.joined_text import JoinedText


class ReplyDraft:
    """What parsers write to. holds_space: space at the end of the text may belong to markup that follows.

    say, think: more visible text, more reasoning. deltas: what nobody has taken yet.
    Promise: the deltas that were taken, joined, are the reply at the end.
    """

    __slots__ = ("_flags", "content", "deltas", "num_reasoning_tokens", "reasoning", "say", "think", "tool_calls")

    def __init__(self, *, holds_space: bool) -> None:
        self.deltas: list[ReplyDelta] = []
        self.content = JoinedText(self.deltas, ContentDelta, holds_space=holds_space)
        self.reasoning = JoinedText(self.deltas, ReasoningDelta, holds_space=True, at_block_start=True)
        self.say, self.think = self.content.add, self.reasoning.add
        self.tool_calls: list[ToolCall] = []
        self.num_reasoning_tokens = 0
        self._flags: list[ReplyFlag] = []

    def take_deltas(self) -> list[ReplyDelta]:
        """What nobody has taken yet; the texts go on writing to the same list."""
        taken = self.deltas[:]
        self.deltas.clear()
        return taken

    def call(self, call_id: str, name: str, arguments: str) -> None:
        """A whole tool call."""
        self.deltas.append(ToolCallDelta(len(self.tool_calls), call_id, name, arguments))
        self.tool_calls.append(ToolCall(call_id, name, arguments))

    def flag(self, flag: ReplyFlag) -> None:
        """Something was wrong; said once."""
        if flag not in self._flags:
            self._flags.append(flag)

    def finish(self) -> tuple[list[ReplyDelta], ParsedReply]:
        """The last deltas, and the whole reply."""
        self.content.end()
        reply = ParsedReply(
            content="".join(self.content.pieces) or None,
            reasoning="".join(self.reasoning.pieces) or None,
            tool_calls=tuple(self.tool_calls),
            flags=tuple(self._flags),
            num_reasoning_tokens=self.num_reasoning_tokens,
        )
        return self.deltas, reply
