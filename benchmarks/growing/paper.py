"""Growth on paper: how much of each thing so many rollouts keep busy, in gateways of one size; the largest share is the
bottleneck. Nothing is assumed to share: what one machine does for two rollouts, it does twice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

STEPS = (12_000, 100_000, 1_000_000)
"""Rollouts at once."""

_SECONDS_A_HOUR = 3600.0

_OTHER_BYTES_A_TOKEN = 4 + 4 + 4
"""By the format: an id, a log-prob, and about four bytes of text."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What a rollout does. turn_seconds: the engine's time for a turn; tool_seconds: until the next; turn_tokens: added
    by a turn to its conversation, sampled and not; turns: of a rollout."""

    turn_seconds: float = 25.0
    tool_seconds: float = 2.0
    turn_tokens: int = 600
    turns: int = 50

    def turns_per_second(self, rollouts: int) -> float:
        """By Little's law: each rollout is either in a turn or at its tools."""
        return rollouts / (self.turn_seconds + self.tool_seconds)

    def figures(self) -> dict[str, Any]:
        """For the results file."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Costs:
    """Measured on one machine. turn_cpu_seconds: of all the gateway's threads, without routing;
    routing_cpu_seconds_a_token: decoding and recording its row; routing_bytes_a_token: its row as it is stored when
    packed; turn_bytes: what a small turn takes in the ledger's tables (its own tokens among them, counted twice here);
    engine_bytes_a_token: of its row on the way from the engine; flight_bytes: memory of a turn in flight;
    durable_turns_per_second, arrays_bytes_per_second: of one ledger; turns_in_flight: most that one worker's
    descriptors allow."""

    turn_cpu_seconds: float
    routing_cpu_seconds_a_token: float
    routing_bytes_a_token: float
    turn_bytes: float
    engine_bytes_a_token: float
    flight_bytes: float
    durable_turns_per_second: float
    arrays_bytes_per_second: float
    turns_in_flight: int

    def million_turns(self, work: Workload) -> dict[str, float]:
        """What a million turns take: hours of one core, and GB on disk."""
        tokens = 1e6 * work.turn_tokens
        return {
            "core_hours": 1e6 * self.turn_seconds_of(work) / _SECONDS_A_HOUR,
            "disk_gb": (tokens * (self.routing_bytes_a_token + _OTHER_BYTES_A_TOKEN) + 1e6 * self.turn_bytes) / 1e9,
        }

    def trillion_tokens(self, work: Workload) -> dict[str, float]:
        """Disk in TB."""
        others = _OTHER_BYTES_A_TOKEN + self.turn_bytes / work.turn_tokens
        return {"disk_tb": self.routing_bytes_a_token + others, "disk_tb_without_routing": others}

    def turn_seconds_of(self, work: Workload) -> float:
        """CPU of a turn with its rows."""
        return self.turn_cpu_seconds + work.turn_tokens * self.routing_cpu_seconds_a_token

    def figures(self) -> dict[str, Any]:
        """For the results file."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Node:
    """A machine that runs one gateway with a worker a core, and how far each part of it may be loaded."""

    cores: int = 16
    memory_bytes: float = 64e9
    disk_bytes_per_second: float = 2e9
    network_bytes_per_second: float = 25e9 / 8
    load: float = 0.6

    def figures(self) -> dict[str, Any]:
        """For the results file."""
        return asdict(self)


NODE = Node()


@dataclass(frozen=True, slots=True)
class Need:
    """What so many rollouts need. shares: of each thing, in gateways that it alone would keep loaded as far as they may
    be. ledgers: stores that take the durable turns and the arrays. worker_load: of one worker's CPU."""

    rollouts: int
    turns_per_second: float
    shares: Mapping[str, float]
    nodes: int
    ledgers: int
    worker_load: float

    @property
    def bottleneck(self) -> str:
        """What runs out first."""
        return max(self.shares, key=self.shares.__getitem__)

    def figures(self) -> dict[str, Any]:
        """For the results file."""
        return {
            "turns_per_second": round(self.turns_per_second, 1),
            "gateways": self.nodes,
            "ledgers": self.ledgers,
            "bottleneck": self.bottleneck,
            "shares": {name: round(share, 3) for name, share in self.shares.items()},
            "worker_load": round(self.worker_load, 3),
        }


def needs(rollouts: int, work: Workload, costs: Costs, node: Node) -> Need:
    """The arithmetic."""
    rate = work.turns_per_second(rollouts)
    token_rate = rate * work.turn_tokens
    in_flight = rate * work.turn_seconds
    recorded = token_rate * _OTHER_BYTES_A_TOKEN + rate * costs.turn_bytes
    stored = token_rate * costs.routing_bytes_a_token + recorded
    # Rows come as base64 of 32-bit numbers and leave by the feed as they are stored.
    moved = token_rate * costs.engine_bytes_a_token + 2 * stored
    cpu = rate * costs.turn_seconds_of(work)
    shares = {
        "processors": cpu / (node.cores * node.load),
        "memory": in_flight * costs.flight_bytes / (node.memory_bytes * node.load),
        "descriptors": in_flight / (node.cores * costs.turns_in_flight),
        "network": moved / (node.network_bytes_per_second * node.load),
        "disk": stored / (node.disk_bytes_per_second * node.load),
        "commits": rate / (costs.durable_turns_per_second * node.load),
    }
    nodes = max(1, math.ceil(max(shares.values())))
    ledgers = (
        rate / costs.durable_turns_per_second + token_rate * costs.routing_bytes_a_token / costs.arrays_bytes_per_second
    )
    return Need(
        rollouts=rollouts,
        turns_per_second=rate,
        shares=shares,
        nodes=nodes,
        ledgers=max(1, math.ceil(ledgers / node.load)),
        worker_load=cpu / (nodes * node.cores),
    )
