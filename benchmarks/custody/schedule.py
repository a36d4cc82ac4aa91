"""Who is harmed when, from a seed; and doing it."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import partial

import aiohttp

from benchmarks.custody.place import Place
from benchmarks.custody.processes import Fleet, Member
from engines.weights.names import weight_label
from gateway.client import GatewayClient
from gateway.contracts.errors import VerbatimError


class Harm(StrEnum):
    """KILL: SIGKILL, started again. HANG: SIGSTOP, SIGCONT later. HANG_AND_KILL: SIGSTOP, then SIGKILL, started again.
    RESTART: SIGTERM, started again when it has ended. REPLACE: `serve --replace` beside it. REPLACE_AND_KILL: the same,
    and SIGKILL to the old one meanwhile. UPDATE: new weights on all engines."""

    KILL = "kill"
    HANG = "hang"
    HANG_AND_KILL = "hang and kill"
    RESTART = "restart"
    REPLACE = "replace"
    REPLACE_AND_KILL = "replace and kill"
    UPDATE = "update"


PAUSE_MODES = ("abort", "keep", "drain")
ALL = "all engines"
_TARGETS = ("gateway", "gateway", "router", "engine-0", "engine-1", "trainer")
_HARMS = (Harm.KILL, Harm.HANG, Harm.HANG_AND_KILL, Harm.RESTART)
_HARMS_OF_GATEWAY = (*_HARMS, Harm.REPLACE, Harm.REPLACE_AND_KILL)


@dataclass(frozen=True, slots=True)
class Planned:
    """One deed to do `at` seconds after the start. lasts: seconds that a hang takes, or that a killed process stays
    away. mode: of the pause of an update."""

    at: float
    target: str
    harm: Harm
    lasts: float = 0.0
    mode: str = ""


@dataclass(slots=True)
class Deed:
    """One deed that was done. began, ended: seconds since the epoch; `ended`: the process is ready again."""

    target: str
    harm: Harm
    mode: str
    began: float
    ended: float = 0.0
    trouble: str = ""


def plan(seed: int, *, seconds: float, every_seconds: float, update_every: int = 3) -> Iterator[Planned]:
    """Deeds until `seconds`; each `update_every`th is an update of weights, and every target and harm has its turn."""
    rng = random.Random(seed)
    at, number, updates = every_seconds, 0, 0
    targets: list[str] = []
    harms: dict[str, list[Harm]] = {}
    while at < seconds:
        number += 1
        if number % update_every == 0:
            yield Planned(at, ALL, Harm.UPDATE, mode=PAUSE_MODES[updates % len(PAUSE_MODES)])
            updates += 1
        else:
            if not targets:
                targets = rng.sample(_TARGETS, len(_TARGETS))
            target = targets.pop()
            if not harms.get(target):
                known = _HARMS_OF_GATEWAY if target == "gateway" else _HARMS
                harms[target] = rng.sample(known, len(known))
            yield Planned(at, target, harms[target].pop(), lasts=rng.uniform(0.1, 4.0))
        at += every_seconds * rng.uniform(0.6, 1.4)


@dataclass(slots=True)
class Harmer:
    """Does what is planned to a fleet and notes it. Deeds to one process follow each other; others overlap."""

    fleet: Fleet
    place: Place
    http: aiohttp.ClientSession
    deeds: list[Deed] = field(default_factory=list)
    _locks: dict[str, asyncio.Lock] = field(default_factory=dict)

    async def follow(self, planned: Iterable[Planned], *, tell: Callable[[str], None]) -> None:
        """Until the last deed is done and repaired."""
        began = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for one in planned:
                await asyncio.sleep(max(0.0, began + one.at - time.monotonic()))
                tell(f"{one.at:7.1f} s  {one.harm} {one.target} {one.mode}\n")
                tasks.create_task(self.do(one))

    async def do(self, one: Planned) -> None:
        """One deed, to its end."""
        async with self._locks.setdefault(one.target, asyncio.Lock()):
            deed = Deed(one.target, one.harm, one.mode, time.time())
            self.deeds.append(deed)
            if one.harm is Harm.UPDATE:
                await self.update(one.mode)
            else:
                deed.trouble = await self._harm(self.fleet.members[one.target], one)
            deed.ended = time.time()
            with self.place.deeds.open("a") as file:
                file.write(json.dumps(asdict(deed)) + "\n")

    async def _harm(self, member: Member, one: Planned) -> str:
        """What should not have happened meanwhile."""
        trouble = ""
        if one.harm in (Harm.HANG, Harm.HANG_AND_KILL):
            member.signal(signal.SIGSTOP)
            await asyncio.sleep(one.lasts)
        match one.harm:
            case Harm.HANG:
                member.signal(signal.SIGCONT)
            case Harm.KILL | Harm.HANG_AND_KILL:
                await member.kill()
                await asyncio.sleep(min(one.lasts, 1.0))
                member.start()
            case Harm.RESTART:
                exit_code = await member.stop()
                trouble = f"ended with {exit_code}" if exit_code and member.name == "gateway" else ""
                member.start()
            case Harm.REPLACE:
                trouble = await member.replace()
            case Harm.REPLACE_AND_KILL:
                await member.replace_and_kill(one.lasts)
        await member.wait_ready()
        return trouble

    async def update(self, mode: str) -> None:
        """Pause, new weights on every engine, resume; each step as often as it takes."""
        version = self.fleet.policy_version + 1
        self.fleet.policy_version = version  # engines that are started from now on have them
        async with GatewayClient(self.fleet.gateway_url, timeout_seconds=20.0) as gateway:
            await _persistently(lambda: gateway.pause(mode))
            for url in self.fleet.engine_urls:
                await _persistently(partial(self._load, url, version))
            await _persistently(lambda: gateway.set_policy(version, weight_label(version)))
            await _persistently(gateway.resume)

    async def _load(self, url: str, version: int) -> None:
        body = {"model_path": str(self.place.model), "weight_version": weight_label(version)}
        timeout = aiohttp.ClientTimeout(total=3)
        async with self.http.post(url + "/update_weights_from_disk", json=body, timeout=timeout) as reply:
            reply.raise_for_status()


async def _persistently(step: Callable[[], Awaitable[object]]) -> None:
    while True:
        with suppress(VerbatimError, aiohttp.ClientError, TimeoutError):
            await step()
            return
        await asyncio.sleep(0.2)
