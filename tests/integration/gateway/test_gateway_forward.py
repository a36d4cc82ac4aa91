"""Other paths of the engine: bytes pass untouched both ways, keys and control do not pass at all."""

from __future__ import annotations

import asyncio
import gzip
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from aiohttp import web

from engines.echo import EchoServer
from gateway.contracts.errors import ConfigurationError
from gateway.routes.forward import Forward
from gateway.settings import GatewaySettings
from tests.integration.gateway.conftest import RunningGateway, StartGateway

OPERATOR = {"VERBATIM_OPERATOR_KEY": "operator-secret"}
PACKED = gzip.compress(b'{"data": [1.0, 18446744073709551617]}')
PIECE = bytes(2**16)
MANY_PIECES = 2_000


@dataclass
class Seen:
    """One request as the engine got it."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    def names(self) -> set[str]:
        return {name.lower() for name, _ in self.headers}

    def header(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name]


@dataclass
class Upstream:
    """An engine with an answer of its own on every path; `allowed` lets the next piece of a slow one go."""

    seen: list[Seen] = field(default_factory=list)
    num_pieces: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)
    allowed: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def app(self) -> web.Application:
        app = EchoServer([1, 2]).app()
        app.router.add_route("*", "/{rest:.*}", self.answer)
        return app

    async def answer(self, request: web.Request) -> web.StreamResponse:
        headers = [(name.decode(), value.decode()) for name, value in request.raw_headers]
        self.seen.append(Seen(request.method, request.raw_path, headers, await request.read()))
        kind = request.query.get("answer", "packed")
        return await getattr(self, kind)(request)  # type: ignore[no-any-return]

    async def packed(self, request: web.Request) -> web.StreamResponse:
        reply = web.Response(status=218, body=PACKED)
        reply.headers.update(
            {"Content-Encoding": "gzip", "Content-Type": "application/x-mine", "Connection": "X-Hop", "X-Hop": "1"}
        )
        reply.headers["X-SMG-Worker-URL"] = "http://10.0.0.7:30000"
        reply.headers.update({"Server": "engine/1", "Date": "yesterday", "Set-Cookie": "a=b", "X-Mine": "ü"})
        reply.headers.add("X-Twice", "1")
        reply.headers.add("X-Twice", "2")
        return reply

    async def slow(self, request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse()
        await reply.prepare(request)
        for number in range(3):
            await reply.write(b"piece %d;" % number)
            await asyncio.to_thread(self.allowed.wait, 20)
            self.allowed.clear()
        return reply

    async def endless(self, request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse()
        await reply.prepare(request)
        try:
            for number in range(MANY_PIECES):
                self.num_pieces = number
                await reply.write(PIECE)
        except (ConnectionError, asyncio.CancelledError):
            self.cancelled.set()
            raise
        return reply

    async def silent(self, request: web.Request) -> web.StreamResponse:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return web.Response()

    async def broken(self, request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse()
        await reply.prepare(request)
        await reply.write(b"half")
        assert request.transport is not None
        request.transport.abort()
        return reply

    async def elsewhere(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=307, headers={"Location": "/server_info"})


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    """In a thread of its own, where a client that goes away cancels what it asked for."""
    upstream = Upstream()
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(upstream.app(), handler_cancellation=True)

    async def start() -> str:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    upstream.url = asyncio.run_coroutine_threadsafe(start(), loop).result(20)
    yield upstream
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(20)
    loop.close()


@pytest.fixture(scope="module")
def gateway(
    upstream: Upstream, start_gateway: StartGateway, tmp_path_factory: pytest.TempPathFactory
) -> RunningGateway:
    return start_gateway(tmp_path_factory.mktemp("ledger"), engine=f"sglang={upstream.url}", environment=OPERATOR)


@pytest.fixture
def session(gateway: RunningGateway, session_id: str) -> dict[str, Any]:
    operator = {"Authorization": "Bearer operator-secret"}
    return dict(gateway.post("/sessions", {"session_id": f"{session_id}/ü"}, headers=operator))


@pytest.fixture
def key(session: dict[str, Any]) -> dict[str, str]:
    return {"Authorization": f"Bearer {session['api_key']}"}


def raw(
    url: str, method: str, target: str, *, body: bytes = b"", headers: Any = ()
) -> tuple[http.client.HTTPResponse, bytes]:
    """A request whose target stands in its first line as written here."""
    with closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)) as connection:
        connection.putrequest(method, target, skip_accept_encoding=True)
        for name, value in [*dict(headers).items(), ("Content-Length", str(len(body)))]:
            connection.putheader(name, value)
        connection.endheaders(body)
        reply = connection.getresponse()
        return reply, reply.read()


def test_a_call_reaches_the_engine_as_it_was_sent(
    gateway: RunningGateway, upstream: Upstream, session: dict[str, Any], key: dict[str, str]
) -> None:
    """I8: method, path, query and body byte for byte; keys, cookies and the connection's headers stay here."""
    body = b'{ "input" : "\\u2028", "x": 1.0, "big": 123456789012345678901234567890 }\n'
    target = f"{urlsplit(session['base_url']).path}/embeddings?a=%2F&b=%c3%bc&a=+;x[]=%%"
    headers = {
        "Content-Type": "application/x-my+json", "X-Mine": "ü=1", "X-Api-Key": "k", "Cookie": "c", "X-Auth": "a",
        "Connection": "keep-alive, X-Hop", "X-Hop": "1", "TE": "trailers", "X-Session-ID": "other",
        "X-Forwarded-For": "1.2.3.4", "X-SMG-Routing-Key": "z", "X-Override-Rid": "r", "Proxy-Authorization": "p",
    }  # fmt: skip
    reply, _ = raw(gateway.url, "POST", target, body=body, headers=headers | key)
    assert reply.status == 218
    seen = upstream.seen[-1]
    assert (seen.method, seen.target) == ("POST", "/v1/embeddings?a=%2F&b=%c3%bc&a=+;x[]=%%")
    assert seen.body == body
    assert seen.names() == {"host", "content-type", "x-mine", "content-length"}
    assert seen.header("host") == [urlsplit(upstream.url).netloc]
    assert seen.header("content-type") == ["application/x-my+json"]


