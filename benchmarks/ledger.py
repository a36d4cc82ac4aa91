"""`verbatim bench ledger`: durable turns a second, arrays and the feed in bytes a second, a store of a million turns.

Every figure is of the ledger as the gateway uses it, beside what somebody would write otherwise: one SQLite transaction
a turn, and a static reply of uvicorn. Nothing is left on the disk; `--folder` says which one is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sqlite3
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.ledger_load.feed import measure_feed
from benchmarks.ledger_load.million import measure_large_store
from benchmarks.ledger_load.turns import measure_arrays, measure_plain_sqlite, measure_shared, measure_turns

RESULTS = Path(__file__).parent / "results" / "ledger.json"
_PARTS = ("turns", "shared", "arrays", "feed", "large_store")
_PACKAGES = ("verbatim-rl", "numpy", "orjson", "msgspec", "uvicorn", "uvloop", "aiohttp")


class _Target(NamedTuple):
    """A figure (path into the results), and what it must reach: at least, or at most where `at_most`."""

    figure: str
    bound: float
    at_most: bool = False


_TARGETS = (
    _Target("turns.256.per_second", 10_000),
    _Target("turns.256.cpu_microseconds", 45, at_most=True),
    _Target("arrays.megabytes_per_second", 100),
    _Target("feed.megabytes_per_second", 500),
    _Target("large_store.open_seconds", 2.0, at_most=True),
)


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of `verbatim bench ledger`."""
    parser.add_argument("--turns", type=int, default=40_000, help="small turns a measurement (40000)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts (3)")
    parser.add_argument("--array-megabytes", type=int, default=2_000, help="routing rows written (2000)")
    parser.add_argument("--rollouts", type=int, default=64, help="rollouts of 32k tokens in the feed's store (64)")
    parser.add_argument("--reads", type=int, default=512, help="rollouts read from the feed (512)")
    parser.add_argument("--stored-turns", type=int, default=1_000_000, help="turns of the large store (1000000)")
    parser.add_argument(
        "--only",
        choices=("turns", "shared", "arrays", "feed", "large_store"),
        help="one part; others keep their figures",
    )
    parser.add_argument("--folder", type=Path, help="where the stores are made (the system's temporary folder)")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE", help="where the figures go")


def run(arguments: argparse.Namespace) -> int:
    """Run; 0 if every target that was measured is met."""
    figures: dict[str, Any] = _measured_before(arguments.output) if arguments.only else {}
    with tempfile.TemporaryDirectory(prefix="verbatim-ledger-", dir=arguments.folder) as folder:
        for name, part in _parts(arguments, Path(folder)).items():
            if arguments.only in (None, name):
                figures |= part()
                _say(name, figures)
    checks = list(_checked(figures))
    for check in checks:
        sys.stdout.write(
            f"{'met   ' if check['met'] else 'MISSED'} {check['figure']}: {check['is']} ({check['wanted']})\n"
        )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(figures | {"targets": checks} | _about(), indent=1) + "\n")
    return 0 if all(check["met"] for check in checks) else 1


def _measured_before(file: Path) -> dict[str, Any]:
    """The other parts' figures, where one is measured alone."""
    figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return figures


def _parts(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rounds, num_turns, few = arguments.rounds, arguments.turns, arguments.turns // 10
    return {
        "turns": lambda: {
            "turns": {str(n): measure_turns(folder, n, few if n == 1 else num_turns, rounds) for n in (1, 32, 256)},
            "plain_sqlite": measure_plain_sqlite(folder, few, rounds),
        },
        "shared": lambda: {"shared": {str(n): measure_shared(folder, n, num_turns, rounds) for n in (2, 4)}},
        "arrays": lambda: {"arrays": measure_arrays(folder, arguments.array_megabytes)},
        "feed": lambda: {"feed": asyncio.run(measure_feed(folder, arguments.rollouts, arguments.reads, rounds))},
        "large_store": lambda: {"large_store": measure_large_store(folder, arguments.stored_turns)},
    }


def _checked(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    checks = []
    for target in _TARGETS:
        value: Any = figures
        for key in target.figure.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            met = value <= target.bound if target.at_most else value >= target.bound
            wanted = f"{'<=' if target.at_most else '>='} {target.bound:g}"
            checks.append({"figure": target.figure, "is": value, "wanted": wanted, "met": met})
    return checks


def _say(name: str, figures: Mapping[str, Any]) -> None:
    parts = (name, "plain_sqlite") if name == "turns" else (name,)
    for part in parts:
        sys.stdout.write(f"{part}: {json.dumps(figures[part])}\n")
    sys.stdout.flush()


def _about() -> dict[str, Any]:
    return {
        "versions": {name: version(name) for name in _PACKAGES}
        | {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version},
        "machine": {
            "cores": os.cpu_count(),
            "load_average": os.getloadavg()[0],
            "processor": platform.machine(),
            "system": platform.system(),
        },
    }
