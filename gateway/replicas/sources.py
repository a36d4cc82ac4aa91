"""Which engines a gateway was told to use, and where they are; one that is not there yet is used when it is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gateway.contracts.errors import Conflict, EngineError, EngineTimeout, EngineUnavailable, IdentityMismatch
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

    @property
    def sources(self) -> tuple[EngineSource, ...]:
        """Those in use and those expected; not those that are being removed."""
        return tuple(self._sources[engine_id] for engine_id in self._pool.engine_ids)

    async def add(self, kind: str, url: str, engine_id: str | None = None) -> Replica:
        """Take an engine in; raises ConfigurationError, and what `ReplicaPool.add` raises."""
        engine = self._connect(kind, url, engine_id)
        try:
            await self._pool.add(engine)
        except BaseException:
            await engine.aclose()
            raise
        self._sources[engine.engine_id] = EngineSource(engine.engine_id, kind, url)
        return self._pool.replica(engine.engine_id)

    async def add_or_expect(self, source: EngineSource) -> None:
        """Take an engine in, now or when it answers; raises EngineError, IdentityMismatch for one that is unfit."""
        try:
            await self.add(source.kind, source.url, source.engine_id)
        except (EngineUnavailable, EngineTimeout) as error:
            # Gateways are restarted while routers and engines are: turns wait for them as they would later.
            self._expect(source, error)

    async def remove(self, engine_id: str, *, drain: bool) -> None:
        """Take an engine out, or expect it no longer; raises NotFound."""
        await self._pool.remove(engine_id, drain=drain)

    async def inherit(self, sources: Iterable[EngineSource]) -> None:
        """Use another process's engines; one that fails now was fit there, so it may come back."""
        await asyncio.gather(*map(self._inherit, sources))

    async def _inherit(self, source: EngineSource) -> None:
        seconds = self._pool.settings.health_timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                await self.add(source.kind, source.url, source.engine_id)
        except Conflict:  # it is there already
            return
        except TimeoutError:
            self._expect(source, EngineTimeout(f"no answer within {seconds:g} s"))
        except (EngineError, IdentityMismatch) as error:
            self._expect(source, error)

    def _expect(self, source: EngineSource, error: EngineError | IdentityMismatch) -> None:
        _log.warning("engine %s=%s is not there yet, and used when it is: %s", source.kind, source.url, error.message)
        self._sources[source.engine_id] = source
        self._pool.expect(self._connect(source.kind, source.url, source.engine_id), error)
