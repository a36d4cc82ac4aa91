"""Server-sent events out of the pieces of an answer, and routing rows out of the events before they are whole.

    pieces of a socket ─▶ EventReader ─▶ data of each event, JSON
                              └─ base64 of `"routed_experts":"…"` ─▶ RoutingSink, piece by piece

The event that ends a long request carries its routing rows as one JSON string: 67 MB for 32k tokens of a model with 48
layers and 8 experts a token. Waiting for it whole, parsing it and decoding it would take that memory four times over
and hold the event loop for half a second. So the string goes to a sink as it arrives, and a short word stands in the
JSON where it was. Only an event that is still unfinished after `BIG_LINE_BYTES` is looked through for such a string:
small events, which are nearly all, cost nothing more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Protocol

BIG_LINE_BYTES = 2**16
_PIECE_BYTES = 2**18

_DATA = b"data: "
_KEY = b'"routed_experts"'
_TO_VALUE = re.compile(rb"[ \t\r]*(?::[ \t\r]*(.)?)?", re.DOTALL)
_TEXT = re.compile(rb'[^"\\\n]*(?:\\(?:u[0-9a-fA-F]{4}|["\\/bfnrt])[^"\\\n]*)*')
"""What a JSON string holds up to its end, a line's end, or an escape that is not whole or that JSON has not."""
_ESCAPE_BYTES = len(rb"\u0000")


class RoutingSink(Protocol):
    """Takes the characters of one string after another."""

    def begin(self) -> str:
        """A string begins, and replaces one of before; returns the ASCII word that stands for it in the event."""
        ...

    def feed(self, text: bytes) -> None:
        """Its next characters, never many at once. Raises nothing: what is wrong with them is told when the rows are
        asked for."""
        ...


