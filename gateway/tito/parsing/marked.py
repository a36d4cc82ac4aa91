"""Replies whose markup stands between markers: reasoning and calls, read as they stream.

White space that is layout of the markup (newlines around reasoning, space between text and calls) is not part of the
message; a call that is malformed or cut becomes content, as written.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from gateway.contracts.generation import Finish, JsonValue, TokenIds
from gateway.tito.conversation import (
    ContentDelta,
    ParsedReply,
    ReasoningDelta,
    ReplyDelta,
    ReplyFlag,
    ToolCall,
    ToolCallDelta,
)
from gateway.tito.parsing.calls import CallSyntax
from gateway.tito.parsing.markers import Marker, Scanned, TokenScanner
from gateway.tito.parsing.reasoning import ReasoningMarkers
from gateway.tito.parsing.reply import OpenMarkup
from gateway.tito.tokenizer import ChatTokenizer


@dataclass(frozen=True, slots=True)
class MarkedParsing:
    """How one model's replies are read; `reasoning` and `calls` None where it has no such markup."""

    tokenizer: ChatTokenizer
    reasoning: ReasoningMarkers | None
    calls: CallSyntax | None

    @property
    def name(self) -> str:
        """The call syntax and the reasoning style."""
        calls = "text" if self.calls is None else "hermes"
        return calls if self.reasoning is None else f"{calls} + {self.reasoning.opener.text}"

    @property
    def markers(self) -> tuple[Marker, ...]:
        """All of this model's markup."""
        return (*_reasoning_pair(self.reasoning), *_call_pair(self.calls))

    def opens_reasoning(self, prompt_ids: Sequence[int] | TokenIds) -> bool:
        """Whether a prompt ends inside reasoning; looks back to the last marker or control token only."""
        if self.reasoning is None:
            return False
        opener, closer = self.reasoning.opener, self.reasoning.closer
        if opener.token_id is None or closer.token_id is None:
            return self.tokenizer.decode(prompt_ids[-32:]).rstrip().endswith(opener.text)
        special = {token.token_id for token in self.tokenizer.added_tokens.values() if token.special}
        edges = np.array(sorted({opener.token_id, closer.token_id, *special, *self.tokenizer.eos_token_ids}))
        for stop in range(len(prompt_ids), 0, -_LOOK_BACK):
            chunk = np.asarray(prompt_ids[max(0, stop - _LOOK_BACK) : stop])
            found = np.flatnonzero(np.isin(chunk, edges))
            if len(found):
                return int(chunk[found[-1]]) == opener.token_id
        return False

    def start(
        self,
        *,
        prompt_ids: Sequence[int] | TokenIds,
        tools: Sequence[JsonValue],
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
    ) -> MarkedParser:
        """A parser for one reply, as `ReplyParsing.start` has it."""
        calls = self.calls if tools else None
        reasoning_open = self.opens_reasoning(prompt_ids)
        return MarkedParser(self, calls, reasoning_open=reasoning_open, stop=stop, stop_token_ids=stop_token_ids)


def _reasoning_pair(reasoning: ReasoningMarkers | None) -> tuple[Marker, ...]:
    return () if reasoning is None else (reasoning.opener, reasoning.closer)


def _call_pair(calls: CallSyntax | None) -> tuple[Marker, ...]:
    return () if calls is None else (calls.opener, calls.closer)


_LOOK_BACK = 1024
"""Ids of a prompt that are looked at in one step, from its end."""


class _State(Enum):
    CONTENT = "content"
    REASONING = "reasoning"
    CALL = "call"


