"""The prompt builder's work besides turns (certifying shapes, audits): one thread, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gateway.memory import give_back_memory
from gateway.tito.prompt import PromptBuilder
from gateway.tito.proof import Prover


class PromptUpkeep:
    """Owns the tasks that do it; `aclose` ends the proof, and waits for the last ones."""

    def __init__(self, prompts: PromptBuilder) -> None:
        self._prompts = prompts
        self._prover = Prover()
        self._preparing: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None

    def prepare(self) -> None:
        """Certify the shapes of ordinary agents; those of turns that come meanwhile are certified one by one."""
        self._preparing = asyncio.create_task(asyncio.to_thread(self._prepare))

    def poke(self) -> None:
        """Begin, if there is something to do and nothing under way."""
        if self._prompts.upkeep_due:
            self._start(self._prompts.upkeep)

    async def aclose(self) -> None:
        """End what can be ended, wait for what runs; raises what it raised."""
        self._prover.end()
        for task in (self._preparing, self._task):
            if task is not None:
                await task

    def _prepare(self) -> None:
        self._prompts.prepare(self._prover.prove)
        give_back_memory()  # of a vocabulary's reading

    def _start(self, work: Callable[[], None]) -> None:
        if self._task is not None and not self._task.done():
            return
        for task in (self._preparing, self._task):
            if task is not None and task.done():
                task.result()  # a bug in a certificate must not pass in silence
        self._task = asyncio.create_task(asyncio.to_thread(work))
