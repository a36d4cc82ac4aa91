"""Appenders on an event loop, alone or in several processes of one store, and the plain SQLite that they replace."""

from __future__ import annotations

import asyncio
import gc
import json
import resource
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from benchmarks.ledger_load.records import a_session, conversation, long_turn
from gateway.contracts.experts import RoutedExperts
from gateway.contracts.records import TurnRecord
from gateway.ledger import rows
from gateway.ledger.sqlite import SqliteLedger

_TURNS_PER_SESSION = 10
_PROGRAM = Path(__file__).with_name("appender.py")
_LAYERS, _EXPERTS, _TOP_K = 48, 128, 8
_ROWS_A_TURN = 8192


def measure_turns(folder: Path, num_agents: int, num_turns: int, rounds: int) -> dict[str, Any]:
    """Turns of `num_agents` conversations at a time, each durable before the next; deliveries are noted too.

    CPU is of all threads of the process and holds the agents' own loop, some microseconds a turn.
    """
    return _median([_one_store(folder, num_agents, num_turns) for _ in range(rounds)])


def _one_store(folder: Path, num_agents: int, num_turns: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=folder) as data:

        async def work() -> dict[str, float]:
            ledger = SqliteLedger.open(Path(data))
            try:
                return await append_turns(ledger, num_agents, num_turns, prefix="s")
            finally:
                await ledger.aclose()

        return uvloop.run(work())


