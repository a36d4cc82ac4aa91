"""Periodic health checks: a silent engine is ejected, one that answers and is the right one is readmitted."""

from __future__ import annotations

import asyncio

from gateway.contracts.errors import EngineTimeout, EngineUnavailable
from gateway.replicas.pool import Replica, ReplicaPool


async def watch_health(pool: ReplicaPool) -> None:
    """Check every engine, and whether a pause is over, each `health_interval_seconds` until cancelled."""
    while True:
        await pool.greet()
        await pool.end_overdue_pauses()
        await asyncio.gather(*(check_replica(pool, replica) for replica in pool.replicas))
        await asyncio.sleep(pool.settings.health_interval_seconds)


async def check_replica(pool: ReplicaPool, replica: Replica) -> None:
    """One check: is it up, and is it still the right engine, with which weights?"""
    try:
        async with asyncio.timeout(pool.settings.health_timeout_seconds):
            if not await replica.engine.healthy():
                pool.eject(replica, EngineUnavailable("its health check fails"))
            elif not pool.is_pausing or not replica.healthy:
                # In a pause of ours weights are on their way into it; the resume asks who it is.
                await pool.refresh(replica)
    except TimeoutError:
        pool.eject(replica, EngineTimeout(f"no health answer in {pool.settings.health_timeout_seconds:g} s"))
