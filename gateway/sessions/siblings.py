"""The other worker processes of the same gateway, as far as sessions, feed and status need them (`serve --workers`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from gateway.contracts.generation import JsonValue


class Siblings(Protocol):
    """What a worker can ask and tell them. A sibling that dies, or does not answer in time, is not waited for."""

    @property
    def are_all(self) -> bool:
        """Whether no other process writes to the ledger, so that what they say of a session is all there is."""
        ...

    async def settle(self, session_id: str) -> None:
        """Have them end the turns of a session that is being finished or deleted: all are on disk then."""
        ...

    async def is_used(self, session_id: str) -> bool:
        """Whether a turn of it runs there, or a client waits or may come back."""
        ...

    def rollout_finished(self) -> None:
        """Tell them that a rollout has entered the feed."""
        ...

    def begin_change(self, session_id: str) -> None:
        """Something of a session is on its way into the ledger: from now on they do not rely on what they know."""
        ...

    def end_change(self, session_id: str) -> None:
        """It is there, or is not coming: they read the session again. Called before its agent is told."""
        ...

    def changes(self, session_id: str) -> int | None:
        """A number that moves whenever one of them changes a session, perhaps more often; None while one does, or may
        have died at it, and where others than they write too, so that only the ledger knows."""
        ...

    async def figures(self, *, with_counts: bool = False) -> Sequence[Mapping[str, JsonValue]]:
        """What each of them has at the moment (`gateway.parts.Gateway.figures`), with what it has counted so far."""
        ...


class Alone:
    """Of a gateway that is one process; whether others write too, its ledger knows (`Ledger.shared`)."""

    are_all = False

    async def settle(self, session_id: str) -> None:
        """There is nobody."""

    async def is_used(self, session_id: str) -> bool:
        """Nobody uses it."""
        return False

    def rollout_finished(self) -> None:
        """There is nobody."""

    def begin_change(self, session_id: str) -> None:
        """There is nobody."""

    def end_change(self, session_id: str) -> None:
        """There is nobody."""

    def changes(self, session_id: str) -> int | None:
        """Only the ledger knows."""
        return None

    async def figures(self, *, with_counts: bool = False) -> Sequence[Mapping[str, JsonValue]]:
        """There is nobody."""
        return ()


ALONE = Alone()
