"""Weights by way of a folder that engine and trainer both see: `/update_weights_from_disk`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson

from engines.connection import EngineHttp
from engines.smg import workers_behind
from engines.weights.names import weight_label
from gateway.contracts.errors import EngineError, EngineRejected, RequestError, TransportError
from gateway.contracts.ports import PauseMode


class DiskTransport:
    """Tells engines to load a checkpoint folder (implements `gateway.contracts.ports.WeightTransport`).

    pause: what happens to requests that run meanwhile. RETRACT: they wait and go on under the new weights with their
    cache computed anew. IN_PLACE: they go on with the old cache. ABORT: they end with what they have. None: the engine
    waits until they have ended (or, if someone else has paused it, loads at once and stays paused). api_key: of engines
    that were started with one.

    An address may be an smg router's: it stands for all of its workers, which are spoken to at their own addresses.
    """

    def __init__(
        self,
        *,
        pause: PauseMode | None = PauseMode.RETRACT,
        timeout_seconds: float = 600.0,
        api_key: str | None = None,
    ) -> None:
        self._pause = pause
        self._timeout_seconds = timeout_seconds
        self._api_key = api_key

    async def publish(self, checkpoint: Path, *, policy_version: int, engine_urls: Sequence[str]) -> str:
        """Load `checkpoint` into every engine at once and return their new label.

        Raises TransportError naming the first engine that failed, when all have answered.
        """
        label = weight_label(policy_version)
        folder = _absolute(checkpoint)
        await _all_answered(self._load(url, folder, label) for url in engine_urls)
        return label

    async def aclose(self) -> None:
        """Nothing is kept open between two publications."""

    async def _load(self, url: str, checkpoint: Path, label: str) -> None:
        async with self._connected(url, label) as engine:
            workers = await workers_behind(engine)
            if not workers:
                await self._update(engine, checkpoint, label)
        await _all_answered(self._load_worker(worker, checkpoint, label) for worker in workers)

    async def _load_worker(self, url: str, checkpoint: Path, label: str) -> None:
        async with self._connected(url, label) as engine:
            await self._update(engine, checkpoint, label)

    @asynccontextmanager
    async def _connected(self, url: str, label: str) -> AsyncIterator[EngineHttp]:
        engine = EngineHttp(
            url,
            engine_id=url,
            connect_timeout_seconds=10.0,
            idle_timeout_seconds=self._timeout_seconds,
            api_key=self._api_key,
        )
        try:
            yield engine
        except (EngineError, RequestError) as error:
            raise TransportError(f"weights {label} did not reach {url}: {error.message}") from error
        finally:
            await engine.aclose()

    async def _update(self, engine: EngineHttp, checkpoint: Path, label: str) -> None:
        if self._pause is not None:
            await self._post(engine, "/pause_generation", {"mode": self._pause.value})
        try:
            body = {
                "model_path": str(checkpoint),
                "weight_version": label,
                # Requests paused in place keep their cache; asking to flush it would be refused.
                "flush_cache": self._pause is not PauseMode.IN_PLACE,
            }
            answer = orjson.loads(await self._post(engine, "/update_weights_from_disk", body))
            if not answer.get("success"):
                raise EngineRejected(f"{engine.url}: {answer.get('message')}")
        finally:
            if self._pause is not None:
                await self._post(engine, "/continue_generation", {})
        await self._verify(engine, checkpoint, label)

    async def _post(self, engine: EngineHttp, path: str, body: dict[str, Any]) -> bytes:
        return await engine.post(path, body, timeout_seconds=self._timeout_seconds)

    async def _verify(self, engine: EngineHttp, checkpoint: Path, label: str) -> None:
        """An engine that answers 200 has been seen serving other weights: ask it what it holds."""
        info = await engine.get_json("/model_info", timeout_seconds=self._timeout_seconds)
        served = (info.get("weight_version"), info.get("model_path"))
        if served != (label, str(checkpoint)):
            raise EngineRejected(f"{engine.url} serves {served[0]} from {served[1]} after it was given {label}")


async def _all_answered(loads: Iterable[Awaitable[None]]) -> None:
    """Wait for all, then raise the first error."""
    outcomes = await asyncio.gather(*loads, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome


def _absolute(folder: Path) -> Path:
    """Engines do not share this process's working directory."""
    return Path(os.path.abspath(folder))