def test_an_answer_reaches_the_agent_as_the_engine_gave_it(
    gateway: RunningGateway, session: dict[str, Any], key: dict[str, str]
) -> None:
    """I8: a packed body stays packed and says so; one Server, one Date, a length that is right."""
    reply, body = raw(gateway.url, "POST", f"{urlsplit(session['base_url']).path}/rerank", headers=key)
    assert (reply.status, body) == (218, PACKED)
    assert reply.headers.get_all("content-encoding") == ["gzip"]
    assert reply.headers.get_all("content-length") == [str(len(PACKED))]
    assert reply.headers.get_all("content-type") == ["application/x-mine"]
    assert reply.headers.get_all("x-twice") == ["1", "2"]
    assert len(reply.headers.get_all("server") or ()) == len(reply.headers.get_all("date") or ()) == 1
    assert reply.headers["server"] != "engine/1"
    assert not {"x-hop", "set-cookie", "connection", "x-smg-worker-url"} & {name.lower() for name in reply.headers}


def test_an_answer_is_passed_on_while_it_is_made(
    gateway: RunningGateway, upstream: Upstream, session: dict[str, Any], key: dict[str, str]
) -> None:
    url = f"{session['base_url']}/score?answer=slow"
    with httpx.stream("POST", url, headers=key, timeout=20) as reply:
        pieces = reply.iter_raw()
        for number in range(3):
            assert next(pieces) == b"piece %d;" % number
            upstream.allowed.set()
        assert list(pieces) == []


def test_a_client_that_does_not_read_holds_the_engine_back_and_one_that_goes_ends_the_call(
    gateway: RunningGateway, upstream: Upstream, session: dict[str, Any], key: dict[str, str]
) -> None:
    """125 MiB are waiting; what is under way of them stays small."""
    upstream.cancelled.clear()
    target = f"{urlsplit(session['base_url']).path}/score?answer=endless"
    parts = urlsplit(gateway.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=20) as client:
        head = (
            f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nAuthorization: {key['Authorization']}\r\n\r\n"
        )
        client.sendall(head.encode())
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
        before = -1
        while before != (before := upstream.num_pieces):
            time.sleep(0.5)
        assert 0 < before < MANY_PIECES / 4
    assert upstream.cancelled.wait(10)


def test_a_client_that_goes_before_the_answer_ends_the_call_at_the_engine(
    upstream: Upstream, session: dict[str, Any], key: dict[str, str]
) -> None:
    upstream.cancelled.clear()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{session['base_url']}/score?answer=silent", headers=key, timeout=0.5)
    assert upstream.cancelled.wait(10)


def test_an_answer_that_breaks_off_is_not_made_to_look_whole(session: dict[str, Any], key: dict[str, str]) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.post(f"{session['base_url']}/score?answer=broken", headers=key, timeout=20)


