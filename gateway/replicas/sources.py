"""Which engines a gateway was told to use, and where they are; one that does not answer yet is waited for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gateway.contracts.errors import Conflict, EngineError, IdentityMismatch
from gateway.contracts.ports import Engine
from gateway.replicas.pool import Replica, ReplicaPool

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineSource:
    """What makes an engine's client. kind: as in `--engine KIND=URL`."""

    engine_id: str
    kind: str
    url: str


class EngineList:
    """The pool's engines with their sources. connect(kind, url, engine_id): a client; the id may be left to it."""

    def __init__(self, pool: ReplicaPool, connect: Callable[[str, str, str | None], Engine]) -> None:
        self._pool = pool
        self._connect = connect
        self._sources: dict[str, EngineSource] = {}
        self._awaited: dict[str, EngineSource] = {}

    @property
    def sources(self) -> tuple[EngineSource, ...]:
        """Those in use and those waited for; not those that are being removed."""
        used = [replica.engine.engine_id for replica in self._pool.replicas if not replica.draining]
        return (*(self._sources[engine_id] for engine_id in used), *self._awaited.values())

    async def add(self, kind: str, url: str, engine_id: str | None = None) -> Replica:
        """Take an engine in; raises ConfigurationError, and what `ReplicaPool.add` raises."""
        engine = self._connect(kind, url, engine_id)
        try:
            await self._pool.add(engine)
        except BaseException:
            await engine.aclose()
            raise
        self._sources[engine.engine_id] = EngineSource(engine.engine_id, kind, url)
        self._awaited.pop(engine.engine_id, None)
        return self._pool.replica(engine.engine_id)

    async def remove(self, engine_id: str, *, drain: bool) -> None:
        """Take an engine out, or wait for it no longer; raises NotFound."""
        if self._awaited.pop(engine_id, None) is None:
            await self._pool.remove(engine_id, drain=drain)

    async def inherit(self, sources: Iterable[EngineSource]) -> None:
        """Use another process's engines; one that does not answer was known there, so it may come back."""
        await asyncio.gather(*map(self._inherit, sources))

    async def retry(self) -> None:
        """Ask again, each health interval, those that are waited for; until cancelled."""
        while True:
            await asyncio.sleep(self._pool.settings.health_interval_seconds)
            await self.inherit(list(self._awaited.values()))

    async def _inherit(self, source: EngineSource) -> None:
        try:
            async with asyncio.timeout(self._pool.settings.health_timeout_seconds):
                await self.add(source.kind, source.url, source.engine_id)
        except Conflict:  # it is there already
            self._awaited.pop(source.engine_id, None)
        except (EngineError, IdentityMismatch, TimeoutError) as error:
            if source.engine_id not in self._awaited:
                _log.warning("engine %s is taken in when it answers: %s", source.engine_id, error or "no answer")
            self._awaited[source.engine_id] = source
