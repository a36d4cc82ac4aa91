"""When the collector looks through all that is in memory, which stops everything meanwhile."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest

from gateway.background import background
from gateway.memory import collect_cycles


class Ring:
    """Refers to itself, so that only the collector can free it."""

    def __init__(self) -> None:
        self.own = self


@pytest.fixture(autouse=True)
def no_other_collections() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def much_happens() -> None:
    """As many passes over young objects as make a full one worth it."""
    for _ in range(20):
        gc.collect(0)


def old_ring() -> tuple[weakref.ref[Ring], asyncio.Event]:
    """One that outlived the young objects' passes and is garbage now, and what tells that it has gone."""
    ring, gone = Ring(), asyncio.Event()
    gc.collect(0)
    return weakref.ref(ring, lambda _: gone.set()), gone


async def test_cycles_go_when_no_turn_has_run_for_a_moment_and_not_under_turns() -> None:
    running = 1
    async with background(collect_cycles(lambda: running, look_seconds=0.01)):
        await asyncio.sleep(0)  # it has begun
        ring, gone = old_ring()
        much_happens()
        await asyncio.sleep(0.2)
        assert ring() is not None
        running = 0
        await asyncio.wait_for(gone.wait(), 10)


async def test_who_always_has_turns_is_looked_through_at_times() -> None:
    async with background(collect_cycles(lambda: 1, look_seconds=0.01, longest_seconds=0.05)):
        await asyncio.sleep(0)
        _ring, gone = old_ring()
        much_happens()
        await asyncio.wait_for(gone.wait(), 10)


async def test_nothing_is_looked_through_where_nothing_happened() -> None:
    async with background(collect_cycles(lambda: 0, look_seconds=0.01, longest_seconds=0.01)):
        await asyncio.sleep(0)
        ring, gone = old_ring()
        await asyncio.sleep(0.2)
        assert ring() is not None
    gc.collect()
    await asyncio.wait_for(gone.wait(), 10)
