"""HTTP to an engine, with every foreign failure translated once.

Connections that fail, 5xx, 408 and streams that end early → EngineUnavailable; 429 and what says `Retry-After` →
EngineBusy; silence → EngineTimeout; other 4xx → ContextOverflow or EngineRejected; bodies that are not what HTTP said →
EngineProtocolError.

Silence has two limits. A short one after which the other side is asked whether it lives: a process that hangs keeps
its connections open, and a long prompt or a paused engine is silent as well. A long one, whatever it says.

What is sent is ours alone: no header of an agent, no cookie of an engine, and the operator's engine key only as
`Authorization`. Redirects are not followed.

Our own requests go through `engines.http1`, since each turn is one of them; calls of others, which may be anything that
HTTP allows, through aiohttp (`raw_http`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import msgspec
import numpy as np
import orjson

from engines.event_stream import EventReader
from engines.http1 import Connection, Http1Client, NotHttp, Pace
from engines.refusals import refusal, retry_after_seconds
from gateway.contracts.errors import (
    EngineBusy,
    EngineError,
    EngineProtocolError,
    EngineTimeout,
    EngineUnavailable,
    VerbatimError,
)
from gateway.contracts.generation import WrittenIds
from gateway.contracts.ports import RawCall, RawReply

if TYPE_CHECKING:
    from engines.raw_http import RawHttp

logger = logging.getLogger(__name__)

_KEEPALIVE_SECONDS = 4.0
"""How long an idle connection is kept: uvicorn, which serves the engines, closes its end after 5 s."""

_REPEATABLE = frozenset(("GET",))
"""May be asked again where an idle connection turns out to be closed. A POST may have been carried out."""

_DONE = b"[DONE]"
_GOING_ON = b'"finish_reason":null'
"""What an event says that is not the last one; inside a text its quotes would be escaped."""


class Answer(NamedTuple):
    """One answer as it came, whatever its status."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class PieceReader(Protocol):
    """Makes events of the pieces of a stream, cut anywhere (`engines.event_stream.EventReader`)."""

    @property
    def inside_event(self) -> bool:
        """Whether an event has begun and is not complete."""
        ...

    def read(self, piece: bytes, /) -> Sequence[bytes]:
        """The data of the events that this piece completes."""
        ...


