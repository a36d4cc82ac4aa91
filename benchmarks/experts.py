"""What replies with routing rows cost: CPU, memory, the event loop's gaps, bytes on disk; against JSON and base64.

routing/engine.py ──67 MB──▶ routing/process.py: SGLang's client ─▶ embedded ledger      a fresh process a measurement
                                                └ the same answer by json and base64
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import results_file
from benchmarks.routing.process import SCENARIOS
from benchmarks.routing.store import measure_store
from benchmarks.routing.workload import WORKLOADS
from engines.launch import free_port

RESULTS = Path(__file__).parent / "results" / "experts.json"

_PACKAGES = ("numpy", "pybase64", "orjson", "aiohttp", "uvloop", "zstandard")
_CHECKOUT = Path(__file__).resolve().parent.parent
_START_SECONDS = 120
_RUN_SECONDS = 600
_BASE64_BYTES = 2048
"""Of a token's rows: 48 layers, 8 experts, int32."""


class Target(NamedTuple):
    """A figure that is wanted, and how it is found in the results."""

    name: str
    most: float
    found: Callable[[Mapping[str, Any]], float]


TARGETS = (
    Target("CPU of a reply, decoded, ms", 90, lambda r: _worst(r, "decode", "cpu_ms", "median")),
    Target("CPU of a reply, decoded and recorded, ms", 90, lambda r: _worst(r, "recorded", "cpu_ms", "median")),
    Target("peak above what is stored, MB", 35, lambda r: _worst(r, "recorded", "peak_mb_above_rows")),
    Target("gap of the event loop beside small turns, p99, ms", 20, lambda r: _worst(r, "beside", "own_gap_ms", "p99")),
    Target(
        "sixteen replies at once, memory of the process, MB", 700, lambda r: _worst(r, "at_once", "peak_mb_of_process")
    ),
    Target("bytes a token at once", 384.99, lambda r: _stored(r, "bytes_a_token")),
    Target("bytes a token after packing", 340, lambda r: _stored(r, "packed_bytes_a_token")),
    Target(
        "rows of fifty turns, in CPU of one reply with all of them (were each to capture all: 25)",
        2.5,
        lambda r: _fifty(r),
    ),
)


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of `verbatim bench experts`."""
    parser.add_argument("--rows", type=int, default=32_768, help="tokens of a reply (32768: 67 MB)")
    parser.add_argument("--workload", choices=WORKLOADS, action="append", help="how experts are chosen (all)")
    parser.add_argument("--scenario", choices=sorted(SCENARIOS), action="append", help="only these measurements (all)")
    parser.add_argument("--seed", type=int, default=1, help="of the routing (1)")
    parser.add_argument("--skip-store", action="store_true", help="do not measure what rows take on disk")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE", help="where the figures go")


def run(arguments: argparse.Namespace) -> int:
    """Measure and report; 0 if every target is met and every row came back as it was sent."""
    results: dict[str, Any] = {
        "rows": arguments.rows,
        "seed": arguments.seed,
        "base64_mb": arguments.rows * _BASE64_BYTES / 1e6,
        "load_average_before": [round(load, 1) for load in os.getloadavg()],
        "replies": {},
    }
    for workload in arguments.workload or WORKLOADS:
        with running_engine(workload, arguments.rows, arguments.seed) as url:
            for scenario in arguments.scenario or SCENARIOS:
                figures = in_fresh_process(scenario, url, arguments.rows)
                results["replies"].setdefault(workload, {})[scenario] = figures
                sys.stdout.write(f"{workload} {scenario}: {json.dumps(figures)}\n")
                sys.stdout.flush()
    if not arguments.skip_store:
        results["store"] = asyncio.run(measure_store(arguments.rows, arguments.seed))
        sys.stdout.write(f"store: {json.dumps(results['store'])}\n")
    results["targets"] = [_judged(target, results) for target in TARGETS]
    for target in results["targets"]:
        verdict = "met   " if target["met"] else "MISSED"
        sys.stdout.write(f"{verdict} {target['name']}: {target['found']} (at most {target['most']})\n")
    command = f"verbatim bench experts --rows {arguments.rows} --seed {arguments.seed}"
    results_file.merge(
        arguments.output, "experts", f"{arguments.rows} rows", results, command=command, packages=_PACKAGES
    )
    return 0 if all(target["met"] for target in results["targets"]) and _is_whole(results) else 1


@contextlib.contextmanager
def running_engine(workload: str, num_rows: int, seed: int) -> Iterator[str]:
    """The engine's URL, while its process lives."""
    port = free_port()
    arguments = [str(port), workload, str(num_rows), str(seed)]
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.routing.engine", *arguments],
        cwd=_CHECKOUT, env=_environment(), stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError(f"the benchmark's engine ended with {process.wait(_START_SECONDS)}")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(_START_SECONDS)


def in_fresh_process(scenario: str, url: str, num_rows: int) -> dict[str, Any]:
    """One measurement's figures."""
    with tempfile.TemporaryDirectory(prefix="verbatim-experts-") as folder:
        command = [sys.executable, "-m", "benchmarks.routing.process", scenario, url, f"{folder}/data", str(num_rows)]
        done = subprocess.run(
            command, cwd=_CHECKOUT, env=_environment(), stdout=subprocess.PIPE, text=True, check=True,
            timeout=_RUN_SECONDS,
        )  # fmt: skip
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(_CHECKOUT), "OMP_NUM_THREADS": "1"}


def _judged(target: Target, results: Mapping[str, Any]) -> dict[str, Any]:
    """A target of which nothing was measured is not met."""
    try:
        found = round(target.found(results), 2)
    except (KeyError, ValueError):
        return {"name": target.name, "most": target.most, "found": None, "met": False}
    return {"name": target.name, "most": target.most, "found": found, "met": found <= target.most}


def _worst(results: Mapping[str, Any], scenario: str, *path: str) -> float:
    values = []
    for figures in results["replies"].values():
        value = figures[scenario]
        for name in path:
            value = value[name]
        values.append(float(value))
    return max(values)


def _stored(results: Mapping[str, Any], name: str) -> float:
    return max(
        float(results["store"][workload][kind][name]) for workload in WORKLOADS for kind in ("one_reply", "fifty_turns")
    )


def _fifty(results: Mapping[str, Any]) -> float:
    """Without what fifty turns cost that bring no rows, and one reply's own."""
    ratios = []
    for figures in results["replies"].values():
        found = {
            name: figures["incremental"][f"{name}_cpu_ms"]["median"] for name in ("fifty", "fifty_without_rows", "one")
        }
        ratios.append((found["fifty"] - found["fifty_without_rows"]) / found["one"])
    return max(ratios)


def _is_whole(results: Mapping[str, Any]) -> bool:
    """Every row that was stored was read back."""
    kinds = [kind for workload in WORKLOADS for kind in results.get("store", {}).get(workload, {}).values()]
    return all(kind["read_back_equal"] for kind in kinds)
