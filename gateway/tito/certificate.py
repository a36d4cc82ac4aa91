"""Certificates: for which shapes of a turn what the template adds does not depend on the conversation before it.

A shape is tried on made-up conversations in several contexts and with several kinds of text (`shapes`). Where the
suffix learned behind a short made-up history equals the one learned in context every time, and history is never
rewritten but for its reasoning, turns of that shape need one short render instead of two long ones; where it differs in
numbers only, which count what lies before, a frame that counts along (`frames`). Nothing here knows any model family;
what a certificate promises is audited on real turns (`prompt`), and withdrawn when it was wrong.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Generic, NamedTuple, TypeVar

from gateway.contracts.errors import TemplateRaised
from gateway.contracts.generation import JsonValue
from gateway.contracts.records import SegmentReason
from gateway.tito.conversation import Conversation
from gateway.tito.history import History, compare_history
from gateway.tito.junction import Junction, TurnTokens, learn_junction, local_suffix
from gateway.tito.parsing.reasoning import ReasoningMarkers
from gateway.tito.shapes import Shape, conversations, conversations_behind_systems, example_tools
from gateway.tito.template import ChatTemplate

F = TypeVar("F")

_MAX_SHAPES = 4_096
_MAX_PENDING = 64
_AUDITED_FIRST = 3
_AUDITED_EVERY = 64

_NUMBER = re.compile(r"\d+")


class Verdict(StrEnum):
    """What a turn of some shape comes to, worst last."""

    APPENDS = "append-only"
    REASONING_DROPPED = "old reasoning dropped"
    RAISES = "raises"
    OTHER_STOP = "other stop"
    REWRITTEN = "rewritten"
    DROPPED_MESSAGE = "dropped message"
    UNCERTIFIED = "uncertified"


_ORDER = {verdict: i for i, verdict in enumerate(Verdict)}
_VERDICT_OF_REASON = {
    SegmentReason.DROPPED_MESSAGE: Verdict.DROPPED_MESSAGE,
    SegmentReason.TEMPLATE_RAISED: Verdict.RAISES,
}
_VERDICT_OF_HISTORY = {
    History.KEPT: Verdict.APPENDS,
    History.REASONING_DROPPED: Verdict.REASONING_DROPPED,
    History.REWRITTEN: Verdict.REWRITTEN,
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One made-up conversation of a shape. stop: text of the token that ends its reply, "" if none was found.

    local: what follows it is the same behind a short made-up history; numbered: but for numbers.
    """

    verdict: Verdict
    stop: str
    local: bool = False
    numbered: bool = False


@dataclass(frozen=True)
class ShapeCertificate:
    """All that was tried for one shape. behind_systems: with a system's words in the middle of what lies before."""

    shape: Shape
    cells: tuple[Cell, ...]
    behind_systems: tuple[Cell, ...] = ()

    @cached_property
    def verdict(self) -> Verdict:
        """The worst of its conversations; those that the template refuses count only if it refuses all."""
        verdicts = [cell.verdict for cell in self._rendered] or [Verdict.RAISES]
        return max(verdicts, key=lambda verdict: _ORDER[verdict])

    @property
    def stops(self) -> tuple[str, ...]:
        """The tokens that ended its replies."""
        return tuple(dict.fromkeys(cell.stop for cell in self.cells if cell.stop))

    @cached_property
    def stop(self) -> str | None:
        """The one token that ends replies of this shape where no full render is needed, else None."""
        stops = self.stops
        suffices = self.verdict in (Verdict.APPENDS, Verdict.REASONING_DROPPED) and all(
            cell.local or cell.numbered for cell in self._rendered
        )
        return stops[0] if suffices and len(stops) == 1 else None

    @cached_property
    def is_numbered(self) -> bool:
        """Whether numbers in what follows depend on the conversation: a short render does not do, a frame may."""
        return not all(cell.local for cell in self._rendered)

    @cached_property
    def holds_behind_systems(self) -> bool:
        """Whether it also speaks for conversations in whose middle a system or a developer says something: some
        templates show that with the last question, wherever it was said."""
        rendered = [cell for cell in self.behind_systems if cell.verdict is not Verdict.RAISES]
        return all(
            _ORDER[cell.verdict] <= _ORDER[self.verdict]
            and cell.stop == self.stop
            and (cell.local or (cell.numbered and self.is_numbered))
            for cell in rendered
        )

    @property
    def _rendered(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.verdict is not Verdict.RAISES]


def certify_shape(
    template: ChatTemplate,
    shape: Shape,
    arguments: Mapping[str, JsonValue],
    *,
    tokens: TurnTokens,
    reasoning: ReasoningMarkers | None,
) -> ShapeCertificate:
    """Try a shape: some 20 short conversations, a few renders each. arguments: the template's."""
    cells, behind_systems = (
        tuple(
            _cell(template, conversation, num_messages, tokens=tokens, reasoning=reasoning)
            for conversation, num_messages in made
        )
        for made in (conversations(shape, arguments), conversations_behind_systems(shape, arguments))
    )
    return ShapeCertificate(shape, cells, behind_systems)


