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

    Promise: the deltas that were taken, joined, are the reply at the end.
    """

    __slots__ = ("_deltas", "_flags", "content", "num_reasoning_tokens", "reasoning", "tool_calls")

    def __init__(self, *, holds_space: bool) -> None:
        self.content = JoinedText(holds_space=holds_space)
        self.reasoning = JoinedText(holds_space=True)
        self.reasoning.begin_block()
        self.tool_calls: list[ToolCall] = []
        self.num_reasoning_tokens = 0
        self._flags: list[ReplyFlag] = []
        self._deltas: list[ReplyDelta] = []

    def say(self, text: str) -> None:
        """More visible text."""
        if shown := self.content.add(text):
            self._deltas.append(ContentDelta(shown))

    def think(self, text: str) -> None:
        """More reasoning."""
        if shown := self.reasoning.add(text):
            self._deltas.append(ReasoningDelta(shown))

    def call(self, call: ToolCall) -> None:
        """A whole tool call."""
        self._deltas.append(ToolCallDelta(len(self.tool_calls), call.call_id, call.name, call.arguments))
        self.tool_calls.append(call)

    def flag(self, flag: ReplyFlag) -> None:
        """Something was wrong; said once."""
        if flag not in self._flags:
            self._flags.append(flag)

    def take_deltas(self) -> list[ReplyDelta]:
        """What is new since they were taken last."""
        deltas, self._deltas = self._deltas, []
        return deltas

    def finish(self) -> tuple[list[ReplyDelta], ParsedReply]:
        """The last deltas, and the whole reply."""
        if shown := self.content.end():
            self._deltas.append(ContentDelta(shown))
        reply = ParsedReply(
            content=self.content.text or None,
            reasoning=self.reasoning.text or None,
            tool_calls=tuple(self.tool_calls),
            flags=tuple(self._flags),
            num_reasoning_tokens=self.num_reasoning_tokens,
        )
        return self.take_deltas(), reply
