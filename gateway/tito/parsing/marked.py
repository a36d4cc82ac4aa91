"""Replies whose markup stands between markers: reasoning and calls, read as they stream.

White space that is layout of the markup (newlines around reasoning, space between text and calls) is not part of the
message; a call that is malformed or cut becomes content, as written. A call's opener or closer may be missing where
the syntax has none; a section around the calls is layout once a call in it was good.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from gateway.contracts.generation import Finish, FinishReason, JsonValue, TokenIds
from gateway.contracts.replies import (
    ParsedReply,
    ReplyDelta,
    ReplyFlag,
)
from gateway.tito.parsing.call_ids import CallIdStyle
from gateway.tito.parsing.calls import CallFrame, CallSyntax, WrittenCall, body_text
from gateway.tito.parsing.draft import ReplyDraft
from gateway.tito.parsing.json_text import object_text
from gateway.tito.parsing.markers import Marker, Markup, Scanned, TokenScanner
from gateway.tito.parsing.reasoning import ReasoningMarkers, ReasoningOpening
from gateway.tito.parsing.reply import OpenMarkup
from gateway.tito.tokenizer import ChatTokenizer

_MAX_UNDECIDED_CHARACTERS = 256
"""Of a reply's beginning that may yet turn out to be a call without an opener (white space between its first words)."""


@dataclass(frozen=True)
class MarkedParsing:
    """How one model's replies are read; `reasoning` and `calls` None where it has no such markup."""

    name: str
    tokenizer: ChatTokenizer
    reasoning: ReasoningMarkers | None
    calls: CallSyntax | None
    call_ids: CallIdStyle = CallIdStyle.CALL_HEX

    @cached_property
    def markers(self) -> tuple[Marker, ...]:
        """All of this model's markup."""
        pair = () if self.reasoning is None else (self.reasoning.opener, self.reasoning.closer)
        return (*pair, *(() if self.calls is None else self.calls.frame.markers))

    def opens_reasoning(self, prompt_ids: Sequence[int] | TokenIds) -> bool:
        """Whether a prompt, all of its ids, ends inside reasoning that the template opened."""
        return self._opening is not None and self._opening.is_open(prompt_ids)

    def start(
        self,
        *,
        prompt_ids: Sequence[int] | TokenIds,
        tools: Sequence[JsonValue],
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
    ) -> MarkedParser:
        """A parser for one reply, as `ReplyParsing.start` has it."""
        scanner = TokenScanner(self._markup, stop_token_ids=stop_token_ids, stop=stop)
        reasoning_open = self._opening is not None and self._opening.is_open(prompt_ids)
        return MarkedParser(self, scanner, tools, reasoning_open=reasoning_open)

    @cached_property
    def _markup(self) -> Markup:
        return Markup(self.tokenizer, self.markers)

    @cached_property
    def _opening(self) -> ReasoningOpening | None:
        return None if self.reasoning is None else ReasoningOpening(self.tokenizer, self.reasoning)


class _State(Enum):
    CONTENT = "content"
    REASONING = "reasoning"
    CALL = "call"


_CONTENT, _REASONING, _CALL = _State  # an enum's own names are slow to read
_NO_CALLS = CallFrame()


