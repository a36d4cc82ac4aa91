"""A request and its reply on a real connection: who hears that a client has gone, and what counts as delivered."""

from __future__ import annotations

import asyncio
import gc
import socket
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import cast

import pytest
import uvicorn
from fastapi.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from engines.launch import free_port
from gateway.routes.bodies import Frame, FrameReply, JsonReply, gathered
from gateway.routes.connections import BoundedConnection
from gateway.routes.exchange import Exchange, exchange_of
from gateway.wire.json_text import JsonText
from tests.waiting import until_async

REQUEST = b"POST /%b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b"


@asynccontextmanager
async def serving(app: ASGIApp, *, read_timeout_seconds: float = 20.0) -> AsyncIterator[int]:
    """The port of a server of ours for an application."""
    port = free_port()
    connection = partial(BoundedConnection, read_timeout_seconds=read_timeout_seconds, write_timeout_seconds=20.0)
    config = uvicorn.Config(
        app,
        port=port,
        http=cast("type[asyncio.Protocol]", connection),
        ws="none",
        lifespan="off",
        log_level="critical",
        timeout_keep_alive=1,
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    await until_async(lambda: server.started)
    try:
        yield port
    finally:
        server.should_exit = True
        await task


class Notes:
    """What became of a reply."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.came = asyncio.Event()
        self.ended = asyncio.Event()

    def note(self, what: str) -> Callable[[], None]:
        return partial(self.heard.append, what)

    def reply(self, size: int) -> Response:
        return JsonReply(JsonText((b"x" * size,)), (), self.note("delivered"), self.note("lost"))


def connected(port: int) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port))
    client.settimeout(10)
    return client


async def replies(client: socket.socket, num: int, body: bytes) -> bytes:
    """All that a client reads until `num` replies with such a body have come."""
    loop, text = asyncio.get_running_loop(), b""
    while text.count(body) < num:
        piece = await loop.run_in_executor(None, client.recv, 2**16)
        assert piece, f"the connection ended after {text!r}"
        text += piece
    return text


@pytest.mark.parametrize("size", [2, 70_000, 600_000])
async def test_a_client_that_has_closed_does_not_count_as_reached(size: int) -> None:
    """Its end lies unread in the socket when the reply is ready: the loop does not know of it yet."""
    notes = Notes()
    clients: list[socket.socket] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        clients[0].close()  # nothing is awaited until the reply is written
        await notes.reply(size)(scope, receive, send)
        notes.ended.set()

    async with serving(app) as port:
        clients.append(connected(port))
        clients[0].sendall(REQUEST % (b"", 0, b""))
        await asyncio.wait_for(notes.ended.wait(), 10)
    assert notes.heard == ["lost"]


@pytest.mark.parametrize("size", [2, 70_000, 600_000])
async def test_a_reply_that_is_read_is_delivered_once(size: int) -> None:
    notes = Notes()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await notes.reply(size)(scope, receive, send)

    async with serving(app) as port:
        with connected(port) as client:
            client.sendall(REQUEST % (b"", 0, b""))
            text = await replies(client, 1, b"x" * size)
            assert b"content-length: %d\r\n" % size in text
    assert notes.heard == ["delivered"]


async def test_a_short_reply_of_several_parts_is_sent_whole() -> None:
    notes = Notes()
    text = JsonText((b"[1,", b"2,", b"3]"))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await JsonReply(text, ((b"x-a", b"b"),), notes.note("delivered"), notes.note("lost"))(scope, receive, send)

    async with serving(app) as port:
        with connected(port) as client:
            client.sendall(REQUEST % (b"", 0, b""))
            reply = await replies(client, 1, b"[1,2,3]")
    assert b"x-a: b\r\ncontent-length: 7\r\ncontent-type: application/json\r\n\r\n[1,2,3]" in reply
    assert notes.heard == ["delivered"]


async def test_a_request_that_is_over_needs_no_collector_to_go() -> None:
    """Passes of the collector over all that is in memory stop everything, so they are rare."""
    notes = Notes()
    seen: list[weakref.ref[Exchange]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        exchange = exchange_of(scope)
        assert exchange is not None
        exchange.attend()
        seen.append(weakref.ref(exchange))
        await notes.reply(2)(scope, receive, send)

    gc.disable()
    try:
        async with serving(app) as port:
            with connected(port) as client:
                for num in (1, 2):
                    client.sendall(REQUEST % (b"", 0, b""))
                    await replies(client, 1, b"xx")
                    assert len(seen) == num
                assert seen[0]() is None
    finally:
        gc.enable()


class Written:
    """A transport that tells what is written to it, each time."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.pieces: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.pieces.append(data)
        self._transport.write(data)

    def __getattr__(self, name: str) -> object:
        return getattr(self._transport, name)


async def frames_of(*frames: Frame) -> AsyncGenerator[Frame, None]:
    for frame in frames:
        yield frame


@pytest.mark.parametrize(
    ("make", "num"),
    [
        (lambda notes: notes.reply(2), 1),
        (lambda notes: FrameReply(frames_of(Frame(b"xx", is_last=True)), (), notes.note("lost")), 1),
        (lambda notes: FrameReply(frames_of(Frame(b"x"), Frame(b"xx", is_last=True)), (), notes.note("lost")), 2),
        (lambda notes: FrameReply(frames_of(Frame(b"xx")), (), notes.note("lost")), 2),
    ],
)
async def test_head_and_end_of_a_reply_take_no_writes_of_their_own(make: Callable[[Notes], Response], num: int) -> None:
    """Each write is a packet, and wakes its reader."""
    notes = Notes()
    written: list[Written] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        exchange = exchange_of(scope)
        assert exchange is not None
        written.append(Written(exchange.transport))
        exchange.transport = written[0]  # type: ignore[assignment]
        await make(notes)(scope, receive, send)
        notes.ended.set()

    async with serving(app) as port:
        with connected(port) as client:
            client.sendall(REQUEST % (b"", 0, b""))
            await replies(client, 1, b"xx")
            await asyncio.wait_for(notes.ended.wait(), 10)
    assert len(written[0].pieces) == num
    assert written[0].pieces[0].startswith(b"HTTP/1.1 200 OK\r\n")
    assert "lost" not in notes.heard


async def test_pieces_are_gathered_in_order_and_a_large_one_stands_alone() -> None:
    large = b"x" * 2**17
    assert list(gathered([b"a", b"", b"b", large, b"c", b"d"])) == [b"ab", large, b"cd"]
    assert list(gathered([])) == []


async def test_who_attends_is_cancelled_when_the_client_goes_and_need_not_tell_it() -> None:
    notes = Notes()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        exchange = exchange_of(scope)
        assert exchange is not None
        exchange.attend()
        notes.came.set()
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            notes.heard.append(f"excused: {exchange.excuse()}, has a client: {exchange.has_client()}")
        await asyncio.sleep(0)  # the task is as good as before
        notes.ended.set()

    async with serving(app) as port:
        client = connected(port)
        client.sendall(REQUEST % (b"", 0, b""))
        await asyncio.wait_for(notes.came.wait(), 10)
        client.close()
        await asyncio.wait_for(notes.ended.wait(), 10)
    assert notes.heard == ["excused: True, has a client: False"]


async def test_a_cancellation_by_others_is_not_excused() -> None:
    notes = Notes()
    tasks: list[asyncio.Task[None] | None] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        exchange = exchange_of(scope)
        assert exchange is not None
        exchange.attend()
        tasks.append(asyncio.current_task())
        notes.came.set()
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            notes.heard.append(f"excused: {exchange.excuse()}")
            raise
        finally:
            notes.ended.set()

    async with serving(app) as port:
        with connected(port) as client:
            client.sendall(REQUEST % (b"", 0, b""))
            await asyncio.wait_for(notes.came.wait(), 10)
            assert tasks[0] is not None
            tasks[0].cancel()
            await asyncio.wait_for(notes.ended.wait(), 10)
    assert notes.heard == ["excused: False"]


async def test_frames_end_with_their_reader() -> None:
    """I4's other half: what was not sent is not taken for sent."""
    notes = Notes()

    async def frames() -> AsyncIterator[Frame]:
        try:
            while True:
                yield Frame(b"x" * 2**16)
        finally:
            notes.heard.append("closed")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        exchange = exchange_of(scope)
        assert exchange is not None
        exchange.attend()
        reply = FrameReply(frames(), (), notes.note("lost"))  # type: ignore[arg-type]  # an async generator
        try:
            await reply(scope, receive, send)
        except asyncio.CancelledError:
            notes.heard.append("cancelled")
            assert exchange.excuse()
        notes.ended.set()

    async with serving(app) as port:
        client = connected(port)
        client.sendall(REQUEST % (b"", 0, b""))
        await replies(client, 3, b"x" * 1000)
        client.close()
        await asyncio.wait_for(notes.ended.wait(), 10)
    assert notes.heard == ["closed", "cancelled"]


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """The path, and how long the body was."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message["body"]), message["more_body"]
    await asyncio.sleep(0.01)
    await Response(f"[{scope['path']} {size}]")(scope, receive, send)


async def test_requests_that_are_sent_ahead_are_answered_in_order() -> None:
    async with serving(echo) as port:
        with connected(port) as client:
            client.sendall(b"".join(REQUEST % (b"%d" % i, i, b"b" * i) for i in range(5)))
            text = await replies(client, 5, b"]")
    assert [text.index(b"[/%d %d]" % (i, i)) for i in range(5)] == sorted(text.index(b"[/%d" % i) for i in range(5))


@pytest.mark.parametrize("sizes", [(3,), (3, 4), (70_000, 1, 200_000, 5)])
async def test_a_body_is_whole_in_however_many_pieces_it_comes(sizes: tuple[int, ...]) -> None:
    """What came before anybody asked for it, and what comes while somebody waits."""
    body = b"".join(bytes([ord("a") + i]) * size for i, size in enumerate(sizes))
    got: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        exchange = exchange_of(scope)
        assert exchange is not None
        await asyncio.sleep(0.05)
        whole = exchange.whole_body()
        if whole is None:
            whole, more = b"", True
            while more:
                message = await receive()
                whole, more = whole + message["body"], message["more_body"]
        got.append(whole)
        await Response("read")(scope, receive, send)

    async with serving(app) as port:
        with connected(port) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.sendall(REQUEST % (b"", len(body), b""))
            at = 0
            for size in sizes:
                await asyncio.sleep(0.02)
                await asyncio.get_running_loop().run_in_executor(None, client.sendall, body[at : at + size])
                at += size
            await replies(client, 1, b"read")
    assert got == [body]


@pytest.mark.parametrize("bad", [(b"a b", b"1"), (b"a", b"1\r\nb: 2"), (b"", b"\x00")])
async def test_a_header_that_would_end_early_is_not_sent(bad: tuple[bytes, bytes]) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2"), bad]})

    async with serving(app) as port:
        with connected(port) as client:
            client.sendall(REQUEST % (b"", 0, b""))
            assert await _closed(client) == b""


async def _closed(client: socket.socket) -> bytes:
    return await asyncio.get_running_loop().run_in_executor(None, client.recv, 2**16)


@pytest.mark.parametrize(
    ("sent", "answered"),
    [
        (b"", b""),
        (b"POST / HTTP/1.1\r\nHost: loc", b"HTTP/1.1 408 "),
        (REQUEST % (b"", 0, b""), b"HTTP/1.1 200 "),
        (REQUEST % (b"", 0, b"") + b"POST / HTTP/1.1\r\nHost: loc", b"HTTP/1.1 200 "),
    ],
    ids=["nothing", "half-a-head", "a-request", "a-request-and-half-a-head"],
)
async def test_deadlines_end_what_does_not_go_on(sent: bytes, answered: bytes) -> None:
    """A timer that was set for one thing serves the next: none rings too early, and none not at all."""
    async with serving(echo, read_timeout_seconds=0.5) as port:
        with connected(port) as client:
            client.sendall(sent)
            first = await _closed(client)
            assert first.startswith(answered)
            while first and await _closed(client):  # or the client loses patience
                pass


async def test_a_slow_client_that_keeps_asking_is_served() -> None:
    """Longer than every deadline, each of which begins anew."""
    async with serving(echo, read_timeout_seconds=0.5) as port:
        with connected(port) as client:
            for i in range(6):
                client.sendall(REQUEST % (b"%d" % i, 0, b""))
                assert b"[/%d 0]" % i in await replies(client, 1, b"]")
                await asyncio.sleep(0.3)
