"""How connections come in, whatever else the event loop has to do; real sockets."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager

import pytest
from starlette.types import Receive, Scope, Send

from gateway.handover.server import GatewayServer, Stop
from gateway.handover.shares import Shares
from gateway.listening import listening_socket, server_config
from gateway.settings import GatewaySettings

_FEW_TURNS = 5
"""Of the loop, in which a connection that was accepted is set up."""


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers anything with 204."""
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


@pytest.fixture
def settings() -> GatewaySettings:
    return GatewaySettings(port=0)


@pytest.fixture
def listener(settings: GatewaySettings) -> Iterator[socket.socket]:
    with listening_socket(settings) as bound:
        bound.listen(2048)
        yield bound


@pytest.fixture
def clients() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
async def server(settings: GatewaySettings, listener: socket.socket) -> AsyncIterator[GatewayServer]:
    async with serving(settings, listener) as started:
        yield started


@asynccontextmanager
async def serving(
    settings: GatewaySettings, listener: socket.socket, shares: Shares | None = None
) -> AsyncIterator[GatewayServer]:
    """A server that has started; on the way out it stops, and no connection of it is left."""
    config = server_config(settings, app)
    config.load()
    stop = Stop(settings.drain_seconds, begin=lambda: None, cut=lambda: None)
    server = GatewayServer(config, listener, stop, None if shares is None else shares.enter(0))
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    yield server
    await asyncio.wait_for(server.shutdown(), 10)
    assert not server.server_state.connections


def connect(listener: socket.socket, stack: ExitStack) -> socket.socket:
    return stack.enter_context(socket.create_connection(listener.getsockname(), timeout=10))


async def turn_loop() -> None:
    for _ in range(_FEW_TURNS):
        await asyncio.sleep(0)


async def test_connections_that_come_together_are_taken_together(
    server: GatewayServer, listener: socket.socket, clients: ExitStack
) -> None:
    """However long the loop takes for a turn, no agent waits behind all others for as many turns."""
    for _ in range(50):
        connect(listener, clients)
    await turn_loop()
    assert len(server.server_state.connections) == 50


async def test_a_worker_leaves_what_comes_together_to_those_with_fewer(
    settings: GatewaySettings, listener: socket.socket, clients: ExitStack
) -> None:
    shares = Shares(2)
    shares.enter(1)  # it has none, and accepts none
    async with serving(settings, listener, shares) as server:
        for _ in range(6):
            connect(listener, clients)
        await turn_loop()
        assert len(server.server_state.connections) == 1
        async with asyncio.timeout(10):  # unless they do not take it
            while len(server.server_state.connections) < 6:
                await turn_loop()


async def test_a_connection_that_is_set_up_while_the_server_stops_is_closed(server: GatewayServer) -> None:
    """Nothing would close it afterwards, and the process would wait for its client."""
    theirs, ours = socket.socketpair()
    with theirs:
        stopping = asyncio.create_task(server.shutdown())
        await asyncio.sleep(0)
        await server.adopt(ours.detach())
        await asyncio.wait_for(stopping, 10)
        theirs.settimeout(10)
        assert theirs.recv(1) == b""


async def test_a_connection_that_was_just_accepted_counts(
    server: GatewayServer, listener: socket.socket, clients: ExitStack
) -> None:
    """Or who gives its place away would end without it."""
    connect(listener, clients)
    for _ in range(1000):
        if server.is_busy:
            break
        await asyncio.sleep(0)
    assert not server.server_state.connections
    server.stop_accepting()
    assert server.is_busy
    given: list[int] = []
    server.leave(given.append)
    await turn_loop()
    assert not server.is_busy
    assert len(given) == 1
    os.close(given[0])


async def test_a_server_that_steps_aside_takes_up_what_came_meanwhile(
    server: GatewayServer, listener: socket.socket, clients: ExitStack
) -> None:
    server.stop_accepting()
    waiting = connect(listener, clients)
    waiting.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
    await turn_loop()
    assert not server.server_state.connections
    await server.stay()
    reply = await asyncio.wait_for(asyncio.to_thread(waiting.recv, 100), 10)
    assert reply.startswith(b"HTTP/1.1 204")