def test_redirects_are_the_agents_to_follow(
    gateway: RunningGateway, upstream: Upstream, session: dict[str, Any], key: dict[str, str]
) -> None:
    """Else an engine's redirect would reach what the agent may not ask for."""
    reply = httpx.post(f"{session['base_url']}/score?answer=elsewhere", headers=key, timeout=20)
    assert (reply.status_code, reply.headers["location"]) == (307, "/server_info")
    assert upstream.seen[-1].target == "/v1/score?answer=elsewhere"


def test_refused_paths_name_the_setting_and_never_reach_the_engine(
    gateway: RunningGateway, upstream: Upstream, session: dict[str, Any], key: dict[str, str]
) -> None:
    """I7."""
    prefix, before = urlsplit(session["base_url"]).path.removesuffix("/v1"), len(upstream.seen)
    for method, path in (
        ("POST", "/update_weights_from_disk"), ("GET", "/server_info"), ("POST", "/v1/../flush_cache"),
        ("POST", "/v1/embeddings/..%2f..%2fflush_cache"), ("POST", "//v1/embeddings"), ("POST", "/api/chat"),
        ("POST", "/inference/v1/generate"), ("GET", "/v1/embeddings"), ("POST", "/%76%31/embeddings"),
    ):  # fmt: skip
        reply, body = raw(gateway.url, method, prefix + path, headers=key)
        message = json.loads(body)["error"]["message"]
        assert reply.status == 404, path
        assert "setting `forward` is known" in message
    assert len(upstream.seen) == before


def test_a_path_of_the_gateways_own_asked_for_otherwise_says_how_it_is_served(
    session: dict[str, Any], key: dict[str, str]
) -> None:
    reply = httpx.get(f"{session['base_url']}/chat/completions", headers=key, timeout=20)
    assert (reply.status_code, reply.headers["allow"]) == (405, "POST")


def test_only_who_may_use_a_session_may_forward_under_it(
    gateway: RunningGateway, upstream: Upstream, session: dict[str, Any], key: dict[str, str], session_id: str
) -> None:
    """With the session in the path, in the header or in the key alone."""
    operator = {"Authorization": "Bearer operator-secret"}
    other = gateway.post("/sessions", {"session_id": f"other-{session_id}"}, headers=operator)
    their_key = {"X-Api-Key": other["api_key"]}
    url, before = f"{session['base_url']}/embeddings", len(upstream.seen)
    assert httpx.post(url, timeout=20).status_code == 401
    assert httpx.post(url, headers=their_key, timeout=20).status_code == 403
    assert httpx.post(f"{gateway.url}/v1/embeddings", timeout=20).status_code == 401
    assert httpx.post(f"{gateway.url}/sessions/made-up/v1/embeddings", headers=key, timeout=20).status_code == 403
    assert len(upstream.seen) == before
    assert httpx.post(f"{gateway.url}/v1/embeddings", headers=key, timeout=20).status_code == 218
    assert httpx.post(f"{gateway.url}/v1/embeddings", headers=operator, timeout=20).status_code == 218
    gateway.post(f"/sessions/{other['session_id']}/finish", headers=operator)
    assert httpx.post(f"{other['base_url']}/embeddings", headers=their_key, timeout=20).status_code == 409


def test_a_forwarded_call_is_counted_and_is_no_turn(
    gateway: RunningGateway, upstream: Upstream, session: dict[str, Any], key: dict[str, str]
) -> None:
    operator = {"Authorization": "Bearer operator-secret"}

    def counted() -> float:
        lines = httpx.get(f"{gateway.url}/metrics", headers=operator, timeout=20).text.split("\n")
        return sum(float(line.split()[-1]) for line in lines if line.startswith("verbatim_forwarded_calls_total{"))

    before = counted()
    httpx.post(f"{session['base_url']}/embeddings", headers=key, timeout=20)
    assert counted() == before + 1
    path = urlsplit(session["base_url"]).path.removesuffix("/v1")
    assert gateway.get(f"{path}/turns", headers=operator)["turns"] == []


@pytest.mark.parametrize(
    "body",
    [
        {"query": "a", "items": [[1], [99_999_999]]},
        {"input": [-1]},
        {"input": [2**80]},
        {"input": [99_999_999.0]},
        {"tools": [{"enum": [-1]}], "input": {"ids": [{"deep": [[99_999_999]]}]}},
    ],
)
def test_token_ids_that_the_model_does_not_have_are_not_forwarded(
    body: dict[str, Any], upstream: Upstream, session: dict[str, Any], key: dict[str, str]
) -> None:
    """Some engines die of them."""
    before = len(upstream.seen)
    reply = httpx.post(f"{session['base_url']}/score", headers=key, json=body, timeout=20)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith(f"{list(body)[-1]}: token id ")
    assert len(upstream.seen) == before


