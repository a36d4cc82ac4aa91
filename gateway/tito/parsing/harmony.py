"""gpt-oss replies (the harmony format): messages in channels, each with a header.

    <|channel|>analysis<|message|>REASONING<|end|>
    <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{ARGUMENTS}<|call|>
    <|start|>assistant<|channel|>final<|message|>CONTENT<|return|>

A message with a recipient is a call, whatever its channel; without one, `analysis` is reasoning and all else content.
What is no message (text without a header, a call that is malformed or cut) is content as written. The state machine
works on the marker ids of this model's own tokenizer; the library for the format brings a vocabulary of its own.
"""

from __future__ import annotations

import re
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
from gateway.tito.parsing.calls import PROBE_NAME
from gateway.tito.parsing.draft import ReplyDraft
from gateway.tito.parsing.json_text import object_text
from gateway.tito.parsing.markers import Marker, Markup, Scanned, TokenScanner, marker
from gateway.tito.parsing.reasoning import ReasoningMarkers
from gateway.tito.parsing.reply import OpenMarkup
from gateway.tito.tokenizer import ChatTokenizer

HARMONY = "harmony"

_START, _CHANNEL, _MESSAGE, _CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
_END, _CALL, _RETURN = "<|end|>", "<|call|>", "<|return|>"
_MARKERS = (_START, _CHANNEL, _MESSAGE, _CONSTRAIN, _END, _CALL, _RETURN)
_EDGES = (_START, _END, _CALL, _RETURN)
_REASONING_CHANNEL, _CHANNELS = "analysis", ("analysis", "commentary", "final")
_ROLE = re.compile(r"(?:<\|start\|>)?\s*(\w*)")
_FIRST_WORD = re.compile(r"\A\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_HEADER_SO_FAR = re.compile(
    r"(?:<\|start\|>)?\s*\w*(?:\s+(?:t|to|to=[^\s<]*\s*)?)?"
    r"(?:<\|channel\|>\s*\w*(?:\s+(?:t|to|to=[^\s<]*))?(?:\s*<\|constrain\|>)?\s*[\w/.+-]*\s*)?"
)
"""What a header may look like before it is complete: role, recipient, channel, recipient, kind of content."""
_BARE_HEADER = re.compile(r"(?:<\|start\|>\s*(?P<role>\w*)\s*)?(?:<\|channel\|>\s*(?P<channel>\w*)\s*)?")
_NO_TOOLS = frozenset(("all", "assistant", "user"))
_MAX_HEADER_CHARACTERS = 256
_LAST_PROMPT_IDS = 256
"""A header of the message that a prompt leaves open stands within these."""


def writes_harmony(shown_call: str, tokenizer: ChatTokenizer) -> bool:
    """Whether a template that writes calls like this is of this format; if it writes none, the vocabulary decides."""
    if f"to=functions.{PROBE_NAME}" in shown_call and _MESSAGE in shown_call:
        return True
    return PROBE_NAME not in shown_call and all(tokenizer.token_id(t) is not None for t in (_CHANNEL, _MESSAGE, _CALL))


