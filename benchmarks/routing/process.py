"""One measurement in a fresh process: SGLang's client and the embedded ledger, as the gateway has them.

    python -m benchmarks.routing.process SCENARIO ENGINE_URL FOLDER NUM_ROWS     prints one line of JSON

CPU is of the whole process, all threads. Memory is what the kernel counts: VmHWM above VmRSS of just before, the
high-water mark reset in between.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import hashlib
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import numpy as np
import uvloop

from benchmarks.routing.workload import SHAPE
from engines.sglang import SglangEngine
from gateway.contracts.examples import example_turn
from gateway.contracts.experts import RoutedExperts
from gateway.contracts.generation import GenerateEnd, GenerateRequest, SamplingParams
from gateway.contracts.records import (
    Attachment,
    MatchTier,
    RootContext,
    SegmentReason,
    SessionOrigin,
    SessionRecord,
    TurnRecord,
)
from gateway.contracts.versions import VersionSpan
from gateway.ledger.sqlite import SqliteLedger

NUM_NEW = 769
NUM_AT_ONCE = 16
NUM_TURNS = 50
SMALL_AGENTS = 8
ROUNDS = 7


class Usage(NamedTuple):
    """Of a piece of work: CPU and wall seconds, and by how much memory rose above what it was before."""

    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int


class Gaps(NamedTuple):
    """Seconds by which timers came late, and of them those of this process's own making."""

    seconds: list[float]
    own: list[float]

    def figures(self) -> dict[str, Any]:
        """In milliseconds."""
        return {"gap_ms": _percentiles(self.seconds), "own_gap_ms": _percentiles(self.own)}


class Bench:
    """An engine and a ledger."""

    def __init__(self, url: str, engine: SglangEngine, ledger: SqliteLedger) -> None:
        self.url = url
        self.engine = engine
        self.ledger = ledger
        self._indexes: dict[str, int] = {}

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(cls, url: str, folder: Path) -> AsyncIterator[Bench]:
        """Both, closed at the end."""
        engine = SglangEngine(url, engine_id="e0", routing=SHAPE, policy_version_of=int, context_length=10**6)
        ledger = SqliteLedger.open(folder)
        try:
            yield cls(url, engine, ledger)
        finally:
            await engine.aclose()
            await ledger.aclose()

    async def ask(self, num_prompt: int, num_new: int, *, start: int | None) -> GenerateEnd:
        """One reply, with its rows from `start` on."""
        request = GenerateRequest(
            f"{time.monotonic_ns():032x}",
            np.arange(num_prompt, dtype=np.int32) % 30_000,
            SamplingParams(max_new_tokens=num_new),
            routed_experts_start=start,
        )
        end: GenerateEnd | None = None
        async with contextlib.aclosing(self.engine.generate(request)) as items:
            async for item in items:
                end = item if isinstance(item, GenerateEnd) else end
        assert end is not None
        return end

    async def turn(self, session_id: str, num_prompt: int, num_new: int, *, start: int | None) -> RoutedExperts | None:
        """A reply, recorded: a session's next turn."""
        end = await self.ask(num_prompt, num_new, start=start)
        index = self._indexes.get(session_id, 0)
        if index == 0:
            await self.ledger.create_session(session_record(session_id))
        self._indexes[session_id] = index + 1
        rows = end.routed_experts
        assert (rows is None) == (start is None), "the reply's rows could not be read"
        await self.ledger.append_turn(turn_record(session_id, index, rows), rows)
        return rows


async def measured(work: Callable[[], Awaitable[Any]]) -> Usage:
    """Do it, and say what it took."""
    gc.collect()
    _forget_peak()
    before, cpu, wall = _memory("VmRSS"), time.process_time(), time.perf_counter()
    result = await work()
    usage = Usage(time.process_time() - cpu, time.perf_counter() - wall, _memory("VmHWM") - before)
    del result
    return usage


async def decode(bench: Bench, num_rows: int) -> dict[str, Any]:
    """Replies one after another, read and decoded; then the same by the plain way of a JSON parser and base64."""
    prompt = num_rows - NUM_NEW + 1
    await bench.ask(64, 1, start=0)
    first = await measured(lambda: bench.ask(prompt, NUM_NEW, start=0))
    ours = [await measured(lambda: bench.ask(prompt, NUM_NEW, start=0)) for _ in range(ROUNDS)]
    end = await bench.ask(prompt, NUM_NEW, start=0)
    assert end.routed_experts is not None
    return {
        "digest": hashlib.sha256(end.routed_experts.ids).hexdigest(),
        **_cost(first, ours, end.routed_experts.ids.nbytes),
    }