class EngineHttp:
    """One engine's HTTP connections; `idle_timeout_seconds` bounds the silence between two pieces of an answer.

    first_byte_timeout_seconds: of a stream, until it begins (None: as between pieces). stall_timeout_seconds: of a
    stream, after how much silence it is asked whether it lives (0: never).
    api_key: sent as `Authorization: Bearer …`, for engines that were started with one. refusal_of: (status, body, name)
    of an answer of 300 and above → the error that it stands for.
    """

    def __init__(
        self,
        url: str,
        *,
        engine_id: str,
        connect_timeout_seconds: float,
        idle_timeout_seconds: float,
        first_byte_timeout_seconds: float | None = None,
        stall_timeout_seconds: float = 0.0,
        api_key: str | None = None,
        refusal_of: Callable[[int, bytes, str], VerbatimError] | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.engine_id = engine_id
        self.idle_timeout_seconds = idle_timeout_seconds
        self.first_byte_timeout_seconds = first_byte_timeout_seconds or idle_timeout_seconds
        self.stall_timeout_seconds = stall_timeout_seconds or None
        self._connect_timeout_seconds = connect_timeout_seconds
        self._authorization = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._refusal_of = refusal_of or refusal
        self._client: Http1Client | None = None
        self._raw: RawHttp | None = None

    async def get_json(self, path: str, *, timeout_seconds: float) -> Any:
        """GET a JSON document."""
        return parsed(await self._body("GET", path, None, timeout_seconds), self.named(path))

    async def get_object(self, path: str, *, timeout_seconds: float) -> Mapping[str, Any]:
        """GET a JSON object."""
        content = await self.get_json(path, timeout_seconds=timeout_seconds)
        if not isinstance(content, dict):
            raise EngineProtocolError(f"{self.named(path)} answered {type(content).__name__}, expected an object")
        return content

    async def get_status(self, path: str, *, timeout_seconds: float) -> int:
        """The status of a GET, whatever it is."""
        return (await self.ask("GET", path, timeout_seconds=timeout_seconds)).status

    async def post(self, path: str, body: Mapping[str, Any], *, timeout_seconds: float) -> bytes:
        """POST JSON and return the body of the answer."""
        return await self._body("POST", path, body, timeout_seconds)

    async def ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_seconds: float,
    ) -> Answer:
        """The answer to one request, a refusal too."""
        until = asyncio.get_running_loop().time() + timeout_seconds
        sent = None if body is None else serialised(body)
        try:
            connection = await self.client().send(method, path, sent, headers)
            try:
                return await self._answer(connection, until)
            except ConnectionError:
                if method not in _REPEATABLE or connection.has_received or not connection.is_reused:
                    raise
            return await self._answer(await self.client().send(method, path, sent, headers, fresh=True), until)
        except (OSError, NotHttp) as error:
            raise self.translated(error, path) from error

    def stream(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        headers: Mapping[str, str] | None = None,
        reader: PieceReader | None = None,
        on_headers: Callable[[Mapping[str, str]], None] | None = None,
        on_silence: Callable[[], Awaitable[None]] | None = None,
    ) -> EventStream:
        """POST JSON for an answer of server-sent events; it is sent when the stream is entered.

        reader: of the events, where they are more than JSON. on_headers: told the answer's. on_silence: asked when the
        stream stalls; raises the EngineError that the silence stands for, if any.
        """
        reader = reader or EventReader()
        return EventStream(self, path, body, headers, reader=reader, on_headers=on_headers, on_silence=on_silence)

    @asynccontextmanager
    async def forward(self, call: RawCall) -> AsyncIterator[RawReply]:
        """Send a call as it is; its answer is neither decoded nor followed elsewhere."""
        if self._raw is None:
            from engines.raw_http import RawHttp  # aiohttp is 9 MB and a tenth of the start; few gateways forward

            self._raw = RawHttp(
                self.named,
                headers=self._authorization,
                connect_timeout_seconds=self._connect_timeout_seconds,
                idle_timeout_seconds=self.idle_timeout_seconds,
            )
        async with self._raw.forward(self.url, call) as reply:
            yield reply

    async def aclose(self) -> None:
        """Close all connections."""
        if self._client is not None:
            await self._client.aclose()
        if self._raw is not None:
            await self._raw.aclose()

    def client(self) -> Http1Client:
        """The connections of our own requests; raises NotHttp for an address that is none."""
        if self._client is None:
            self._client = Http1Client(
                self.url,
                # Plain bodies only: a router in between may drop `Content-Encoding` and leave the body as it is.
                headers={"Accept-Encoding": "identity", "User-Agent": "verbatim"} | self._authorization,
                connect_timeout_seconds=self._connect_timeout_seconds,
                keepalive_seconds=_KEEPALIVE_SECONDS,
            )
        return self._client

    def named(self, path: str) -> str:
        """Who answers there, in words."""
        return f"engine {self.engine_id} at {self.url}{path}"

    def refused(self, answer: Answer, path: str) -> VerbatimError:
        """The error that an answer of 300 and above stands for."""
        error = self._refusal_of(answer.status, answer.body, self.named(path))
        wait = retry_after_seconds(answer.headers.get("Retry-After"))
        if type(error) is EngineUnavailable and (answer.status == 429 or wait is not None):
            return EngineBusy(error.message, retry_after_seconds=wait)
        return error

    def translated(self, error: OSError | NotHttp, path: str) -> EngineError:
        """A foreign failure in our words."""
        named = self.named(path)
        if isinstance(error, NotHttp):
            return EngineProtocolError(f"{named}: not HTTP as promised: {error}")
        if isinstance(error, TimeoutError):
            return EngineTimeout(f"{named} did not answer in time")
        return EngineUnavailable(f"{named} is not reachable: {error}")

    async def _body(self, method: str, path: str, body: Mapping[str, Any] | None, timeout_seconds: float) -> bytes:
        answer = await self.ask(method, path, body, timeout_seconds=timeout_seconds)
        if answer.status >= 300:
            raise self.refused(answer, path)
        return answer.body

    async def _answer(self, connection: Connection, until: float) -> Answer:
        """All of an answer; raises TimeoutError where it is not there by `until`, or says nothing for too long."""
        try:
            if not await connection.head(min(until, connection.heard_at + self.idle_timeout_seconds)):
                raise TimeoutError
            body: list[bytes] = []
            while pieces := await connection.pieces(min(until, connection.heard_at + self.idle_timeout_seconds)):
                body += pieces
            if pieces is None:
                raise TimeoutError
            answer = Answer(connection.status, connection.headers, b"".join(body))
            connection.finish()
            return answer
        finally:
            connection.close()

    async def whole(self, connection: Connection) -> Answer:
        """All of an answer that has begun."""
        return await self._answer(connection, float("inf"))


