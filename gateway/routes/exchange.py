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
from typing import Any

from starlette.types import ASGIApp, Message, Scope
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

_EXCHANGE = "verbatim.exchange"
_ESTABLISHED = b"\x01"
"""`tcpi_state` of Linux's `struct tcp_info`, its first byte, as long as neither side has closed (net/tcp_states.h)."""

_log = logging.getLogger("uvicorn.error")
_NO_ACCESS_LOG = logging.getLogger("uvicorn.access")


class Signal:
    """What of `asyncio.Event` a connection needs. An event's queue takes 0.8 KB before anybody waits in it, and every
    connection has two."""

    __slots__ = ("_is_set", "_waiters")

    def __init__(self, *, is_set: bool = False) -> None:
        self._is_set = is_set
        self._waiters: tuple[asyncio.Future[None], ...] = ()

    def set(self) -> None:
        """Who waits goes on."""
        self._is_set = True
        waiters, self._waiters = self._waiters, ()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def clear(self) -> None:
        """Who waits from now on, waits for the next time."""
        self._is_set = False

    async def wait(self) -> None:
        """Until it is set."""
        if not self._is_set:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters += (waiter,)
            await waiter


class Flow(FlowControl):
    """uvicorn's, with a `Signal`."""

    __slots__ = ()

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.read_paused = False
        self.write_paused = False
        self._is_writable_event = Signal(is_set=True)  # type: ignore[assignment]


class Exchange(RequestResponseCycle):
    """uvicorn's cycle, which knows its client. descriptor: of the connection's socket."""

    __slots__ = ("_attendant", "_descriptor", "_was_left")

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
        super().__init__(
            scope=scope,  # type: ignore[arg-type]  # uvicorn's own name for the same
            transport=transport,
            flow=flow,
            logger=_log,
            access_logger=_NO_ACCESS_LOG,
            access_log=False,
            default_headers=default_headers,
            message_event=Signal(),  # type: ignore[arg-type]
            expect_100_continue=expect_100_continue,
            keep_alive=keep_alive,
            on_response=on_response,
        )
        self._descriptor = descriptor
        self._attendant: asyncio.Task[Any] | None = None
        self._was_left = False
        scope["extensions"] = {_EXCHANGE: self}  # ASGI allows a server's own names

    async def run_asgi(self, app: ASGIApp) -> None:  # type: ignore[override]  # uvicorn's own name for the same
        """As uvicorn's; at its end it lets go of what refers to it, so that it goes at once and not when the collector
        looks for cycles, which stops everything for as long as there is much in memory."""
        try:
            await super().run_asgi(app)  # type: ignore[arg-type]
        finally:
            self._attendant = None
            self.scope["extensions"] = {}

    async def send(self, message: Message) -> None:  # type: ignore[override]  # uvicorn's own name for the same
        """As uvicorn does it, but for a frame of a stream, of which a reply has one for every few tokens."""
        if not (self.chunked_encoding and message.get("more_body")) or self.scope["method"] == "HEAD":
            await super().send(message)  # type: ignore[arg-type]
            return
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if not self.disconnected and (body := message["body"]):
            self.transport.write(b"%x\r\n%b\r\n" % (len(body), body))

    def attend(self) -> None:
        """From now on the task that calls is cancelled when the client goes, at once if it has gone."""
        self._attendant = asyncio.current_task()
        if self.is_gone:
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
        if self.is_gone:
            return False
        return _tcp_state(self._descriptor) == _ESTABLISHED

    def whole_body(self) -> bytes | None:
        """The body if all of it has come, None where it has to be received."""
        if self.more_body or self.disconnected:
            return None
        body, self.body = bytes(self.body), bytearray()
        return body


def exchange_of(scope: Scope) -> Exchange | None:
    """The exchange of a request that came over a `BoundedConnection`."""
    extensions: dict[str, Any] = scope.get("extensions") or {}
    found: Exchange | None = extensions.get(_EXCHANGE)
    return found


def is_there(scope: Scope) -> bool:
    """Whether the client of a request is there still; servers other than ours do not tell."""
    exchange = exchange_of(scope)
    return exchange is None or exchange.has_client()


def is_gone(scope: Scope) -> bool:
    """Whether the connection of a request is known to be closed."""
    exchange = exchange_of(scope)
    return exchange is not None and exchange.is_gone


def _tcp_state(descriptor: int) -> bytes:
    """Of a connection that somebody else owns; uvloop's own view of its socket would open another descriptor."""
    view = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=descriptor)
    try:
        return view.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
    finally:
        view.detach()
