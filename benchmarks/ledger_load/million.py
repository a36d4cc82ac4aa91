"""A store as a long job leaves it: how fast it opens, what it takes, and how long its look-ups take."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.ledger_load.records import a_session, conversation
from gateway.ledger.sqlite import SqliteLedger

_TURNS_PER_SESSION = 10
_AGENTS = 256
_NUM_LOOKUPS = 500
_LEFT_OPEN = 100
"""One session in so many has not ended."""


def measure_large_store(folder: Path, num_turns: int) -> dict[str, Any]:
    """Write a store of `num_turns` through the ledger, open it anew, look things up, write on."""
    with tempfile.TemporaryDirectory(dir=folder) as data:
        seconds, longest_log = uvloop.run(_fill(Path(data), num_turns))
        sizes = {file.name: file.stat().st_size for file in Path(data).iterdir() if file.is_file()}
        return {
            "turns": num_turns,
            "filled_per_second": round(num_turns / seconds),
            "longest_log_megabytes": round(longest_log / 1e6, 1),
            "bytes_per_turn": round(sizes["ledger.sqlite"] / num_turns),
            "open_seconds": _seconds_to_open(Path(data)),
            "milliseconds": uvloop.run(_look_up(Path(data), num_turns // _TURNS_PER_SESSION)),
        }


async def _fill(data: Path, num_turns: int) -> tuple[float, int]:
    """Seconds taken, and the longest that the write-ahead log was."""
    ledger = SqliteLedger.open(data)
    numbers = iter(range(num_turns // _TURNS_PER_SESSION))
    longest_log = 0

    async def agent() -> None:
        nonlocal longest_log
        for number in numbers:
            name = _name(number)
            await ledger.create_session(a_session(name))
            for turn in conversation(name, _TURNS_PER_SESSION):
                await ledger.append_turn(turn, None)
                noted = ledger.mark_delivered(name, turn.turn_id, time.time())
            await noted
            if number % _LEFT_OPEN:
                await ledger.finish(name, reward=1.0, outcome="completed", metadata={}, finished_at=time.time())
            longest_log = max(longest_log, (data / "ledger.sqlite-wal").stat().st_size)

    began = time.perf_counter()
    await asyncio.gather(*(agent() for _ in range(_AGENTS)))
    seconds = time.perf_counter() - began
    await ledger.aclose()
    return seconds, longest_log


def _seconds_to_open(data: Path) -> float:
    """In a process of its own, as a gateway starts; the imports are no part of it."""
    program = (
        "import time\nfrom pathlib import Path\nfrom gateway.ledger.sqlite import SqliteLedger\n"
        f"began = time.perf_counter()\nSqliteLedger.open(Path({str(data)!r}))\nprint(time.perf_counter() - began)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return round(float(done.stdout), 3)


async def _look_up(data: Path, num_sessions: int) -> dict[str, Any]:
    """Median and 99th percentile of each look-up, one at a time, of random sessions."""
    ledger = SqliteLedger.open(data)
    generator = random.Random(0)

    def name() -> str:
        return _name(generator.randrange(num_sessions))

    async def append() -> None:
        new = f"new-{generator.random()}"
        await ledger.create_session(a_session(new))
        await ledger.append_turn(next(conversation(new, 1)), None)

    async def lease() -> None:
        lent = await ledger.lease(
            consumer="trainer", limit=8, lease_seconds=60.0, whole_groups=False, labels=None, now=time.time()
        )
        assert lent is not None
        await ledger.acknowledge(lent.lease_id)

    look_ups: dict[str, Callable[[], Awaitable[object]]] = {
        "session": lambda: ledger.session(name()),
        "turns_of_session": lambda: ledger.turns(name()),
        "finish": lambda: ledger.finish_record(name()),
        "deliveries": lambda: ledger.unknown_deliveries(name()),
        "page_of_sessions": lambda: ledger.sessions(limit=100, after=name()),
        "sessions_by_label": lambda: ledger.sessions(labels={"split": "train"}, limit=100, after=name()),
        "expired_sessions": lambda: ledger.sessions_past_ttl(time.time(), limit=100),
        "append_to_new_session": append,
        "lease_and_acknowledge": lease,
    }
    seldom: dict[str, Callable[[], Awaitable[object]]] = {
        "counts": lambda: ledger.counts("trainer", time.time()),
        "stored_bytes": ledger.stored_bytes,
        "usage": ledger.usage,
    }
    figures = {what: await _timed(look_up, _NUM_LOOKUPS) for what, look_up in look_ups.items()}
    figures |= {what: await _timed(look_up, 3) for what, look_up in seldom.items()}
    await ledger.aclose()
    return figures


async def _timed(look_up: Callable[[], Awaitable[object]], times: int) -> dict[str, float]:
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        await look_up()
        seconds.append(time.perf_counter() - began)
    seconds.sort()
    return {"p50": round(seconds[times // 2] * 1e3, 2), "p99": round(seconds[times * 99 // 100] * 1e3, 2)}


def _name(number: int) -> str:
    return f"session-{number * 2654435761 % 2**32:08x}-{number}"  # in no order, as ids are
