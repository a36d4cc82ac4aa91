"""What routing rows take on disk: at once, and after the background has packed them; how fast both ways go."""

from __future__ import annotations

import hashlib
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.routing.process import session_record, turn_record
from benchmarks.routing.workload import WORKLOADS, bound_bytes, routing_blocks
from gateway.contracts.experts import RoutedExperts
from gateway.ledger.sqlite import SqliteLedger
from gateway.ledger_check import verify_ledger

_TURN_ROWS = 655
"""Of a conversation of fifty turns and 32k tokens."""


async def measure_store(num_rows: int, seed: int) -> dict[str, Any]:
    """Bytes a token of both workloads, of one big reply and of many turns that each brought their own rows."""
    return {
        workload: {
            "one_reply": await _stored(workload, num_rows, num_rows, seed),
            "fifty_turns": await _stored(workload, num_rows, _TURN_ROWS, seed),
        }
        for workload in WORKLOADS
    } | {"bound_bytes_a_token": round(bound_bytes(), 1)}


async def _stored(workload: str, num_rows: int, turn_rows: int, seed: int) -> dict[str, Any]:
    ids = np.concatenate([block.astype(np.uint8) for block in routing_blocks(workload, num_rows, seed=seed)])
    parts = [RoutedExperts(ids[start : start + turn_rows], start) for start in range(0, num_rows, turn_rows)]
    with tempfile.TemporaryDirectory(prefix="verbatim-experts-") as folder:
        ledger = SqliteLedger.open(Path(folder) / "data")
        await ledger.create_session(session_record("s"))
        for index, part in enumerate(parts):
            await ledger.append_turn(turn_record("s", index, part), part)
        at_once = (await ledger.usage()).routing_bytes
        await ledger.aclose()
        ledger = SqliteLedger.open(Path(folder) / "data")  # whose writer has nothing open, so that nothing is left over
        cpu = time.process_time()
        done = await ledger.compress(bytes_per_second=0, full_bytes=1)
        pack_seconds = time.process_time() - cpu
        packed = (await ledger.usage()).routing_bytes
        cpu, digest, expected = time.process_time(), hashlib.sha256(), hashlib.sha256(ids)
        read = [await ledger.experts("s", f"t{index}") for index in range(len(parts))]
        read_seconds = time.process_time() - cpu
        for rows in read:
            assert rows is not None
            digest.update(rows.ids)
        await ledger.aclose()
        damages = verify_ledger(Path(folder) / "data").damages
    return {
        "records": done.num_records,
        "bytes_a_token": round(at_once / num_rows, 1),
        "packed_bytes_a_token": round(packed / num_rows, 1),
        "pack_mb_a_cpu_second": round(done.num_bytes / 1e6 / pack_seconds),
        "read_packed_mb_a_cpu_second": round(ids.nbytes / 1e6 / read_seconds),
        "read_back_equal": digest.digest() == expected.digest() and not damages,
    }