def test_a_list_of_requests_is_looked_into(upstream: Upstream, session: dict[str, Any], key: dict[str, str]) -> None:
    before = len(upstream.seen)
    reply = httpx.post(f"{session['base_url']}/score", headers=key, json=[{"input": [99_999_999]}], timeout=20)
    assert (reply.status_code, len(upstream.seen)) == (400, before)
    assert reply.json()["error"]["message"].startswith("body: token id 99999999 ")


IDS = '"input": [99999999]}'


@pytest.mark.parametrize("kind", ["application/json", "Application/Vnd.X+JSON", "text/plain", "", "audio/wav"])
@pytest.mark.parametrize(
    "body",
    [
        b'{"x": NaN, ' + IDS.encode(),
        b'{"x": 1e999, ' + IDS.encode(),
        b'{"x": "\\ud800", ' + IDS.encode(),
        b"\xef\xbb\xbf{" + IDS.encode(),
        ("{" + IDS).encode("utf-16"),
        b"[" * 100_000,
    ],
)
def test_json_that_only_engines_would_read_is_not_forwarded(
    body: bytes, kind: str, upstream: Upstream, session: dict[str, Any], key: dict[str, str]
) -> None:
    """I7: what cannot be looked into could hold token ids that some engines die of."""
    before = len(upstream.seen)
    headers = key | ({"Content-Type": kind} if kind else {})
    reply = httpx.post(f"{session['base_url']}/score", headers=headers, content=body, timeout=20)
    assert (reply.status_code, len(upstream.seen)) == (400, before)
    assert "not JSON" in reply.json()["error"]["message"]


def test_forms_and_recordings_are_forwarded_unread(
    upstream: Upstream, session: dict[str, Any], key: dict[str, str]
) -> None:
    url, recording = f"{session['base_url']}/audio/transcriptions", b"RIFF\xff\x00{NaN"
    form = httpx.post(url, headers=key, files={"file": recording}, timeout=20)
    assert form.status_code == 218
    assert recording in upstream.seen[-1].body
    plain = httpx.post(url, headers=key | {"Content-Type": "audio/wav"}, content=recording, timeout=20)
    assert (plain.status_code, upstream.seen[-1].body) == (218, recording)


def test_what_an_agent_means_for_its_tools_is_no_token_id(session: dict[str, Any], key: dict[str, str]) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"enum": [-1, 99_999_999]}}}]
    body = {"messages": [], "tools": tools}
    assert httpx.post(f"{session['base_url']}/chat/completions/render", headers=key, json=body).status_code == 218


def test_websockets_are_refused_in_words(gateway: RunningGateway, upstream: Upstream, key: dict[str, str]) -> None:
    before = len(upstream.seen)
    headers = {
        "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }  # fmt: skip
    for path in ("/v1/realtime", "/v1/embeddings", "/sessions/a/v1/realtime"):
        reply, body = raw(gateway.url, "GET", path, headers=headers | key)
        assert reply.status == 404
        assert b"WebSockets are not forwarded" in body
    assert len(upstream.seen) == before


def test_settings_choose_what_is_forwarded(upstream: Upstream, start_gateway: StartGateway, tmp_path: Path) -> None:
    for name, setting, expected in (
        ("own", 'forward_paths=["/mine/*"]', [218, 218, 404]),
        ("none", "forward=none", [404, 404, 404]),
    ):
        gateway = start_gateway(tmp_path / name, "--set", setting, engine=f"sglang={upstream.url}")
        paths = ("v1/embeddings", "mine/own-path.v2", "pause_generation")
        replies = [httpx.post(f"{gateway.url}/sessions/s/{path}", timeout=20) for path in paths]
        assert [reply.status_code for reply in replies] == expected
    assert [seen.target for seen in upstream.seen if "own" in seen.target] == ["/mine/own-path.v2"]


def test_an_engine_that_takes_turns_only_says_so_without_its_name(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = start_gateway(tmp_path / "data")
    reply = httpx.post(f"{gateway.url}/sessions/s/v1/embeddings", timeout=20)
    assert reply.status_code == 404
    assert "POST /v1/embeddings: the engine takes turns only" in reply.json()["error"]["message"]


def test_forwarding_nothing_and_paths_to_forward_do_not_go_together() -> None:
    with pytest.raises(ConfigurationError, match="forward is none"):
        GatewaySettings(forward=Forward.NONE, forward_paths=("/mine",))
    with pytest.raises(ConfigurationError, match="forward_paths: '/'"):
        GatewaySettings(forward_paths=("/",))
