"""Reading requests and writing JSON replies, the same way on every route."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias
from urllib.parse import unquote

from fastapi import Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from gateway.contracts.errors import InvalidRequest, PayloadTooLarge, RequestTimeout, UnsupportedEncoding
from gateway.contracts.generation import JsonValue
from gateway.routes.exchange import WHOLE_BODY, WITH_BODY, exchange_of, is_gone, is_there
from gateway.routes.limits import FREE_BYTES, BodyAccount, body_account, read_timeout_seconds
from gateway.wire.fields import check_nesting
from gateway.wire.json_text import JsonText, dump_json, load_json_object

HttpHeaders: TypeAlias = Sequence[tuple[bytes, bytes]]
"""As they leave: names in lower case, values that need no check."""

MAX_ID_CHARACTERS = 512
"""Of a session's id."""

PIECE_BYTES = 2**18
"""Of a reply in one write."""

_NOTHING: Mapping[str, str] = {}

_SHORT_BYTES = 2**16
"""What a connection takes without waiting for its reader (the write buffer's high-water mark)."""


async def read_body(request: Request, *, max_bytes: int) -> bytes:
    """The whole body; raises PayloadTooLarge for one that is longer than `max_bytes`, UnsupportedEncoding for one that
    is compressed, RequestTimeout for one that takes too long, TooManyRequests where bodies hold all there is for them.
    """
    body = body_at_hand(request, max_bytes=max_bytes)
    return await awaited_body(request, max_bytes=max_bytes) if body is None else body


async def awaited_body(request: Request, *, max_bytes: int) -> bytes:
    """As `read_body`, for one that is not at hand."""
    account = _announced(request, max_bytes)
    limit_seconds = read_timeout_seconds(request.scope)
    try:
        async with asyncio.timeout(limit_seconds):
            return await _whole_body(request, account, max_bytes)
    except TimeoutError as error:
        raise RequestTimeout(f"the body did not come within {limit_seconds:g} s") from error
    except ClientDisconnect as error:
        raise InvalidRequest("the body broke off") from error


def body_at_hand(request: Request, *, max_bytes: int) -> bytes | None:
    """The whole body if it came with its head, as nearly all do; None where it has to be waited for. Raises as
    `read_body`."""
    encoding = request.headers.get("content-encoding", "")
    if encoding and (encoding := encoding.strip().lower()) not in ("", "identity"):
        raise UnsupportedEncoding(f"the body's content-encoding is {encoding[:40]!r}; send it as it is (identity)")
    exchange = exchange_of(request.scope)
    body = None if exchange is None else exchange.whole_body()
    if body is not None and ((size := len(body)) > FREE_BYTES or size > max_bytes):
        _grow(body_account(request.scope), size, max_bytes)
    return body


def _announced(request: Request, max_bytes: int) -> BodyAccount:
    """The account of a request whose body may have the length that its head tells."""
    account = body_account(request.scope)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal():
        if int(declared) > max_bytes:
            raise _too_long(max_bytes)
        account.announce(int(declared))
    return account


async def _whole_body(request: Request, account: BodyAccount, max_bytes: int) -> bytes:
    pieces: list[bytes] = []
    size = 0
    async for piece in request.stream():
        size += len(piece)
        _grow(account, size, max_bytes)
        pieces.append(piece)
    return b"".join(pieces)


