"""The sessions that this process has touched lately: loaded from the ledger, forgotten again, never only in memory."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

from gateway.contracts.errors import Conflict, NotFound, SessionSealed, VerbatimError
from gateway.contracts.generation import JsonValue
from gateway.contracts.ports import Ledger
from gateway.contracts.records import FinishRecord, SessionOrigin, SessionRecord
from gateway.sessions.idempotency import OpenTurn, SessionCalls, is_whole
from gateway.sessions.raw import TokenPaths
from gateway.sessions.recent import Recent
from gateway.sessions.siblings import ALONE, Siblings
from gateway.sessions.tree import TurnTree

_NOTE_SECONDS = 1.0
"""Within which a delivery is noted by another gateway."""

_FEW_LOOKS = 16

_LOOK_SECONDS = 0.05


_log = logging.getLogger(__name__)


class RunningTurn(OpenTurn, Protocol):
    """A turn under way, as its session sees it."""

    def cut(self, reason: VerbatimError) -> None:
        """End sampling now, with `reason` for who still waits; what was sampled is recorded."""
        ...

    async def settled(self) -> None:
        """Wait until it is recorded or has failed."""
        ...


@dataclass(eq=False, slots=True)
class Session:
    """One session in memory: its record and its turn tree, both as the ledger has them. seen_changes: of its siblings,
    when it was last brought up to date (`Siblings.changes`)."""

    record: SessionRecord
    tree: TurnTree
    finish: FinishRecord | None
    closing: bool = False
    seen_changes: int | None = None
    held_until: float = 0.0
    deliveries: list[asyncio.Future[None]] = field(default_factory=list)
    recent: Recent = field(default_factory=Recent)
    calls: SessionCalls[RunningTurn] = field(init=False)
    _token_paths: TokenPaths | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.calls = SessionCalls(self.tree)

    @property
    def running(self) -> Collection[RunningTurn]:
        """Turns that run in this process."""
        return self.calls.running

    @property
    def token_paths(self) -> TokenPaths:
        """For raw prompts, which few sessions have."""
        if self._token_paths is None:
            self._token_paths = TokenPaths(self.tree)
        return self._token_paths

    @property
    def is_idle(self) -> bool:
        """Whether it may end by itself now: no turn, no client that waits or may come back, and nobody who ends it."""
        return not (self.is_used or self.closing or self.finish is not None)

    @property
    def is_used(self) -> bool:
        """Whether a turn runs, or a client waits or may come back."""
        is_busy = self.running or self.deliveries or self.calls.is_anyone_waiting
        return bool(is_busy) or time.monotonic() < self.held_until

    def hold(self, seconds: float) -> None:
        """Have it not end by itself for so long."""
        if seconds > 0 and (until := time.monotonic() + seconds) > self.held_until:
            self.held_until = until

    async def deliveries_noted(self) -> None:
        """Wait until the ledger knows of every reply whose last byte has left: its agent may ask at once."""
        while self.deliveries:
            await asyncio.wait(self.deliveries)

    async def catch_up(self, ledger: Ledger) -> bool:
        """Learn what other gateways have recorded of it since; False if it was deleted, or made anew."""
        session_id = self.record.session_id
        record, finish, turns, deliveries = await asyncio.gather(
            ledger.session(session_id),
            ledger.finish_record(session_id),
            ledger.turns(session_id, after=self.tree.num_complete - 1),
            ledger.deliveries(session_id),
        )
        if record != self.record:
            return False
        for turn in turns:
            self.tree.add(turn)
        for turn_id, delivered_at in deliveries.items():
            self.tree.mark_delivered(turn_id, delivered_at)
        self.finish = finish or self.finish
        return True

    @property
    def unsettled(self) -> set[str]:
        """Whole turns that other processes answered, and that nobody is known to have got."""
        return {
            node.record.turn_id
            for node in self.tree
            if self.tree.delivered_at(node.record.turn_id) is None
            and is_whole(node.record)
            and not self.calls.is_own(node.record.turn_id)
        }

    def check_open(self) -> None:
        """Raise SessionSealed once the session is finished or about to be."""
        if self.finish is not None or self.closing:
            raise SessionSealed(f"session {self.record.session_id} is finished; it takes no more turns")


class SessionRegistry:
    """Gives sessions by id. `capacity`: how many idle ones stay in memory. `on_finish`: told of each that ends here."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        capacity: int = 10_000,
        on_finish: Callable[[SessionRecord], None] = lambda _: None,
        siblings: Siblings = ALONE,
    ) -> None:
        self._ledger = ledger
        self._capacity = capacity
        self._on_finish = on_finish
        self._siblings = siblings
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._loading: dict[str, asyncio.Task[Session | None]] = {}

    @property
    def loaded(self) -> Sequence[Session]:
        """Those in memory now."""
        return list(self._sessions.values())

    async def find(self, session_id: str) -> Session | None:
        """The session, or None if nobody made it."""
        if (known := self.unchanged(session_id)) is not None:  # nearly always
            self._sessions.move_to_end(session_id)
            return known
        if session_id in self._sessions and await self._brought_up_to_date(session_id):
            self._sessions.move_to_end(session_id)
            return self._sessions[session_id]
        if session_id not in self._loading:
            task = asyncio.create_task(self._load(session_id))
            self._loading[session_id] = task
            task.add_done_callback(lambda _: self._loading.pop(session_id, None))
        # Shielded: a caller that goes away must not take the load from those who wait with it.
        return await asyncio.shield(self._loading[session_id])

    async def record(self, session_id: str) -> SessionRecord | None:
        """What is known of a session before its turns are read: who has no key to it must not cause that."""
        known = self.unchanged(session_id)
        return await self._ledger.session(session_id) if known is None else known.record

    def unchanged(self, session_id: str) -> Session | None:
        """A session in memory that is as the ledger has it, if that is known without asking."""
        known = self._sessions.get(session_id)
        if known is None or not self._ledger.shared:
            return known
        changes = self._siblings.changes(session_id)
        return known if changes is not None and changes == known.seen_changes else None

    def touch(self, session: Session) -> None:
        """One in memory is used: of those that are idle, the others are forgotten first."""
        self._sessions.move_to_end(session.record.session_id)

    @contextmanager
    def _changing(self, session_id: str) -> Iterator[None]:
        """What this process writes of a session here, the others read again."""
        self._siblings.begin_change(session_id)
        try:
            yield
        finally:
            self._siblings.end_change(session_id)

    async def get(self, session_id: str) -> Session:
        """The session; raises NotFound."""
        session = await self.find(session_id)
        if session is None:
            raise NotFound(f"no session {session_id!r}; make it with POST /sessions")
        return session

    async def create(self, wanted: SessionRecord) -> tuple[Session, bool]:
        """Make a session; one with equal properties that exists is returned (False), another one raises Conflict.

        One that is not in memory is written without a look whether it is there, which the ledger tells then: nearly
        every session that somebody makes is new.
        """
        session_id = wanted.session_id
        if not self.holds(session_id):
            try:
                return await self._create(wanted)
            except Conflict:  # it is there: whether it is the wanted one, its record tells
                pass
        existing = await self.find(session_id)
        if existing is None:
            return await self._create(wanted)
        if not _same_wish(existing.record, wanted):
            raise Conflict(f"session {session_id!r} exists already with other properties")
        return existing, False

    async def _create(self, wanted: SessionRecord) -> tuple[Session, bool]:
        session_id = wanted.session_id
        with self._changing(session_id):
            changes = self._siblings.changes(session_id)
            stored = await self._ledger.create_session(wanted)
        if (earlier := self._loading.get(session_id)) is not None:
            await asyncio.wait([earlier])  # it may have looked before the session was there
        others_tell = not self._ledger.shared or changes is not None
        if stored is wanted and others_tell and not self.holds(session_id):
            # Made just now, and by nobody else: it has no turns to be read.
            self._keep(Session(wanted, TurnTree(), None, seen_changes=changes))
        return await self.get(session_id), stored is wanted

    def holds(self, session_id: str) -> bool:
        """Whether a session is in memory, or on its way there; perhaps not as the ledger has it now."""
        return session_id in self._sessions or session_id in self._loading

    async def finish(
        self, session_id: str, *, reward: float | None, outcome: str, metadata: Mapping[str, JsonValue]
    ) -> FinishRecord:
        """Seal a session: running turns are cut and recorded first, then its rollout enters the feed."""
        return await self.close(await self.get(session_id), reward=reward, outcome=outcome, metadata=metadata)

    async def close(
        self, session: Session, *, reward: float | None, outcome: str, metadata: Mapping[str, JsonValue]
    ) -> FinishRecord:
        """As `finish`, of a session in memory: it takes no turn from the moment of the call."""
        session.closing = True
        try:
            await asyncio.gather(_settle(session), self._siblings.settle(session.record.session_id))
            await session.deliveries_noted()
            await self._settle_deliveries(session)
            session_id = session.record.session_id
            with self._changing(session_id):
                session.finish = await self._ledger.finish(
                    session_id, reward=reward, outcome=outcome, metadata=metadata, finished_at=time.time()
                )
        finally:
            session.closing = False
        self._on_finish(session.record)
        return session.finish

    async def _settle_deliveries(self, session: Session) -> None:
        """Decide on whole replies of which it is not known whether somebody got them.

        Another gateway may just be noting it. If not, the one that answered died with the last byte: had the agent not
        got the reply it would have asked again, so it counts as delivered, and its tokens train (I3).
        """
        session_id, deadline = session.record.session_id, time.monotonic() + _NOTE_SECONDS
        while self._ledger.shared and session.unsettled and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_SECONDS)
            await session.catch_up(self._ledger)
        if not session.unsettled:
            return
        for turn_id in session.unsettled & set(await self._ledger.unknown_deliveries(session_id)):
            now = time.time()
            await self._ledger.mark_delivered(session_id, turn_id, now)
            session.tree.mark_delivered(turn_id, now)
            _log.warning("session %s: the reply of %s is taken for delivered: who gave it died", session_id, turn_id)

    async def delete(self, session_id: str) -> None:
        """Forget a session here and in the ledger, which may refuse with Conflict."""
        session = await self.get(session_id)
        await asyncio.gather(_settle(session), self._siblings.settle(session_id))
        with self._changing(session_id):
            await self._ledger.delete_session(session_id)
        self._sessions.pop(session_id, None)

    async def settle(self, session_id: str) -> None:
        """End the turns of a session that another worker finishes or deletes; all are on disk then."""
        if (session := self._sessions.get(session_id)) is not None:
            await _settle(session)
            await session.deliveries_noted()

    def is_used(self, session_id: str) -> bool:
        """Whether a turn of it runs in this process, or a client waits or may come back."""
        session = self._sessions.get(session_id)
        return session is not None and session.is_used

    async def _brought_up_to_date(self, session_id: str) -> bool:
        """Whether a session in memory is as the ledger has it now."""
        session, changes = self._sessions[session_id], self._siblings.changes(session_id)
        if await session.catch_up(self._ledger):
            session.seen_changes = changes
            return session_id in self._sessions
        if self._sessions.get(session_id) is session:
            del self._sessions[session_id]
        return False

    async def _load(self, session_id: str) -> Session | None:
        changes = self._siblings.changes(session_id)
        record = await self._ledger.session(session_id)
        if record is None:
            return None
        finish = await self._ledger.finish_record(session_id)
        tree = TurnTree(await self._ledger.turns(session_id))
        session = Session(record, tree, finish, seen_changes=changes)
        self._keep(session)
        return session

    def _keep(self, session: Session) -> None:
        self._sessions[session.record.session_id] = session
        self._forget_idle()

    def _forget_idle(self) -> None:
        """Of those that were used longest ago, of which a few are looked at: a look at all, with each session that is
        made, would take longer than its turns. Who is in use goes to the end, so that others are looked at next."""
        newest = next(reversed(self._sessions))
        for _ in range(_FEW_LOOKS):
            if len(self._sessions) <= self._capacity:
                return
            session_id, session = next(iter(self._sessions.items()))
            if session_id == newest:
                return
            if session.running or session.closing or session.deliveries:
                self._sessions.move_to_end(session_id)
            else:
                del self._sessions[session_id]