class MarkedParser:
    """Reads one reply; made by `MarkedParsing.start`."""

    def __init__(
        self,
        parsing: MarkedParsing,
        calls: CallSyntax | None,
        *,
        reasoning_open: bool,
        stop: Iterable[str],
        stop_token_ids: Iterable[int],
    ) -> None:
        self._reasoning_markers = parsing.reasoning
        self._calls = calls
        markers = (*_reasoning_pair(parsing.reasoning), *_call_pair(calls))
        self._scanner = TokenScanner(parsing.tokenizer, markers, stop_token_ids=stop_token_ids, stop=stop)
        self._state = _State.REASONING if reasoning_open and parsing.reasoning is not None else _State.CONTENT
        self._content = _JoinedText(holds_space=calls is not None)
        self._reasoning = _JoinedText(holds_space=True)
        self._reasoning.begin_block()
        self._call_body = ""
        self._tool_calls: list[ToolCall] = []
        self._flags: list[ReplyFlag] = []
        self._num_reasoning_tokens = 0
        self._deltas: list[ReplyDelta] = []

    def feed(self, token_ids: Sequence[int]) -> list[ReplyDelta]:
        """Deltas that the next sampled tokens make certain; may be empty."""
        for token_id in token_ids:
            was_reasoning = self._state is _State.REASONING
            self._read(self._scanner.push(int(token_id)))
            self._num_reasoning_tokens += was_reasoning or self._state is _State.REASONING
        return self._take_deltas()

    def finish(self, finish: Finish) -> tuple[list[ReplyDelta], ParsedReply]:
        """The last deltas, and the whole reply; the parser takes no more tokens."""
        stop_string = finish.matched if isinstance(finish.matched, str) else None
        self._read(self._scanner.finish(stop_string))
        if self._state is _State.CALL:
            self._end_at_stop_string(stop_string)
        elif self._state is _State.REASONING:
            self._flag(ReplyFlag.UNCLOSED_REASONING)
        self._show_content(self._content.end())
        deltas = self._take_deltas()
        reply = ParsedReply(
            content=self._content.text or None,
            reasoning=self._reasoning.text or None,
            tool_calls=tuple(self._tool_calls),
            flags=tuple(self._flags),
            num_reasoning_tokens=self._num_reasoning_tokens,
        )
        return deltas, reply

    @property
    def open_markup(self) -> OpenMarkup:
        """What would have to be closed if the reply ended now."""
        in_call = self._state is _State.CALL and self._calls is not None
        return OpenMarkup(
            in_reasoning=self._state is _State.REASONING,
            closing_text=self._calls.closer.text if in_call and self._calls is not None else "",
        )

    def _read(self, scanned: Iterable[Scanned]) -> None:
        for item in scanned:
            if isinstance(item, str):
                self._text(item)
            elif self._state is _State.REASONING:
                self._marker_in_reasoning(item)
            elif self._state is _State.CALL:
                self._marker_in_call(item)
            else:
                self._marker_in_content(item)

    def _text(self, text: str) -> None:
        if self._state is _State.CALL:
            self._call_body += text
        elif self._state is _State.REASONING:
            self._show_reasoning(self._reasoning.add(text))
        else:
            self._show_content(self._content.add(text))

    def _marker_in_reasoning(self, item: Marker) -> None:
        markers = self._reasoning_markers
        if markers is not None and item == markers.closer:
            self._state = _State.CONTENT
            self._content.begin_block()
        elif markers is not None and item == markers.opener and not self._reasoning.text:
            return  # an opener that the prompt already had, or that the model repeats
        else:
            self._text(item.text)  # a call inside reasoning is not a call

    def _marker_in_content(self, item: Marker) -> None:
        if self._calls is not None and item == self._calls.opener:
            self._state = _State.CALL
            self._call_body = ""
        elif self._opens_reasoning(item):
            self._state = _State.REASONING
            self._reasoning.begin_block()
        else:
            self._text(item.text)

    def _opens_reasoning(self, item: Marker) -> bool:
        if self._reasoning_markers is None or item != self._reasoning_markers.opener:
            return False
        # Spelled out in ordinary tokens, it means reasoning at the very beginning only; later it is quoted text.
        return item.token_id is not None or not (self._content.text.strip() or self._tool_calls)

    def _marker_in_call(self, item: Marker) -> None:
        calls = self._calls
        if calls is not None and item == calls.closer:
            self._end_call(closer=item.text)
        elif calls is not None and item == calls.opener:
            self._spill_call(ReplyFlag.UNCLOSED_TOOL_CALL, closer="")
            self._marker_in_content(item)
        else:
            self._call_body += item.text

    def _end_at_stop_string(self, stop_string: str | None) -> None:
        if self._calls is not None and stop_string == self._calls.closer.text:
            self._end_call(closer="")
        else:
            self._spill_call(ReplyFlag.UNCLOSED_TOOL_CALL, closer="")

    def _end_call(self, *, closer: str) -> None:
        written = self._calls.read(self._call_body) if self._calls is not None else None
        if written is None:
            self._spill_call(ReplyFlag.MALFORMED_TOOL_CALL, closer=closer)
            return
        call = ToolCall(f"call_{uuid.uuid4().hex}", written.name, written.arguments)
        self._deltas.append(ToolCallDelta(len(self._tool_calls), call.call_id, call.name, call.arguments))
        self._tool_calls.append(call)
        self._state = _State.CONTENT
        self._content.begin_block()

    def _spill_call(self, flag: ReplyFlag, *, closer: str) -> None:
        """What was to be a call becomes content, as written."""
        opener = self._calls.opener.text if self._calls is not None else ""
        self._flag(flag)
        self._state = _State.CONTENT
        self._show_content(self._content.add(opener + self._call_body + closer))

    def _flag(self, flag: ReplyFlag) -> None:
        if flag not in self._flags:
            self._flags.append(flag)

    def _show_content(self, text: str) -> None:
        if text:
            self._deltas.append(ContentDelta(text))

    def _show_reasoning(self, text: str) -> None:
        if text:
            self._deltas.append(ReasoningDelta(text))

    def _take_deltas(self) -> list[ReplyDelta]:
        deltas, self._deltas = self._deltas, []
        return deltas


class _JoinedText:
    """Text that comes in pieces and in blocks (before and after markup); knows which space is only layout.

    A block after markup loses its leading newlines and is joined to earlier text by one. Trailing space waits, where
    `holds_space`, until it is known whether text or markup follows; markup that is accepted drops it.
    """

    def __init__(self, *, holds_space: bool) -> None:
        self._holds_space = holds_space
        self._pieces: list[str] = []
        self._waiting = ""
        self._at_block_start = False

    @property
    def text(self) -> str:
        """Everything shown so far."""
        return "".join(self._pieces)

    def begin_block(self) -> None:
        """Markup was accepted here."""
        self._waiting = ""
        self._at_block_start = True

    def add(self, text: str) -> str:
        """Take more text; returns what can be shown now."""
        text = self._waiting + text
        if self._at_block_start:
            text = text.lstrip("\n")
        shown = text.rstrip() if self._holds_space else text
        self._waiting = text[len(shown) :]
        if shown and self._at_block_start:
            shown = "\n" + shown if self._pieces else shown
            self._at_block_start = False
        return self._show(shown)

    def end(self) -> str:
        """No more text; returns the space that waited, if it follows text."""
        waiting = "" if self._at_block_start else self._waiting
        self._waiting = ""
        return self._show(waiting)

    def _show(self, text: str) -> str:
        if text:
            self._pieces.append(text)
        return text
