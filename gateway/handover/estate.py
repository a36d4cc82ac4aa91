"""What a gateway gives away when another process takes over, and how it empties itself then."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from gateway.contracts.errors import EngineUnavailable
from gateway.handover.channel import MAX_DESCRIPTORS, Channel
from gateway.handover.chores import Chores
from gateway.handover.control import Place
from gateway.handover.predecessor import Predecessor
from gateway.handover.server import GatewayServer
from gateway.handover.state import LiveState
from gateway.replicas.operations import Follower, Operations
from gateway.sessions.turns import TurnRunner

_TICK_SECONDS = 0.02


class Estate(Protocol):
    """What gives its place away: one gateway process, or the workers of one together."""

    @property
    def place(self) -> Place:
        """The sockets that travel."""
        ...

    @property
    def lock(self) -> int | None:
        """The descriptor that holds the ledger's folder, None where none does."""
        ...

    @property
    def operations(self) -> Follower:
        """Who makes and passes on operators' changes."""
        ...

    @property
    def drain_seconds(self) -> float:
        """How long replies may run after a successor serves."""
        ...

    @property
    def num_running(self) -> int:
        """Turns under way."""
        ...

    @property
    def is_busy(self) -> bool:
        """Whether anything is left here: connections, requests, turns, or a predecessor that still ends its own."""
        ...

    def state(self) -> LiveState:
        """What a successor has to be told."""
        ...

    def share(self, is_under_way: bool) -> None:
        """A successor may write to the ledger, or does so no more."""
        ...

    async def stop_accepting(self) -> None:
        """What comes from now on waits in the listener's queue; chores are left to the successor."""
        ...

    async def stay(self) -> None:
        """Undo `stop_accepting` and `leave`, for what is still here; repeating it is fine."""
        ...

    def leave(self, give: Callable[[int], None]) -> None:
        """Give every connection away, as a descriptor, as soon as it has no request."""
        ...

    async def deliveries_noted(self) -> None:
        """Wait until the ledger knows of the replies whose last byte has left."""
        ...

    async def adopt(self, descriptor: int) -> None:
        """Serve a connection that nobody took."""
        ...

    def cut(self, reason: EngineUnavailable) -> None:
        """End the turns that still run."""
        ...

    def end(self) -> None:
        """Nothing is left to do."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class OwnEstate:
    """`Estate` of one process. shared: has the ledger know whether another process writes too. chores: done by one
    process only, presence: what each does that takes requests. predecessor: the process that this one replaced."""

    server: GatewayServer
    place: Place
    lock: int | None
    shared: Callable[[bool], None]
    runner: TurnRunner
    operations: Operations
    presence: Chores
    chores: Chores
    live: Callable[[], LiveState]
    drain_seconds: float
    predecessor: Predecessor | None

    @property
    def num_running(self) -> int:
        """Turns under way."""
        return self.runner.num_running

    @property
    def is_busy(self) -> bool:
        """Whether anything is left here."""
        has_predecessor = self.predecessor is not None and not self.predecessor.is_gone
        return bool(self.server.is_busy or self.runner.num_running or has_predecessor)

    def state(self) -> LiveState:
        """As it is now."""
        return self.live()

    def share(self, is_under_way: bool) -> None:
        """As `Estate` says; a predecessor may still write as well."""
        self.shared(is_under_way or (self.predecessor is not None and not self.predecessor.is_gone))

    async def stop_accepting(self) -> None:
        """As `Estate` says."""
        await self.chores.stop()
        await self.presence.stop()
        self.server.stop_accepting()

    async def stay(self) -> None:
        """As `Estate` says."""
        await self.server.stay()
        self.presence.start()
        self.chores.start()

    def leave(self, give: Callable[[int], None]) -> None:
        """As `Estate` says."""
        self.server.leave(give)

    async def deliveries_noted(self) -> None:
        """As `Estate` says."""
        await self.runner.deliveries_noted()

    async def adopt(self, descriptor: int) -> None:
        """As `Estate` says."""
        await self.server.adopt(descriptor)

    def cut(self, reason: EngineUnavailable) -> None:
        """As `Estate` says."""
        self.runner.cut(reason)

    def end(self) -> None:
        """As `Estate` says."""
        self.server.should_exit = True


async def emptied(estate: Estate, channel: Channel, given: list[int]) -> None:
    """Wait until nothing is left, and send on, as they come, the connections that `estate.leave` puts into `given`."""
    while given or estate.is_busy:
        if given:
            # Who has read a reply may ask at once, and the successor has to know that it was delivered.
            await estate.deliveries_noted()
            descriptors, given[:MAX_DESCRIPTORS] = given[:MAX_DESCRIPTORS], []
            await send_connections(channel, descriptors)
        await asyncio.sleep(_TICK_SECONDS)


async def send_connections(channel: Channel, descriptors: Sequence[int]) -> bool:
    """Have the process at the other end serve them; they are closed here. False if it is gone."""
    try:
        return await channel.send("connections", descriptors)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
