"""The HTTP/1.1 client of engines against servers of bytes: whatever they send, and wherever it is cut."""

from __future__ import annotations

import asyncio
import gzip
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from engines.connection import EngineHttp
from engines.http1 import Connection, Http1Client
from engines.launch import free_port
from gateway.contracts.errors import EngineProtocolError, EngineTimeout, EngineUnavailable

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\n"


@asynccontextmanager
async def served(serve: Serve, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """The port of a server whose every connection is `serve`; it closes what that leaves open."""
    writers: list[asyncio.StreamWriter] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    port = free_port()
    server = await asyncio.start_server(handle, "127.0.0.1", port, ssl=tls)
    try:
        yield port
    finally:
        server.close()
        for writer in writers:
            writer.close()
        await asyncio.sleep(0)


@asynccontextmanager
async def client_of(port: int) -> AsyncIterator[Http1Client]:
    client = Http1Client(f"http://127.0.0.1:{port}", headers={}, connect_timeout_seconds=5, keepalive_seconds=4)
    try:
        yield client
    finally:
        await client.aclose()


def engine_at(port: int, *, idle_timeout_seconds: float = 5.0) -> EngineHttp:
    return EngineHttp(
        f"http://127.0.0.1:{port}",
        engine_id="e0",
        connect_timeout_seconds=5,
        idle_timeout_seconds=idle_timeout_seconds,
    )


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """One request, body and all."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next((int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0)
    return head + await reader.readexactly(length)


def answering(*pieces: bytes, seconds_between: float = 0.0, close: bool = True) -> Serve:
    """Sends the same to every request; closes behind it, or waits for the next."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(seconds_between)
            if close:
                return

    return serve


async def read_stream(http: EngineHttp) -> None:
    """To its end."""
    async with http.stream("/x", {}) as stream:
        while await stream.next():
            pass


def chunked(body: bytes, sizes: Sequence[int], *, line_end: bytes = b"\r\n", trailers: bytes = b"") -> bytes:
    """The body in chunks of these sizes and one of the rest."""
    raw, at = b"", 0
    for size in [*sizes, len(body)]:
        if chunk := body[at : at + size]:
            raw += b"%x%s%s%s" % (len(chunk), line_end, chunk, line_end)
        at += size
    return raw + b"0" + line_end + trailers + line_end


class Sink(asyncio.Transport):
    """Takes what is written; says whether it was aborted."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection
        self.aborted = False

    def write(self, data: object) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True
        self._connection.connection_lost(None)


async def read_cut(pieces: Sequence[bytes], *, ends: bool) -> tuple[int, bytes, bool]:
    """Status and body of an answer that arrives in these pieces, and whether its connection may be used again."""
    until = asyncio.get_running_loop().time() + 5
    client = Http1Client("http://engine:1", headers={}, connect_timeout_seconds=1, keepalive_seconds=1)
    connection = Connection(client, asyncio.get_running_loop())
    sink = Sink(connection)
    connection.connection_made(sink)
    connection.begin()
    for piece in filter(None, pieces):
        connection.data_received(piece)
    if ends:
        connection.connection_lost(None)
    assert await connection.head(until)
    body = b""
    while some := await connection.pieces(until):
        body += b"".join(some)
    assert some == []
    status = connection.status
    connection.finish()
    kept = not sink.aborted
    await client.aclose()
    return status, body, kept


@given(data=st.data(), body=st.binary(max_size=60), framing=st.sampled_from(["length", "chunked", "end", "1.0"]))
def test_an_answer_is_read_whole_however_it_is_cut(data: st.DataObject, body: bytes, framing: str) -> None:
    """Every framing of RFC 9112, behind informational answers, with trailers, with line ends that proxies write."""
    line_end = data.draw(st.sampled_from([b"\r\n", b"\n"]))
    raw = data.draw(st.sampled_from([b"", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Hints\r\nA: b\r\n\r\n"]))
    match framing:
        case "length":
            raw += HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        case "chunked":
            sizes = data.draw(st.lists(st.integers(1, 20), max_size=3))
            trailers = data.draw(st.sampled_from([b"", b"X-Sum: 7\r\n"]))
            raw += (HEAD + b"transfer-encoding: Chunked\r\n\r\n").replace(b"\r\n", line_end)
            raw += chunked(body, sizes, trailers=trailers)
        case "end":
            raw += HEAD + b"Connection: close\r\n\r\n" + body
        case _:
            raw += b"HTTP/1.0 200 OK\r\n\r\n" + body
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=6)))
    pieces = [raw[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    ends = framing in ("end", "1.0")
    assert asyncio.run(read_cut(pieces, ends=ends)) == (200, body, not ends)


@pytest.mark.parametrize(
    ("answer", "used_again"),
    [
        (HEAD + b"Content-Length: 2\r\n\r\n{}", True),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(b"{}", []), True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", True),
        (HEAD + b"Connection: close\r\nContent-Length: 2\r\n\r\n{}", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}", False),
        (HEAD + b"Content-Length: 2\r\n\r\n{}" + HEAD + b"Content-Length: 2\r\n\r\n[]", False),
    ],
)
async def test_a_connection_is_used_again_where_its_answer_allows(answer: bytes, used_again: bool) -> None:
    """Never behind an answer that nobody asked for: it would be taken for the next request's."""
    connections: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(0)
        while True:
            await read_request(reader)
            connections[-1] += 1
            writer.write(answer)

    async with served(serve) as port, client_of(port) as client:
        for _ in range(2):
            connection = await client.send("GET", "/x")
            assert await connection.head(asyncio.get_running_loop().time() + 5)
            while await connection.pieces(asyncio.get_running_loop().time() + 5):
                pass
            connection.finish()
    assert connections == ([2] if used_again else [1, 1])


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_only_what_may_be_asked_twice_is_asked_again_on_a_new_connection(method: str) -> None:
    """A server may close an idle connection in the moment of the next request; a POST may have been carried out."""
    requests: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for is_first in (True, False):
            requests.append(await read_request(reader))
            if not is_first:
                return
            writer.write(HEAD + b"Content-Length: 2\r\n\r\n{}")

    async with served(serve) as port:
        http = engine_at(port)
        assert await http.get_status("/x", timeout_seconds=5) == 200
        if method == "GET":
            assert await http.get_status("/x", timeout_seconds=5) == 200
        else:
            with pytest.raises(EngineUnavailable):
                await http.post("/x", {}, timeout_seconds=5)
        await http.aclose()
    assert len(requests) == (3 if method == "GET" else 2)


async def test_a_connection_that_the_engine_closed_meanwhile_is_not_used() -> None:
    async with served(answering(HEAD + b"Content-Length: 2\r\n\r\n{}")) as port:
        http = engine_at(port)
        for _ in range(3):
            await http.post("/x", {}, timeout_seconds=5)
            await asyncio.sleep(0.05)
        await http.aclose()


async def test_bytes_that_no_request_asked_for_cost_the_connection() -> None:
    """A proxy's 408 on an idle connection is no answer to the next request."""
    late = HEAD + b"Content-Length: 2\r\n\r\n{}", b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n"
    async with served(answering(*late, seconds_between=0.05, close=False)) as port:
        http = engine_at(port)
        for _ in range(2):
            assert await http.get_status("/x", timeout_seconds=5) == 200
            await asyncio.sleep(0.15)
        await http.aclose()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", EngineUnavailable),
        (b"HTTP/1.1 200 O", EngineUnavailable),
        (HEAD + b"Content-Length: 5\r\n\r\n{}", EngineUnavailable),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{}", EngineUnavailable),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}", EngineProtocolError),
        (HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", EngineProtocolError),
        (HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", EngineProtocolError),
        (HEAD + b"Content-Length: -2\r\n\r\n{}", EngineProtocolError),
        (b"SSH-2.0-OpenSSH_9.2\r\n", EngineProtocolError),
        (HEAD + b"X: " + b"x" * 2**20 + b"\r\n\r\n", EngineProtocolError),
        (HEAD + b"Content-Encoding: br\r\nContent-Length: 2\r\n\r\n{}", EngineProtocolError),
        (HEAD + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}", EngineProtocolError),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n", EngineProtocolError),
    ],
)
async def test_an_answer_that_is_cut_or_no_http_is_an_error_in_our_words(answer: bytes, error: type[Exception]) -> None:
    async with served(answering(answer)) as port:
        http = engine_at(port)
        with pytest.raises(error):
            await http.post("/x", {}, timeout_seconds=5)
        with pytest.raises(error):
            await read_stream(http)
        await http.aclose()