async def plain(bench: Bench, num_rows: int) -> dict[str, Any]:
    """The comparison: the answer read whole, `json`, `base64`, narrowed."""
    prompt = num_rows - NUM_NEW + 1
    body = {
        "rid": "r", "input_ids": list(range(prompt)), "sampling_params": {"max_new_tokens": NUM_NEW},
        "return_routed_experts": True, "routed_experts_start_len": 0,
    }  # fmt: skip

    async def ask() -> np.ndarray[Any, Any]:
        async with aiohttp.ClientSession() as session, session.post(f"{bench.url}/generate", json=body) as response:
            whole = await response.read()
        event = json.loads(whole.split(b"\n", 1)[0].removeprefix(b"data: "))
        raw = base64.b64decode(event["meta_info"]["routed_experts"], validate=True)
        ids = np.frombuffer(raw, "<i4").reshape(num_rows, SHAPE.num_layers, SHAPE.top_k)
        assert ids.min() >= 0
        assert ids.max() < SHAPE.num_experts
        return ids.astype(np.uint8)

    first = await measured(ask)
    usages = [await measured(ask) for _ in range(ROUNDS)]
    return _cost(first, usages, num_rows * SHAPE.num_layers * SHAPE.top_k)


async def recorded(bench: Bench, num_rows: int) -> dict[str, Any]:
    """Replies one after another, each recorded durably."""
    prompt = num_rows - NUM_NEW + 1
    await bench.turn("warm", 64, 1, start=0)
    first = await measured(lambda: bench.turn("big", prompt, NUM_NEW, start=0))
    usages = [await measured(lambda: bench.turn("big", prompt, NUM_NEW, start=0)) for _ in range(ROUNDS)]
    return _cost(first, usages, num_rows * SHAPE.num_layers * SHAPE.top_k)


async def beside(bench: Bench, num_rows: int) -> dict[str, Any]:
    """Big replies while small turns flow: gaps of the event loop with them, and without."""
    prompt = num_rows - NUM_NEW + 1
    await bench.turn("warm", 64, 1, start=0)
    done = asyncio.Event()
    small: list[float] = []

    async def agent(name: str) -> None:
        while not done.is_set():
            began = time.perf_counter()
            await bench.turn(name, 1, 8, start=None)
            small.append(time.perf_counter() - began)

    agents = [asyncio.create_task(agent(f"small-{i}")) for i in range(SMALL_AGENTS)]
    await asyncio.sleep(0.5)
    alone_turns = small.copy()
    async with gaps() as alone:
        await asyncio.sleep(3.0)
    small.clear()
    async with gaps() as among:
        for _ in range(2 * ROUNDS):
            await bench.turn("big", prompt, NUM_NEW, start=0)
    done.set()
    await asyncio.gather(*agents)
    return {
        "small_turns": len(small),
        "without": alone.figures(),
        **among.figures(),
        "small_turn_ms_before": _percentiles(alone_turns),
        "small_turn_ms": _percentiles(small),
    }


@contextlib.asynccontextmanager
async def gaps(every_seconds: float = 0.001) -> AsyncIterator[Gaps]:
    """How late a timer of a millisecond comes, each time: seconds in which the loop did something else.

    `own`: no more of it than this process, all threads, was computing meanwhile; the rest is other programs' doing.
    """
    late = Gaps([], [])

    async def tick() -> None:
        while True:
            began, cpu = time.perf_counter(), time.process_time()
            await asyncio.sleep(every_seconds)
            seconds = max(0.0, time.perf_counter() - began - every_seconds)
            late.seconds.append(seconds)
            late.own.append(min(seconds, time.process_time() - cpu))

    task = asyncio.create_task(tick())
    try:
        yield late
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def at_once(bench: Bench, num_rows: int) -> dict[str, Any]:
    """Sixteen replies at the same time, each recorded."""
    prompt = num_rows - NUM_NEW + 1
    await bench.turn("warm", 64, 1, start=0)

    async def all_of_them() -> None:
        await asyncio.gather(*(bench.turn(f"s{i}", prompt, NUM_NEW, start=0) for i in range(NUM_AT_ONCE)))

    async with gaps() as late:
        usage = await measured(all_of_them)
    return {
        "replies": NUM_AT_ONCE,
        "cpu_ms_a_reply": usage.cpu_seconds * 1e3 / NUM_AT_ONCE,
        "wall_ms": usage.wall_seconds * 1e3,
        "peak_mb_of_process": _memory("VmHWM") / 1e6,
        **late.figures(),
    }


