"""HTTP to engines: streams cut anywhere, refusals that pass, and what goes out with a request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

import numpy as np
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from engines.connection import EngineHttp, serialised
from engines.event_stream import EventReader
from engines.launch import free_port
from engines.refusals import failure
from gateway.contracts.errors import EngineProtocolError, EngineRejected, EngineTimeout, EngineUnavailable
from gateway.contracts.generation import WrittenIds
from gateway.contracts.ports import RawCall

KEY = "engine-secret-7"
payloads = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1, max_size=5), min_size=1, max_size=3
).filter(lambda lines: "\n".join(lines).strip() == "\n".join(lines))
noise = st.sampled_from([": keep-alive", "event: message", "id: 7", "retry: 10", ":", "data", "nonsense"])


@asynccontextmanager
async def served(
    answer: Callable[[web.Request], Awaitable[web.StreamResponse]],
    *,
    api_key: str | None = None,
    idle_timeout_seconds: float = 10.0,
    stall_timeout_seconds: float = 0.0,
) -> AsyncIterator[EngineHttp]:
    """A connection to a server that answers everything with `answer`."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    http = EngineHttp(
        f"http://127.0.0.1:{port}",
        engine_id="e0",
        connect_timeout_seconds=5,
        idle_timeout_seconds=idle_timeout_seconds,
        stall_timeout_seconds=stall_timeout_seconds,
        api_key=api_key,
    )
    try:
        yield http
    finally:
        await http.aclose()
        await runner.cleanup()


