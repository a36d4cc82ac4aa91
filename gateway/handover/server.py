"""uvicorn, on a listening socket that other processes may serve too: it can stop accepting and begin again.

A socket that is handed over keeps its queue, so connections that come meanwhile wait and none is refused. Two sockets
of one port (SO_REUSEPORT) would not do: each has a queue of its own, and closing one resets what waits in it (measured
on Linux 6.18: of 40 connections 13 were lost; `net.ipv4.tcp_migrate_req`, which mends it, is off by default).
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from gateway.routes.connections import BoundedConnection

LAST_SECONDS = 5
"""For replies that were cut to say so."""


@dataclass(frozen=True, slots=True)
class Stop:
    """How replies end when the process is told to. begin: done at once; cut: ends what runs after drain_seconds."""

    drain_seconds: float
    begin: Callable[[], None]
    cut: Callable[[], None]


class GatewayServer(uvicorn.Server):
    """`accepts` is set once it takes requests. The listener is closed when it stops: what comes later is refused."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket, stop: Stop) -> None:
        super().__init__(config)
        self._stop = stop
        self.accepts = asyncio.Event()
        self._listener = listener
        self._give: Callable[[int], None] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a connection is open or a request under way."""
        return bool(self.server_state.connections or self.server_state.tasks)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then tell."""
        await super().startup([self._listener.dup()])
        if self.started:
            self.accepts.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse connections, let replies end; what runs longer is cut, and what then is not told so is cancelled."""
        self._listener.close()
        self._stop.begin()
        overdue = asyncio.get_running_loop().call_later(self._stop.drain_seconds, self._stop.cut)
        await super().shutdown()
        overdue.cancel()

    def stop_accepting(self) -> None:
        """What comes from now on waits in the listener's queue for whoever serves it."""
        for server in self.servers:
            server.close()
        self.servers = []

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
        if not self.servers:
            loop = asyncio.get_running_loop()
            listener = self._listener.dup()
            self.servers = [await loop.create_server(self._connection, sock=listener, backlog=self.config.backlog)]

    async def adopt(self, descriptor: int) -> None:
        """Serve a connection that another process accepted; its client may have closed it meanwhile."""
        connection = socket.socket(fileno=descriptor)
        try:
            _, protocol = await asyncio.get_running_loop().connect_accepted_socket(self._connection, connection)
        except OSError:
            connection.close()
            return
        if self._give is not None:
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
