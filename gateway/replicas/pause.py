"""Holding generation while weights change: abort, keep, retract or drain (design 5, operators)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from gateway.contracts.errors import EngineTimeout
from gateway.contracts.generation import JsonValue
from gateway.contracts.ports import PauseMode


class GatewayPause(StrEnum):
    """ABORT: running requests end at the engine and go on after the resume. KEEP: they stand still with their cache.
    RETRACT: they stand still, and their cache is computed anew. DRAIN: they run to their end; new ones wait."""

    ABORT = "abort"
    KEEP = "keep"
    RETRACT = "retract"
    DRAIN = "drain"

    @property
    def engine_mode(self) -> PauseMode | None:
        """The engines' word for it; None where engines are left alone."""
        return _ENGINE_MODES.get(self)


_ENGINE_MODES = {
    GatewayPause.ABORT: PauseMode.ABORT,
    GatewayPause.KEEP: PauseMode.IN_PLACE,
    GatewayPause.RETRACT: PauseMode.RETRACT,
}

FOUND = "found"
"""What a pause is called that this process did not order: engines were held by another gateway, or by one that died."""


@dataclass(frozen=True, slots=True)
class Pause:
    """A pause of generation as it stands.

    mode: None for one that was found. since: unix time. max_seconds: after which generation goes on by itself, None
    never.
    """

    mode: GatewayPause | None
    since: float
    max_seconds: float | None = None

    @property
    def name(self) -> str:
        """The mode's name, or FOUND."""
        return FOUND if self.mode is None else self.mode.value

    def to_json(self) -> dict[str, JsonValue]:
        """As it is told to another process of a hand-over."""
        return {"mode": self.mode, "since": self.since, "max_seconds": self.max_seconds}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Pause:
        """As it was told; raises KeyError, TypeError, ValueError for what is none."""
        return cls(GatewayPause(value["mode"]), value["since"], value["max_seconds"])

    def is_over(self, now: float) -> bool:
        """Whether its time is up at `now` (unix time)."""
        return self.max_seconds is not None and now >= self.since + self.max_seconds


class PauseGate:
    """New engine requests `enter` when it is open; while the gate is closed they wait, those inside may finish."""

    def __init__(self) -> None:
        self.closed = False
        """Whether new requests wait."""
        self._open = asyncio.Event()
        self._open.set()
        self._idle = asyncio.Event()
        self._inside = 0
        self._num_draining = 0

    def close(self) -> None:
        """Let new requests wait from now on."""
        self.closed = True
        self._open.clear()

    def open(self) -> None:
        """Let them go on."""
        self.closed = False
        self._open.set()

    async def drained(self, *, timeout_seconds: float) -> None:
        """Wait until nobody is inside; raises EngineTimeout."""
        try:
            async with asyncio.timeout(timeout_seconds):
                if self._inside:
                    self._idle.clear()
                    self._num_draining += 1
                    try:
                        await self._idle.wait()
                    finally:
                        self._num_draining -= 1
        except TimeoutError as error:
            raise EngineTimeout(f"{self._inside} requests still run after {timeout_seconds:g} s of draining") from error

    async def opened(self) -> None:
        """Wait until it is open; it may be closed again at once."""
        await self._open.wait()

    def enter(self) -> None:
        """Take a place inside; `leave` gives it back."""
        self._inside += 1

    def leave(self) -> None:
        """One less inside."""
        self._inside -= 1
        if self._num_draining and not self._inside:
            self._idle.set()
