"""The costs that growth is computed from, out of the results files of the other benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.growing.paper import Costs
from gateway.contracts.errors import ConfigurationError

_DESCRIPTORS = 20_000
_A_TURN = 2
"""Descriptors: its client's connection and its engine's."""

_SPARE = 500


def read_measured(folder: Path) -> Costs:
    """Raises ConfigurationError naming the benchmark that has to run first."""
    gateway, scale = _Results(folder, "gateway"), _Results(folder, "scale")
    ledger, experts = _Results(folder, "ledger"), _Results(folder, "experts")
    reply = next(iter(experts.entries("experts")))
    rows = experts.at("experts", reply, "rows")
    return Costs(
        turn_cpu_seconds=max(
            gateway.at("turns", "default", "figures", "verbatim", "32", "cpu_us", "median"),
            scale.at("flight", "default", "figures", "verbatim", "cpu_us_a_turn"),
        )
        / 1e6,
        routing_cpu_seconds_a_token=experts.at("experts", reply, "replies", "random", "recorded", "cpu_ms", "median")
        / 1e3
        / rows,
        routing_bytes_a_token=experts.at("experts", reply, "store", "random", "one_reply", "packed_bytes_a_token"),
        turn_bytes=ledger.at("large_store", "bytes_per_turn"),
        engine_bytes_a_token=experts.at("experts", reply, "base64_mb") * 1e6 / rows,
        flight_bytes=scale.at("flight", "default", "figures", "verbatim", "kb_a_turn") * 1024,
        durable_turns_per_second=ledger.at("turns", "256", "per_second"),
        arrays_bytes_per_second=ledger.at("arrays", "megabytes_per_second") * 1e6,
        turns_in_flight=(_DESCRIPTORS - _SPARE) // _A_TURN,
    )


class _Results:
    """One results file."""

    def __init__(self, folder: Path, name: str) -> None:
        self._name = name
        self._file = folder / f"{name}.json"
        if not self._file.exists():
            raise ConfigurationError(f"{self._file.name} is missing: run `verbatim bench {name}` first")
        self._content = json.loads(self._file.read_text())

    def entries(self, part: str) -> list[str]:
        """Names of what was measured of one part; raises ConfigurationError where nothing was."""
        if not (names := list(self._content.get(part, {}))):
            raise ConfigurationError(f"{self._file.name} has no {part}: run `verbatim bench {self._name}` again")
        return names

    def at(self, *path: str) -> float:
        """A figure; raises ConfigurationError where the file has none of that name."""
        value: Any = self._content
        for step in path:
            if not isinstance(value, dict) or step not in value:
                raise ConfigurationError(
                    f"{self._file.name} has no {'.'.join(path)}: run `verbatim bench {self._name}` again, all parts"
                )
            value = value[step]
        return float(value)
