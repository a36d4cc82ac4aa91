"""Growth on paper and in simulation: the arithmetic of queues, and that the two agree."""

from __future__ import annotations

import pytest

from benchmarks.growing.paper import Costs, Node, Workload, needs
from benchmarks.growing.simulation import Queues, simulate

COSTS = Costs(
    turn_cpu_seconds=400e-6,
    routing_cpu_seconds_a_token=1.4e-6,
    routing_bytes_a_token=336.0,
    turn_bytes=1_200.0,
    engine_bytes_a_token=2048.0,
    flight_bytes=40 * 1024,
    durable_turns_per_second=10_000,
    arrays_bytes_per_second=200e6,
    turns_in_flight=9_750,
)
WORK = Workload(turn_seconds=25.0, tool_seconds=2.0, turn_tokens=600)


def test_the_turns_of_a_second_are_rollouts_by_the_time_of_one_turn() -> None:
    """Little's law, which the simulation keeps too."""
    assert WORK.turns_per_second(2_700) == pytest.approx(100)
    played = simulate(2_700, WORK, Queues(16, 1e-6, 1e-6), seconds=100, seed=1)
    assert played.turns_per_second == pytest.approx(100, rel=0.05)


def test_what_is_needed_most_is_the_bottleneck_and_decides_how_many_gateways() -> None:
    need = needs(1_000_000, WORK, COSTS, Node())
    assert need.nodes >= max(need.shares.values()) > need.nodes - 1
    assert need.shares[need.bottleneck] == max(need.shares.values())
    slow_disks = needs(1_000_000, WORK, COSTS, Node(disk_bytes_per_second=1e8))
    assert slow_disks.bottleneck == "disk"
    assert slow_disks.nodes > need.nodes


def test_the_simulation_keeps_workers_as_busy_as_the_arithmetic_says() -> None:
    node = Node(cores=2)
    need = needs(3_000, WORK, COSTS, node)
    queues = Queues(node.cores, COSTS.turn_seconds_of(WORK), 0.005)
    played = simulate(3_000 // need.nodes, WORK, queues, seconds=60, seed=2)
    assert played.busy == pytest.approx(need.worker_load, abs=0.02)
    assert played.added_p99_seconds < 0.1


def test_workers_that_are_asked_for_more_than_they_can_do_make_turns_wait() -> None:
    """The simulation can fail: past its load nothing keeps up."""
    queues = Queues(1, 0.05, 0.005)
    assert simulate(200, WORK, queues, seconds=60, seed=3).added_p99_seconds < 1.0
    assert simulate(1_500, WORK, queues, seconds=60, seed=3).added_p99_seconds > 10.0


def test_turns_that_come_while_the_disk_syncs_are_durable_together() -> None:
    """Group commit: a slow disk makes larger commits, not a queue."""
    played = simulate(5_400, WORK, Queues(16, 1e-5, 0.1), seconds=60, seed=4)
    assert played.largest_commit > 10
    assert played.turns_per_second == pytest.approx(200, rel=0.1)
    assert played.added_p99_seconds < 0.25
