"""Connections with deadlines: clients that send or read too slowly cannot hold memory, turns or sockets for ever.

uvicorn's protocol is bounded in three places: the head of a request has a limit of time and of size; what is left of a
body after its reply is thrown away for a limited time only; and a client that does not read its reply is cut off, which
routes see as a client that has gone. Bodies have their deadline in `bodies`, where routes read them.
What every request passes does here in one step what uvicorn does in several.
When another process takes over (`gateway.handover`), an idle connection goes there and its client notices nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, cast
from urllib.parse import unquote

import httptools
from starlette.types import Scope
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from gateway.contracts.errors import InvalidRequest, RequestTimeout, VerbatimError
from gateway.routes.exchange import Exchange, Flow
from gateway.wire.errors import error_body
from gateway.wire.json_text import dump_json

_log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 65_536
"""Of a request line and its headers, not counting the piece of data in which they begin."""

_FLUSH_SECONDS = 0.005

_Until: TypeAlias = Literal["head", "rest", "reader", "idle"]
"""What is waited for: the head of a request, what is left of its body, the reader of a reply, the next request."""


class BoundedConnection(HttpToolsProtocol):
    """One connection. read_timeout_seconds: for the head of a request, and for the rest of a body nobody reads;
    write_timeout_seconds: how long a reply may wait for its reader."""

    # With uvicorn's own they would be more than Python keeps in an object without a dict, of 1.2 KB.
    __slots__ = (
        "_deadlines",
        "_descriptor",
        "_give",
        "_head_bytes",
        "_in_message",
        "_read_timeout_seconds",
        "_served",
        "_write_timeout_seconds",
    )
    cycle: Exchange  # None before the first request, as in uvicorn
    pipeline: deque[Exchange]  # type: ignore[assignment]

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        read_timeout_seconds: float,
        write_timeout_seconds: float,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._read_timeout_seconds = read_timeout_seconds
        self._write_timeout_seconds = write_timeout_seconds
        self._deadlines = _Deadlines(self.loop)
        # Of requests that are sent ahead; a deque for each connection would be nearly a kilobyte of every turn.
        self.pipeline = cast("deque[Exchange]", ())
        self._served: Exchange | None = None
        self._descriptor = -1
        self._head_bytes: int | None = 0  # None: no head is being read
        self._in_message = False
        self._give: Callable[[int], None] | None = None

    def leave(self, give: Callable[[int], None]) -> None:
        """Give the connection to another process, as a descriptor, as soon as no request of it is under way."""
        self._give = give
        self._leave_if_idle()

    def stay(self) -> None:
        """Undo `leave`, if it is not given away yet."""
        self._give = None
        if self.cycle is None or self.cycle.response_complete:
            self.flow.resume_reading()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """The first request has to come."""
        super().connection_made(transport)
        self.flow = Flow(transport)
        self._descriptor = transport.get_extra_info("socket").fileno()
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """All deadlines end; who attends to a request hears that its client has gone."""
        self._deadlines.end()
        super().connection_lost(exc)
        if self._served is not None and not self._served.response_complete:
            self._served.client_left()

    def data_received(self, data: bytes) -> None:
        """Read on; a head that does not end is refused."""
        head_bytes = self._head_bytes
        self._deadlines.pop("idle", None)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            message = "Invalid HTTP request received."
            self.logger.warning(message)
            self.send_400_response(message)
        except httptools.HttpParserUpgrade:
            self._unsupported_upgrade_warning()
        if self._head_bytes is None:
            return
        if "head" not in self._deadlines:
            self._await_head()
        if head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(431, InvalidRequest(f"the head of the request is longer than {MAX_HEAD_BYTES} bytes"))

    def on_message_begin(self) -> None:
        """A request begins; `data_received` waits for the rest of its head where not all of that has come."""
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._in_message = True
        self._head_bytes = 0
        self._deadlines.pop("head", None)

    def on_headers_complete(self) -> None:
        """Its head is whole: it begins, or waits for those that were sent before it."""
        self._head_bytes = None
        self._deadlines.pop("head", None)
        parser, url = self.parser, httptools.parse_url(self.url)
        raw_path, version = url.path, parser.get_http_version()
        path = raw_path.decode("ascii")
        scope: Scope = {
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": version,
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,
            "root_path": self.root_path,
            "headers": self.headers,
            "state": self.app_state.copy(),
            "method": parser.get_method().decode("ascii"),
            "path": unquote(path) if "%" in path else path,
            "raw_path": raw_path,
            "query_string": url.query or b"",
        }
        before = self.cycle
        self.cycle = Exchange(
            scope,
            self.transport,
            self.flow,
            descriptor=self._descriptor,
            default_headers=self.server_state.default_headers,
            expect_100_continue=self.expect_100_continue,
            keep_alive=version != "1.0" and parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        if before is None or before.response_complete:
            self._start(self.cycle)
        else:
            self.flow.pause_reading()
            self.pipeline = self.pipeline or deque()
            self.pipeline.appendleft(self.cycle)

    def _start(self, exchange: Exchange) -> None:
        self._served = exchange  # `cycle` is already another one where requests are sent ahead
        task = self.loop.create_task(exchange.run_asgi(self.app))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def on_body(self, body: bytes) -> None:
        """A piece of it; one that comes alone, as nearly all do, is not copied."""
        exchange = self.cycle
        if exchange.response_complete:
            return
        if not exchange.body:
            exchange.body = body
        else:
            if isinstance(exchange.body, bytes):
                exchange.body = bytearray(exchange.body)
            exchange.body += body
        if len(exchange.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        exchange.message_event.set()

    def on_message_complete(self) -> None:
        """It is whole."""
        self._deadlines.pop("rest", None)
        self._in_message = False
        exchange = self.cycle
        if not exchange.response_complete:
            exchange.more_body = False
            if not exchange.message_event.is_news:
                exchange.message_event.set()
        if self._give is not None:
            self._leave_soon()

    def on_response_complete(self) -> None:
        """It is answered; the reader of the last bytes, and the rest of a body that nobody reads, are waited for."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            self._await_reader()
            self._leave_soon()
            return
        if self.flow.read_paused:
            self.flow.resume_reading()
        if self.pipeline:
            self._start(self.pipeline.pop())
        else:
            self._deadlines.set("idle", self.timeout_keep_alive, self.timeout_keep_alive_handler)
        if self.cycle.more_body and self.cycle.response_complete:
            self._deadlines.set("rest", self._read_timeout_seconds, self.transport.abort)
        if self._give is not None:
            self._leave_soon()

    def pause_writing(self) -> None:
        """The client does not read as fast as we write."""
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        """It has read on."""
        super().resume_writing()
        self._deadlines.pop("reader", None)

    def _unset_keepalive_if_required(self) -> None:
        self._deadlines.pop("idle", None)

    def timeout_keep_alive_handler(self) -> None:
        """Nothing more came; who has not even read the last reply is not waited for."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    @property
    def _is_idle(self) -> bool:
        """No byte of a request is here that is not answered."""
        if self._in_message or self.pipeline or self.transport.is_closing():
            return False
        return self.cycle is None or self.cycle.response_complete

    def _leave_soon(self) -> None:
        """Once whoever sent the reply has noted that it is delivered."""
        if self._give is not None and self._is_idle:
            self.flow.pause_reading()  # what comes from now on is for the other process
            self.loop.call_soon(self._leave_if_idle)

    def _leave_if_idle(self) -> None:
        if self._give is None or not self._is_idle:
            return
        self.flow.pause_reading()
        if self.transport.get_write_buffer_size():
            self.loop.call_later(_FLUSH_SECONDS, self._leave_if_idle)
            return
        give, self._give = self._give, None
        give(os.dup(self.transport.get_extra_info("socket").fileno()))
        self.transport.close()  # this process's descriptor only

    def _await_head(self) -> None:
        self._deadlines.set("head", self._read_timeout_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # of the next request, sent ahead
            self._await_head()
        elif self._head_bytes:
            message = f"the head of the request did not come within {self._read_timeout_seconds:g} s"
            self._refuse(408, RequestTimeout(message))
        else:
            self.transport.close()

    def _await_reader(self) -> None:
        self._deadlines.set("reader", self._write_timeout_seconds, self._reader_is_late)

    def _reader_is_late(self) -> None:
        _log.warning("a client did not read its reply for %g s and is cut off", self._write_timeout_seconds)
        self.transport.abort()

    def _refuse(self, status: int, error: VerbatimError) -> None:
        """Answer what is no request yet, and close."""
        self._head_bytes = None
        self._deadlines.pop("head", None)
        body = dump_json(error_body(error))
        phrase = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}[status]
        headers = [*self.server_state.default_headers, (b"content-type", b"application/json")]
        headers += [(b"content-length", b"%d" % len(body)), (b"connection", b"close")]
        lines = [f"HTTP/1.1 {status} {phrase}".encode(), *(name + b": " + value for name, value in headers)]
        self.transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + body)
        self.transport.close()
        self._await_reader()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP."""
        self._refuse(400, InvalidRequest(msg))


class _Deadlines(dict[_Until, tuple[float, Callable[[], None]]]):
    """Those of one connection, under one timer: until what, when, and what happens then. `set` sets one anew, and `pop`
    takes it away.

    Each request makes several, and a timer is half a kilobyte: one that runs is left alone, and looks when it rings
    what was meant.
    """

    __slots__ = ("_loop", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None

    def set(self, until: _Until, seconds: float, then: Callable[[], None]) -> None:
        """From now on."""
        at = self._loop.time() + seconds
        self[until] = at, then
        if self._timer is None or self._timer.when() > at:
            self._ring_by(at)

    def end(self) -> None:
        """Nothing will happen any more."""
        self.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ring_by(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(at, self._ring)

    def _ring(self) -> None:
        self._timer = None
        now = self._loop.time()
        for until, (at, then) in list(self.items()):
            if at <= now and until in self:
                del self[until]
                then()
        if self:
            self._ring_by(min(at for at, _ in self.values()))
