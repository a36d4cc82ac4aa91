"""HTTP/1.1 to one origin, on an asyncio protocol and httptools: what a client of engines needs, at a fraction of a
general library's cost.

It promises: idle connections are kept for a while and used again; a wait ends at the time that the caller gives it, for
which each connection has one timer at most, which looks at the time when it rings instead of being set anew with every
piece; of an answer that nobody reads only a bounded part is taken in. Chunked bodies, bodies with a length and bodies
that end with their connection are read; informational answers are passed over; gzip and deflate are undone where a
proxy compresses although it was asked not to.

It does not: follow redirects, keep cookies, speak through a proxy, send bodies in pieces, ask with HEAD, or translate
errors. Those are OSError (TimeoutError for connecting; BrokenOff for a connection that ended too early) and NotHttp.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import httptools
from multidict import CIMultiDict
from yarl import URL

_HIGH_WATER_BYTES = 256 * 1024
"""Of a body that waits to be read; above it the connection is not read from."""
_MAX_HEAD_BYTES = 64 * 1024
"""Looked at while a head is not whole: one that came in one piece is no longer than such a piece."""
_MAX_REST_BYTES = 64 * 1024
_REST_SECONDS = 1.0
"""How much may follow what the reader of an answer needed, and for how long, until its connection is closed instead of
being used again."""
_CLOSING_SECONDS = 1.0

_APART_BYTES = 64 * 1024
"""A larger body is not copied to stand behind its head."""

_GATHER_SECONDS = 5.0
_GATHER_BYTES = 32 * 1024
"""How long, and up to how much, pieces that nobody is in a hurry for wait to be read together."""


class BrokenOff(ConnectionError):
    """The other side ended the connection before its answer was whole."""


class NotHttp(Exception):
    """What came is not HTTP as the protocol has it, or not as it was asked for."""


class Pace(Protocol):
    """Whether whoever reads an answer wants each piece at once (`gateway.contracts.generation.Pace`)."""

    is_live: bool
    on_live: Callable[[], None] | None
    first_at: float | None


class _Decoder(Protocol):
    def decompress(self, data: bytes, /) -> bytes: ...


class Http1Client:
    """Connections to the origin of `url`; safe for any number of requests at once, on one event loop.

    headers: sent with every request. keepalive_seconds: how long an idle connection may be used again.
    """

    def __init__(
        self, url: str, *, headers: Mapping[str, str], connect_timeout_seconds: float, keepalive_seconds: float
    ) -> None:
        self._url = URL(url)
        host, port = self._url.host, self._url.port
        if self._url.scheme not in ("http", "https") or not host or not port:
            raise NotHttp(f"{url} is no address of the kind http://host:port")
        self._address = (host, port)
        self._headers = {"Host": _host(self._url), "Accept": "*/*"} | _basic_authorization(self._url) | dict(headers)
        self._connect_timeout_seconds = connect_timeout_seconds
        self._keepalive_seconds = keepalive_seconds
        self._tls = _tls_context() if self._url.scheme == "https" else None
        self._heads: dict[tuple[str, str], bytes] = {}
        self._open: set[Connection] = set()
        self._idle: dict[Connection, float] = {}
        """When each became idle; the newest stands last."""
        self._sweep: asyncio.TimerHandle | None = None
        self._closed = 0
        self._emptied: asyncio.Future[None] | None = None

    async def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        fresh: bool = False,
    ) -> Connection:
        """Send a request; its answer is read from the connection, which `finish` or `close` gives back.

        path: with its query, behind the path of the address. body: JSON. fresh: on a new connection. Raises OSError,
        TimeoutError, and ValueError for headers that would be more than one line.
        """
        head = self._heads.get((method, path)) or self._head(method, path)
        if headers:
            head += _lines(headers)
        num_bytes = 0
        if body is not None:
            num_bytes = len(body)
            head += b"Content-Type: application/json\r\nContent-Length: %d\r\n" % num_bytes
        connection = None if fresh else self._reusable()
        if connection is None:
            connection = await self._connect()
        connection.begin()
        if body is None or num_bytes <= _APART_BYTES:
            connection.transport.write(head + b"\r\n" + (body or b""))
        else:
            connection.transport.write(head + b"\r\n")
            connection.transport.write(body)
        return connection

    async def aclose(self) -> None:
        """Close all connections; requests under way break off."""
        self._closed += 1
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        for connection in list(self._open):
            connection.end()
        if self._open:  # the event loop tells of each in its next rounds
            self._emptied = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._emptied], timeout=_CLOSING_SECONDS)

    def _reusable(self) -> Connection | None:
        """The connection that was used last, unless that was too long ago: then all others were longer ago."""
        while self._idle:
            connection, since = self._idle.popitem()
            if connection.now() >= since + self._keepalive_seconds:
                connection.end()
            elif not connection.transport.is_closing():
                return connection
        return None

    async def _connect(self) -> Connection:
        loop, closed = asyncio.get_running_loop(), self._closed
        async with asyncio.timeout(self._connect_timeout_seconds):
            _, connection = await loop.create_connection(lambda: Connection(self, loop), *self._address, ssl=self._tls)
        if closed != self._closed:
            connection.end()
        if connection.transport.is_closing():
            raise BrokenOff("the connection was closed at once")
        return connection

    def _head(self, method: str, path: str) -> bytes:
        target = URL(str(self._url.with_user(None)).rstrip("/") + path).raw_path_qs
        head = f"{method} {target} HTTP/1.1\r\n".encode("ascii") + _lines(self._headers)
        self._heads[method, path] = head
        return head

    def opened(self, connection: Connection) -> None:
        """A connection is there."""
        self._open.add(connection)

    def lost(self, connection: Connection) -> None:
        """A connection is gone."""
        self._open.discard(connection)
        self._idle.pop(connection, None)
        if not self._open and self._emptied is not None and not self._emptied.done():
            self._emptied.set_result(None)

    def release(self, connection: Connection, now: float) -> None:
        """A connection may be used again."""
        self._idle[connection] = now
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(self._keepalive_seconds, self._close_old)

    def _close_old(self) -> None:
        loop = asyncio.get_running_loop()
        self._sweep = None
        limit = loop.time() - self._keepalive_seconds
        for connection in [connection for connection, since in self._idle.items() if since <= limit]:
            del self._idle[connection]
            connection.end()
        if self._idle:
            oldest = next(iter(self._idle.values()))
            self._sweep = loop.call_at(oldest + self._keepalive_seconds, self._close_old)


class Connection(asyncio.Protocol):
    """One connection, and the answer that it is reading.

    After `Http1Client.send`: `head`, then `status` and `headers`, then `pieces` until there are none; `finish` when the
    answer, or what was needed of it, has been read, `close` for everything else.
    """

    __slots__ = (
        "_buffered",
        "_client",
        "_complete",
        "_decoder",
        "_error",
        "_fields",
        "_finished",
        "_gathering",
        "_going_on",
        "_going_on_at",
        "_head_bytes",
        "_keep",
        "_loop",
        "_may_wait",
        "_pace",
        "_parser",
        "_paused",
        "_pieces",
        "_rings_at",
        "_timer",
        "_until_end",
        "_wait_until",
        "_waiter",
        "has_head",
        "has_received",
        "heard_at",
        "is_reused",
        "now",
        "status",
        "transport",
    )

    def __init__(self, client: Http1Client, loop: asyncio.AbstractEventLoop) -> None:
        self._client = client
        self._loop = loop
        self.now = loop.time
        """The loop's time."""
        self._parser: Any = None
        self._timer: asyncio.TimerHandle | None = None
        self._gathering: asyncio.TimerHandle | None = None
        self._going_on = b""
        self._going_on_at = 0
        self._may_wait = False
        self._rings_at = 0.0
        self._waiter: asyncio.Future[bool] | None = None
        self._wait_until = 0.0
        self._error: Exception | None = None
        self._paused = False
        self._pieces: list[bytes] = []
        self._complete = True
        """Between two answers nothing is expected."""
        self._finished = True
        self.transport: asyncio.Transport
        self.is_reused = False
        self.begin_answer()

    # -- what the client and the reader of an answer call

    def begin(self) -> None:
        """A request is about to be sent."""
        self.is_reused = self._parser is not None
        if self._parser is None:
            self._parser = httptools.HttpResponseParser(self)
            # As tolerant as aiohttp, which proxies are tried with: line ends without CR, blanks behind a chunk's size.
            self._parser.set_dangerous_leniencies(
                lenient_headers=True, lenient_optional_cr_before_lf=True, lenient_spaces_after_chunk_size=True
            )
        self._complete = self._finished = False
        self.has_received = False
        self.heard_at = self._loop.time()
        self._pace: Pace | None = None
        self.begin_answer()

    def begin_answer(self) -> None:
        """Nothing is known of the answer yet, or an informational one was not it."""
        self.status = 0
        self.has_head = False
        self._fields: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._buffered = 0
        self._keep = False
        self._until_end = False
        self._decoder: _Decoder | None = None

    @property
    def headers(self) -> Mapping[str, str]:
        """The answer's, whatever the case of their names."""
        return CIMultiDict((name.decode("latin-1"), value.decode("latin-1")) for name, value in self._fields)

    async def head(self, until: float) -> bool:
        """Wait for status and headers; False if they have not come by `until` (the loop's time)."""
        while not self.has_head:
            if not await self.arrival(until):
                return False
        return True

    async def pieces(self, until: float) -> list[bytes] | None:
        """All of the body that has come since the last call, [] at its end; None if nothing came by `until`."""
        while (pieces := self.taken()) is None:
            if not await self.arrival(until):
                return None
        return pieces

    def taken(self) -> list[bytes] | None:
        """As `pieces`, without waiting: None if nothing has come."""
        if not self._pieces:
            return [] if self._complete else None
        pieces, self._pieces = self._pieces, []
        self._buffered = 0
        if self._paused:
            self._go_on()
        return pieces

    def gather(self, pace: Pace, going_on: bytes) -> None:
        """Of this answer, a piece of one event that holds `going_on` need not be read at once while `pace` is not live,
        nor its head, if it is no refusal.

        It waits some seconds for others to be read with: who reads is woken once for all of them. Any other piece, much
        that waits, the end of the answer, and who begins to listen wake at once. When the first piece came is noted.
        """
        self._pace, self._going_on, self._going_on_at = pace, going_on, 0
        pace.on_live = self._gathered

    async def arrival(self, until: float) -> bool:
        """Wait until something comes, be it the end; False if nothing has by `until`. Raises what ended the request."""
        if self._error is not None:
            raise self._error
        if until <= self._loop.time():
            return False
        self._waiter = self._loop.create_future()
        if self._timer is not None and self._rings_at <= until:  # nearly always: it rings in vain, and looks again
            self._wait_until = until
        else:
            self._ring(until)
        try:
            return await self._waiter
        finally:
            self._waiter = None

    def finish(self) -> None:
        """Of this answer no more is needed; its connection is used again once all of it has come."""
        if self._finished:
            return
        self._finished = True
        self._forget_pace()
        self._pieces.clear()
        self._buffered = 0
        if self._complete or self._error is not None:
            self._settle()
            return
        self._go_on()
        self._ring(self._loop.time() + _REST_SECONDS)

    def close(self) -> None:
        """End the request now, unless its answer was finished with."""
        if not self._finished:
            self.end()

    def end(self) -> None:
        """End the connection now; an answer under way breaks off."""
        self._finished = True
        self._fail(BrokenOff("the connection was closed on this side"))

    def _go_on(self) -> None:
        if self._paused:
            self._paused = False
            if not self.transport.is_closing():
                self.transport.resume_reading()

    # -- waiting

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(True)

    def _ring(self, until: float) -> None:
        """Have the timer ring by `until`: one that rings earlier is left to, and looks again."""
        self._wait_until = until
        if self._timer is not None:
            if self._rings_at <= until:
                return
            self._timer.cancel()
        self._rings_at = until
        self._timer = self._loop.call_at(until, self._rung)

    def _rung(self) -> None:
        self._timer = None
        waits = self._waiter is not None and not self._waiter.done()
        if not waits and (self._complete or not self._finished):
            return  # between two answers, or while the reader is busy
        if self._loop.time() < self._wait_until:
            self._ring(self._wait_until)
        elif not waits:
            self.end()  # the rest of an answer did not come
        elif self._waiter is not None:
            self._waiter.set_result(bool(self._pieces))

    def _gathered(self) -> None:
        if self._gathering is not None:
            self._gathering.cancel()
            self._gathering = None
        if self._pieces:
            self._wake()

    def _forget_pace(self) -> None:
        """It refers to this object, and outlives the answer."""
        if self._pace is not None:
            self._pace.on_live = None
            self._pace = None

    # -- what the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self.transport = cast(asyncio.Transport, transport)
        self._client.opened(self)

    def data_received(self, data: bytes) -> None:
        """Bytes of the answer."""
        if self._complete:
            self._fail(NotHttp("bytes that no request asked for"))
            return
        self.has_received = True
        self.heard_at = self._loop.time()
        self._may_wait = self._pace is not None and not self._pace.is_live
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail(NotHttp("the answer switches to another protocol"))
        except httptools.HttpParserError as error:
            self._fail(NotHttp(str(error.__context__ or error)))  # a callback's refusal, or the parser's own
        if not self.has_head:
            self._head_bytes += len(data)
            if self._head_bytes > _MAX_HEAD_BYTES:
                self._fail(NotHttp(f"headers of more than {_MAX_HEAD_BYTES} bytes"))
            return  # nobody waits for half a head, and who waits is told of a failure
        if self._may_wait and self._buffered <= _GATHER_BYTES:
            if self._pieces and self._pace is not None and self._pace.first_at is None:
                self._pace.first_at = self.heard_at
            if self._gathering is None:
                self._gathering = self._loop.call_later(_GATHER_SECONDS, self._gathered)
            return
        if (waiter := self._waiter) is not None and not waiter.done():
            waiter.set_result(True)
        if self._finished:
            if self._is_whole():
                self._settle()
            elif self._buffered > _MAX_REST_BYTES:
                self.end()
        elif self._buffered > _HIGH_WATER_BYTES and not self._paused and not self._is_whole():
            self._paused = True
            self.transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is over: the end of a body that has no other, else of the request."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._gathering is not None:
            self._gathering.cancel()
            self._gathering = None
        self._forget_pace()
        if not self._complete and self._error is None:
            if exc is None and self.has_head and self._until_end:
                self._complete = True
                self._keep = False
            else:
                self._error = exc if isinstance(exc, OSError) else BrokenOff("the other side closed the connection")
        self._parser = None  # it refers to this object
        self._client.lost(self)
        self._wake()

    # -- what the parser calls

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header, or one trailer, which says nothing to us."""
        if not self.has_head:
            self._fields.append((name, value))

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self.status = self._parser.get_status_code()
        if self.status < 200:
            return
        self._until_end = self.status not in (204, 304)
        self._may_wait = self._may_wait and self.status == 200
        for name, value in self._fields:
            match name.lower():
                case b"content-length":
                    self._until_end = False
                case b"transfer-encoding":
                    self._until_end = value != b"chunked" and not value.lower().rstrip().endswith(b"chunked")
                case b"content-encoding":
                    self._decoder = _decoder(value)
        self.has_head = True

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        if self._decoder is not None:
            body = self._decoder.decompress(body)
        self._buffered += len(body)
        if body and not self._finished:
            self._pieces.append(body)
        if self._may_wait and not self._is_going_on(body):
            self._may_wait = False

    def _is_going_on(self, body: bytes) -> bool:
        """Whether a piece is one event that says so."""
        if body.find(b"\n", 0, -2) >= 0:
            return False
        # Events that say all tokens again say it later each time, so what was passed over is not searched again.
        found = body.find(self._going_on, self._going_on_at)
        if found < 0:
            found = body.find(self._going_on, 0, self._going_on_at + len(self._going_on))
        self._going_on_at = max(found, 0)
        return found >= 0

    def on_message_complete(self) -> None:
        """The answer is whole, unless it was an informational one."""
        if self.has_head:
            self._complete = True
            self._may_wait = False
            self._keep = self._parser.should_keep_alive()
        else:
            self.begin_answer()

    def on_message_begin(self) -> None:
        """One answer begins, or one too many."""
        if self._complete:
            raise NotHttp("more than one answer to one request")

    # -- ends

    def _is_whole(self) -> bool:
        """By a call: what the parser calls may have changed it."""
        return self._complete

    def _settle(self) -> None:
        """Use the connection again, or close it."""
        is_usable = self._error is None and self._keep and not self.transport.is_closing()
        if is_usable and not self.transport.get_write_buffer_size():
            self._client.release(self, self._loop.time())
        else:
            self.end()

    def _fail(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
        self.transport.abort()
        self._wake()


def _decoder(encoding: bytes) -> _Decoder | None:
    match encoding.strip().lower():
        case b"" | b"identity":
            return None
        case b"gzip" | b"x-gzip" | b"deflate":
            return zlib.decompressobj(zlib.MAX_WBITS | 32)
    raise NotHttp(f"the answer is encoded as {encoding!r}, although it was asked to be plain")


def _host(url: URL) -> str:
    return url.host_port_subcomponent or ""


def _basic_authorization(url: URL) -> dict[str, str]:
    if url.user is None:
        return {}
    credentials = f"{url.user}:{url.password or ''}".encode()
    return {"Authorization": f"Basic {base64.b64encode(credentials).decode()}"}


def _lines(headers: Mapping[str, str]) -> bytes:
    """Headers as they are sent; raises ValueError for one that would be more than one line."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    if lines.count("\r") != len(headers) or lines.count("\n") != len(headers) or "\0" in lines:
        raise ValueError("a header holds a line end")
    return lines.encode()


def _tls_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context
