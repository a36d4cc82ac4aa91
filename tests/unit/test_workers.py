"""What workers of one gateway share and tell each other, without their processes."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.contracts.errors import Conflict, HandoverFailed, TooManyRequests, VerbatimError
from gateway.contracts.settings import load_settings
from gateway.handover.channel import Channel
from gateway.handover.marks import ChangeMarks
from gateway.handover.questions import Questions
from gateway.handover.shares import Shares
from gateway.settings import GatewaySettings, of_one_worker

ABSENT_AT_THE_START = ("torch", "transformers", "ray", "aiohttp", "psycopg", "obstore", "httpx", "openai", "matplotlib")
"""Heavy, and needed by some gateways only, or by none."""


def test_gateway_starts_without_what_only_some_gateways_need() -> None:
    code = f"import sys, gateway.main; print([name for name in {ABSENT_AT_THE_START!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("fewer", [0, 1])
def test_as_many_workers_as_cores_keep_to_one_each(fewer: int) -> None:
    """Fewer are left to the system."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    num_workers = len(cores) - fewer
    said = []
    for number in range(num_workers):
        program = f"import os; os.sched_setaffinity(0, {cores}); from gateway.workers import keep_to_core"
        program += f"; keep_to_core({number}, {num_workers}); print(*sorted(os.sched_getaffinity(0)))"
        told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
        said.append([int(core) for core in told.stdout.split()])
    assert said == ([cores] * num_workers if fewer else [[core] for core in cores])


def test_a_worker_steps_back_only_for_those_that_accept() -> None:
    shares = Shares(3)
    first, second = shares.enter(0), shares.enter(1)  # the third is not there yet
    assert not first.is_exceeded
    first.set(1)
    assert first.is_exceeded
    assert not second.is_exceeded
    assert shares.least() == 1
    second.set(1)
    assert not first.is_exceeded
    first.set(5)
    shares.leave(1)  # it died
    assert not first.is_exceeded
    assert shares.least() == 0


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2), st.booleans()), max_size=60))
def test_no_change_of_another_worker_goes_unseen(steps: list[tuple[str, int, bool]]) -> None:
    """Whatever the order, and also where one that began never ended: its worker died."""
    marks = ChangeMarks(3)
    workers = [marks.of(number) for number in range(3)]
    seen = {name: workers[0].changes(name) for name in "abc"}
    open_changes = dict.fromkeys("abc", 0)
    for name, number, ends in steps:
        before = workers[0].changes(name)
        workers[number].begin(name)
        if ends:
            workers[number].end(name)
        if number == 0:
            assert workers[0].changes(name) == before  # its own it knows of
            continue
        open_changes[name] += not ends
        now = workers[0].changes(name)
        assert now is None or now != seen[name]
        assert (now is None) == bool(open_changes[name])
        seen[name] = now


def test_limits_of_all_sessions_together_are_divided() -> None:
    settings = load_settings(
        GatewaySettings,
        file=None,
        overrides=[
            "workers=4",
            "limits.concurrent=10",
            "limits.requests_per_second=2",
            "bodies_in_flight_bytes=100000000",
        ],
    )
    own = of_one_worker(settings)
    assert own.limits.concurrent == 3
    assert own.limits.requests_per_second == 0.5
    assert own.bodies_in_flight_bytes == own.max_body_bytes


@asynccontextmanager
async def asking(answer: Any) -> AsyncIterator[tuple[Questions, Channel]]:
    """Questions to a process that answers so, and its channel."""
    ends = [Channel(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)]
    both = [Questions(end, answer) for end in ends]

    async def read(channel: Channel, questions: Questions) -> None:
        while (message := await channel.receive()) is not None:
            assert questions.take(message)
        questions.end()

    reading = [asyncio.create_task(read(*each)) for each in zip(ends, both, strict=True)]
    try:
        yield both[0], ends[1]
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
        for end in ends:
            end.close()


async def echo(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    if name == "refuse":
        raise Conflict("there is one already")
    if name == "refuse with more":
        raise TooManyRequests("too many", retry_after_seconds=3)
    if name == "never":
        await asyncio.Event().wait()
    return {"name": name, **fields}


def test_answers_of_any_size_and_errors_by_their_class_come_back() -> None:
    async def run() -> None:
        async with asking(echo) as (questions, _):
            many = await asyncio.gather(*(questions.ask("n", number=number) for number in range(100)))
            assert [answer["number"] for answer in many] == list(range(100))
            for size in (10, 40_000):
                assert await questions.ask("size", text="x" * size) == {"name": "size", "text": "x" * size}
            assert len((await asyncio.gather(*(questions.ask("big", text="x" * 120_000) for _ in range(3))))[0]) == 2
            with pytest.raises(Conflict, match="there is one already"):
                await questions.ask("refuse")
            with pytest.raises(VerbatimError, match="too many"):
                await questions.ask("refuse with more")

    asyncio.run(run())


def test_nobody_waits_for_a_process_that_ends() -> None:
    async def run() -> None:
        async with asking(echo) as (questions, other):
            with pytest.raises(TimeoutError):
                await questions.ask("never", timeout_seconds=0.01)
            waiting = asyncio.create_task(questions.ask("never"))
            await asyncio.sleep(0.01)
            questions.end()
            other.close()
            with pytest.raises(HandoverFailed):
                await waiting
            with pytest.raises(HandoverFailed):
                await questions.ask("n")

    asyncio.run(run())
