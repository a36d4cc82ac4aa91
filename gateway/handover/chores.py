"""Work in the background that only one process of a hand-over does: it stops here and goes on there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeAlias

Chore: TypeAlias = Callable[[], Coroutine[Any, Any, None]]
"""Makes a coroutine that runs until it is cancelled."""


class Chores:
    """Starts and stops them together; repeating either is fine."""

    def __init__(self, chores: Sequence[Chore]) -> None:
        self._chores = tuple(chores)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """From now on they run."""
        if not self._tasks:
            self._tasks = [asyncio.create_task(chore()) for chore in self._chores]

    async def stop(self) -> None:
        """They end; raises what one of them raised."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
                raise result
