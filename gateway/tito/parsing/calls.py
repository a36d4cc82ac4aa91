"""What a family of tool-call syntax must know; each family is one module beside this one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from msgspec import Struct

from gateway.contracts.generation import JsonValue
from gateway.tito.parsing.markers import Marker, Scanned
from gateway.tito.tokenizer import ChatTokenizer

PROBE_NAME = "probe_function"
"""The function of the call that is rendered to see how a template writes calls."""


class WrittenCall(Struct, frozen=True):
    """A call as the model wrote it; `arguments` is JSON text of an object, `call_id` None where it wrote none."""

    name: str
    arguments: str
    call_id: str | None = None


class Section(NamedTuple):
    """What stands around all calls of a reply."""

    opener: Marker
    closer: Marker


@dataclass(frozen=True, slots=True)
class CallFrame:
    """Where calls stand in a reply.

    closer: None where a call reaches to the next opener or the reply's end. inner: markup inside a call, which reaches
    `CallSyntax.read` as markers. section: optional, around several calls. beginnings: texts, written without white
    space, with which a whole reply that is a call may begin although no opener stands there.
    """

    opener: Marker | None = None
    closer: Marker | None = None
    inner: tuple[Marker, ...] = ()
    section: Section | None = None
    beginnings: tuple[str, ...] = ()

    @property
    def markers(self) -> tuple[Marker, ...]:
        """All of it."""
        pair = [marker for marker in (self.opener, self.closer) if marker is not None]
        return (*(self.section or ()), *pair, *self.inner)


class CallSyntax(Protocol):
    """One family's calls with one tokenizer's markers."""

    @property
    def frame(self) -> CallFrame:
        """Where its calls stand."""
        ...

    def read(self, body: Sequence[Scanned], tools: Sequence[JsonValue]) -> tuple[WrittenCall, ...] | None:
        """The calls that one frame holds (mostly one), None if it is malformed; never raises.

        tools: the request's definitions, for syntaxes in which only the schema tells "1" from 1.
        """
        ...


@dataclass(frozen=True, slots=True)
class CallFamily:
    """A syntax that can be chosen.

    written: matches a template's rendering of a call to `PROBE_NAME`. tokens: added tokens of which a vocabulary that
    knows this syntax has all; empty where they would not tell it from others.
    """

    name: str
    written: re.Pattern[str]
    tokens: tuple[str, ...]
    make: Callable[[ChatTokenizer], CallSyntax]


def body_text(body: Sequence[Scanned]) -> str:
    """A call's body as written."""
    if len(body) == 1 and type(whole := body[0]) is str:
        return whole
    return "".join(piece if isinstance(piece, str) else piece.text for piece in body)


def split_at(body: Sequence[Scanned], separator: Marker) -> tuple[str, str] | None:
    """The texts before and after the first `separator`, None if there is none."""
    for i, piece in enumerate(body):
        if piece == separator:
            return body_text(body[:i]), body_text(body[i + 1 :])
    return None
