"""Deadlines of sampling: each turn has one, and all turns of a process share one timer.

A turn has as long as any other, so who began first is due first; one that is cut early gets a timer of its own.
"""

from __future__ import annotations

import asyncio
from types import TracebackType


class Deadlines:
    """Of all turns that sample now. seconds: how long each may.

    `asyncio.timeout` does the same with a timer for each, and two coroutines to enter and leave it.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._running: dict[Deadline, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> Deadline:
        """A deadline for what the running task does from now on: in a `with` block, which raises TimeoutError."""
        loop = asyncio.get_running_loop()
        deadline = Deadline(self._running, loop, loop.time() + self._seconds)
        self._running[deadline] = None
        if self._timer is None:
            self._timer = loop.call_at(deadline.ends_at, self._sweep, loop)
        return deadline

    def close(self) -> None:
        """No turn begins any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer, now = None, loop.time()
        for deadline in self._running:
            if deadline.ends_at > now:
                self._timer = loop.call_at(deadline.ends_at, self._sweep, loop)
                return
            deadline.expire()


class Deadline:
    """Of one turn. running: all there are, which it leaves with its block. ends_at: by the event loop's clock, unless
    it is brought forward."""

    __slots__ = ("_earlier", "_loop", "_num_cancels", "_running", "_task", "ends_at", "expired")

    def __init__(self, running: dict[Deadline, None], loop: asyncio.AbstractEventLoop, ends_at: float) -> None:
        self._running = running
        self._loop = loop
        self._task: asyncio.Task[object] | None = asyncio.current_task(loop)
        self._num_cancels = 0 if self._task is None else self._task.cancelling()
        self._earlier: asyncio.TimerHandle | None = None
        self.ends_at = ends_at
        self.expired = False

    def bring_forward(self, when: float | None) -> None:
        """End at `when` already; None: as at first."""
        if self._earlier is not None:
            self._earlier.cancel()
        self._earlier = None if when is None else self._loop.call_at(when, self.expire)

    def expire(self) -> None:
        """End what runs in the block."""
        if not self.expired and self._task is not None:
            self.expired = True
            self._task.cancel()

    def __enter__(self) -> Deadline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        del self._running[self]
        if self._earlier is not None:
            self.bring_forward(None)
        is_ours = self.expired and task is not None and task.uncancel() <= self._num_cancels
        if is_ours and kind is asyncio.CancelledError:
            raise TimeoutError from error