async def test_what_a_proxy_compressed_is_read() -> None:
    packed = gzip.compress(b'{"a": 1}')
    async with served(answering(HEAD + b"content-encoding: gzip\r\n\r\n" + packed)) as port:
        http = engine_at(port)
        assert await http.get_json("/x", timeout_seconds=5) == {"a": 1}
        await http.aclose()


async def test_silence_is_measured_from_the_last_piece() -> None:
    """An answer may take longer than the silence that is allowed; the control call's own limit holds all the same."""
    pieces = [HEAD + b"Content-Length: 6\r\n\r\n", *(b"%d" % i for i in range(6))]
    async with served(answering(*pieces, seconds_between=0.15, close=False)) as port:
        http = engine_at(port, idle_timeout_seconds=0.6)
        assert await http.post("/x", {}, timeout_seconds=5) == b"012345"
        with pytest.raises(EngineTimeout):
            await http.post("/x", {}, timeout_seconds=0.4)
        hasty = engine_at(port, idle_timeout_seconds=0.05)
        with pytest.raises(EngineTimeout):
            await hasty.post("/x", {}, timeout_seconds=5)
        await http.aclose()
        await hasty.aclose()


async def test_of_a_body_that_nobody_reads_only_a_part_is_taken_in() -> None:
    """Replies reach 67 MB; 64 of them must not lie in memory because their readers are busy."""
    size, sent = 64 * 2**20, asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % size + bytes(size))
        await writer.drain()
        sent.set()
        await reader.read()

    async with served(serve) as port, client_of(port) as client:
        connection = await client.send("POST", "/x", b"{}")
        until = asyncio.get_running_loop().time() + 20
        assert await connection.head(until)
        await asyncio.sleep(0.3)
        assert not sent.is_set()
        held = [len(piece) for piece in await connection.pieces(until) or ()]
        assert 0 < sum(held) < 2**20
        read = sum(held)
        while pieces := await connection.pieces(until):
            read += sum(map(len, pieces))
        assert read == size
        connection.finish()


