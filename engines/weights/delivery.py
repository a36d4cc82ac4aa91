"""What all ways of bringing weights to engines share: each engine or worker at once, paused if asked, failures told.

publish ─▶ deliver ─▶ every engine, or every worker behind a router ─▶ update(engine) ─▶ must show the new label
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from engines.connection import EngineHttp
from engines.smg import workers_behind
from gateway.contracts.errors import EngineError, EngineRejected, RequestError, TransportError
from gateway.contracts.ports import PauseMode

Update: TypeAlias = Callable[["Controls"], Awaitable[None]]
"""Brings the weights to one engine; raises EngineError, RequestError or TransportError."""


@dataclass(frozen=True, slots=True)
class Controls:
    """An engine's control routes; `timeout_seconds` is the longest answer waited for."""

    engine: EngineHttp
    timeout_seconds: float

    @property
    def url(self) -> str:
        """Where it listens."""
        return self.engine.url

    async def post(self, path: str, body: Mapping[str, Any]) -> bytes:
        """The answer's body."""
        return await self.engine.post(path, body, timeout_seconds=self.timeout_seconds)

    async def get_object(self, path: str) -> Mapping[str, Any]:
        """A JSON object."""
        return await self.engine.get_object(path, timeout_seconds=self.timeout_seconds)

    async def is_paused(self) -> bool:
        """Whether it holds requests back now."""
        return await self.engine.get_status("/ready", timeout_seconds=self.timeout_seconds) == 503

    @asynccontextmanager
    async def paused(self, mode: PauseMode | None) -> AsyncIterator[None]:
        """Paused meanwhile; None leaves that to somebody else."""
        if mode is None:
            yield
            return
        await self.post("/pause_generation", {"mode": mode.value})
        try:
            yield
        finally:
            await self.post("/continue_generation", {})

    async def verify(self, label: str, *, folder: Path | None = None) -> None:
        """An engine that answers 200 has been seen serving other weights: ask it what it holds."""
        info = await self.get_object("/model_info")
        if info.get("weight_version") != label or folder not in (None, Path(str(info.get("model_path")))):
            served = f"{info.get('weight_version')} from {info.get('model_path')}"
            raise EngineRejected(f"{self.url} serves {served} after it was given {label}")


async def deliver(
    urls: Sequence[str], update: Update, *, label: str, timeout_seconds: float, api_key: str | None
) -> None:
    """Run `update` for every engine at once; an smg router's address stands for all of its workers.

    Raises TransportError naming the first engine that failed, when all have answered.
    """

    async def to_engine_or_workers(url: str) -> None:
        async with _connected(url, label, timeout_seconds, api_key) as controls:
            workers = await workers_behind(controls.engine)
            if not workers:
                await update(controls)
        await _all_answered(to_engine(worker) for worker in workers)

    async def to_engine(url: str) -> None:
        async with _connected(url, label, timeout_seconds, api_key) as controls:
            await update(controls)

    await _all_answered(to_engine_or_workers(url) for url in urls)


@asynccontextmanager
async def _connected(url: str, label: str, timeout_seconds: float, api_key: str | None) -> AsyncIterator[Controls]:
    engine = EngineHttp(
        url,
        engine_id=url,
        connect_timeout_seconds=10.0,
        idle_timeout_seconds=timeout_seconds,
        api_key=api_key,
    )
    try:
        yield Controls(engine, timeout_seconds)
    except (EngineError, RequestError) as error:
        raise TransportError(f"weights {label} did not reach {url}: {error.message}") from error
    finally:
        await engine.aclose()


async def _all_answered(loads: Iterable[Awaitable[None]]) -> None:
    """Wait for all, then raise the first error."""
    outcomes = await asyncio.gather(*loads, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome


def absolute(folder: Path) -> Path:
    """Engines do not share this process's working directory."""
    return Path(os.path.abspath(folder))
