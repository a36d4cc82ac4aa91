"""One request and its reply on a connection: ASGI's messages, and whether the client is still there.

Who waits for a turn has to hear at once that its client has gone. The connection tells the exchange, which cancels the
task that attends to it: no request has a second task that only listens. Before the last piece of a reply leaves the
socket itself is asked, because the end of a connection may lie there unread.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any, Literal, cast

import msgspec
from starlette.types import ASGIApp, Message, Scope
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HEADER_RE, HEADER_VALUE_RE, STATUS_LINE, RequestResponseCycle

WITH_BODY = "verbatim.with_body"
"""Set in the message that begins a reply by who sends the first piece of its body before doing anything else."""

WHOLE_BODY = "verbatim.whole_body"
"""The body of a reply, in the message that begins it, where an `Exchange` sends it: nothing follows."""

_START = "http.response.start"
_EXCHANGE = "verbatim.exchange"
_ESTABLISHED = b"\x01"
"""`tcpi_state` of Linux's `struct tcp_info`, its first byte, as long as neither side has closed (net/tcp_states.h)."""

_IN_LOWER_CASE = frozenset((b"date", b"server", b"content-length", b"content-type", b"x-session-id", b"x-request-id"))
"""Names that nearly every reply has."""

_log = logging.getLogger("uvicorn.error")
_NO_ACCESS_LOG = logging.getLogger("uvicorn.access")


class _News(msgspec.Struct, eq=False):
    """An `asyncio.Event` as far as uvicorn uses it, made only where somebody waits: few bodies come in pieces, few
    replies are not read, and nearly a kilobyte for each would be kept for every turn under way."""

    is_news: bool = False
    _event: asyncio.Event | None = None

    def set(self) -> None:
        """There is some."""
        self.is_news = True
        if self._event is not None:
            self._event.set()

    def clear(self) -> None:
        """It is known."""
        self.is_news = False
        if self._event is not None:
            self._event.clear()

    async def wait(self) -> Literal[True]:
        """Until there is."""
        if self.is_news:
            return True
        self._event = self._event or asyncio.Event()
        return await self._event.wait()


