"""A turn under way: what its readers hear of it, from whenever on they listen, and the means to end it early.

run_turn ──emit──▶ Turn ──▶ each reader: what there is already, as one event, then event by event
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from gateway.contracts.errors import EngineTimeout, EngineUnavailable, VerbatimError
from gateway.contracts.experts import RoutedExperts
from gateway.contracts.generation import Pace, TokenIds, TopLogprob
from gateway.contracts.records import TurnRecord
from gateway.contracts.replies import ContentDelta, ReasoningDelta, ReplyDelta
from gateway.sessions.deadlines import Deadline
from gateway.sessions.idempotency import NO_HINT, CallChoice, RetryHint
from gateway.sessions.recorded import WholeReply

_MANY_PIECES = 512
"""Objects that wait for a late reader, before they are made one."""


class TurnStarted(msgspec.Struct, frozen=True, eq=False):
    """The prompt stands. `prompt_token_ids`: all of it, int32[P]."""

    prompt_token_ids: TokenIds


class TurnProgress(msgspec.Struct, frozen=True, eq=False):
    """New tokens, and what of them can be shown already."""

    token_ids: TokenIds
    logprobs: npt.NDArray[np.float32]
    deltas: Sequence[ReplyDelta]
    top_logprobs: Sequence[Sequence[TopLogprob]] = ()


class TurnFinished(msgspec.Struct, frozen=True, eq=False):
    """The turn is on disk; its reply may be sent. whole: all of it, of which `record` holds the last part only where it
    goes on with another turn's; experts: its routing rows."""

    record: TurnRecord
    whole: WholeReply
    experts: RoutedExperts | None


TurnEvent = TurnStarted | TurnProgress | TurnFinished


class TurnTimes(msgspec.Struct, frozen=True, eq=False):
    """For metrics: seconds from the start of a turn to its prompt, its first token and its record."""

    prompt_seconds: float
    first_token_seconds: float | None
    total_seconds: float


class Turn:
    """One turn's events for any number of readers. call, retry: what it answers. pace: how soon they want them.

    live_interval: how many tokens an engine may tell together to who reads along.
    """

    __slots__ = (
        "_clock", "_cut_at", "_cut_for_good", "_cut_reason", "_deadline", "_first_token_seconds",
        "_prompt_seconds", "_readers", "_so_far", "_task", "_waiting", "call", "pace", "retry", "started_at", "turn_id",
    )  # fmt: skip

    def __init__(
        self, turn_id: str, call: CallChoice, retry: RetryHint = NO_HINT, *, live_interval: int | None = None
    ) -> None:
        self.turn_id = turn_id
        self.call = call
        self.retry = retry
        self.pace = Pace(is_live=False, live_interval=live_interval)
        self.started_at = time.time()
        self._clock = time.monotonic()
        self._prompt_seconds = 0.0
        self._first_token_seconds: float | None = None
        self._so_far = _SoFar()
        self._readers: list[asyncio.Queue[TurnEvent | None]] = []
        self._waiting: list[asyncio.Future[None]] = []
        self._deadline: Deadline | None = None
        self._cut_at: float | None = None
        self._cut_for_good = False
        self._cut_reason: VerbatimError | None = None
        self._task: asyncio.Task[TurnFinished] | None = None

    def emit(self, event: TurnStarted | TurnProgress) -> None:
        """Tell the readers, also those to come."""
        if isinstance(event, TurnStarted):
            self._prompt_seconds = time.monotonic() - self._clock
            self._so_far.started = event
        else:
            if self._first_token_seconds is None:
                kept_since = self.pace.first_at
                self._first_token_seconds = max(0.0, (kept_since or time.monotonic()) - self._clock)
            self._so_far.add(event)
        for reader in self._readers:
            reader.put_nowait(event)

    def times(self) -> TurnTimes:
        """How long it took so far."""
        return TurnTimes(self._prompt_seconds, self._first_token_seconds, time.monotonic() - self._clock)

    async def events(self) -> AsyncGenerator[TurnEvent, None]:
        """Events up to TurnFinished, those of the past joined; raises what ended the turn instead."""
        reader: asyncio.Queue[TurnEvent | None] = asyncio.Queue()
        self._readers.append(reader)
        self.pace.quicken()
        try:
            is_over = self._task is not None and self._task.done()
            for event in self._so_far.events():
                yield event
            while not is_over and (new := await reader.get()) is not None:
                yield new
        finally:
            self._readers.remove(reader)
            self.pace.is_live = bool(self._readers)
        if self._task is not None:
            yield await self.finished()

    async def finished(self) -> TurnFinished:
        """Skip to the end."""
        if self._task is None:
            raise EngineUnavailable("the turn ended before it began")
        if not self._task.done():
            # As `asyncio.shield` would: who waits may be cancelled without the turn.
            waiting = asyncio.get_running_loop().create_future()
            self._waiting.append(waiting)
            await waiting
        return self._task.result()

    async def settled(self) -> None:
        """Wait for the end, however it comes."""
        if self._task is not None:
            await asyncio.wait([self._task])

    def abandon(self, *, grace_seconds: float) -> None:
        """Nobody waits for the reply any more: sample on for the grace, then record what there is."""
        if self._task is None or not self._task.done():
            self._cut_at = asyncio.get_running_loop().time() + grace_seconds
            self._apply_cut()

    def rejoin(self) -> bool:
        """Somebody waits again; False if it is too late, and sampling has been ended."""
        if self._cut_for_good or (self._deadline is not None and self._deadline.expired):
            return False
        if self._task is not None and self._task.done() and (self._task.cancelled() or self._task.exception()):
            return False
        self._cut_at = None
        if self._deadline is not None:
            self._deadline.bring_forward(None)
        return True

    def cut(self, reason: VerbatimError) -> None:
        """End sampling now; who still waits for the reply is told `reason`."""
        self._cut_reason = reason
        self._cut_for_good = True
        self.abandon(grace_seconds=0.0)

    def cut_reason(self) -> VerbatimError | None:
        """Why it was ended early, None if nobody asked for that."""
        if self._cut_at is None:
            return None
        return self._cut_reason or EngineTimeout("the client left, and its grace is over")

    def limit(self, deadline: Deadline | None) -> None:
        """The deadline that sampling runs under now (None: it is over)."""
        self._deadline = deadline
        if self._cut_at is not None:
            self._apply_cut()

    def run(self, work: asyncio.Task[TurnFinished]) -> None:
        """Follow the task that does the work; `tell_end` is to be called when it is done."""
        self._task = work

    def on_end(self, do: Callable[[], None]) -> None:
        """Have something done when the work is over, however it ended."""
        if self._task is not None:
            self._task.add_done_callback(lambda _: do())

    def tell_end(self) -> None:
        """The work is over, however it ended."""
        for reader in self._readers:
            reader.put_nowait(None)
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)

    def _apply_cut(self) -> None:
        if self._deadline is not None and self._cut_at is not None:
            self._deadline.bring_forward(self._cut_at)