async def incremental(bench: Bench, num_rows: int) -> dict[str, Any]:
    """A conversation of fifty turns, each asking for the rows that are new, against one reply with all of them."""
    step = num_rows // NUM_TURNS

    async def conversation(name: str) -> None:
        for index in range(NUM_TURNS):
            stop = (index + 1) * step if index < NUM_TURNS - 1 else num_rows
            await bench.turn(name, stop - 15, 16, start=index * step)

    async def without_rows(name: str) -> None:
        for index in range(NUM_TURNS):
            await bench.turn(name, (index + 1) * step - 15, 16, start=None)

    await bench.turn("warm", 64, 1, start=0)
    await measured(lambda: conversation("warm-50"))
    fifty = [await measured(lambda i=i: conversation(f"c{i}")) for i in range(ROUNDS)]
    bare = [await measured(lambda i=i: without_rows(f"b{i}")) for i in range(ROUNDS)]
    one = [await measured(lambda i=i: bench.turn(f"o{i}", num_rows - 15, 16, start=0)) for i in range(ROUNDS)]
    return {
        "turns": NUM_TURNS,
        "fifty_cpu_ms": _spread([usage.cpu_seconds * 1e3 for usage in fifty]),
        "fifty_without_rows_cpu_ms": _spread([usage.cpu_seconds * 1e3 for usage in bare]),
        "one_cpu_ms": _spread([usage.cpu_seconds * 1e3 for usage in one]),
    }


def session_record(session_id: str) -> SessionRecord:
    """One that says nothing."""
    return SessionRecord(session_id, None, None, None, {}, {}, {}, None, "", SessionOrigin.CREATED, True, time.time())


def turn_record(session_id: str, index: int, rows: RoutedExperts | None) -> TurnRecord:
    """A turn with these rows, which goes on where the one before it ended if its first row is not the first of all."""
    parent = f"t{index - 1}" if rows is not None and rows.start else None
    num_prompt = 8 if rows is None else rows.stop - rows.start - (1 if parent is None else 2)
    return example_turn(
        index,
        session_id=session_id,
        turn_id=f"t{index}",
        attachment=Attachment(
            parent, parent, MatchTier.EXACT if parent else MatchTier.NONE, None if parent else SegmentReason.FIRST
        ),
        root=None if parent else RootContext((), {}),
        prompt_token_ids=np.arange(num_prompt, dtype=np.int32),
        output_token_ids=np.arange(2, dtype=np.int32),
        output_logprobs=np.full(2, -0.25, np.float32),
        version_spans=(VersionSpan(0, 2, 1),),
        num_layers=0 if rows is None else SHAPE.num_layers,
        num_experts=0 if rows is None else SHAPE.num_experts,
        top_k=0 if rows is None else SHAPE.top_k,
        experts_start=0 if rows is None else rows.start,
        experts_stop=0 if rows is None else rows.stop,
        created_at=time.time(),
    )


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def _cost(first: Usage, usages: list[Usage], stored_bytes: int) -> dict[str, Any]:
    """Of equal replies; the first shows how much memory one takes."""
    return {
        "cpu_ms": _spread([usage.cpu_seconds * 1e3 for usage in usages]),
        "wall_ms": _spread([usage.wall_seconds * 1e3 for usage in usages]),
        "peak_mb_above_rows": (first.peak_bytes - stored_bytes) / 1e6,
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 1),
        "least": round(min(values), 1),
        "most": round(max(values), 1),
    }


def _percentiles(seconds: list[float]) -> dict[str, float]:
    values = np.asarray(seconds or [0.0]) * 1e3
    return {
        "p50": round(float(np.percentile(values, 50)), 2),
        "p99": round(float(np.percentile(values, 99)), 2),
        "most": round(float(values.max()), 2),
    }


SCENARIOS = {function.__name__: function for function in (decode, plain, recorded, beside, at_once, incremental)}


async def _run(scenario: str, url: str, folder: Path, num_rows: int) -> None:
    async with Bench.opened(url, folder) as bench:
        figures = await SCENARIOS[scenario](bench, num_rows)
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    uvloop.run(_run(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])))
