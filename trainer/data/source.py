"""Finished rollouts from the gateway's feed, by lease, in whole groups."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from gateway.client import GatewayClient
from gateway.contracts.errors import Conflict, NotFound
from gateway.contracts.rollouts import FinishedRollout, LeasedRollout

_log = logging.getLogger(__name__)
_CONCURRENT_READS = 8


@dataclass(frozen=True, slots=True, eq=False)
class TakenRollouts:
    """What a step leased. Rollouts are ordered by group and session, so that a step repeated after a crash is the same.

    `groups`: names of the groups, those of rollouts that an earlier step had consumed left out. `settled`: sessions of
    the latter, which the leases hold once more; this step's checkpoint names them too.
    """

    lease_ids: tuple[str, ...]
    groups: frozenset[str]
    rollouts: tuple[FinishedRollout, ...]
    settled: frozenset[str] = frozenset()

    @property
    def session_ids(self) -> tuple[str, ...]:
        """Of all that the leases hold."""
        return tuple(sorted({rollout.session.session_id for rollout in self.rollouts} | self.settled))

    def __add__(self, other: TakenRollouts) -> TakenRollouts:
        """Both; a rollout that came twice, as a lease that ended lends it again, is in once (I3)."""
        rollouts = {rollout.session.session_id: rollout for rollout in self.rollouts + other.rollouts}
        return TakenRollouts(
            self.lease_ids + other.lease_ids,
            self.groups | other.groups,
            tuple(sorted(rollouts.values(), key=_order)),
            self.settled | other.settled,
        )


class RolloutSource:
    """One run's training rollouts: the run's name is the consumer, its labels select them.

    A rollout that was dropped under its lease is left out with a warning; one that cannot be read as it was leased
    raises.
    pick: which of their turns train; None leaves it to the gateway.
    """

    def __init__(
        self,
        gateway: GatewayClient,
        *,
        run_name: str,
        group_size: int,
        pick: str | None = None,
        lease_seconds: float = 3600.0,
    ) -> None:
        self._gateway = gateway
        self._consumer = run_name
        self._labels = {"run": run_name, "purpose": "train"}
        self._group_size = group_size
        self._pick = pick
        self._lease_seconds = lease_seconds
        self._consumed: frozenset[str] = frozenset()

    async def resume(self, *, lease_ids: Sequence[str], consumed: Collection[str]) -> None:
        """Settle what a killed predecessor left: acknowledge what its checkpoint had consumed, return all else.

        `consumed`: session ids of those leases; should they be lent again, they are not trained twice (I3).
        """
        self._consumed = frozenset(consumed)
        for lease_id in lease_ids:
            try:
                await self._gateway.acknowledge(lease_id)
            except (NotFound, Conflict) as error:
                _log.warning("lease %s of the last checkpoint: %s; its rollouts are skipped", lease_id, error.message)
        returned = await self._gateway.release_consumer(self._consumer)
        if returned:
            _log.info("%d rollouts that were leased and not trained are back in the feed", returned)

    async def take(self, num_groups: int, *, wait_seconds: float) -> TakenRollouts:
        """Lease up to `num_groups` whole groups, waiting at most `wait_seconds` for them; fewer if no more came."""
        taken = TakenRollouts((), frozenset(), ())
        deadline = time.monotonic() + wait_seconds
        while len(taken.groups) < num_groups:
            lease = await self._gateway.lease(
                consumer=self._consumer,
                limit=(num_groups - len(taken.groups)) * self._group_size,
                wait_seconds=max(deadline - time.monotonic(), 0.0),
                lease_seconds=self._lease_seconds,
                whole_groups=True,
                labels=self._labels,
            )
            if lease is not None:
                fresh = [rollout for rollout in lease.rollouts if rollout.session_id not in self._consumed]
                groups = frozenset(rollout.group or rollout.session_id for rollout in fresh)
                settled = frozenset(rollout.session_id for rollout in lease.rollouts) & self._consumed
                async with self._gateway.extending(lease.lease_id, lease_seconds=self._lease_seconds):
                    taken += TakenRollouts((lease.lease_id,), groups, await self._read(fresh), settled)
            elif time.monotonic() >= deadline:
                break
        return taken

    @asynccontextmanager
    async def holding(self, taken: TakenRollouts) -> AsyncIterator[None]:
        """Keep the leases while the block runs, however long that takes."""
        async with AsyncExitStack() as stack:
            for lease_id in taken.lease_ids:
                await stack.enter_async_context(self._gateway.extending(lease_id, lease_seconds=self._lease_seconds))
            yield

    async def acknowledge(self, lease_ids: Sequence[str]) -> None:
        """Mark leases as consumed, after the checkpoint that names them."""
        for lease_id in lease_ids:
            await self._gateway.acknowledge(lease_id)

    async def _read(self, leased: Sequence[LeasedRollout]) -> tuple[FinishedRollout, ...]:
        slots = asyncio.Semaphore(_CONCURRENT_READS)

        async def read(rollout: LeasedRollout) -> FinishedRollout | None:
            async with slots:
                try:
                    return await self._gateway.rollout(rollout.session_id, rollout.snapshot, pick=self._pick)
                except NotFound as error:
                    _log.warning("%s; the step goes on without it", error.message)
                    return None

        try:
            async with asyncio.TaskGroup() as reads:
                tasks = [reads.create_task(read(rollout)) for rollout in leased]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures  # one line for the user: the first of them
        return tuple(rollout for task in tasks if (rollout := task.result()) is not None)


def group_of(rollout: FinishedRollout) -> str:
    """The group's name; a session without one is a group of its own."""
    return rollout.session.group or rollout.session.session_id


def _order(rollout: FinishedRollout) -> tuple[str, str]:
    return group_of(rollout), rollout.session.session_id