def new_session(
    session_id: str,
    *,
    key_hash: str,
    origin: SessionOrigin,
    gaps: tuple[int, ...] = (),
    group: str | None = None,
    group_size: int | None = None,
    task: JsonValue = None,
    labels: Mapping[str, str] | None = None,
    metadata: Mapping[str, JsonValue] | None = None,
    sampling: Mapping[str, JsonValue] | None = None,
    ttl_seconds: float | None = None,
) -> SessionRecord:
    """A session's record as of now."""
    return SessionRecord(
        session_id=session_id,
        group=group,
        group_size=group_size,
        task=task,
        labels=labels or {},
        metadata=metadata or {},
        sampling=sampling or {},
        ttl_seconds=ttl_seconds,
        key_hash=key_hash,
        origin=origin,
        complete=not gaps,
        created_at=time.time(),
        gaps=gaps,
    )


async def _settle(session: Session) -> None:
    running = list(session.running)
    for turn in running:
        turn.cut(SessionSealed(f"session {session.record.session_id} was finished under this turn"))
    await asyncio.gather(*(turn.settled() for turn in running))


def _same_wish(existing: SessionRecord, wanted: SessionRecord) -> bool:
    """Equal in what a caller chooses; key, origin and time are ours."""
    ours = {"key_hash": "", "created_at": 0.0, "origin": SessionOrigin.CREATED, "complete": True, "gaps": ()}
    return replace(existing, **ours) == replace(wanted, **ours)  # type: ignore[arg-type]  # names checked by tests
