"""Reading requests and writing JSON replies, the same way on every route."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from urllib.parse import unquote

from fastapi import Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from gateway.contracts.errors import InvalidRequest, PayloadTooLarge, RequestTimeout, UnsupportedEncoding
from gateway.contracts.generation import JsonValue
from gateway.routes.connections import client_is_gone
from gateway.routes.limits import body_account, read_timeout_seconds
from gateway.wire.fields import check_nesting
from gateway.wire.json_text import JsonText, dump_json, load_json_object

MAX_ID_CHARACTERS = 512
"""Of a session's id."""

_PIECE_BYTES = 2**18


async def read_body(request: Request, *, max_bytes: int) -> bytes:
    """The whole body; raises PayloadTooLarge for one that is longer than `max_bytes`, UnsupportedEncoding for one that
    is compressed, RequestTimeout for one that takes too long, TooManyRequests where bodies hold all there is for them.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise UnsupportedEncoding(f"the body's content-encoding is {encoding[:40]!r}; send it as it is (identity)")
    limit_seconds = read_timeout_seconds(request.scope)
    try:
        async with asyncio.timeout(limit_seconds):
            return await _whole_body(request, max_bytes)
    except TimeoutError as error:
        raise RequestTimeout(f"the body did not come within {limit_seconds:g} s") from error
    except ClientDisconnect as error:
        raise InvalidRequest("the body broke off") from error


async def _whole_body(request: Request, max_bytes: int) -> bytes:
    too_long = PayloadTooLarge(f"the body is longer than {max_bytes} bytes")
    account = body_account(request.scope)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal():
        if int(declared) > max_bytes:
            raise too_long
        account.announce(int(declared))
    pieces: list[bytes] = []
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size > max_bytes:
            raise too_long
        account.grow(size)
        pieces.append(piece)
    return b"".join(pieces)


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


class JsonReply(Response):
    """A JSON reply of any size, sent as fast as it is read; `delivered` runs when its last byte has left, or `lost` if
    its client goes before."""

    def __init__(
        self, text: JsonText, headers: Mapping[str, str], delivered: Callable[[], None], lost: Callable[[], None]
    ) -> None:
        sized = {**headers, "Content-Length": str(text.num_bytes)}
        super().__init__(headers=sized, media_type="application/json")
        self._text = text
        self._delivered = delivered
        self._lost = lost

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send, then tell; the last byte waits until the client is known to be there still."""
        complete = False
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            last = b""
            for piece in self._pieces():
                await send({"type": "http.response.body", "body": last + piece[:-1], "more_body": True})
                if client_is_gone(scope):
                    return
                last = piece[-1:]
            await asyncio.sleep(0)  # a connection that is closed by now is known to be
            if not client_is_gone(scope):
                await send({"type": "http.response.body", "body": last})
                complete = True
        finally:
            # At once: who has read the end may finish the session before this response has wound up.
            if complete:
                self._delivered()
            else:
                self._lost()

    def _pieces(self) -> Iterator[bytes]:
        return (part for piece in self._text.pieces() for part in slices(piece) if part)


def slices(data: bytes) -> Iterator[bytes]:
    """Pieces of a size that one write may have: between two of them a slow reader is waited for."""
    if len(data) <= _PIECE_BYTES:
        yield data
        return
    view = memoryview(data)
    for start in range(0, len(data), _PIECE_BYTES):
        yield bytes(view[start : start + _PIECE_BYTES])


def path_id(request: Request, name: str = "session_id") -> str | None:
    """An id of the path, percent-decoded (see `SessionPaths`), or None where the route has none."""
    value = request.path_params.get(name)
    return None if value is None else unquote(value)


def checked_id(session_id: str) -> str:
    """A session's id; raises InvalidRequest for one that is empty or too long."""
    if not 1 <= len(session_id) <= MAX_ID_CHARACTERS:
        raise InvalidRequest(f"session_id: expected 1 to {MAX_ID_CHARACTERS} characters, got {len(session_id)}")
    return session_id