def _cell(
    template: ChatTemplate,
    conversation: Conversation,
    num_messages: int,
    *,
    tokens: TurnTokens,
    reasoning: ReasoningMarkers | None,
) -> Cell:
    try:
        full_text = template.render(conversation)
    except TemplateRaised:
        return Cell(Verdict.RAISES, "")
    junction = learn_junction(template, conversation, num_messages=num_messages, full_text=full_text, tokens=tokens)
    if not isinstance(junction, Junction):
        return Cell(_VERDICT_OF_REASON.get(junction, Verdict.UNCERTIFIED), "")
    if not junction.is_engine_stop:
        return Cell(Verdict.OTHER_STOP, junction.stop)
    history = compare_history(
        template,
        conversation,
        num_messages=num_messages,
        full_text=full_text,
        end=junction.stop + junction.suffix,
        reasoning=reasoning,
    )
    suffix = local_suffix(
        template, conversation, num_messages=num_messages, stop=junction.stop, tools=stand_in_tools(conversation)
    )
    local = suffix == junction.suffix
    numbered = not local and suffix is not None and _NUMBER.sub("#", suffix) == _NUMBER.sub("#", junction.suffix)
    return Cell(_VERDICT_OF_HISTORY[history], junction.stop, local, numbered)


def stand_in_tools(conversation: Conversation) -> tuple[JsonValue, ...]:
    """Tools for a short render: one, if the conversation has any."""
    return example_tools(1) if conversation.tools else ()


def is_audited(num_uses: int) -> bool:
    """Whether what relied on evidence for the `num_uses`-th time is built the long way too."""
    return num_uses <= _AUDITED_FIRST or num_uses % _AUDITED_EVERY == 0


class ShapeKey(NamedTuple):
    """A shape under given template arguments, which are named by their JSON text."""

    shape: Shape
    arguments: str


class CertificateBook(Generic[F]):
    """Certificates by shape, each with what makes it quick (`frames`): those known, asked for, withdrawn.

    Bounded, safe between threads.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[ShapeKey, _Entry[F]] = OrderedDict()
        self._pending: OrderedDict[ShapeKey, Mapping[str, JsonValue]] = OrderedDict()
        self._unframed: OrderedDict[ShapeKey, Mapping[str, JsonValue]] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, key: ShapeKey, arguments: Mapping[str, JsonValue]) -> tuple[ShapeCertificate, F | None] | None:
        """A shape's certificate and frame; an unknown one is asked for (`take_pending`), None for now."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                if len(self._pending) < _MAX_PENDING:
                    self._pending[key] = arguments
                return None
            if entry.withdrawn:
                return None
            if not entry.framed and entry.certificate.stop is not None and len(self._unframed) < _MAX_PENDING:
                entry.framed = True
                self._unframed[key] = arguments
            return entry.certificate, entry.frame

    def use(self, key: ShapeKey) -> bool:
        """Count a turn that relied on a certificate; whether it should be audited."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:  # gone in the meantime
                return True
            entry.num_uses += 1
            return is_audited(entry.num_uses)

    def withdraw(self, key: ShapeKey) -> None:
        """Never rely on this certificate again."""
        with self._lock:
            if key in self._entries:
                self._entries[key].withdrawn = True

    def put(self, key: ShapeKey, certificate: ShapeCertificate) -> None:
        """Add a certificate; the oldest goes where there are too many."""
        with self._lock:
            self._pending.pop(key, None)
            self._entries.setdefault(key, _Entry(certificate))
            if len(self._entries) > _MAX_SHAPES:
                self._entries.popitem(last=False)

    def put_frame(self, key: ShapeKey, frame: F | None) -> None:
        """Add a certificate's frame, None for one that has none; its first turns are audited again."""
        with self._lock:
            if key in self._entries and frame is not None:
                self._entries[key].frame, self._entries[key].num_uses = frame, 0

    def take_pending(self) -> tuple[ShapeKey, Mapping[str, JsonValue]] | None:
        """A shape that was asked for and is not known yet."""
        with self._lock:
            return self._pending.popitem(last=False) if self._pending else None

    def take_unframed(self) -> tuple[ShapeKey, Mapping[str, JsonValue], str] | None:
        """A shape in use without a frame, and the stop of its certificate."""
        with self._lock:
            while self._unframed:
                key, arguments = self._unframed.popitem(last=False)
                stop = self._entries[key].certificate.stop if key in self._entries else None
                if stop is not None:
                    return key, arguments, stop
            return None

    @property
    def has_pending(self) -> bool:
        """Whether shapes wait to be certified, or certificates to be framed."""
        return bool(self._pending or self._unframed)


@dataclass(slots=True)
class _Entry(Generic[F]):
    """framed: its frame was asked for."""

    certificate: ShapeCertificate
    frame: F | None = None
    framed: bool = False
    num_uses: int = 0
    withdrawn: bool = False
