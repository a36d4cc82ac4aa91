"""What operators change under way, here and in the other processes of the same place.

Generation is in several processes at once: in the workers of a gateway, and in a replaced gateway that still ends its
replies. Each change is made by one of them and told to its neighbours, who tell theirs; engines are told once. Of
several workers one leads: it makes all changes, in one order, also those that the others are asked for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from gateway.contracts.errors import EngineError, EngineTimeout, HandoverFailed, NotFound
from gateway.replicas.pause import GatewayPause, Pause
from gateway.replicas.pool import Replica, ReplicaPool
from gateway.replicas.sources import EngineList, EngineSource

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Change:
    """One operator's command, as it travels. arguments: JSON values by name."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


class Neighbour(Protocol):
    """The process before or after this one in a hand-over."""

    async def ask(self, change: Change) -> str | None:
        """Have a change made there too; returns what went wrong, None also where the process is gone."""
        ...


class Leader(Protocol):
    """The process that makes the changes which this one is asked for."""

    async def perform(self, change: Change) -> dict[str, Any]:
        """Have a change made, everywhere; what `Operations.perform` returned there, or the error that it raised."""
        ...


class Follower(Protocol):
    """What makes and passes on the changes that other processes were asked for."""

    @property
    def neighbours(self) -> set[Neighbour]:
        """Who is told, and tells."""
        ...

    async def follow(self, change: Change, *, told_by: Neighbour) -> None:
        """Make a change that another process was asked for, and tell the others; raises VerbatimError."""
        ...


class Operations:
    """Makes changes. learn_policy(policy_version, weight_version): stores what a label means, and knows it.

    `leader` makes them for this process, None while it makes them itself.
    """

    def __init__(
        self, pool: ReplicaPool, engines: EngineList, learn_policy: Callable[[int, str], Awaitable[None]]
    ) -> None:
        self._pool = pool
        self._engines = engines
        self._learn_policy = learn_policy
        self.neighbours: set[Neighbour] = set()
        self.leader: Leader | None = None

    async def perform(self, change: Change) -> dict[str, Any]:
        """Make a change that another worker was asked for, everywhere; what it has to know, raises as the method."""
        arguments = change.arguments
        match change.name:
            case "add_engine":
                replica = await self.add_engine(arguments["kind"], arguments["url"], arguments["engine_id"])
                return {"engine_id": replica.engine.engine_id}
            case "remove_engine":
                await self.remove_engine(arguments["engine_id"], drain=arguments["drain"])
            case "pause":
                await self.pause(GatewayPause(arguments["mode"]), max_seconds=arguments["max_seconds"])
            case "resume":
                await self.resume()
            case "policy":
                await self.set_policy(arguments["policy_version"], arguments["weight_version"])
        return {}

    async def add_engine(self, kind: str, url: str, engine_id: str | None) -> Replica:
        """Take an engine in; raises as `EngineList.add`."""
        change = Change("add_engine", {"kind": kind, "url": url, "engine_id": engine_id})
        if self.leader is not None:
            made = await self.leader.perform(change)
            return self._pool.replica(made["engine_id"])
        replica = await self._engines.add(kind, url, engine_id)
        change.arguments["engine_id"] = replica.engine.engine_id
        await self._tell(change)
        return replica

    async def remove_engine(self, engine_id: str, *, drain: bool) -> None:
        """Take an engine out, with `drain` after all requests that run on it; raises NotFound, EngineTimeout."""
        change = Change("remove_engine", {"engine_id": engine_id, "drain": drain})
        if self.leader is not None:
            await self.leader.perform(change)
            return
        await asyncio.gather(self._engines.remove(engine_id, drain=drain), self._tell(change))

    async def pause(self, mode: GatewayPause, *, max_seconds: float | None = None) -> None:
        """Hold generation; returns when it stands still, in every process. Raises EngineError; it goes on then."""
        if self.leader is not None:
            await self.leader.perform(Change("pause", {"mode": mode, "max_seconds": max_seconds}))
            return
        pause = Pause(mode, time.time(), max_seconds)
        try:
            # Nobody may send an aborted turn anew before everybody holds it back.
            _, errors = await asyncio.gather(self._pool.hold(pause), self._tell(Change("pause", pause.to_json())))
            if errors:
                raise EngineTimeout("; ".join(errors))
            await self._pool.stand_still()
        except EngineError:
            await self.resume()  # nobody else would: who asked for the pause is told that there is none
            raise

    async def resume(self) -> None:
        """Let generation go on, everywhere."""
        if self.leader is not None:
            await self.leader.perform(Change("resume"))
            return
        await self._pool.resume()
        await self._tell(Change("resume"))

    async def set_policy(self, policy_version: int, weight_version: str) -> None:
        """Say what an engine's label means."""
        change = Change("policy", {"policy_version": policy_version, "weight_version": weight_version})
        if self.leader is not None:
            await self.leader.perform(change)
            return
        await self._learn_policy(policy_version, weight_version)
        await self._pool.refresh_identities()
        await self._tell(change)

    async def follow(self, change: Change, *, told_by: Neighbour) -> None:
        """Make a change that another process was asked for, and tell the others; raises VerbatimError."""
        _, errors = await asyncio.gather(self._follow(change), self._tell(change, but=told_by))
        if errors:
            raise HandoverFailed("; ".join(errors))

    async def _follow(self, change: Change) -> None:
        arguments = change.arguments
        match change.name:
            case "add_engine":
                source = EngineSource(arguments["engine_id"], arguments["kind"], arguments["url"])
                await self._engines.inherit([source])  # one that does not answer here is used when it does
            case "remove_engine":
                try:
                    await self._engines.remove(arguments["engine_id"], drain=arguments["drain"])
                except NotFound:  # it is gone already
                    return
            case "pause":
                await self._pool.hold(Pause.from_json(arguments))
            case "resume":
                await self._pool.release()
            case "policy":
                await self._learn_policy(arguments["policy_version"], arguments["weight_version"])
                await self._pool.refresh_identities()

    async def _tell(self, change: Change, *, but: Neighbour | None = None) -> list[str]:
        """What went wrong elsewhere; a change that cannot be made there does not undo it here."""
        answers = await asyncio.gather(*(each.ask(change) for each in self.neighbours if each is not but))
        errors = [answer for answer in answers if answer is not None]
        for error in errors:
            _log.warning("%s: %s", change.name, error)
        return errors
