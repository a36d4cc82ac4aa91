"""The prompt builder's work besides turns (certifying shapes, audits): one thread, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gateway.memory import give_back_memory
from gateway.tito.prompt import PromptBuilder
from gateway.tito.proof import prove_elsewhere


class PromptUpkeep:
    """Owns the task that does it; `aclose` waits for the last one."""

    def __init__(self, prompts: PromptBuilder) -> None:
        self._prompts = prompts
        self._task: asyncio.Task[None] | None = None

    def prepare(self) -> None:
        """Certify the shapes of ordinary agents; turns that come meanwhile are certified one by one."""
        self._start(self._prepare)

    def poke(self) -> None:
        """Begin, if there is something to do and nothing under way."""
        if self._prompts.upkeep_due:
            self._start(self._prompts.upkeep)

    async def aclose(self) -> None:
        """Wait for what runs; raises what it raised."""
        if self._task is not None:
            await self._task

    def _prepare(self) -> None:
        self._prompts.prepare(prove_elsewhere)
        give_back_memory()  # of a vocabulary's reading

    def _start(self, work: Callable[[], None]) -> None:
        if self._task is None or self._task.done():
            if self._task is not None:
                self._task.result()  # a bug in a certificate must not pass in silence
            self._task = asyncio.create_task(asyncio.to_thread(work))
