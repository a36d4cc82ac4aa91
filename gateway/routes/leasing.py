"""Leases for who waits: long polls that cost nothing while nothing happens, and leases that nobody received.

    finish, release ──▶ rollout_finished, look_again ──wakes──▶ the first of each line ──▶ ledger.lease
    another process's finish, an expired lease, a group's deadline ──a slow poll──▶ ┘

Waiters that want the same stand in one line, and only its first asks the ledger. What a rollout's labels exclude is not
woken by it. A lease is given back at once when its reply cannot be delivered, or when its request was cancelled.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import TypeAlias

from starlette.types import Receive, Scope, Send

from gateway.contracts.errors import LedgerError
from gateway.contracts.ports import Ledger
from gateway.contracts.records import SessionRecord
from gateway.contracts.rollouts import Lease
from gateway.routes.bodies import JsonReply
from gateway.routes.feed_requests import LeaseRequest, Wanted
from gateway.wire.json_text import JsonText, dump_json

_POLL_SECONDS = 1.0
_LEAST_PAUSE_SECONDS = 0.01
_PATIENCE_AFTER_WAKING, _PATIENCE_BETWEEN_POLLS = 2, 50
"""A line rests so many times as long as its last look into the ledger took."""


IsGone: TypeAlias = Callable[[], Awaitable[bool]]


@dataclass(slots=True)
class _Line:
    """Waiters of one kind. turn: held by the first. changed: there may be something new."""

    num_waiting: int = 0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    changed: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class _Claim:
    """Requests for one lease id: another try may come while the gateway still holds the first for alive."""

    num_requests: int = 0
    lease: Lease | None = None
    delivered: bool = False


class LeaseQueue:
    """The waiters of one gateway process. poll_seconds: how often a line looks into the ledger without being woken."""

    def __init__(self, ledger: Ledger, *, poll_seconds: float = _POLL_SECONDS) -> None:
        self._ledger = ledger
        self._poll_seconds = poll_seconds
        self._lines: dict[Wanted, _Line] = {}
        self._claims: dict[str, _Claim] = {}
        self._closed = False
        self._keeps_waiting = True

    async def serve(self) -> None:
        """Until cancelled consumers may wait here; then there is nothing for them, and they ask another process."""
        self._keeps_waiting = True
        try:
            await asyncio.Event().wait()
        finally:
            self._keeps_waiting = False
            self.look_again()

    def rollout_finished(self, session: SessionRecord) -> None:
        """Wake those whom a rollout that has just entered the feed may serve."""
        for wanted, line in self._lines.items():
            if wanted.may_be_served_by(session.labels):
                line.changed.set()

    def look_again(self) -> None:
        """Wake everybody: rollouts came back to the feed, or the process is about to end."""
        for line in self._lines.values():
            line.changed.set()

    def close(self) -> None:
        """End all waiting, now and later, with an error that has clients ask again: this process is going down."""
        self._closed = True
        self.look_again()

    async def lease(self, request: LeaseRequest, *, wait_seconds: float, is_gone: IsGone) -> Lease | None:
        """A lease as soon as there is one, None when there was none in time or the client `is_gone`.

        Who gets one calls `ended` when its reply has left or is lost. Raises LedgerError when the process is about to
        end, Conflict for the id of a lease that has ended.
        """
        self._claims.setdefault(request.lease_id, _Claim()).num_requests += 1
        lease = None
        try:
            lease = await self._wait(request, time.monotonic() + wait_seconds, is_gone)
        finally:
            if lease is None:
                await self.ended(request.lease_id, delivered=False)
        return lease

    async def ended(self, lease_id: str, *, delivered: bool) -> None:
        """A request for this lease is over; what none of those for it has received goes back to the feed at once."""
        claim = self._claims[lease_id]
        claim.num_requests -= 1
        claim.delivered |= delivered
        if claim.num_requests:
            return
        del self._claims[lease_id]
        if claim.lease is not None and not claim.delivered:
            await self._ledger.release(lease_id)
            self.look_again()

    async def _wait(self, request: LeaseRequest, deadline: float, is_gone: IsGone) -> Lease | None:
        async with self._standing(request.wanted) as line:
            lease = None if await is_gone() else await self._look(request)
            remaining = deadline - time.monotonic()
            if lease is not None or remaining <= 0 or not self._keeps_waiting:
                return lease
            try:
                async with asyncio.timeout(remaining):
                    await line.turn.acquire()
            except TimeoutError:
                return None
            try:
                return await self._watch(line, request, deadline, is_gone)
            finally:
                line.turn.release()
                line.changed.set()  # there may be more, or it was woken in vain: the next one looks

    async def _watch(self, line: _Line, request: LeaseRequest, deadline: float, is_gone: IsGone) -> Lease | None:
        """The first of a line: looks when woken, and now and then."""
        took = 0.0
        while True:
            pause = max(self._poll_seconds, _PATIENCE_BETWEEN_POLLS * took)
            with suppress(TimeoutError):
                async with asyncio.timeout(min(pause, max(deadline - time.monotonic(), 0.0))):
                    await line.changed.wait()
                    await asyncio.sleep(max(_LEAST_PAUSE_SECONDS, _PATIENCE_AFTER_WAKING * took))
            line.changed.clear()
            if self._closed:
                raise LedgerError("this gateway is about to end; ask again")
            if not self._keeps_waiting or await is_gone():  # nothing is lent to a client that is gone
                return None
            started = time.monotonic()
            lease = await self._look(request)
            took = time.monotonic() - started
            if lease is not None or time.monotonic() >= deadline:
                return lease

    async def _look(self, request: LeaseRequest) -> Lease | None:
        """Ask the ledger once; a lease that comes after this request was cancelled is known all the same."""
        looking = asyncio.ensure_future(
            self._ledger.lease(
                consumer=request.consumer,
                limit=request.limit,
                lease_seconds=request.lease_seconds,
                whole_groups=request.whole_groups,
                labels=request.labels,
                now=time.time(),
                group_deadline_seconds=request.group_deadline_seconds,
                lease_id=request.lease_id,
            )
        )
        try:
            lease = await asyncio.shield(looking)
        except asyncio.CancelledError:
            self._claims[request.lease_id].lease = await looking
            raise
        if lease is not None:
            self._claims[request.lease_id].lease = lease
        return lease

    @asynccontextmanager
    async def _standing(self, wanted: Wanted) -> AsyncIterator[_Line]:
        line = self._lines.setdefault(wanted, _Line())
        line.num_waiting += 1
        try:
            yield line
        finally:
            line.num_waiting -= 1
            if not line.num_waiting:
                del self._lines[wanted]


class LeaseReply(JsonReply):
    """A lease on its way to its consumer; the queue is told whether its last byte has left."""

    def __init__(self, lease: Lease, queue: LeaseQueue) -> None:
        super().__init__(JsonText((dump_json(asdict(lease)),)), (), self._note_delivery, lambda: None)
        self._lease_id = lease.lease_id
        self._queue = queue
        self._is_delivered = False

    def _note_delivery(self) -> None:
        self._is_delivered = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send, and tell."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._queue.ended(self._lease_id, delivered=self._is_delivered)