def _grow(account: BodyAccount, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise _too_long(max_bytes)
    account.grow(size)


def _too_long(max_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the body is longer than {max_bytes} bytes")


async def read_fields(request: Request, *, max_bytes: int, known: Sequence[str]) -> dict[str, JsonValue]:
    """A JSON object of `known` fields, {} for an empty body; raises InvalidRequest naming a field that is not known."""
    body = await read_body(request, max_bytes=max_bytes)
    fields = load_json_object(body) if body.strip() else {}
    check_nesting(fields)
    unknown = sorted(fields.keys() - set(known))
    if unknown:
        raise InvalidRequest(f"{', '.join(unknown)}: unknown field; known are {', '.join(known)}")
    return fields


def typed(fields: Mapping[str, JsonValue], name: str, kind: type | tuple[type, ...], words: str) -> JsonValue:
    """A field's value, None if absent or null; raises InvalidRequest if it is not `words`, or beyond 64 bits."""
    value = fields.get(name)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise InvalidRequest(f"{name}: the number is out of range")
    if value is None or (isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)):
        return value
    raise InvalidRequest(f"{name}: expected {words}")


def json_reply(value: JsonValue, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON reply."""
    return Response(dump_json(value), status, dict(headers or {}), media_type="application/json")


class _Prepared(Response):
    """A reply whose headers are as they leave; the framework would make them anew, and check each."""

    status_code = 200
    background = None
    body = b""

    raw_headers: list[tuple[bytes, bytes]]

    def _start(self) -> Message:
        """What begins the reply; its body follows at once."""
        return {"type": "http.response.start", "status": 200, "headers": self.raw_headers, WITH_BODY: True}


class JsonReply(_Prepared):
    """A JSON reply of any size, sent as fast as it is read; `delivered` runs when its last byte has left, or `lost` if
    its client goes before."""

    def __init__(
        self, text: JsonText, headers: HttpHeaders, delivered: Callable[[], None], lost: Callable[[], None]
    ) -> None:
        first = text.parts[0]
        whole = first if type(first) is bytes and len(text.parts) == 1 else None
        num_bytes = text.num_bytes if whole is None else len(whole)
        self._short = whole if num_bytes <= _SHORT_BYTES else None
        self.raw_headers = [*headers, (b"content-length", b"%d" % num_bytes), (b"content-type", b"application/json")]
        self._text = text
        self._delivered = delivered
        self._lost = lost

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send, then tell; the last piece waits until the client is known to be there still.

        A short reply is one message, and one write with its head.
        """
        complete = False
        try:
            exchange, body = exchange_of(scope), self._short
            if body is not None and exchange is not None and not exchange.flow.write_paused and exchange.has_client():
                start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers, WHOLE_BODY: body}
                await send(start)
                complete = True
            else:
                complete = await self._sent_in_pieces(scope, send)
        finally:
            # At once: who has read the end may finish the session before this response has wound up.
            if complete:
                self._delivered()
            else:
                self._lost()

    async def _sent_in_pieces(self, scope: Scope, send: Send) -> bool:
        """Whether the client was there for the last of them."""
        await send(self._start())
        last = b""
        for piece in self._pieces():
            if last:
                await send({"type": "http.response.body", "body": last, "more_body": True})
                if is_gone(scope):
                    return False
            last = piece
        if not is_there(scope):
            return False
        await send({"type": "http.response.body", "body": last})
        return True

    def _pieces(self) -> Iterator[bytes]:
        """The last one is short: what is written before it, the client has to have read."""
        for piece in self._text.pieces():
            for part in slices(piece):
                if len(part) > _SHORT_BYTES:
                    yield part[:-1]
                    yield part[-1:]
                elif part:
                    yield part


class Frame(NamedTuple):
    """A piece of a streamed reply."""

    data: bytes
    is_last: bool = False


class FrameReply(_Prepared):
    """A streamed reply; its frames end with it, also those that nobody asked for any more. `lost` runs if the client
    goes before any of them was asked for: they tell what becomes of the others."""

    def __init__(self, frames: AsyncGenerator[Frame, None], headers: HttpHeaders, lost: Callable[[], None]) -> None:
        self.raw_headers = [*headers, (b"content-type", b"text/event-stream; charset=utf-8")]
        self._frames = frames
        self._lost = lost

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send, then close the frames."""
        begun = False
        try:
            await send(self._start())
            begun = True
            is_last = False
            async for data, is_last in self._frames:
                await send({"type": "http.response.body", "body": data, "more_body": not is_last})
            if not is_last:
                await send({"type": "http.response.body", "body": b""})
        finally:
            if not begun:
                self._lost()
            await self._frames.aclose()


def gathered(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in few pieces: small ones that are there together leave in one write."""
    waiting = b""
    for piece in pieces:
        if len(waiting) + len(piece) <= _SHORT_BYTES:
            waiting += piece
            continue
        if waiting:
            yield waiting
        waiting = piece
    if waiting:
        yield waiting


def slices(data: bytes) -> Iterator[bytes]:
    """Pieces of a size that one write may have: between two of them a slow reader is waited for."""
    if len(data) <= PIECE_BYTES:
        yield data
        return
    view = memoryview(data)
    for start in range(0, len(data), PIECE_BYTES):
        yield bytes(view[start : start + PIECE_BYTES])


def path_id(request: Request, name: str = "session_id") -> str | None:
    """An id of the path, percent-decoded (see `SessionPaths`), or None where the route has none."""
    value = request.scope.get("path_params", _NOTHING).get(name)
    return unquote(value) if value is not None and "%" in value else value


def checked_id(session_id: str) -> str:
    """A session's id; raises InvalidRequest for one that is empty or too long."""
    if not 1 <= len(session_id) <= MAX_ID_CHARACTERS:
        raise InvalidRequest(f"session_id: expected 1 to {MAX_ID_CHARACTERS} characters, got {len(session_id)}")
    return session_id
