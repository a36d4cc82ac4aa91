"""Rollouts of 32k tokens with their routing, read from a real gateway process as a trainer reads them."""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks.ledger_load.records import a_session
from benchmarks.ledger_load.turns import routed_turn, routing_rows, rows_of
from benchmarks.models.families import FAMILIES, write_model
from engines.launch import free_port
from gateway.client import GatewayClient
from gateway.contracts.rollouts import LeasedRollout
from gateway.ledger.sqlite import SqliteLedger

_FOLDER = Path(__file__).resolve().parent
_GATEWAY = _FOLDER.parent / "gateway_process.py"
_STATIC = _FOLDER / "static_reply.py"
_READY_SECONDS = 60.0
_READERS = 4
_TURNS, _TOKENS_A_TURN = 4, 8192


async def measure_feed(folder: Path, num_rollouts: int, num_reads: int, rounds: int) -> dict[str, Any]:
    """Read `num_reads` rollouts, four at a time, of `num_rollouts`; and as many bytes of a static reply."""
    data, model = folder / "feed", folder / "feed-model"
    await _fill(data, num_rollouts)
    family = sorted(FAMILIES)[0]
    write_model(model, family=FAMILIES[family], vocabulary="byte_level")
    port, static_port = free_port(), free_port()
    arguments = [family, "keep", str(data), str(model), str(port), str(folder / "witness")]
    gateway = subprocess.Popen(  # noqa: ASYNC220  # nothing else runs meanwhile
        [sys.executable, _GATEWAY, *arguments], stdout=subprocess.DEVNULL
    )
    static: subprocess.Popen[bytes] | None = None
    try:
        async with GatewayClient(f"http://127.0.0.1:{port}", retry_seconds=_READY_SECONDS) as client:
            lease = await client.lease(consumer="trainer", limit=num_rollouts, whole_groups=False, lease_seconds=3600.0)
            assert lease is not None
            first = lease.rollouts[0]
            num_bytes = len(await client.rollout_bytes(first.session_id, first.snapshot))
            static = subprocess.Popen(  # noqa: ASYNC220
                [sys.executable, _STATIC, str(static_port), str(num_bytes)]
            )
            await _answers(static_port)
            feed, yardstick = [], []
            for _ in range(rounds):
                wanted = [lease.rollouts[i % num_rollouts] for i in range(num_reads)]
                feed.append(await _read(client, wanted, gateway.pid))
                yardstick.append(await _read_static(static_port, num_reads, num_bytes, static.pid))
        return {
            "rollout_megabytes": round(num_bytes / 1e6, 1),
            "reads": num_reads,
            **_medians(feed),
            "static_reply": _medians(yardstick),
        }
    finally:
        for process in filter(None, (gateway, static)):
            process.terminate()
            process.wait()


async def _fill(data: Path, num_rollouts: int) -> None:
    ledger = SqliteLedger.open(data)
    ids = routing_rows(_TOKENS_A_TURN)
    for number in range(num_rollouts):
        name, parent = f"rollout-{number}", None
        await ledger.create_session(a_session(name))
        for index in range(_TURNS):
            turn = routed_turn(name, index, parent, num_tokens=_TOKENS_A_TURN)
            await ledger.append_turn(turn, rows_of(turn, ids))
            await ledger.mark_delivered(name, turn.turn_id, time.time())
            parent = turn.turn_id
        await ledger.finish(name, reward=1.0, outcome="completed", metadata={}, finished_at=time.time())
    await ledger.aclose()


async def _read(client: GatewayClient, wanted: Iterable[LeasedRollout], server: int) -> dict[str, float]:
    """The whole body of each, into one buffer."""
    waiting = iter(wanted)

    async def reader() -> int:
        num_read = 0
        for rollout in waiting:
            num_read += len(await client.rollout_bytes(rollout.session_id, rollout.snapshot))
        return num_read

    return await _timed([reader() for _ in range(_READERS)], server)


async def _read_static(port: int, num_reads: int, num_bytes: int, server: int) -> dict[str, float]:
    waiting = iter(range(num_reads))

    async def reader(session: aiohttp.ClientSession) -> int:
        num_read = 0
        for _ in waiting:
            async with session.get(f"http://127.0.0.1:{port}/") as response:
                body = bytearray(num_bytes)
                filled = 0
                async for block in response.content.iter_any():
                    body[filled : filled + len(block)] = block
                    filled += len(block)
                num_read += filled
        return num_read

    async with aiohttp.ClientSession() as session:
        return await _timed([reader(session) for _ in range(_READERS)], server)


async def _timed(readers: list[Any], server: int) -> dict[str, float]:
    process = psutil.Process(server)
    before, own, began = sum(process.cpu_times()[:2]), time.process_time(), time.perf_counter()
    num_bytes = sum(await asyncio.gather(*readers))
    seconds = time.perf_counter() - began
    return {
        "megabytes_per_second": round(num_bytes / 1e6 / seconds),
        "server_cpu_seconds_per_gigabyte": round((sum(process.cpu_times()[:2]) - before) / num_bytes * 1e9, 2),
        "reader_cpu_seconds_per_gigabyte": round((time.process_time() - own) / num_bytes * 1e9, 2),
        "server_peak_megabytes": _peak_megabytes(server),
    }


def _peak_megabytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 // 10**6


async def _answers(port: int) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline:
        with suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        await asyncio.sleep(0.05)
    raise TimeoutError(f"nobody answers on port {port} (process of {os.getpid()})")


def _medians(rounds: list[dict[str, float]]) -> dict[str, Any]:
    medians: dict[str, Any] = {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}
    return medians | {
        "range": [min(f["megabytes_per_second"] for f in rounds), max(f["megabytes_per_second"] for f in rounds)]
    }
