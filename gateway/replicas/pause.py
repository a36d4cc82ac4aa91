"""Holding generation while weights change: abort, keep or drain (design 5, operators)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import StrEnum

from gateway.contracts.errors import EngineTimeout
from gateway.contracts.ports import PauseMode


class GatewayPause(StrEnum):
    """ABORT: running requests end at the engine and go on after the resume. KEEP: they stand still with their cache.
    DRAIN: they run to their end; new ones wait."""

    ABORT = "abort"
    KEEP = "keep"
    DRAIN = "drain"

    @property
    def engine_mode(self) -> PauseMode | None:
        """The engines' word for it; None where engines are left alone."""
        return {GatewayPause.ABORT: PauseMode.ABORT, GatewayPause.KEEP: PauseMode.IN_PLACE}.get(self)


class PauseGate:
    """New engine requests pass `admitted`; while the gate is closed they wait, those inside may finish."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._inside = 0

    @property
    def closed(self) -> bool:
        """Whether new requests wait."""
        return not self._open.is_set()

    def close(self) -> None:
        """Let new requests wait from now on."""
        self._open.clear()

    def open(self) -> None:
        """Let them go on."""
        self._open.set()

    async def drained(self, *, timeout_seconds: float) -> None:
        """Wait until nobody is inside; raises EngineTimeout."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._idle.wait()
        except TimeoutError as error:
            raise EngineTimeout(f"{self._inside} requests still run after {timeout_seconds:g} s of draining") from error

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """Wait for the gate, then hold a place inside."""
        while self.closed:
            await self._open.wait()
        self._inside += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._idle.set()