@dataclass(frozen=True)
class HarmonyParsing:
    """How a gpt-oss model's replies are read."""

    tokenizer: ChatTokenizer
    name: str = HARMONY

    @cached_property
    def markers(self) -> tuple[Marker, ...]:
        """All of this model's markup."""
        return tuple(marker(self.tokenizer, text) for text in _MARKERS)

    @cached_property
    def reasoning(self) -> ReasoningMarkers:
        """The header of a reasoning message, and its end."""
        opener = Marker(f"{_CHANNEL}{_REASONING_CHANNEL}{_MESSAGE}", None)
        return ReasoningMarkers(opener, marker(self.tokenizer, _END))

    def opens_reasoning(self, prompt_ids: Sequence[int] | TokenIds) -> bool:
        """Whether a prompt, all of its ids, ends inside a reasoning message."""
        return self.start(prompt_ids=prompt_ids, tools=()).open_markup.in_reasoning

    def start(
        self,
        *,
        prompt_ids: Sequence[int] | TokenIds,
        tools: Sequence[JsonValue],
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
    ) -> HarmonyParser:
        """A parser for one reply, as `ReplyParsing.start` has it; it begins in the message that the prompt opened."""
        scanner = TokenScanner(self._markup, stop_token_ids=stop_token_ids, stop=stop)
        parser = HarmonyParser(scanner, calls_tools=bool(tools))
        parser.begin(self._open_message(prompt_ids))
        return parser

    @cached_property
    def _markup(self) -> Markup:
        return Markup(self.tokenizer, self.markers)

    @cached_property
    def _edge_ids(self) -> frozenset[int | None]:
        """None among them for one that is no token."""
        return frozenset(found.token_id for found in self.markers if found.text in _EDGES)

    def _open_message(self, prompt_ids: Sequence[int] | TokenIds) -> list[Scanned]:
        """The prompt's last message from its start marker on; empty where none is open."""
        last = [int(token_id) for token_id in prompt_ids[-_LAST_PROMPT_IDS:]]
        edge_ids = self._edge_ids
        if None not in edge_ids:  # each ends whatever stands before it, so the last one is where reading begins
            at = len(last) - 1
            while at >= 0 and last[at] not in edge_ids:
                at -= 1
            last = last[at:] if at >= 0 else []
        scanner = TokenScanner(self._markup, stop_token_ids=(), stop=())
        scanned = [item for at in range(len(last)) for item in scanner.take(last, at, at + 1)[0]]
        scanned += scanner.finish(None)
        edges = [i for i, item in enumerate(scanned) if isinstance(item, Marker) and item.text in _EDGES]
        return scanned[edges[-1] :] if edges else []


def _is_bare_header(text: str) -> bool:
    """Whether this is a header without a recipient, as far as it got: markup that says nothing."""
    found = _BARE_HEADER.fullmatch(text)
    if found is None:
        return False
    channel = found["channel"] or ""
    return "assistant".startswith(found["role"] or "") and any(known.startswith(channel) for known in _CHANNELS)


class _State(Enum):
    BETWEEN = "between"
    HEADER = "header"
    REASONING = "reasoning"
    CONTENT = "content"
    CALL = "call"


_BETWEEN, _HEADER, _REASONING, _CONTENT, _IN_CALL = _State  # an enum's own names are slow to read


