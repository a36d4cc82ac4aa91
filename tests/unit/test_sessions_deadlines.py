"""Deadlines of sampling: one timer for all turns, as `asyncio.timeout` would end each."""

from __future__ import annotations

import asyncio

import pytest

from gateway.sessions.deadlines import Deadlines

NEVER = 3600.0


async def sample(deadlines: Deadlines, *, cut_after: float | None = None, error: Exception | None = None) -> None:
    """Wait for ever under a deadline. cut_after: seconds; error: raised instead of a cancellation."""
    with deadlines.begin() as deadline:
        if cut_after is not None:
            deadline.bring_forward(asyncio.get_running_loop().time() + cut_after)
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            if error is not None:
                raise error from None
            raise


async def test_each_turn_ends_when_its_own_time_is_over() -> None:
    deadlines, ended = Deadlines(0.02), list[int]()

    async def turn(number: int) -> None:
        await asyncio.sleep(number * 0.005)
        with pytest.raises(TimeoutError):
            await sample(deadlines)
        ended.append(number)

    await asyncio.gather(*map(turn, range(4)))
    assert ended == [0, 1, 2, 3]
    with pytest.raises(TimeoutError):  # also where no other runs
        await sample(deadlines)


async def test_a_turn_that_ends_in_time_is_left_alone() -> None:
    deadlines = Deadlines(0.01)
    with deadlines.begin() as deadline:
        pass
    await asyncio.sleep(0.03)
    assert not deadline.expired


async def test_a_turn_that_is_cut_ends_early() -> None:
    deadlines = Deadlines(NEVER)
    with pytest.raises(TimeoutError):
        await sample(deadlines, cut_after=0.0)
    deadlines.close()


async def test_a_turn_that_is_called_back_goes_on() -> None:
    deadlines = Deadlines(NEVER)
    with deadlines.begin() as deadline:
        deadline.bring_forward(asyncio.get_running_loop().time() + 0.005)
        deadline.bring_forward(None)
        await asyncio.sleep(0.02)
    assert not deadline.expired
    deadlines.close()


async def test_a_cancelled_turn_is_cancelled_and_not_late() -> None:
    deadlines = Deadlines(NEVER)
    task = asyncio.create_task(sample(deadlines))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    deadlines.close()


async def test_what_fails_for_another_reason_says_so_although_its_time_is_over() -> None:
    with pytest.raises(ValueError, match="mine"):
        await sample(Deadlines(0.005), error=ValueError("mine"))
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
