"""Calls of others to an engine, sent as they are: whatever HTTP allows, so through aiohttp, imported only here.

No header of ours but the engine's key, no cookie of an engine; bodies stay as they are encoded, redirects are not
followed. Failures are translated as in `connection`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager

import aiohttp
from yarl import URL

from gateway.contracts.errors import EngineProtocolError, EngineTimeout, EngineUnavailable
from gateway.contracts.ports import RawCall, RawReply

_KEEPALIVE_SECONDS = 4.0
"""As in `connection`: below what uvicorn keeps."""


class RawHttp:
    """The connections of such calls. named(path): how errors name it. headers: added to each."""

    def __init__(
        self,
        named: Callable[[str], str],
        *,
        headers: Mapping[str, str],
        connect_timeout_seconds: float,
        idle_timeout_seconds: float,
    ) -> None:
        self._named = named
        self._headers = headers
        self._timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=connect_timeout_seconds, sock_read=idle_timeout_seconds
        )
        self._session: aiohttp.ClientSession | None = None

    @asynccontextmanager
    async def forward(self, url: str, call: RawCall) -> AsyncIterator[RawReply]:
        """As `gateway.contracts.ports.ForwardingEngine` says; url: of the engine."""
        async with self._translated(call.target):
            response = await self._opened().request(
                call.method,
                URL(url + call.target, encoded=True),
                headers=call.headers,
                data=call.body or None,
                allow_redirects=False,
                timeout=self._timeout,
            )
        async with response, aclosing(self._pieces(response, call.target)) as body:
            yield RawReply(response.status, list(response.headers.items()), body)

    async def aclose(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None or self._session.closed:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_SECONDS),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=self._headers,
                auto_decompress=False,
                skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
            )
        return self._session

    async def _pieces(self, response: aiohttp.ClientResponse, path: str) -> AsyncGenerator[bytes, None]:
        async with self._translated(path):
            async for piece in response.content.iter_any():
                yield piece

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
