"""Rollouts through one gateway, event by event: workers that do one thing at a time, one group-committing ledger.

    tools ─▶ a worker reads ─▶ engine ─▶ the same worker takes the reply ─▶ commit with what else waits ─▶ tools

What a turn waits for at workers and at the ledger, beyond its own work, is what the gateway adds when it is busy.
"""

from __future__ import annotations

import heapq
import itertools
import random
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.growing.paper import Workload

_BEFORE = 0.5
"""Part of a turn's work that comes before its engine."""

_WARM = 1.5
"""Turns of a rollout that are not counted: all begin at once."""


@dataclass(frozen=True, slots=True)
class Queues:
    """workers: each takes work in order of arrival. cpu_seconds: of a turn in all. fsync_seconds: of one commit."""

    workers: int
    cpu_seconds: float
    fsync_seconds: float


@dataclass(frozen=True, slots=True)
class Played:
    """turns: that were counted. busy: share of the workers' time at work. Added: what turns took beyond their engine
    and their tools. largest_commit: turns that one fsync made durable."""

    turns: int
    turns_per_second: float
    busy: float
    added_p50_seconds: float
    added_p99_seconds: float
    largest_commit: int

    def figures(self) -> dict[str, Any]:
        """For the results file."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


def simulate(rollouts: int, work: Workload, queues: Queues, *, seconds: float, seed: int) -> Played:
    """Play `rollouts` for so long; engines take turn_seconds ± 20 %, tools an exponential time."""
    chance = random.Random(seed)
    order = itertools.count()
    free_at = [0.0] * queues.workers
    begin = _WARM * (work.turn_seconds + work.tool_seconds)
    end = begin + seconds
    events: list[tuple[float, int, str, int, float]] = []
    waiting: list[tuple[int, float]] = []
    committing: list[tuple[int, float]] = []
    added: list[float] = []
    busy, largest = 0.0, 0

    def at(when: float, kind: str, rollout: int, engine_seconds: float) -> None:
        heapq.heappush(events, (when, next(order), kind, rollout, engine_seconds))

    def worked(now: float, rollout: int, part: float) -> float:
        nonlocal busy
        number = rollout % queues.workers
        seconds_of_work = queues.cpu_seconds * part
        done = max(now, free_at[number]) + seconds_of_work
        free_at[number] = done
        if begin <= now < end:
            busy += seconds_of_work
        return done

    for rollout in range(rollouts):
        at(chance.uniform(0, work.turn_seconds + work.tool_seconds), "asks", rollout, 0.0)
    started = [0.0] * rollouts
    while events:
        now, _, kind, rollout, engine_seconds = heapq.heappop(events)
        if now >= end:
            break
        if kind == "asks":
            started[rollout] = now
            engine_seconds = work.turn_seconds * chance.uniform(0.8, 1.2)
            at(worked(now, rollout, _BEFORE) + engine_seconds, "answered", rollout, engine_seconds)
        elif kind == "answered":
            at(worked(now, rollout, 1 - _BEFORE), "records", rollout, engine_seconds)
        elif kind == "records":
            waiting.append((rollout, engine_seconds))
            if not committing:
                committing, waiting = waiting, []
                at(now + queues.fsync_seconds, "committed", -1, 0.0)
        else:
            largest = max(largest, len(committing))
            for done, its_engine_seconds in committing:
                if now >= begin:
                    added.append(now - started[done] - its_engine_seconds)
                at(now + chance.expovariate(1 / work.tool_seconds), "asks", done, 0.0)
            committing, waiting = waiting, []
            if committing:
                at(now + queues.fsync_seconds, "committed", -1, 0.0)
    p50, p99 = np.percentile(added, [50, 99]) if added else (float("inf"), float("inf"))
    return Played(
        turns=len(added),
        turns_per_second=len(added) / seconds,
        busy=busy / (seconds * queues.workers),
        added_p50_seconds=float(p50),
        added_p99_seconds=float(p99),
        largest_commit=largest,
    )