class MarkedParser:
    """Reads one reply; made by `MarkedParsing.start`."""

    __slots__ = (
        "_beginning",
        "_call_body",
        "_call_ids",
        "_call_opener",
        "_calls",
        "_draft",
        "_frame",
        "_in_section",
        "_label",
        "_reasoning_markers",
        "_scanner",
        "_section_text",
        "_state",
        "_tools",
    )

    def __init__(
        self, parsing: MarkedParsing, scanner: TokenScanner, tools: Sequence[JsonValue], *, reasoning_open: bool
    ) -> None:
        self._reasoning_markers = parsing.reasoning
        self._calls = parsing.calls if tools else None  # without tools, call markup is text
        self._frame = self._calls.frame if self._calls is not None else _NO_CALLS
        self._call_ids = parsing.call_ids
        self._tools = tools
        self._scanner = scanner
        self._state = _REASONING if reasoning_open else _CONTENT
        self._draft = ReplyDraft(holds_space=self._calls is not None)
        label = parsing.reasoning.label if parsing.reasoning is not None else ""
        self._label = _Label(label) if label else None
        self._beginning: str | None = "" if self._frame.beginnings else None
        self._in_section = False
        self._section_text: list[str] = []  # the opener of a section in which no call was good yet, and space behind it
        self._call_opener = ""
        self._call_body: list[Scanned] = []

    def feed(self, token_ids: Sequence[int]) -> list[ReplyDelta]:
        """Deltas that the next sampled tokens make certain; may be empty."""
        draft, at, end = self._draft, 0, len(token_ids)
        while at < end:
            was_reasoning, start = self._state is _REASONING, at
            # Where the beginning is undecided, each token may decide it.
            scanned, at = self._scanner.take(token_ids, start, end if self._beginning is None else start + 1)
            if scanned:
                self._read(scanned)
            if was_reasoning or self._state is _REASONING:
                draft.num_reasoning_tokens += at - start
        return draft.take_deltas()

    def finish(self, finish: Finish) -> tuple[list[ReplyDelta], ParsedReply]:
        """The last deltas, and the whole reply; the parser takes no more tokens."""
        stop_string = finish.matched if isinstance(finish.matched, str) else None
        if scanned := self._scanner.finish(stop_string):
            self._read(scanned)
        if self._state is not _CONTENT or self._beginning is not None or self._section_text:
            self._end_what_is_open(finish, stop_string)
        return self._draft.finish()

    @property
    def open_markup(self) -> OpenMarkup:
        """What would have to be closed if the reply ended now."""
        call_closer = self._frame.closer if self._state is _CALL else None
        section_closer = self._frame.section.closer if self._frame.section and self._in_section else None
        return OpenMarkup(
            in_reasoning=self._state is _REASONING,
            closing_text="".join(closer.text for closer in (call_closer, section_closer) if closer is not None),
        )

    def _read(self, scanned: Iterable[Scanned]) -> None:
        for item in scanned:
            if type(item) is str:
                if self._state is _CONTENT and self._beginning is None and not self._section_text:
                    self._draft.say(item)
                else:
                    self._text(item)
            elif type(item) is Marker:
                if self._state is _REASONING:
                    self._marker_in_reasoning(item)
                elif self._state is _CALL:
                    self._marker_in_call(item)
                else:
                    self._marker_in_content(item)

    def _text(self, text: str) -> None:
        if self._state is _CALL:
            self._call_body.append(text)
        elif self._state is _REASONING:
            self._draft.think(text if self._label is None else self._label.skip(text))
        elif self._beginning is not None:
            self._decide_beginning(self._beginning + text)
        elif self._section_text and text.isspace():
            self._section_text.append(text)
        else:
            self._spill_section()
            self._draft.say(text)

    def _marker_in_reasoning(self, item: Marker) -> None:
        markers = self._reasoning_markers
        if markers is not None and item == markers.closer:
            self._end_label()
            self._state = _CONTENT
            self._draft.content.begin_block()
        elif markers is not None and item == markers.opener and self._draft.reasoning.is_blank:
            return  # an opener that the prompt already had, or that the model repeats
        else:
            self._text(item.text)  # a call inside reasoning is not a call

    def _marker_in_content(self, item: Marker) -> None:
        if item == self._frame.opener:
            if self._beginning is not None:
                self._end_beginning()
            self._open_call(item.text)
        elif self._frame.section is not None and item == self._frame.section.opener and not self._in_section:
            self._in_section = True
            self._section_text = [item.text]
        elif self._frame.section is not None and item == self._frame.section.closer and self._in_section:
            self._close_section(item)
        elif self._opens_reasoning(item):
            self._state = _REASONING
            self._draft.reasoning.begin_block()
            if self._label is not None:
                self._label.begin()
        else:
            self._end_beginning()
            self._text(item.text)

    def _opens_reasoning(self, item: Marker) -> bool:
        if self._reasoning_markers is None or item != self._reasoning_markers.opener:
            return False
        # Spelled out in ordinary tokens, it means reasoning at the very beginning only; later it is quoted text.
        return item.token_id is not None or (
            self._draft.content.is_blank and not self._draft.tool_calls and not self._beginning
        )

    def _marker_in_call(self, item: Marker) -> None:
        frame = self._frame
        if item == frame.closer:
            self._end_call(closer=item.text)
        elif item == frame.opener or (frame.section is not None and item == frame.section.closer and self._in_section):
            if frame.closer is None:
                self._end_call(closer="")
            else:
                self._spill_call(ReplyFlag.UNCLOSED_TOOL_CALL, closer="")
            self._marker_in_content(item)
        else:
            self._call_body.append(item)

    def _end_what_is_open(self, finish: Finish, stop_string: str | None) -> None:
        """The reply has ended: by itself, or it was cut."""
        flag = ReplyFlag.MALFORMED_TOOL_CALL if finish.reason is FinishReason.STOP else ReplyFlag.UNCLOSED_TOOL_CALL
        closer = self._frame.closer
        if self._state is _REASONING:
            self._end_label()
            self._draft.flag(ReplyFlag.UNCLOSED_REASONING)
        elif self._state is _CALL and (closer is None or stop_string == closer.text):
            self._end_call(closer="", flag=flag)
        elif self._state is _CALL:
            self._spill_call(ReplyFlag.UNCLOSED_TOOL_CALL, closer="")
        self._end_beginning()
        self._spill_section(flag=flag)

    def _decide_beginning(self, text: str) -> None:
        """Whether the reply so far, `text`, is a call without an opener: yes, no, or not yet certain."""
        written = "".join(text.split())
        if any(written.startswith(beginning) for beginning in self._frame.beginnings):
            self._beginning = None
            self._open_call("")
            self._call_body.append(text)
        elif len(text) < _MAX_UNDECIDED_CHARACTERS and any(b.startswith(written) for b in self._frame.beginnings):
            self._beginning = text
        else:
            self._beginning = text
            self._end_beginning()

    def _end_beginning(self) -> None:
        """It is no call without an opener, or comes too late for one."""
        text, self._beginning = self._beginning, None
        if text:
            self._text(text)

    def _end_label(self) -> None:
        """No more reasoning: what waited may have been the label's beginning only."""
        if self._label is not None:
            self._draft.think(self._label.end())

    def _open_call(self, opener: str) -> None:
        self._state = _CALL
        self._call_opener = opener
        self._call_body = []

    def _end_call(self, *, closer: str, flag: ReplyFlag = ReplyFlag.MALFORMED_TOOL_CALL) -> None:
        written = self._calls.read(self._call_body, self._tools) if self._calls is not None else None
        if written is None:
            self._spill_call(flag, closer=closer)
            return
        for call in written:
            self._add_call(call)
        self._state = _CONTENT
        self._section_text = []
        self._draft.content.begin_block()

    def _add_call(self, written: WrittenCall) -> None:
        call_id = written.call_id
        if call_id is None or any(call.call_id == call_id for call in self._draft.tool_calls):
            call_id = self._call_ids.new_id()
        self._draft.call(call_id, written.name, written.arguments)

    def _spill_call(self, flag: ReplyFlag, *, closer: str) -> None:
        """What was to be a call becomes content, as written."""
        text = body_text(self._call_body)
        self._state = _CONTENT
        self._spill_section(flag=flag)
        # JSON without an opener that is no call is an answer in JSON.
        if self._call_opener or object_text(text) is None:
            self._draft.flag(flag)
        self._draft.say(self._call_opener + text + closer)

    def _close_section(self, item: Marker) -> None:
        if self._section_text:
            self._section_text.append(item.text)
            self._spill_section()
        else:
            self._draft.content.begin_block()
        self._in_section = False

    def _spill_section(self, *, flag: ReplyFlag = ReplyFlag.MALFORMED_TOOL_CALL) -> None:
        """A section without a good call so far becomes content, as written."""
        if not self._section_text:
            return
        text = "".join(self._section_text)
        self._section_text = []
        self._in_section = False
        self._draft.flag(flag)
        self._draft.say(text)


class _Label:
    """Takes the label that follows a reasoning opener out of the text behind it."""

    __slots__ = ("_held", "_label")

    def __init__(self, label: str) -> None:
        self._label = label
        self._held: str | None = None

    def begin(self) -> None:
        """An opener was read."""
        self._held = ""

    def skip(self, text: str) -> str:
        """`text` without the label; what may yet become it waits."""
        if self._held is None:
            return text
        self._held += text
        if self._label.startswith(self._held):
            return ""
        return self.end().removeprefix(self._label)

    def end(self) -> str:
        """What waited; the label alone is markup."""
        text, self._held = self._held or "", None
        return "" if text == self._label else text