@given(events=st.lists(payloads, max_size=4), data=st.data(), line_end=st.sampled_from(["\n", "\r\n"]))
def test_events_are_read_whole_however_the_stream_is_cut(
    events: list[list[str]], data: st.DataObject, line_end: str
) -> None:
    """I8: comments, other fields, several data lines, both line ends, pieces of any size."""
    stream = ""
    for lines in events:
        for line in lines:
            stream += "".join(f"{other}{line_end}" for other in data.draw(st.lists(noise, max_size=2)))
            space = " " if line.startswith(" ") else data.draw(st.sampled_from(["", " "]))  # the first one is no data
            stream += f"data:{space}{line}{line_end}"
        stream += line_end
    stream += f": the last{line_end}{line_end}"
    raw = stream.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    reader = EventReader()
    pieces = [raw[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    read = [payload.decode() for piece in pieces for payload in reader.read(piece)]
    assert read == ["\n".join(lines) for lines in events]


async def test_a_request_given_up_in_the_moment_of_its_answer_is_closed() -> None:
    """What the probe of a silent engine raises is told; the answer that came meanwhile does not stay open."""
    given_up, left = asyncio.Event(), asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        await given_up.wait()
        response = web.StreamResponse()
        await response.prepare(request)
        while request.transport is not None and not request.transport.is_closing():  # noqa: ASYNC110 (a connection)
            await asyncio.sleep(0.01)
        left.set()
        return response

    async def check_silence() -> None:
        given_up.set()
        await asyncio.sleep(0.2)
        raise EngineUnavailable("it hangs")

    async with served(answer, stall_timeout_seconds=0.05) as http:
        with pytest.raises(EngineUnavailable, match="it hangs"):
            async with http.stream("/generate", {}, on_silence=check_silence):
                pass
        await asyncio.wait_for(left.wait(), 5)


async def test_a_stream_of_nothing_but_comments_is_silence() -> None:
    """A router sends them for as long as its worker says nothing."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(4):
            await response.write(b": keep-alive\n\n")
            await asyncio.sleep(0.1)
        await response.write(b'data: {"a":\r\ndata: 1}\r\n\r\n')
        while True:
            await response.write(b": keep-alive\n\n")
            await asyncio.sleep(0.1)

    async with served(answer, idle_timeout_seconds=3.0) as http, http.stream("/generate", {}) as events:
        assert await events.next() == [b'{"a":\n1}']
        with pytest.raises(EngineTimeout, match="sent nothing"):
            await events.next()


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (408, EngineUnavailable),
        (425, EngineUnavailable),
        (429, EngineUnavailable),
        (503, EngineUnavailable),
        (400, EngineRejected),
        (404, EngineRejected),
        (307, EngineProtocolError),
    ],
)
async def test_a_refusal_that_passes_is_no_refusal_of_the_request(status: int, error: type[Exception]) -> None:
    async def answer(_request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "no"}}, status=status, headers={"Location": "/elsewhere"})

    async with served(answer) as http:
        with pytest.raises(error):
            await http.post("/generate", {}, timeout_seconds=5)


@pytest.mark.parametrize(("code", "error"), [(429, EngineUnavailable), (500, EngineUnavailable), (400, EngineRejected)])
def test_a_refusal_inside_a_stream_is_told_by_its_code(code: int, error: type[Exception]) -> None:
    assert isinstance(failure({"message": "no", "code": code}, "engine e0"), error)


async def test_what_goes_out_is_ours_alone() -> None:
    """The key as Authorization, headers that one request asked for, no cookie that an engine has set, no redirect."""
    seen: list[Mapping[str, str]] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        seen.append(dict(request.headers))
        return web.json_response({}, headers={"Set-Cookie": "worker=1; Path=/"})

    async with served(answer, api_key=KEY) as http:
        await http.ask("POST", "/generate", {}, headers={"X-SMG-Routing-Key": "s"}, timeout_seconds=5)
        await http.get_status("/ping", timeout_seconds=5)
    first, second = seen
    assert first["Authorization"] == second["Authorization"] == f"Bearer {KEY}"
    assert first["X-SMG-Routing-Key"] == "s"
    assert set(second) == {"Host", "Accept", "Accept-Encoding", "User-Agent", "Authorization"}
    assert second["Accept-Encoding"] == "identity"


async def test_the_key_is_in_no_error() -> None:
    async def answer(_request: web.Request) -> web.StreamResponse:
        return web.Response(status=401, text="unauthorized")

    async with served(answer, api_key=KEY) as http:
        with pytest.raises(EngineRejected) as refused:
            await http.post("/generate", {}, timeout_seconds=5)
    with pytest.raises(EngineUnavailable) as gone:
        await http.post("/generate", {}, timeout_seconds=5)
    await http.aclose()
    assert KEY not in f"{refused.value!r} {gone.value!r} {gone.value.__cause__!r}"


async def test_a_call_of_somebody_else_carries_the_key_and_nothing_else_of_ours() -> None:
    seen: list[Mapping[str, str]] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        seen.append(dict(request.headers))
        return web.Response(text="whole")

    async with served(answer, api_key=KEY) as http, http.forward(RawCall("GET", "/health", [], b"")) as reply:
        assert b"".join([piece async for piece in reply.body]) == b"whole"
    assert set(seen[0]) == {"Host", "Authorization"}
    assert seen[0]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(("broken", "error"), [(True, EngineUnavailable), (False, EngineTimeout)])
async def test_an_answer_on_its_way_fails_in_our_words(broken: bool, error: type[Exception]) -> None:
    """While the body is read, not only when the call is left."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"half")
        assert request.transport is not None
        if broken:
            request.transport.abort()
        await asyncio.sleep(1)
        return response

    async with (
        served(answer, idle_timeout_seconds=0.3) as http,
        http.forward(RawCall("POST", "/score", [], b"{}")) as reply,
    ):
        assert await anext(reply.body) == b"half"
        with pytest.raises(error):
            await anext(reply.body)


async def test_a_callers_own_failure_is_not_the_engines() -> None:
    async def answer(_request: web.Request) -> web.StreamResponse:
        return web.Response(text="whole")

    with pytest.raises(BrokenPipeError):
        async with served(answer) as http, http.forward(RawCall("GET", "/health", [], b"")):
            raise BrokenPipeError


@pytest.mark.parametrize("forwarded", [False, True])
async def test_an_idle_connection_is_not_used_after_the_engine_may_have_closed_it(forwarded: bool) -> None:
    """uvicorn closes idle connections after 5 s; a request on such a connection would fail."""
    ports: list[int] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        ports.append(request.transport.get_extra_info("peername")[1])
        return web.json_response({})

    async def ask(http: EngineHttp) -> None:
        if not forwarded:
            await http.get_status("/ping", timeout_seconds=5)
            return
        async with http.forward(RawCall("GET", "/ping", [], b"")) as reply:
            assert [piece async for piece in reply.body] == [b"{}"]

    async with served(answer) as http:
        await ask(http)
        await ask(http)
        await asyncio.sleep(4.5)
        await ask(http)
    assert ports[0] == ports[1] != ports[2]


@pytest.mark.parametrize("text", [b"[1, 2,3]", b""])
@pytest.mark.parametrize("own", [7, 2**70])
def test_ids_leave_as_they_were_written_or_else_as_they_are(text: bytes, own: int) -> None:
    """Also beside a number of the agent's that only the standard library can write."""
    ids = WrittenIds(np.array([1, 2, 3], dtype=np.int32), text)
    body = serialised({"ids": ids, "own": own, "array": np.array([4], dtype=np.int32)})
    assert json.loads(body) == {"ids": [1, 2, 3], "own": own, "array": [4]}
    assert (b"[1, 2,3]" in body) == (bool(text) and own == 7)
