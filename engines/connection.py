"""HTTP to an engine, with every foreign failure translated once.

Connections that fail, 5xx, 408 and streams that end early → EngineUnavailable; 429 and what says `Retry-After` →
EngineBusy; silence → EngineTimeout; other 4xx → ContextOverflow or EngineRejected; bodies that are not what HTTP said →
EngineProtocolError.

Silence has two limits. A short one after which the other side is asked whether it lives: a process that hangs keeps
its connections open, and a long prompt or a paused engine is silent as well. A long one, whatever it says.

What is sent is ours alone: no header of an agent, no cookie of an engine, and the operator's engine key only as
`Authorization`. Redirects are not followed.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any, NamedTuple

import aiohttp
import orjson
from yarl import URL

from engines.event_stream import EventReader, RoutingSink
from gateway.contracts.errors import (
    ContextOverflow,
    EngineBusy,
    EngineError,
    EngineProtocolError,
    EngineRejected,
    EngineTimeout,
    EngineUnavailable,
    VerbatimError,
)
from gateway.contracts.ports import RawCall, RawReply

logger = logging.getLogger(__name__)

_OVERFLOW_MARKS = ("maximum context length", "longer than the model's context length", "is longer than the maximum")
_EXPERTS = b'"routed_experts":"'
_LONG_NUMBER = re.compile(rb"[0-9]{19}")
_PASSING_STATUSES = frozenset((408, 425, 429))
"""Refusals of now, not of the request."""

_KEEPALIVE_SECONDS = 4.0
"""How long an idle connection is kept: uvicorn, which serves the engines, closes its end after 5 s."""


class Answer(NamedTuple):
    """One answer as it came, whatever its status."""

    status: int
    headers: Mapping[str, str]
    body: bytes


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
        self._connect_timeout_seconds = connect_timeout_seconds
        self._idle_timeout_seconds = idle_timeout_seconds
        self._first_byte_timeout_seconds = first_byte_timeout_seconds or idle_timeout_seconds
        self._stall_timeout_seconds = stall_timeout_seconds or None
        self._api_key = api_key
        self._refusal_of = refusal_of or refusal
        self._session: aiohttp.ClientSession | None = None
        self._raw_session: aiohttp.ClientSession | None = None

    async def get_json(self, path: str, *, timeout_seconds: float) -> Any:
        """GET a JSON document."""
        async with self._request("GET", path, None, timeout_seconds) as response:
            return _parsed(await response.read(), self._named(path))

    async def get_object(self, path: str, *, timeout_seconds: float) -> Mapping[str, Any]:
        """GET a JSON object."""
        content = await self.get_json(path, timeout_seconds=timeout_seconds)
        if not isinstance(content, dict):
            raise EngineProtocolError(f"{self._named(path)} answered {type(content).__name__}, expected an object")
        return content

    async def get_status(self, path: str, *, timeout_seconds: float) -> int:
        """The status of a GET, whatever it is."""
        async with self._sent("GET", path, None, timeout_seconds, None) as response:
            return response.status

    async def post(self, path: str, body: Mapping[str, Any], *, timeout_seconds: float) -> bytes:
        """POST JSON and return the body of the answer."""
        async with self._request("POST", path, body, timeout_seconds) as response:
            return await response.read()

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
        async with self._sent(method, path, body, timeout_seconds, headers) as response:
            return Answer(response.status, response.headers, await response.read())

    async def events(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        headers: Mapping[str, str] | None = None,
        routing: RoutingSink | None = None,
        on_headers: Callable[[Mapping[str, str]], None] = lambda headers: None,
        on_silence: Callable[[], Awaitable[None]] | None = None,
    ) -> AsyncGenerator[Any, None]:
        """POST JSON and yield the parsed events of the answer, up to `[DONE]`; on_headers is told the answer's first.

        routing: takes the rows of a big event as they arrive. on_silence: asked when the stream stalls; raises the
        EngineError that the silence stands for, if any.
        Raises EngineUnavailable if the stream ends without `[DONE]`, EngineTimeout if it says nothing but comments.
        """
        async with (
            self._translated(path),
            self._opening(path, body, headers, on_silence) as opening,
            await opening as response,
        ):
            if response.status >= 300:
                raise await self._refused(response, path)
            on_headers(response.headers)
            reader = EventReader(routing)
            heard = time.monotonic()
            while piece := await self._next_piece(response, on_silence):
                for payload in reader.read(piece):
                    if payload == b"[DONE]":
                        return
                    yield _parsed(payload, self._named(path))
                    heard = time.monotonic()
                # A router keeps the connection alive with comments, however long its worker is silent.
                if reader.inside_event:
                    heard = time.monotonic()
                elif time.monotonic() > heard + self._idle_timeout_seconds:
                    raise EngineTimeout(f"{self._named(path)} sent nothing for {self._idle_timeout_seconds:g} s")
                elif self._stalls_since(heard) and on_silence is not None:
                    await on_silence()
        raise EngineUnavailable(f"{self._named(path)}: the stream ended early")

    @asynccontextmanager
    async def _opening(
        self,
        path: str,
        body: Mapping[str, Any],
        headers: Mapping[str, str] | None,
        on_silence: Callable[[], Awaitable[None]] | None,
    ) -> AsyncIterator[asyncio.Future[aiohttp.ClientResponse]]:
        """A request whose answer has begun, or has failed to, when the body is entered."""
        request = self._opened().post(
            self.url + path, json=body, headers=headers, timeout=self._timeout(None), allow_redirects=False
        )
        opening = asyncio.ensure_future(_answer(request))
        deadline = time.monotonic() + self._first_byte_timeout_seconds
        try:
            while not opening.done():
                patience = min(self._stall_timeout_seconds or deadline, deadline - time.monotonic())
                await asyncio.wait([opening], timeout=max(0.0, patience))
                if opening.done():
                    break
                if time.monotonic() >= deadline:
                    raise EngineTimeout(
                        f"{self._named(path)} did not begin to answer in {self._first_byte_timeout_seconds:g} s"
                    )
                if on_silence is not None:
                    await on_silence()
            yield opening
        finally:
            # Done or not: what raised here may have come in the same moment as the answer, which nobody would close.
            opening.cancel()
            with suppress(asyncio.CancelledError, aiohttp.ClientError, OSError):
                (await opening).close()

    async def _next_piece(
        self, response: aiohttp.ClientResponse, on_silence: Callable[[], Awaitable[None]] | None
    ) -> bytes:
        """The next bytes of a stream, b"" at its end."""
        while True:
            try:
                async with asyncio.timeout(self._stall_timeout_seconds) as stall:
                    return await response.content.readany()
            except TimeoutError:
                if not stall.expired() or on_silence is None:
                    raise
            await on_silence()

    def _stalls_since(self, heard: float) -> bool:
        return self._stall_timeout_seconds is not None and time.monotonic() > heard + self._stall_timeout_seconds

    @asynccontextmanager
    async def forward(self, call: RawCall) -> AsyncIterator[RawReply]:
        """Send a call as it is; its answer is neither decoded nor followed elsewhere."""
        async with self._translated(call.target):
            response = await self._opened_raw().request(
                call.method,
                URL(self.url + call.target, encoded=True),
                headers=call.headers,
                data=call.body or None,
                allow_redirects=False,
                timeout=self._timeout(None),
            )
        async with response, aclosing(self._pieces(response, call.target)) as body:
            yield RawReply(response.status, list(response.headers.items()), body)

    async def aclose(self) -> None:
        """Close all connections."""
        for session in (self._session, self._raw_session):
            if session is not None:
                await session.close()

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None or self._session.closed:
            self._session = aiohttp.ClientSession(
                connector=_connector(),
                cookie_jar=aiohttp.DummyCookieJar(),
                # Plain bodies only: a router in between may drop `Content-Encoding` and leave the body as it is.
                headers={"Accept-Encoding": "identity", "User-Agent": "verbatim"} | self._authorization(),
                json_serialize=_serialised,
            )
        return self._session

    def _opened_raw(self) -> aiohttp.ClientSession:
        """For calls of others: it adds the engine key only, keeps no cookies and leaves bodies compressed."""
        if self._raw_session is None or self._raw_session.closed:
            self._raw_session = aiohttp.ClientSession(
                connector=_connector(),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=self._authorization(),
                auto_decompress=False,
                skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
            )
        return self._raw_session

    def _authorization(self) -> dict[str, str]:
        return {} if self._api_key is None else {"Authorization": f"Bearer {self._api_key}"}

    async def _pieces(self, response: aiohttp.ClientResponse, path: str) -> AsyncGenerator[bytes, None]:
        async with self._translated(path):
            async for piece in response.content.iter_any():
                yield piece

    def _timeout(self, total_seconds: float | None) -> aiohttp.ClientTimeout:
        return aiohttp.ClientTimeout(
            total=total_seconds, sock_connect=self._connect_timeout_seconds, sock_read=self._idle_timeout_seconds
        )

    def _named(self, path: str) -> str:
        return f"engine {self.engine_id} at {self.url}{path}"

    @asynccontextmanager
    async def _request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        timeout_seconds: float | None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        async with self._sent(method, path, body, timeout_seconds, headers) as response:
            if response.status >= 300:
                raise await self._refused(response, path)
            yield response

    async def _refused(self, response: aiohttp.ClientResponse, path: str) -> VerbatimError:
        error = self._refusal_of(response.status, await response.read(), self._named(path))
        wait = retry_after_seconds(response.headers.get("Retry-After"))
        if type(error) is EngineUnavailable and (response.status == 429 or wait is not None):
            return EngineBusy(error.message, retry_after_seconds=wait)
        return error

    @asynccontextmanager
    async def _sent(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        timeout_seconds: float | None,
        headers: Mapping[str, str] | None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        async with (
            self._translated(path),
            self._opened().request(
                method,
                self.url + path,
                json=body,
                headers=headers,
                timeout=self._timeout(timeout_seconds),
                allow_redirects=False,
            ) as response,
        ):
            yield response

    @asynccontextmanager
    async def _translated(self, path: str) -> AsyncIterator[None]:
        named = self._named(path)
        try:
            yield
        except TimeoutError as error:  # first: aiohttp's timeouts are both a TimeoutError and a ClientError
            raise EngineTimeout(f"{named} did not answer in time") from error
        except aiohttp.ClientPayloadError as error:
            raise EngineUnavailable(f"{named}: the answer broke off: {error}") from error
        except (aiohttp.ClientConnectionError, OSError) as error:
            raise EngineUnavailable(f"{named} is not reachable: {error}") from error
        except aiohttp.ClientError as error:
            raise EngineProtocolError(f"{named}: not HTTP as promised: {error}") from error


async def abort_quietly(abort: Callable[[str], Awaitable[None]], request_id: str) -> None:
    """End a request that nobody waits for; where that fails, the log says so."""
    try:
        await abort(request_id)
    except EngineError as error:
        logger.info("request %s may go on at its engine: %s", request_id, error)


def refusal(status: int, body: bytes, named: str) -> VerbatimError:
    """The error that an engine's answer of 300 and above stands for."""
    message = _message(body) or f"HTTP {status}"
    if status < 400:
        return EngineProtocolError(f"{named} redirects ({status}), which is not followed: give its own address")
    if status >= 500 or status in _PASSING_STATUSES:
        return EngineUnavailable(f"{named} failed with {status}: {message}")
    return refused(message, named)