class HarmonyParser:
    """Reads one reply; made by `HarmonyParsing.start`."""

    def __init__(self, scanner: TokenScanner, *, calls_tools: bool) -> None:
        self._scanner = scanner
        self._calls_tools = calls_tools
        self._state = _BETWEEN
        self._header = ""  # from the start or channel marker on, markers spelled out
        self._given_header = ""  # what of it stands in the prompt
        self._recipient = ""
        self._call_body: list[str] = []
        self._draft = ReplyDraft(holds_space=False)

    def begin(self, open_message: Sequence[Scanned]) -> None:
        """Start inside the message that a prompt left open: its start marker, and what of it is there already."""
        self._read(open_message)
        # What the prompt holds of a message's text is no part of the reply; only the state is.
        self._given_header = self._header
        self._draft = ReplyDraft(holds_space=False)
        self._call_body = []

    def feed(self, token_ids: Sequence[int]) -> list[ReplyDelta]:
        """Deltas that the next sampled tokens make certain; may be empty."""
        draft, at, end = self._draft, 0, len(token_ids)
        while at < end:
            # In a header, and between messages, each token may decide what follows.
            one_by_one = self._state is _BETWEEN or self._state is _HEADER
            was_reasoning, start = self._state is _REASONING, at
            scanned, at = self._scanner.take(token_ids, start, start + 1 if one_by_one else end)
            if scanned:
                self._read(scanned)
            if was_reasoning or self._state is _REASONING:
                draft.num_reasoning_tokens += at - start
        return draft.take_deltas()

    def finish(self, finish: Finish) -> tuple[list[ReplyDelta], ParsedReply]:
        """The last deltas, and the whole reply; the parser takes no more tokens."""
        self._read(self._scanner.finish(finish.matched if isinstance(finish.matched, str) else None))
        if self._state is _REASONING:
            self._draft.flag(ReplyFlag.UNCLOSED_REASONING)
        elif self._state is _IN_CALL and finish.reason is FinishReason.STOP:
            self._end_message("")
        elif self._state is _IN_CALL:
            self._spill_call(ReplyFlag.UNCLOSED_TOOL_CALL, "")
        elif self._state is _HEADER and not _is_bare_header(self._own_header()):
            self._spill_header(ReplyFlag.UNCLOSED_TOOL_CALL if _RECIPIENT.search(self._header) else None)
        return self._draft.finish()

    @property
    def open_markup(self) -> OpenMarkup:
        """A header that was cut needs its end; whatever else is open, the turn's stop token closes."""
        in_own_header = self._state is _HEADER and bool(self._own_header())
        return OpenMarkup(in_reasoning=self._state is _REASONING, closing_text=_MESSAGE if in_own_header else "")

    def _read(self, scanned: Iterable[Scanned]) -> None:
        for item in scanned:
            if isinstance(item, str):
                self._text(item)
            elif item.text in (_START, _CHANNEL):
                self._begin_header(item.text)
            elif item.text in (_END, _CALL, _RETURN):
                self._end_message(item.text)
            elif item.text == _MESSAGE and self._state is _HEADER:
                self._open_message()
            else:
                self._text(item.text)

    def _text(self, text: str) -> None:
        if self._state is _HEADER:
            self._header += text
            if not _HEADER_SO_FAR.fullmatch(self._own_header()) or len(self._header) > _MAX_HEADER_CHARACTERS:
                self._spill_header(self._broken_header())
        elif self._state is _IN_CALL:
            self._call_body.append(text)
        elif self._state is _REASONING:
            self._draft.think(text)
        elif self._state is _CONTENT:
            self._draft.say(text)
        elif not text.isspace():
            self._open_content()
            self._draft.say(text)

    def _begin_header(self, marker_text: str) -> None:
        if self._state is _HEADER and marker_text == _CHANNEL and _CHANNEL not in self._header:
            self._header += marker_text
            return
        self._end_message("")
        self._state = _HEADER
        self._header, self._given_header = marker_text, ""

    def _open_message(self) -> None:
        """The header is complete: what follows is reasoning, content or a call's arguments."""
        role = _ROLE.match(self._header)
        channel = _FIRST_WORD.findall(self._header.partition(_CHANNEL)[2])
        recipient = _RECIPIENT.search(self._header)
        if role is not None and role.group(1) not in ("", "assistant"):
            self._spill_header(ReplyFlag.MALFORMED_TOOL_CALL, _MESSAGE)
        elif recipient is not None and recipient.group(1) not in _NO_TOOLS:
            self._recipient = recipient.group(1)
            self._open_call()
        elif channel == [_REASONING_CHANNEL]:
            self._state = _REASONING
            self._draft.reasoning.begin_block()
        elif (channel and channel[0] in _CHANNELS) or not self._own_header():
            self._open_content()
        else:
            self._spill_header(self._broken_header(), _MESSAGE)

    def _open_call(self) -> None:
        if self._calls_tools:
            self._state, self._call_body = _IN_CALL, []
        else:
            self._spill_header(None, _MESSAGE)  # without tools, call markup is text

    def _open_content(self) -> None:
        self._state = _CONTENT
        if not self._draft.content.is_blank:
            self._draft.content.begin_block()

    def _end_message(self, closer: str) -> None:
        if self._state is _HEADER and not _is_bare_header(self._own_header()):
            self._spill_header(self._broken_header())
        elif self._state is _IN_CALL:
            arguments = object_text("".join(self._call_body))
            if arguments is None:
                self._spill_call(ReplyFlag.MALFORMED_TOOL_CALL, closer)
            else:
                self._add_call(arguments)
        self._state = _BETWEEN

    def _add_call(self, arguments: str) -> None:
        name = self._recipient.removeprefix("functions.") or self._recipient
        self._draft.call(CallIdStyle.CALL_HEX.new_id(), name, arguments)

    def _spill_call(self, flag: ReplyFlag, closer: str) -> None:
        """What was to be a call becomes content, as written."""
        self._spill_header(flag, _MESSAGE + "".join(self._call_body) + closer)

    def _spill_header(self, flag: ReplyFlag | None, more: str = "") -> None:
        """What was to be a header becomes content, as far as the model wrote it, and `more` with it."""
        if flag is not None:
            self._draft.flag(flag)
        own = self._own_header()
        self._open_content()
        self._draft.say(own + more)

    def _broken_header(self) -> ReplyFlag | None:
        """Text without any markup is just text."""
        is_markup = _CHANNEL in self._own_header() or _RECIPIENT.search(self._own_header()) is not None
        return ReplyFlag.MALFORMED_TOOL_CALL if is_markup else None

    def _own_header(self) -> str:
        return self._header[len(self._given_header) :]
