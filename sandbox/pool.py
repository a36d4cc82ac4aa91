"""A bounded pool of sandboxes for rollouts: who may have one now, and a few started ahead of need.

Promises: at most `size` sandboxes are taken at a time and waiting is first come, first served; creations under way are
bounded; every taken sandbox is destroyed afterwards and none is ever used twice. A failure of the sandbox itself
(SandboxLost) travels to whoever was using it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gateway.contracts.errors import ConfigurationError, Conflict, SandboxError, SandboxUnavailable
from gateway.contracts.ports import NetworkAccess, Sandbox, SandboxDriver, SandboxLimits, SandboxSpec
from sandbox.register import furnish

_log = logging.getLogger(__name__)


class SandboxPool:
    """Lends sandboxes of one driver; belongs to one event loop. Its owner closes the pool, then the driver."""

    def __init__(
        self,
        driver: SandboxDriver,
        *,
        size: int,
        warm: int = 0,
        warm_limits: SandboxLimits | None = None,
        starting: int | None = None,
    ) -> None:
        """`size`: how many may be taken at a time; `warm`: how many more wait, started, with `warm_limits` and no
        network; `starting`: how many creations may be under way (default: the number of processors, at least 2)."""
        if size < 1 or warm < 0:
            raise ConfigurationError(f"a sandbox pool of size {size} with {warm} warm ones cannot be")
        self._driver = driver
        self._places = asyncio.Semaphore(size)  # asyncio's semaphores wake their waiters in order
        self._starting = asyncio.Semaphore(starting or max(2, os.cpu_count() or 1))
        self._num_warm = warm
        self._warm_limits = warm_limits or SandboxLimits()
        self._warm: deque[Sandbox] = deque()
        self._numbers = itertools.count()
        self._taken: set[str] = set()
        self._refill: asyncio.Task[None] | None = None
        self._closed = False

    @asynccontextmanager
    async def take(self, spec: SandboxSpec) -> AsyncIterator[Sandbox]:
        """A fresh sandbox for the length of a `with` block, destroyed at its end.

        Waits while all are taken. Raises SandboxUnavailable (also after `aclose`), Conflict if the key is taken.
        """
        if spec.key in self._taken:
            raise Conflict(f"the sandbox of {spec.key!r} is taken already")
        self._taken.add(spec.key)
        try:
            async with self._places:
                sandbox = await self._obtain(spec)
                try:
                    yield sandbox
                finally:
                    await sandbox.destroy()
        finally:
            self._taken.discard(spec.key)

    async def aclose(self) -> None:
        """Destroy the sandboxes that wait; taken ones are destroyed by their takers."""
        self._closed = True
        if self._refill is not None:
            self._refill.cancel()
            await asyncio.gather(self._refill, return_exceptions=True)
        while self._warm:
            await self._warm.popleft().destroy()

    async def _obtain(self, spec: SandboxSpec) -> Sandbox:
        if self._closed:
            raise SandboxUnavailable("the sandbox pool is closed")
        warm = self._pop_warm(spec)
        self._start_refill()
        if warm is not None:
            return await furnish(warm, spec.files)
        async with self._starting:
            return await self._driver.create(spec)

    def _pop_warm(self, spec: SandboxSpec) -> Sandbox | None:
        fits = spec.limits == self._warm_limits and spec.network is NetworkAccess.NONE
        return self._warm.popleft() if fits and self._warm else None

    def _start_refill(self) -> None:
        if len(self._warm) < self._num_warm and (self._refill is None or self._refill.done()):
            self._refill = asyncio.create_task(self._fill(), name="warm sandboxes")

    async def _fill(self) -> None:
        """Start sandboxes ahead of need; a failure is left to the next `take`, which meets it itself."""
        while len(self._warm) < self._num_warm:
            try:
                async with self._starting:
                    spec = SandboxSpec(f"warm-{next(self._numbers)}", limits=self._warm_limits)
                    self._warm.append(await self._driver.create(spec))
            except SandboxError as error:
                _log.warning("no sandbox could be started ahead of need: %s", error)
                return