async def test_a_stream_that_said_all_gives_its_connection_back_once_the_rest_has_come() -> None:
    connections: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        while True:
            await read_request(reader)
            writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"9\r\ndata: 1\n\n\r\n")
            await asyncio.sleep(0.05)
            writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    async with served(serve) as port:
        http = engine_at(port)
        requests = 0
        while requests < 20 and len(connections) == requests:  # on a busy machine the rest may come late
            async with http.stream("/x", {}) as stream:
                assert await stream.next() == [b"1"]
                stream.finish()
            requests += 1
            await asyncio.sleep(0.15)
        await http.aclose()
    assert len(connections) < requests


async def test_a_stream_that_is_left_early_ends_at_the_engine_too() -> None:
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"9\r\ndata: 1\n\n\r\n")
        assert await reader.read() == b""
        gone.set()

    async with served(serve) as port:
        http = engine_at(port)
        async with http.stream("/x", {}) as stream:
            assert await stream.next() == [b"1"]
        await asyncio.wait_for(gone.wait(), 5)
        await http.aclose()


async def test_closing_the_client_breaks_off_what_is_under_way() -> None:
    """So that requests of an engine that is taken out go on elsewhere."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        await reader.read()

    async with served(serve) as port:
        http = engine_at(port)
        asked = asyncio.ensure_future(http.post("/x", {}, timeout_seconds=10))
        await asyncio.sleep(0.1)
        await http.aclose()
        with pytest.raises(EngineUnavailable):
            await asked


async def test_a_header_cannot_become_two() -> None:
    """A session's name goes out as one."""
    async with served(answering(HEAD + b"Content-Length: 0\r\n\r\n")) as port, client_of(port) as client:
        for value in ("a\r\nX: b", "a\nb", "a\0b"):
            with pytest.raises(ValueError, match="line end"):
                await client.send("GET", "/x", headers={"X-Key": value})


async def test_engines_behind_tls_are_asked_only_if_they_are_who_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    serve = answering(HEAD + b"Content-Length: 2\r\n\r\n{}", close=False)
    async with served(serve, tls=context) as port:
        for is_trusted in (False, True):
            if is_trusted:
                monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
            http = EngineHttp(
                f"https://localhost:{port}", engine_id="e0", connect_timeout_seconds=5, idle_timeout_seconds=5
            )
            if is_trusted:
                assert await http.post("/x", {}, timeout_seconds=5) == b"{}"
            else:
                with pytest.raises(EngineUnavailable):
                    await http.post("/x", {}, timeout_seconds=5)
            await http.aclose()


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate of localhost and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths
