"""Figures of rounds: one measurement's, medians and ranges over rounds, ratios within a round, targets."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.load.programs import Played


@dataclass(frozen=True, slots=True)
class Measured:
    """One contender at one number of sessions in one round.

    turns_per_second: those that ended within the measured seconds. Latencies in milliseconds, of all good turns.
    cpu_us: CPU microseconds of the contender's processes a turn; engine_us, generator_us: of the two tools likewise.
    """

    contender: str
    sessions: int
    round: int
    turns: int
    errors: int
    turns_per_second: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    cpu_us: float
    engine_us: float
    generator_us: float
    rss_mb: float


FIGURES = (
    *("turns_per_second", "p50_ms", "p90_ms", "p99_ms"),
    *("cpu_us", "engine_us", "generator_us", "rss_mb"),
)
"""Of `Measured`, those of which medians are told."""


def measured(
    contender: str,
    sessions: int,
    number: int,
    played: Played,
    *,
    seconds: float,
    cpu_seconds: float,
    engine_seconds: float,
    rss_bytes: int,
) -> Measured:
    """The figures of one run. seconds: for how long turns were begun."""
    records = played.records
    good = records[records["status"] == 200]
    turns = len(records)
    ended = int((good["start"] + good["latency"] <= seconds).sum())
    p50, p90, p99 = percentiles(good["latency"] * 1e3)
    each = 1e6 / max(1, turns)
    return Measured(
        contender=contender,
        sessions=sessions,
        round=number,
        turns=turns,
        errors=int(played.account["errors"]),
        turns_per_second=ended / seconds,
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        cpu_us=cpu_seconds * each,
        engine_us=engine_seconds * each,
        generator_us=float(played.account["cpu_seconds"]) * each,
        rss_mb=rss_bytes / 2**20,
    )


def percentiles(values: Any) -> tuple[float, float, float]:
    """The 50th, 90th and 99th; NaN of nothing."""
    if len(values) == 0:
        return (float("nan"),) * 3
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return float(p50), float(p90), float(p99)


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.4g} [{self.low:.4g}, {self.high:.4g}]"


def spread(values: Iterable[float]) -> Spread:
    """Median, least and greatest; raises ValueError of nothing."""
    listed = sorted(values)
    if not listed:
        raise ValueError("a spread of no values")
    return Spread(statistics.median(listed), listed[0], listed[-1])


def over_rounds(runs: Sequence[Measured], contender: str, sessions: int) -> dict[str, Spread]:
    """Each figure of a contender at a number of sessions; {} where it was not measured."""
    mine = [run for run in runs if (run.contender, run.sessions) == (contender, sessions)]
    return {name: spread(getattr(run, name) for run in mine) for name in FIGURES} if mine else {}


def compared(
    runs: Sequence[Measured],
    figure: str,
    ours: str,
    other: str,
    sessions: int,
    *,
    other_sessions: int | None = None,
) -> list[tuple[float, float]]:
    """(ours, the other's) of each round that has both: what was measured beside each other is compared.

    other_sessions: the other's, None for the same.
    """
    its_sessions = sessions if other_sessions is None else other_sessions
    by_round = {(run.contender, run.sessions, run.round): float(getattr(run, figure)) for run in runs}
    rounds = sorted({run.round for run in runs})
    return [
        (by_round[ours, sessions, number], by_round[other, its_sessions, number])
        for number in rounds
        if (ours, sessions, number) in by_round and (other, its_sessions, number) in by_round
    ]


def ratios(
    runs: Sequence[Measured],
    figure: str,
    ours: str,
    other: str,
    sessions: int,
    *,
    other_sessions: int | None = None,
) -> Spread | None:
    """Ours over the other's, round by round; None where they never met. A round in which the other ended nothing in the
    measured time has no ratio."""
    both = compared(runs, figure, ours, other, sessions, other_sessions=other_sessions)
    pairs = [(mine, its) for mine, its in both if its]
    return spread(mine / its for mine, its in pairs) if pairs else None


def differences(runs: Sequence[Measured], figure: str, ours: str, other: str, sessions: int) -> Spread | None:
    """Ours less the other's, likewise."""
    pairs = compared(runs, figure, ours, other, sessions)
    return spread(mine - its for mine, its in pairs) if pairs else None


@dataclass(frozen=True, slots=True)
class Target:
    """A figure and what it must be; the median counts. at_least: else at most."""

    name: str
    wanted: float
    reached: Spread
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether it is."""
        return self.reached.median >= self.wanted if self.at_least else self.reached.median <= self.wanted

    def line(self) -> str:
        """For the terminal."""
        bound = ">=" if self.at_least else "<="
        return f"{'met   ' if self.met else 'MISSED'} {self.name}: {self.reached}, wanted {bound} {self.wanted:g}\n"

    def figures(self) -> dict[str, Any]:
        """For the results file."""
        bound = "at_least" if self.at_least else "at_most"
        return {"name": self.name, bound: self.wanted, "reached": plain(asdict(self.reached)), "met": self.met}


def plain(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers with four digits that count, for reading."""
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in figures.items()}
