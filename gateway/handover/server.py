"""uvicorn, on a listening socket that other processes may serve too: it can stop accepting and begin again.

A socket that is handed over keeps its queue, so connections that come meanwhile wait and none is refused. Two sockets
of one port (SO_REUSEPORT) would not do: each has a queue of its own, and closing one resets what waits in it (measured
on Linux 6.18: of 40 connections 13 were lost; `net.ipv4.tcp_migrate_req`, which mends it, is off by default).
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from gateway.handover.shares import Share
from gateway.routes.connections import BoundedConnection

_log = logging.getLogger(__name__)

LAST_SECONDS = 5
"""For replies that were cut to say so."""

_MOST_AT_ONCE = 64
"""Connections, before anything else has its turn."""

_STEP_BACK_SECONDS = 0.002
"""For which a worker that has more connections than another leaves a new one to that."""
_NO_DESCRIPTOR_SECONDS = 1.0
"""For which nothing is accepted when the process has no descriptor left."""
_BACKLOG = 2048
"""As uvicorn has it."""


@dataclass(frozen=True, slots=True)
class Stop:
    """How replies end when the process is told to. begin: done at once; cut: ends what runs after drain_seconds."""

    drain_seconds: float
    begin: Callable[[], None]
    cut: Callable[[], None]


class GatewayServer(uvicorn.Server):
    """`accepts` is set once it takes requests. The listener is closed when it stops: what comes later is refused.

    share: this process's part of the connections, where other workers accept from the same socket.
    """

    def __init__(self, config: uvicorn.Config, listener: socket.socket, stop: Stop, share: Share | None = None) -> None:
        super().__init__(config)
        self._stop = stop
        self.accepts = asyncio.Event()
        self._listener = listener
        self._share = share
        self._door: _Door | None = None
        self._taking: set[asyncio.Task[None]] = set()
        self._give: Callable[[int], None] | None = None
        self._is_closing = False

    @property
    def is_busy(self) -> bool:
        """Whether a connection is open, or being set up, or a request under way."""
        return bool(self.server_state.connections or self._taking or self.server_state.tasks)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then tell."""
        await super().startup([])
        self._open_door()
        if self.started:
            self.accepts.set()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second; other workers learn how many connections are here."""
        if self._door is not None:
            self._door.tell()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse connections, let replies end; what runs longer is cut, and what then is not told so is cancelled."""
        self._is_closing = True
        self._close_door()
        self._listener.close()
        self._stop.begin()
        overdue = asyncio.get_running_loop().call_later(self._stop.drain_seconds, self._stop.cut)
        await super().shutdown()
        overdue.cancel()

    def stop_accepting(self) -> None:
        """What comes from now on waits in the listener's queue for whoever serves it."""
        self._close_door()

    def leave(self, give: Callable[[int], None]) -> None:
        """Give every connection away, as a descriptor, as soon as it has no request."""
        self._give = give
        for connection in list(self.server_state.connections):
            assert isinstance(connection, BoundedConnection)
            connection.leave(give)

    async def stay(self) -> None:
        """Undo both, for what is still here; repeating it is fine."""
        self._give = None
        for connection in self.server_state.connections:
            assert isinstance(connection, BoundedConnection)
            connection.stay()
        self._open_door()

    async def adopt(self, descriptor: int) -> None:
        """Serve a connection that another process accepted."""
        await self._take(socket.socket(fileno=descriptor))

    def _open_door(self) -> None:
        if self._door is None:
            self._door = _Door(self._listener, self._share, self._accepted, self._num_connections)

    def _close_door(self) -> None:
        if self._door is not None:
            self._door.close()
            self._door = None

    def _num_connections(self) -> int:
        return len(self.server_state.connections) + len(self._taking)

    def _accepted(self, connection: socket.socket) -> None:
        task = asyncio.get_running_loop().create_task(self._take(connection))
        self._taking.add(task)
        task.add_done_callback(self._taking.discard)

    async def _take(self, connection: socket.socket) -> None:
        """Serve it; its client may have closed it meanwhile."""
        connection.setblocking(False)
        try:
            _, protocol = await asyncio.get_running_loop().connect_accepted_socket(self._connection, connection)
        except OSError:
            connection.close()
            return
        if self._is_closing:  # idle ones have been closed, and nobody would close this one
            protocol.shutdown()
        elif self._give is not None:
            protocol.leave(self._give)

    def _connection(self) -> BoundedConnection:
        connection = self.config.http_protocol_class(  # type: ignore[call-arg]  # as uvicorn itself calls it
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        assert isinstance(connection, BoundedConnection)
        return connection

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop cleanly on a signal; uvicorn itself would raise it again afterwards."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)


class _Door:
    """Accepts from a listening socket; where other workers do too, no more than its share (see `shares`).

    The loop's own server accepts one connection in each turn of the loop. A turn of a busy loop takes five milliseconds
    and more, so of 256 agents that came at once the last one waited for more than a second.
    """

    def __init__(
        self,
        listener: socket.socket,
        share: Share | None,
        take: Callable[[socket.socket], None],
        count: Callable[[], int],
    ) -> None:
        self._listener = listener.dup()
        self._listener.setblocking(False)
        self._listener.listen(_BACKLOG)
        self._share = share
        self._take = take
        self._count = count
        self._loop = asyncio.get_running_loop()
        self._rest: asyncio.TimerHandle | None = None
        self.tell()
        self._watch()

    def tell(self) -> None:
        """The others learn how many connections are here."""
        if self._share is not None:
            self._share.set(self._count())

    def close(self) -> None:
        """Nothing more is accepted; what waits is for the others."""
        if self._share is not None:
            self._share.leave()
        if self._rest is not None:
            self._rest.cancel()
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()

    def _watch(self) -> None:
        self._rest = None
        self._loop.add_reader(self._listener.fileno(), self._knocked)

    def _rest_for(self, seconds: float, then: Callable[[], None]) -> None:
        self._loop.remove_reader(self._listener.fileno())
        self._rest = self._loop.call_later(seconds, then)

    def _is_enough(self) -> bool:
        return self._share is not None and self._share.is_exceeded

    def _knocked(self) -> None:
        if self._is_enough():
            self._rest_for(_STEP_BACK_SECONDS, self._accept_what_is_left)
        else:
            self._accept()

    def _accept_what_is_left(self) -> None:
        self._watch()
        self._accept()

    def _accept(self) -> None:
        for _ in range(_MOST_AT_ONCE):
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):  # another worker was faster; the client has gone
                return
            except OSError as error:
                _log.error("no connection can be accepted: %s", error.strerror or error)
                self._rest_for(_NO_DESCRIPTOR_SECONDS, self._watch)
                return
            self._take(connection)
            self.tell()
            if self._is_enough():
                return