class EventReader:
    """Server-sent events out of the pieces of a stream, cut anywhere.

    Lines end with LF or CRLF, an event with an empty line. The `data` lines of one event are joined with LF; comments
    (`:`, which keep a connection alive) and other fields (`event`, `id`, `retry`) say nothing to us.

    routing: takes the string of each `routed_experts` in a line of at least `big_line_bytes`; None: it stays in place.
    """

    __slots__ = ("_big_line_bytes", "_buffered", "_data", "_held", "_inside_rows", "_looked", "_routing")

    def __init__(self, routing: RoutingSink | None = None, *, big_line_bytes: int = BIG_LINE_BYTES) -> None:
        self._routing = routing
        self._big_line_bytes = big_line_bytes
        self._buffered = bytearray()
        self._data: list[bytes] = []
        self._looked = 0  # up to here the unfinished line holds no rows
        self._inside_rows = False
        self._held = b""  # the beginning of an escape inside the rows

    @property
    def inside_event(self) -> bool:
        """Whether an event has begun and is not complete."""
        return bool(self._data) or self._buffered.startswith(b"data:")

    def read(self, piece: bytes) -> list[bytes]:
        """The data of the events that this piece completes."""
        if len(piece) <= _PIECE_BYTES:
            is_between = not self._buffered and not self._data and not self._inside_rows
            if is_between and (events := _whole_events(piece)) is not None:
                return events
            return self._read(piece)
        starts = range(0, len(piece), _PIECE_BYTES)  # else it might hold a big event whole
        return [data for start in starts for data in self._read(piece[start : start + _PIECE_BYTES])]

    def _read(self, piece: bytes) -> list[bytes]:
        if self._inside_rows:
            piece = self._behind_rows(piece)
        return list(self._completed(piece))

    def _completed(self, piece: bytes) -> Iterator[bytes]:
        """The same of a piece that may be anything."""
        searched = len(self._buffered)
        self._buffered += piece
        start = 0
        while (end := self._buffered.find(b"\n", max(start, searched))) >= 0:
            first, stop = start, end - self._buffered.endswith(b"\r", start, end)
            start = end + 1
            self._looked = 0
            if self._buffered.startswith(b"data:", first, stop):
                first += len(b"data: " if self._buffered.startswith(_DATA, first, stop) else b"data:")
                self._data.append(bytes(memoryview(self._buffered)[first:stop]))  # its one copy, it may be long
            elif first == stop and self._data:
                data, self._data = b"\n".join(self._data).strip(), []
                if data:
                    yield data
        del self._buffered[:start]
        if self._routing is not None and not self._inside_rows and len(self._buffered) >= self._big_line_bytes:
            self._take_rows(self._routing)

    def _take_rows(self, routing: RoutingSink) -> None:
        """Have the sink take what the unfinished line holds of rows."""
        while (start := self._start_of_rows()) is not None:
            text = bytes(memoryview(self._buffered)[start:])
            del self._buffered[start:]
            self._buffered += routing.begin().encode()
            self._looked = len(self._buffered)
            self._inside_rows = True
            self._buffered += self._behind_rows(text)
            if self._inside_rows:
                return

    def _start_of_rows(self) -> int | None:
        """Behind the opening quote of the next value of ours in the unfinished line."""
        line = self._buffered
        while (key := line.find(_KEY, self._looked)) >= 0:
            value = _TO_VALUE.match(line, key + len(_KEY))
            assert value is not None
            if value.end() == len(line) and value[1] is None:
                self._looked = key  # cut before the value
                return None
            self._looked = key + len(_KEY)
            # Behind a backslash it is the end of somebody's text: inside of one the second quote would have one too.
            if value[1] == b'"' and line[key - 1 : key] != b"\\":
                return value.end()
        self._looked = max(self._looked, len(line) - len(_KEY) + 1)
        return None

    def _behind_rows(self, piece: bytes) -> bytes:
        """Feed the sink; what of this piece belongs to the event again, from the closing quote on."""
        assert self._routing is not None
        end = piece.find(b'"')
        text = piece if end < 0 else piece[:end]
        if self._held or b"\\" in text or b"\n" in text:
            return self._behind_escaped(self._held + piece)
        self._routing.feed(text)
        if end < 0:
            return b""
        self._inside_rows = False
        return piece[end:]

    def _behind_escaped(self, piece: bytes) -> bytes:
        """The same where the text has escapes (some write `/` as `\\/`), or where this is no JSON after all."""
        assert self._routing is not None
        found = _TEXT.match(piece)
        assert found is not None
        rest = piece[found.end() :]
        self._routing.feed(_unescaped(found[0]))
        self._held = rest if rest.startswith(b"\\") and len(rest) < _ESCAPE_BYTES and b"\n" not in rest else b""
        if not rest or self._held:
            return b""
        # At a quote the rows are over; at anything else the event is no JSON, and will be refused as a whole.
        self._inside_rows = False
        return rest


def _whole_events(piece: bytes) -> list[bytes] | None:
    """The data of events of one line each, if a piece is just that, as nearly all are; a tenth of the general way."""
    if not piece.startswith(_DATA) or b"\r" in piece:
        return None
    events, start, length = [], len(_DATA), len(piece)
    # Line by line: a search for one byte is twenty times as fast as counting them, or as one for several.
    while (end := piece.find(b"\n", start)) >= 0 and piece.startswith(b"\n", end + 1):
        if data := piece[start:end].strip():
            events.append(data)
        if end + 2 == length:
            return events
        start = end + 2 + len(_DATA)
        if not piece.startswith(_DATA, end + 2):
            return None
    return None


def _unescaped(text: bytes) -> bytes:
    """The characters of a part of a JSON string that holds whole escapes only."""
    plain = text.replace(rb"\/", b"/")
    if b"\\" not in plain:
        return plain
    # Half a character may be at a cut; none that is not ASCII is base64 anyway.
    return str(json.loads(f'"{text.decode("ascii", "replace")}"', strict=False)).encode("utf-8", "surrogatepass")
