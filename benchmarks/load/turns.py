"""Turns of many sessions at once: every contender beside the others, round by round in random order."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.load.contenders import Running
from benchmarks.load.figures import Measured, Spread, Target, differences, over_rounds, ratios, spread
from benchmarks.load.stage import Stage

TARGET_SESSIONS = (32, 256)
"""Where throughput and p99 are compared with a peer's."""


class Contest(NamedTuple):
    """Who is measured where, and with how many sessions at once."""

    stage: Stage
    contender: Running
    sessions: Sequence[int]


def run_rounds(
    contests: Sequence[Contest],
    *,
    rounds: int,
    seconds: float,
    seed: int,
    rate: float | None = None,
    tell: Callable[[str], None],
) -> list[Measured]:
    """`rounds` times every contender on its stage at each of its numbers of sessions, `seconds` each.

    rate: conversations that begin each second, in as many sessions at most; None: each session goes on as it can.
    """
    order = random.Random(seed)
    for contest in contests:
        contest.stage.warm(contest.contender)
    runs = []
    for number in range(1, rounds + 1):
        measurements = [(each.stage, each.contender, at_once) for each in contests for at_once in each.sessions]
        order.shuffle(measurements)
        for stage, contender, at_once in measurements:
            run = stage.measure(contender, at_once, seconds=seconds, number=number, rate=rate)
            runs.append(run)
            tell(line(run))
    return runs


def line(run: Measured) -> str:
    """One measurement, for the terminal."""
    errors = f", {run.errors} ERRORS" if run.errors else ""
    return (
        f"round {run.round}  {run.contender:<12} {run.sessions:>4} sessions  {run.turns_per_second:8.0f} turns/s  "
        f"p50 {run.p50_ms:8.2f} ms  p99 {run.p99_ms:8.2f} ms  CPU {run.cpu_us:6.0f} us "
        f"(engine {run.engine_us:.0f}, agents {run.generator_us:.0f}){errors}\n"
    )


def targets(runs: Sequence[Measured], ours: str) -> list[Target]:
    """What of the gateway's targets these runs can tell: peers that were not there have none."""
    found: list[Target] = []
    measured_at = sorted({run.sessions for run in runs if run.contender == ours})

    def add(name: str, wanted: float, reached: Spread | None, *, at_least: bool = False) -> None:
        if reached is not None:
            found.append(Target(name, wanted, reached, at_least))

    for at_once in (each for each in TARGET_SESSIONS if each in measured_at):
        beside = ratios(runs, "turns_per_second", ours, "smg", at_once)
        add(f"turns/s over smg's, {at_once} sessions", 1.2, beside, at_least=True)
        add(f"p99 over smg's, {at_once} sessions", 1.5, ratios(runs, "p99_ms", ours, "smg", at_once))
        slow = ratios(runs, "turns_per_second", ours, "litellm", at_once)
        add(f"turns/s over litellm's, {at_once} sessions", 50, slow, at_least=True)
    if 32 in measured_at:
        add("CPU us a turn, 32 sessions", 250, over_rounds(runs, ours, 32)["cpu_us"])
    if 1 in measured_at:
        add("added p50 in ms, 1 session", 1.0, differences(runs, "p50_ms", ours, "engine", 1))
    add("errors", 0, spread(run.errors for run in runs if run.contender == ours))
    return found