class Flow(FlowControl):
    """uvicorn's, of which nearly nobody waits until a reply is read."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.read_paused = False
        self.write_paused = False
        self._is_writable_event = cast(asyncio.Event, _News(is_news=True))


class Exchange(RequestResponseCycle):
    """uvicorn's cycle, which knows its client. descriptor: of the connection's socket."""

    # As uvicorn sets them for each.
    logger = _log
    access_logger = _NO_ACCESS_LOG
    access_log = False
    disconnected = False
    body: bytes | bytearray = b""  # type: ignore[assignment]  # bytes as long as one piece has come
    more_body = True
    response_started = False
    response_complete = False
    chunked_encoding: bool | None = None
    expected_content_length = 0
    # Ours.
    _attendant: asyncio.Task[Any] | None = None
    _was_left = False
    _held = b""

    def __init__(
        self,
        scope: Scope,
        transport: asyncio.Transport,
        flow: FlowControl,
        *,
        descriptor: int,
        default_headers: list[tuple[bytes, bytes]],
        expect_100_continue: bool,
        keep_alive: bool,
        on_response: Callable[[], None],
    ) -> None:
        self.scope = scope  # type: ignore[assignment]  # uvicorn's own name for the same
        self.transport = transport
        self.flow = flow
        self.default_headers = default_headers
        self.message_event: _News = _News()  # type: ignore[assignment]
        self.on_response = on_response
        self.keep_alive = keep_alive
        self.waiting_for_100_continue = expect_100_continue
        self._descriptor = descriptor
        scope[_EXCHANGE] = self

    async def run_asgi(self, app: ASGIApp) -> None:  # type: ignore[override]  # uvicorn's own name for the same
        """As uvicorn's; at its end it lets go of what refers to it, so that it goes at once and not when the collector
        looks for cycles, which stops everything for as long as there is much in memory."""
        try:
            await app(self.scope, self.receive, self.send)  # type: ignore[arg-type]
        except BaseException:  # noqa: BLE001  # nobody is above it who would hear
            _log.exception("Exception in ASGI application\n")
            await self._break_off()
        else:
            if not (self.response_complete or self.disconnected):
                _log.error(
                    "ASGI callable returned without %s response.", "completing" if self.response_started else "starting"
                )
                await self._break_off()
        finally:
            self.on_response = _nothing
            self._attendant = None
            self.scope[_EXCHANGE] = None  # type: ignore[literal-required]

    async def _break_off(self) -> None:
        """Nobody goes on with the reply."""
        if self.response_started:
            self.transport.close()
        else:
            await self.send_500_response()

    async def send(self, message: Message) -> None:  # type: ignore[override]  # uvicorn's own name for the same
        """As uvicorn's, but for the head of a reply whose body follows at once (`WITH_BODY`): both leave in one write.

        A write is a packet and a wake-up of its reader, the dearest part of a short reply.
        """
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        kind = message["type"]
        if self.response_complete or kind != ("http.response.body" if self.response_started else _START):
            raise RuntimeError(f"unexpected ASGI message {kind!r}")
        if kind != _START:
            self._send_body(message.get("body", b""), more=message.get("more_body", False))
            return
        self.response_started = True
        self.waiting_for_100_continue = False
        head = self._head(message["status"], [*self.default_headers, *message.get("headers", ())])
        if WHOLE_BODY in message:
            self._held = head
            self._send_body(message[WHOLE_BODY], more=False)
        elif WITH_BODY in message:
            self._held = head
        else:
            self.transport.write(head)

    def _head(self, status: int, headers: list[tuple[bytes, bytes]]) -> bytes:
        lines = [STATUS_LINE[status]]
        closes = False
        for name, value in headers:
            if name not in _IN_LOWER_CASE:
                name = name.lower()
            if name == b"content-length" and self.chunked_encoding is None:
                self.expected_content_length = int(value)
                self.chunked_encoding = False
            elif name == b"transfer-encoding" and value.lower() == b"chunked":
                self.expected_content_length = 0
                self.chunked_encoding = True
            elif name == b"connection" and b"close" in [token.strip() for token in value.lower().split(b",")]:
                self.keep_alive = False
                closes = True
            lines += (name, b": ", value, b"\r\n")
        if HEADER_RE.search(b"".join(lines[1::4])) or HEADER_VALUE_RE.search(b"".join(lines[3::4])):
            raise RuntimeError("a header of the reply holds what no header may")
        end = b"\r\n"
        if self.chunked_encoding is None and self.scope["method"] != "HEAD" and status not in (204, 304):
            self.chunked_encoding = True
            end = b"transfer-encoding: chunked\r\n\r\n"
        if not self.keep_alive and not closes:
            end = b"connection: close\r\n" + end
        lines += (end,)
        return b"".join(lines)

    def _send_body(self, body: bytes, *, more: bool) -> None:
        head, self._held = self._held, b""
        if self.scope["method"] == "HEAD":
            self.expected_content_length, body = 0, b""
        elif self.chunked_encoding:
            chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            body = chunk if more else chunk + b"0\r\n\r\n"
        else:
            self.expected_content_length -= len(body)
            if self.expected_content_length < 0:
                raise RuntimeError("the body of the reply is longer than its Content-Length")
        self.transport.write(head + body if head else body)
        if more:
            return
        if self.expected_content_length:
            raise RuntimeError("the body of the reply is shorter than its Content-Length")
        self.response_complete = True
        if not self.message_event.is_news:
            self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()

    def attend(self) -> None:
        """From now on the task that calls is cancelled when the client goes, at once if it has gone."""
        self._attendant = asyncio.current_task()
        if self.disconnected or self.transport.is_closing():
            self.client_left()

    def client_left(self) -> None:
        """The connection is lost before the reply is complete."""
        self.disconnected = True
        self.message_event.set()
        if self._attendant is not None and not self._was_left:
            self._was_left = True
            self._attendant.cancel()

    def excuse(self) -> bool:
        """Whether a cancellation of the calling task came from the client's leaving alone; it then counts no more."""
        return self._was_left and self._attendant is not None and self._attendant.uncancel() == 0

    @property
    def is_gone(self) -> bool:
        """Whether the connection is known to be closed: what is sent on it now goes nowhere."""
        return self.disconnected or self.transport.is_closing()

    def has_client(self) -> bool:
        """Whether the client is there still, as the socket knows it now.

        Asking the socket's state costs a microsecond; polling it, or letting the loop do so, would besides let go of
        the interpreter's lock, which another thread may then keep for five milliseconds.
        """
        if self.disconnected or self.transport.is_closing():
            return False
        # Of a socket that somebody else owns; uvloop's own view of it would open another descriptor.
        view = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM, 0, self._descriptor)
        try:
            return view.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == _ESTABLISHED
        finally:
            view.detach()

    def whole_body(self) -> bytes | None:
        """The body if all of it has come, None where it has to be received."""
        if self.more_body or self.disconnected:
            return None
        body, self.body = bytes(self.body), b""
        return body


def exchange_of(scope: Scope) -> Exchange | None:
    """The exchange of a request that came over a `BoundedConnection`."""
    found: Exchange | None = scope.get(_EXCHANGE)
    return found


def is_there(scope: Scope) -> bool:
    """Whether the client of a request is there still; servers other than ours do not tell."""
    exchange = exchange_of(scope)
    return exchange is None or exchange.has_client()


def is_gone(scope: Scope) -> bool:
    """Whether the connection of a request is known to be closed."""
    exchange = exchange_of(scope)
    return exchange is not None and exchange.is_gone


def _nothing() -> None: ...
