"""Sessions that nobody uses any more: once their `ttl_seconds` have passed without a turn they end as `abandoned`.

Nobody is cut off by it. A session stays open while one of its turns runs, while a client waits for a reply, and for the
reconnect grace after a client was lost; a process that starts takes all clients for lost. What runs in another gateway
on the same ledger cannot be seen, so a session is then given, besides, the time that a turn may take at most; workers
of one gateway are asked instead. Several gateways may end one session at once: they say the same of it, and the ledger
keeps it once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from gateway.contracts.errors import Conflict, IntegrityError, NotFound, VerbatimError
from gateway.contracts.generation import JsonValue
from gateway.contracts.ports import Ledger
from gateway.contracts.records import Outcome, SessionRecord
from gateway.sessions.registry import SessionRegistry
from gateway.sessions.siblings import ALONE, Siblings
from gateway.sessions.turns import TurnSettings

_log = logging.getLogger(__name__)

_PAGE = 100


@dataclass(frozen=True, slots=True)
class SessionExpiry:
    """`watch` is the coroutine that does it, every `sweep_seconds`."""

    registry: SessionRegistry
    ledger: Ledger
    turns: TurnSettings
    sweep_seconds: float
    siblings: Siblings = ALONE

    async def watch(self) -> None:
        """End what is over, until cancelled; what fails is logged and tried again at the next time."""
        await asyncio.sleep(max(self.turns.disconnect_grace_seconds, self.sweep_seconds))
        while True:
            try:
                await self.sweep(time.time())
            except VerbatimError as error:
                _log.warning("sessions past their time to live are not ended: %s", error)
            await asyncio.sleep(self.sweep_seconds)

    async def sweep(self, now: float) -> int:
        """How many sessions were ended that are past their time at `now`, seconds since the epoch."""
        if self.ledger.shared and not self.siblings.are_all:
            now -= self.turns.timeout_seconds
        kept: set[str] = set()
        num_ended = 0
        while True:
            past = await self.ledger.sessions_past_ttl(now, limit=len(kept) + _PAGE)
            left = [session_id for session_id in past if session_id not in kept]
            for session_id in left:
                if await self._end(session_id):
                    num_ended += 1
                else:
                    kept.add(session_id)
            if not left:
                return num_ended

    async def _end(self, session_id: str) -> bool:
        """Whether the session has ended now; False keeps it for the next sweep."""
        try:
            session = await self.registry.get(session_id)
            if not session.is_idle:
                return False
            if await self.siblings.is_used(session_id) or not session.is_idle:
                return False
            # No wait between the question and the closing: no turn can begin in between.
            await self.registry.close(session, reward=None, outcome=Outcome.ABANDONED, metadata=_why(session.record))
        except (Conflict, NotFound):  # somebody else ended it otherwise, or deleted it, at the same moment
            return False
        except IntegrityError as error:
            _log.warning("session %s is past its time to live and cannot be ended: %s", session_id, error)
            return False
        _log.info("session %s had no turn for %s s and is abandoned", session_id, session.record.ttl_seconds)
        return True


def _why(session: SessionRecord) -> dict[str, JsonValue]:
    """Of the record alone, so that every gateway says the same."""
    return {"reason": "ttl", "ttl_seconds": session.ttl_seconds}
