"""The feed's routes over a real ledger and a real socket, in the test's own event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from engines.launch import free_port
from gateway.ledger.sqlite import SqliteLedger
from gateway.routes.errors import add_error_replies
from gateway.routes.feed import feed_router
from gateway.routes.leasing import LeaseQueue
from gateway.routes.limits import BodyBudget, RequestEdge
from gateway.sessions.picks import PickChoice
from tests.waiting import until_async


class FeedServer:
    """One that can be restarted on its port."""

    def __init__(self, data: Path, port: int) -> None:
        self._data = data
        self._port = port
        self.url = f"http://127.0.0.1:{port}"

    async def start(self) -> None:
        self._ledger = SqliteLedger.open(self._data)
        app = FastAPI()
        app.include_router(
            feed_router(self._ledger, LeaseQueue(self._ledger), authorize=_everybody, picks=PickChoice.load())
        )
        add_error_replies(app)
        edge = RequestEdge(app, budget=BodyBudget(2**20), read_timeout_seconds=20.0)
        config = uvicorn.Config(edge, host="127.0.0.1", port=self._port, log_level="error", lifespan="off")
        self._server = uvicorn.Server(config)
        self._serving = asyncio.create_task(self._server.serve())
        await until_async(lambda: self._server.started)

    async def stop(self) -> None:
        self._server.should_exit = True
        await self._serving
        await self._ledger.aclose()

    async def restart(self) -> None:
        await self.stop()
        await self.start()


@asynccontextmanager
async def serve_feed(data: Path) -> AsyncIterator[FeedServer]:
    server = FeedServer(data, free_port())
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def _everybody(request: object) -> None:
    """Keys are off."""