class EventStream:
    """One answer of server-sent events: enter it, then ask `next` until the end; leaving it earlier ends the request.

    async with http.stream("/generate", body) as stream:
        while events := await stream.next():
            for event in events: ...
    """

    __slots__ = (
        "_body",
        "_connection",
        "_headers",
        "_heard_at",
        "_http",
        "_is_over",
        "_on_headers",
        "_on_silence",
        "_path",
        "_reader",
        "pace",
    )

    def __init__(
        self,
        http: EngineHttp,
        path: str,
        body: Mapping[str, Any],
        headers: Mapping[str, str] | None = None,
        *,
        reader: PieceReader,
        on_headers: Callable[[Mapping[str, str]], None] | None = None,
        on_silence: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._http = http
        self._path = path
        self._body: Mapping[str, Any] | None = body
        self._headers = headers
        self._reader = reader
        self._on_headers = on_headers
        self._on_silence = on_silence
        self._connection: Connection | None = None
        self._heard_at = 0.0
        self._is_over = False
        self.pace: Pace | None = None
        """While it is not live, `next` waits for several events. What came and was not given when the stream is left,
        or not even entered, with an error, `unread` gives."""

    async def __aenter__(self) -> Self:
        """Send the request and wait for the answer to begin; raises the error of one that is a refusal."""
        assert self._body is not None
        http = self._http
        body, self._body = serialised(self._body), None
        begun = False
        try:
            self._connection = connection = await http.client().send("POST", self._path, body, self._headers)
            del body  # a long prompt; the answer may take minutes
            if self.pace is not None and self._on_headers is None:
                self._gather(connection, self.pace)
            too_late = connection.heard_at + http.first_byte_timeout_seconds
            while not connection.has_head:
                if not await connection.arrival(self._waits_until(connection, too_late)):
                    await self._bear_beginning(connection, too_late)
            if connection.status >= 300:
                raise http.refused(await http.whole(connection), self._path)
            if self._on_headers is not None:
                self._on_headers(connection.headers)
            self._heard_at = connection.heard_at
            begun = True
        except (OSError, NotHttp) as error:
            raise http.translated(error, self._path) from error
        finally:
            if not begun and self._connection is not None:
                self._connection.close()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the connection back, or end the request where its end was not heard."""
        assert self._connection is not None
        if self._is_over:
            self._connection.finish()
        else:
            self._connection.close()

    def _gather(self, connection: Connection, pace: Pace) -> None:
        connection.gather(pace, _GOING_ON)
        self.pace = None

    def finish(self) -> None:
        """All that is needed was heard: what may follow does not matter."""
        self._is_over = True

    def unread(self) -> Sequence[bytes]:
        """The data of events that came since the last `next`."""
        if self._connection is None:
            return ()
        pieces = self._connection.taken()
        return [data for data in self._reader.read(b"".join(pieces)) if data != _DONE] if pieces else ()

    async def next(self) -> Sequence[bytes]:
        """The data of the events that came, one at least; () behind `[DONE]`.

        Raises EngineUnavailable if the stream ends without that, EngineTimeout if it says nothing, or nothing but
        comments.
        """
        connection = self._connection
        assert connection is not None
        if self._is_over:
            return ()
        try:
            while (pieces := connection.taken()) or pieces is None:
                if pieces is None:
                    too_late = connection.heard_at + self._http.idle_timeout_seconds
                    if not await connection.arrival(self._waits_until(connection, too_late)):
                        await self._bear_silence(connection)
                    continue
                payloads = self._reader.read(pieces[0] if len(pieces) == 1 else b"".join(pieces))
                if payloads:
                    self._heard_at = connection.heard_at
                    if payloads[-1] == _DONE or _DONE in payloads:
                        self._is_over = True
                        return payloads[: payloads.index(_DONE)]
                    if self.pace is not None:
                        self._gather(connection, self.pace)
                    return payloads
                await self._check_comments()
        except (OSError, NotHttp) as error:
            if isinstance(error, ConnectionError):
                raise EngineUnavailable(f"{self._http.named(self._path)}: the answer broke off: {error}") from error
            raise self._http.translated(error, self._path) from error
        raise EngineUnavailable(f"{self._http.named(self._path)}: the stream ended early")

    def _waits_until(self, connection: Connection, too_late: float) -> float:
        """When a silence is too long, or long enough to ask whether the other side lives."""
        seconds = self._http.stall_timeout_seconds
        return too_late if seconds is None or self._on_silence is None else min(too_late, connection.now() + seconds)

    async def _bear_silence(self, connection: Connection) -> None:
        """Raise TimeoutError for one that is too long."""
        is_too_long = connection.now() >= connection.heard_at + self._http.idle_timeout_seconds
        if self._on_silence is None or is_too_long:
            raise TimeoutError
        await self._on_silence()

    async def _bear_beginning(self, connection: Connection, too_late: float) -> None:
        """Raise EngineTimeout for an answer that does not begin, and what the other side's silence stands for."""
        if connection.now() >= too_late:
            seconds = self._http.first_byte_timeout_seconds
            raise EngineTimeout(f"{self._http.named(self._path)} did not begin to answer in {seconds:g} s")
        if self._on_silence is not None:
            await self._on_silence()

    async def _check_comments(self) -> None:
        """A router keeps the connection alive with comments, however long its worker is silent."""
        assert self._connection is not None
        now = self._connection.now()
        if self._reader.inside_event:
            self._heard_at = now
        elif now > self._heard_at + self._http.idle_timeout_seconds:
            raise EngineTimeout(
                f"{self._http.named(self._path)} sent nothing for {self._http.idle_timeout_seconds:g} s"
            )
        elif self._on_silence is not None and now > self._heard_at + (self._http.stall_timeout_seconds or math.inf):
            await self._on_silence()


async def abort_quietly(abort: Callable[[str], Awaitable[None]], request_id: str) -> None:
    """End a request that nobody waits for; where that fails, the log says so."""
    try:
        await abort(request_id)
    except EngineError as error:
        logger.info("request %s may go on at its engine: %s", request_id, error)


def parsed(body: bytes, named: str) -> Any:
    """JSON without loss (I8): integers of any size stay what they are."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EngineProtocolError(f"{named}: the answer is not JSON: {body[:80]!r}") from error


def serialised(body: Mapping[str, Any]) -> bytes:
    """JSON; arrays of numpy as they are, without a list of Python's numbers in between; ids as they were written."""
    try:
        return orjson.dumps(body, default=_written, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError:  # an integer beyond 64 bits among the agent's own fields, or an array with gaps
        return json.dumps(body, ensure_ascii=False, separators=(",", ":"), default=_listed).encode()


def _written(value: Any) -> Any:
    if isinstance(value, WrittenIds):
        return orjson.Fragment(value.text) if value.text else value.ids
    raise TypeError(f"{type(value).__name__} is no JSON")


def _listed(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, WrittenIds):
        return value.ids.tolist()
    raise TypeError(f"{type(value).__name__} is no JSON")