class _SoFar(msgspec.Struct, eq=False):
    """All that was emitted, as little of it as a late reader needs."""

    started: TurnStarted | None = None
    _token_ids: list[TokenIds] = []
    _logprobs: list[npt.NDArray[np.float32]] = []
    _top_logprobs: list[Sequence[TopLogprob]] = []
    _deltas: list[ReplyDelta] = []

    def add(self, event: TurnProgress) -> None:
        """Keep what is new."""
        if len(event.token_ids):
            self._token_ids.append(event.token_ids)
            self._logprobs.append(event.logprobs)
            self._top_logprobs += event.top_logprobs
        self._deltas += event.deltas
        if len(self._token_ids) >= _MANY_PIECES or len(self._deltas) >= _MANY_PIECES:
            self._join()

    def events(self) -> list[TurnEvent]:
        """The start, and one event for all that followed."""
        if self.started is None:
            return []
        if not self._token_ids and not self._deltas:
            return [self.started]
        self._join()
        top_logprobs, deltas = tuple(self._top_logprobs), tuple(self._deltas)
        return [self.started, TurnProgress(self._token_ids[0], self._logprobs[0], deltas, top_logprobs)]

    def _join(self) -> None:
        self._token_ids = [np.concatenate([np.zeros(0, dtype=np.int32), *self._token_ids])]
        self._logprobs = [np.concatenate([np.zeros(0, dtype=np.float32), *self._logprobs])]
        self._deltas = joined_deltas(self._deltas)


def joined_deltas(deltas: Sequence[ReplyDelta]) -> list[ReplyDelta]:
    """The same text in as few pieces as its order allows."""
    joined: list[ReplyDelta] = []
    texts: list[str] = []
    for i, delta in enumerate(deltas):
        if not isinstance(delta, ContentDelta | ReasoningDelta):
            joined.append(delta)
            continue
        texts.append(delta.text)
        following = deltas[i + 1] if i + 1 < len(deltas) else None
        if type(following) is not type(delta):
            joined.append(type(delta)("".join(texts)))
            texts = []
    return joined