def refused(message: str, named: str) -> ContextOverflow | EngineRejected:
    """The error of a request that the engine will not serve; a context overflow is told by its message."""
    if any(mark in message for mark in _OVERFLOW_MARKS):
        hint = "" if "maximum context length" in message else " (maximum context length exceeded)"
        return ContextOverflow(f"{message}{hint}")
    return EngineRejected(f"{named} refused the request: {message}", reason=message)


def failure(error: Any, named: str) -> VerbatimError:
    """The error that an `error` inside a stream stands for: `{"message", "code"}`, or its text."""
    message = error["message"] if isinstance(error, dict) else str(error)
    code = error.get("code", 400) if isinstance(error, dict) else 400
    if isinstance(code, int) and (code >= 500 or code in _PASSING_STATUSES):
        return EngineUnavailable(f"{named}: {message}")
    return refused(message, named)


def retry_after_seconds(header: str | None) -> float | None:
    """What a `Retry-After` says, a number of seconds or a date; None where there is none that can be read."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


async def _answer(request: Awaitable[aiohttp.ClientResponse]) -> aiohttp.ClientResponse:
    return await request


def _connector() -> aiohttp.TCPConnector:
    return aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_SECONDS)


def _message(body: bytes) -> str:
    """The text of SGLang's or OpenAI's error body; the body itself where it is neither."""
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body.decode(errors="replace").strip()[:500]
    if isinstance(content, dict):
        error = content.get("error", content)
        if isinstance(error, dict):
            error = error.get("message") or error.get("detail")
        if isinstance(error, str):
            return error
    return body.decode(errors="replace").strip()[:500]


def _parsed(body: bytes, named: str) -> Any:
    """JSON without loss (I8): orjson, which turns integers beyond 64 bits into floats, unless there may be one."""
    try:
        return json.loads(body) if _LONG_NUMBER.search(_without_experts(body)) else orjson.loads(body)
    except ValueError as error:
        raise EngineProtocolError(f"{named}: the answer is not JSON: {body[:80]!r}") from error


def _without_experts(body: bytes) -> bytes:
    """The answer without its routing rows, megabytes of base64 that need not be searched."""
    start = body.find(_EXPERTS)
    stop = body.find(b'"', start + len(_EXPERTS)) if start >= 0 else -1
    return body[:start] + body[stop:] if stop >= 0 else body


def _serialised(body: Any) -> str:
    try:
        return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY).decode()
    except TypeError:  # an integer beyond 64 bits among the agent's own fields
        return json.dumps(body, ensure_ascii=False, separators=(",", ":"))
