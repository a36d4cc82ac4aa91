"""A door in front of one real engine: everything passes, and what the engine said of each request is written down.

gateway ──HTTP──▶ Door ──HTTP──▶ engine        Door.served: the engine's own words, not read by the gateway's client
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

from engines.launch import free_port

_NOT_PASSED = frozenset(("host", "content-length", "transfer-encoding", "connection"))
_DATA = b"data: "
_FEWEST_TOKENS, _MOST_TOKENS = 4, 40
_RECENT = 500


@dataclass(slots=True)
class Served:
    """One `/generate` as it went by.

    labels: the engine's own weight label of each token, from its spans. begun, ended: by the monotonic clock; whole:
    whether its last event came.
    """

    rid: str
    prompt: tuple[int, ...]
    begun: float
    token_ids: list[int] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    num_retractions: int = 0
    cached_tokens: int = 0
    finish: str = ""
    ended: float = 0.0

    @property
    def whole(self) -> bool:
        """Whether the engine said that it was over, and which weights made each token."""
        return bool(self.finish)

    def read(self, event: dict[str, Any]) -> None:
        """Note one event of the stream."""
        meta = event["meta_info"]
        fresh = int(meta["completion_tokens"]) - len(self.token_ids)
        if fresh:
            self.token_ids += event["output_ids"][-fresh:]
        if (finish := meta["finish_reason"]) is None:
            return
        self.finish = str(finish["type"])
        self.num_retractions = int(meta.get("num_retractions") or 0)
        self.cached_tokens = int(meta.get("cached_tokens") or 0)
        for span in meta.get("weight_versions") or ():
            self.labels += [span["version"]] * (span["end"] - span["start"])


class Door:
    """Passes requests on to `engine_url`; streams go through as they come."""

    def __init__(self, engine_url: str) -> None:
        self.engine_url = engine_url
        self.url = ""
        self.served: list[Served] = []
        self._session: aiohttp.ClientSession | None = None

    @property
    def num_sampling(self) -> int:
        """Requests under way that have some tokens already, and not many."""
        recent = self.served[-_RECENT:]
        return sum(not one.ended and _FEWEST_TOKENS <= len(one.token_ids) <= _MOST_TOKENS for one in recent)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Door]:
        """Listen on a free loopback port meanwhile."""
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", self._pass)
        runner = web.AppRunner(app, shutdown_timeout=1.0)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector, auto_decompress=False) as session:
            self._session = session
            await runner.setup()
            port = free_port()
            await web.TCPSite(runner, "127.0.0.1", port).start()
            self.url = f"http://127.0.0.1:{port}"
            try:
                yield self
            finally:
                await runner.cleanup()

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        if self._session is None:
            raise web.HTTPServiceUnavailable
        body = await request.read()
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _NOT_PASSED}
        url = self.engine_url + request.path_qs
        async with self._session.request(request.method, url, data=body or None, headers=headers) as answer:
            reply = web.StreamResponse(status=answer.status)
            reply.content_type = answer.content_type
            # Who hangs up has what it wants, or wants it no more: the engine's stream is closed as it would have been.
            with suppress(ConnectionResetError):
                await reply.prepare(request)
                if request.path == "/generate" and answer.status == 200:
                    await self._pass_generation(json.loads(body), answer, reply)
                else:
                    await reply.write(await answer.read())
                await reply.write_eof()
            return reply

    async def _pass_generation(
        self, asked: dict[str, Any], answer: aiohttp.ClientResponse, reply: web.StreamResponse
    ) -> None:
        served = Served(str(asked.get("rid")), tuple(asked["input_ids"]), time.monotonic())
        self.served.append(served)
        left = b""
        try:
            async for piece in answer.content.iter_any():
                *lines, left = (left + piece).split(b"\n")
                for line in lines:
                    if line.startswith(_DATA + b"{"):
                        served.read(json.loads(line.removeprefix(_DATA)))
                await reply.write(piece)
        finally:
            served.ended = time.monotonic()