async def append_turns(ledger: SqliteLedger, num_agents: int, num_turns: int, *, prefix: str) -> dict[str, float]:
    """Make the sessions, then measure their turns."""
    names = [f"{prefix}-{number:06d}" for number in range(num_turns // _TURNS_PER_SESSION)]
    await asyncio.gather(*(ledger.create_session(a_session(name)) for name in names))
    waiting = iter([list(conversation(name, _TURNS_PER_SESSION)) for name in names])
    seconds: list[float] = []
    notes: set[asyncio.Future[None]] = set()

    async def agent() -> None:
        for turns in waiting:
            for turn in turns:
                began = time.perf_counter()
                await ledger.append_turn(turn, None)
                seconds.append(time.perf_counter() - began)
                note = asyncio.ensure_future(ledger.mark_delivered(turn.session_id, turn.turn_id, time.time()))
                notes.add(note)
                note.add_done_callback(notes.discard)

    gc.collect()
    gc.freeze()  # the records themselves are no part of what is measured
    cpu, wall = time.process_time(), time.perf_counter()
    await asyncio.gather(*(agent() for _ in range(num_agents)))
    while notes:
        await asyncio.wait(notes)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    gc.unfreeze()
    return _figures(seconds, cpu, wall)


def measure_shared(folder: Path, num_processes: int, num_turns: int, rounds: int) -> dict[str, Any]:
    """The same from several processes that write to one store, 32 agents each."""
    return _median([_one_shared_store(folder, num_processes, num_turns) for _ in range(rounds)])


def _one_shared_store(folder: Path, num_processes: int, num_turns: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=folder) as data:
        ledger = SqliteLedger.open(Path(data))
        lock = ledger.lock_descriptor
        assert lock is not None
        each = str(num_turns // num_processes)
        appenders = [
            subprocess.Popen(
                [sys.executable, _PROGRAM, data, str(lock), f"p{number}", "32", each],
                pass_fds=[lock],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for number in range(num_processes)
        ]
        for appender in appenders:
            assert appender.stdout is not None
            appender.stdout.readline()  # it is ready
        began = time.perf_counter()
        reports = [json.loads(appender.communicate(b"go\n")[0]) for appender in appenders]
        wall = time.perf_counter() - began
        asyncio.run(ledger.aclose())
    return {
        "per_second": round(num_turns / wall),
        "cpu_microseconds": round(statistics.mean(report["cpu_microseconds"] for report in reports), 1),
        "p50_milliseconds": round(statistics.median(report["p50_milliseconds"] for report in reports), 2),
        "p99_milliseconds": round(max(report["p99_milliseconds"] for report in reports), 2),
    }


def measure_plain_sqlite(folder: Path, num_turns: int, rounds: int) -> dict[str, Any]:
    """One transaction a turn, synchronous=FULL, of the same rows, by the standard library."""
    return _median([_one_plain_store(folder, num_turns) for _ in range(rounds)])


def _one_plain_store(folder: Path, num_turns: int) -> dict[str, float]:
    turns: list[TurnRecord] = []
    for number in range(num_turns // _TURNS_PER_SESSION):
        turns += conversation(f"s-{number:06d}", _TURNS_PER_SESSION)
    with tempfile.TemporaryDirectory(dir=folder) as data:
        connection = sqlite3.connect(Path(data) / "plain.sqlite", isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        columns = ", ".join(rows.TurnRow._fields)
        connection.execute(f"CREATE TABLE turns ({columns}, delivered_at, PRIMARY KEY (session_id, turn_id))")
        insert = f"INSERT INTO turns ({columns}) VALUES ({', '.join('?' * len(rows.TurnRow._fields))})"
        seconds: list[float] = []
        cpu, wall = time.process_time(), time.perf_counter()
        for turn in turns:
            began = time.perf_counter()
            connection.execute(insert, rows.turn_row(turn))
            seconds.append(time.perf_counter() - began)
            connection.execute(
                "UPDATE turns SET delivered_at = ? WHERE session_id = ? AND turn_id = ?",
                (time.time(), turn.session_id, turn.turn_id),
            )
        figures = _figures(seconds, time.process_time() - cpu, time.perf_counter() - wall)
        connection.close()
    return figures


def measure_arrays(folder: Path, num_megabytes: int) -> dict[str, Any]:
    """Turns of 8,192 rows of 48 layers x top 8 of 128 experts, four sessions at a time, durable before the next."""
    ids = routing_rows(_ROWS_A_TURN)
    num_turns = max(num_megabytes * 10**6 // ids.nbytes, 4)

    async def agent(ledger: SqliteLedger, number: int) -> None:
        name, parent = f"s-{number}", None
        await ledger.create_session(a_session(name))
        for index in range(num_turns // 4):
            turn = routed_turn(name, index, parent, num_tokens=_ROWS_A_TURN)
            await ledger.append_turn(
                turn, RoutedExperts(ids[: turn.experts_stop - turn.experts_start], turn.experts_start)
            )
            parent = turn.turn_id

    with tempfile.TemporaryDirectory(dir=folder) as data:

        async def work() -> tuple[float, float]:
            ledger = SqliteLedger.open(Path(data))
            cpu, wall = time.process_time(), time.perf_counter()
            await asyncio.gather(*(agent(ledger, number) for number in range(4)))
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            await ledger.aclose()
            return cpu, wall

        cpu, wall = uvloop.run(work())
        stored = sum(file.stat().st_size for file in (Path(data) / "routing").iterdir())
    return {
        "megabytes": round(stored / 1e6),
        "megabytes_per_second": round(stored / 1e6 / wall),
        "cpu_seconds_per_gigabyte": round(cpu / stored * 1e9, 2),
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def routing_rows(num_rows: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8[rows, layers, top_k]: distinct experts, as random as they come."""
    scores = np.random.default_rng(0).random((256, _LAYERS, _EXPERTS), dtype=np.float32)
    rows_256 = np.argpartition(scores, _TOP_K, axis=-1)[..., :_TOP_K].astype(np.uint8)
    return np.resize(rows_256, (num_rows, _LAYERS, _TOP_K))


def routed_turn(name: str, index: int, parent: str | None, *, num_tokens: int) -> TurnRecord:
    """The next turn of a conversation whose turns all have `num_tokens`, with the rows that it brings (I2)."""
    return long_turn(
        name,
        index,
        parent,
        num_tokens=num_tokens,
        num_layers=_LAYERS,
        num_experts=_EXPERTS,
        top_k=_TOP_K,
        experts_start=max(index * num_tokens - 1, 0),
        experts_stop=(index + 1) * num_tokens - 1,
    )


def rows_of(turn: TurnRecord, ids: np.ndarray[Any, np.dtype[np.uint8]]) -> RoutedExperts:
    """As many of `ids` as the turn has."""
    return RoutedExperts(ids[: turn.experts_stop - turn.experts_start], turn.experts_start)


def _figures(seconds: list[float], cpu: float, wall: float) -> dict[str, float]:
    seconds.sort()
    return {
        "per_second": round(len(seconds) / wall),
        "cpu_microseconds": round(cpu / len(seconds) * 1e6, 1),
        "p50_milliseconds": round(seconds[len(seconds) // 2] * 1e3, 2),
        "p99_milliseconds": round(seconds[len(seconds) * 99 // 100] * 1e3, 2),
    }


def _median(rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Each figure's median, and what it ranged over."""
    medians: dict[str, Any] = {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}
    ranges = {name: [min(f[name] for f in rounds), max(f[name] for f in rounds)] for name in rounds[0]}
    return medians | {"ranges": ranges}
