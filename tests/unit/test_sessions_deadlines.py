"""Deadlines of sampling: one timer for all turns, as `asyncio.timeout` would end each."""

from __future__ import annotations

import asyncio

import pytest

from gateway.sessions.deadlines import Deadline, Deadlines

NEVER = 3600.0


async def wait_for_ever() -> None:
    await asyncio.get_running_loop().create_future()


async def test_each_turn_ends_when_its_own_time_is_over() -> None:
    deadlines = Deadlines(0.02)
    ended: list[int] = []

    async def turn(number: int) -> None:
        await asyncio.sleep(number * 0.005)
        with pytest.raises(TimeoutError), deadlines.begin():
            await wait_for_ever()
        ended.append(number)

    await asyncio.wait_for(asyncio.gather(*map(turn, range(4))), NEVER)
    assert ended == [0, 1, 2, 3]
    with pytest.raises(TimeoutError):  # also where no other runs
        with deadlines.begin():
            await wait_for_ever()


async def test_a_turn_that_ends_in_time_is_left_alone() -> None:
    deadlines = Deadlines(0.01)
    with deadlines.begin() as deadline:
        pass
    await asyncio.sleep(0.03)
    assert not deadline.expired


async def test_a_turn_that_is_cut_ends_early_unless_it_is_called_back() -> None:
    deadlines = Deadlines(NEVER)
    loop = asyncio.get_running_loop()
    with pytest.raises(TimeoutError), deadlines.begin() as deadline:
        deadline.bring_forward(loop.time())
        await wait_for_ever()
    with deadlines.begin() as deadline:
        deadline.bring_forward(loop.time() + 0.005)
        deadline.bring_forward(None)
        await asyncio.sleep(0.02)
    assert not deadline.expired
    deadlines.close()


async def test_a_cancelled_turn_is_cancelled_and_not_late() -> None:
    deadlines, began = Deadlines(NEVER), asyncio.Event()

    async def turn() -> Deadline:
        with deadlines.begin() as deadline:
            began.set()
            await wait_for_ever()
        return deadline

    task = asyncio.create_task(turn())
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    deadlines.close()


async def test_what_fails_for_another_reason_says_so_although_its_time_is_over() -> None:
    deadlines = Deadlines(0.005)
    with pytest.raises(ValueError, match="mine"), deadlines.begin() as deadline:
        try:
            await wait_for_ever()
        except asyncio.CancelledError:
            raise ValueError("mine") from None
    assert deadline.expired
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
