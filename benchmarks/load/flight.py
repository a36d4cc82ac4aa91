"""Thousands of long turns in flight at once: do all end well, how late, and in how much memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.load.contenders import Running
from benchmarks.load.figures import percentiles
from benchmarks.load.programs import Generator
from benchmarks.load.stage import Stage
from gateway.contracts.errors import EngineUnavailable

_SAMPLE_SECONDS = 5.0
_SETTLE_SECONDS = 4.0


@dataclass(frozen=True, slots=True)
class Flight:
    """How the turns are spread. from_ms, to_ms: how long the engine takes for one. ramp_seconds: until all began.

    turns: that each session takes, one after another, so that as many stay in flight.
    """

    sessions: int = 12_000
    turns: int = 2
    from_ms: int = 20_000
    to_ms: int = 30_000
    ramp_seconds: float = 20.0

    @property
    def patience_seconds(self) -> float:
        """No run takes longer."""
        return self.ramp_seconds + self.turns * self.to_ms / 1e3 + 240.0


@dataclass(frozen=True, slots=True)
class Sample:
    """A moment of a flight; bytes above the idle contender, descriptors of its fullest process."""

    seconds: float
    in_flight: int
    pss_bytes: int
    num_descriptors: int


@dataclass(frozen=True, slots=True)
class Landed:
    """What came of it. added_ms: latency less the engine's own time, of each good turn."""

    contender: str
    processes: int
    turns: int
    errors: int
    peak_in_flight: int
    idle_pss_bytes: int
    added_ms: npt.NDArray[np.float64]
    cpu_us: float
    samples: Sequence[Sample]

    @property
    def kb_a_turn(self) -> float:
        """Memory above idle over turns in flight, where most were in flight; session state is in it."""
        fullest = max(self.samples, key=lambda sample: sample.in_flight)
        return fullest.pss_bytes / 1024 / max(1, fullest.in_flight)

    def figures(self) -> dict[str, Any]:
        """For the results file."""
        p50, p90, p99 = percentiles(self.added_ms)
        return {
            "processes": self.processes,
            "turns": self.turns,
            "errors": self.errors,
            "peak_in_flight": self.peak_in_flight,
            "added_ms": {"p50": round(p50, 2), "p90": round(p90, 2), "p99": round(p99, 2)},
            "kb_a_turn": round(self.kb_a_turn, 1),
            "idle_mb": round(self.idle_pss_bytes / 2**20, 1),
            "descriptors": max(sample.num_descriptors for sample in self.samples),
            "cpu_us_a_turn": round(self.cpu_us, 1),
            "memory": [
                {"in_flight": sample.in_flight, "mb": round(sample.pss_bytes / 2**20, 2)} for sample in self.samples
            ],
        }

    def line(self) -> str:
        """For the terminal."""
        told = self.figures()
        return (
            f"{self.contender:<12} {told['turns']} turns, {told['errors']} failed, {told['peak_in_flight']} at once; "
            f"added p50 {told['added_ms']['p50']} ms, p99 {told['added_ms']['p99']} ms; {told['kb_a_turn']} KB a turn "
            f"above {told['idle_mb']} MB, {told['descriptors']} descriptors in a process, "
            f"{self.cpu_us:.0f} us CPU a turn\n"
        )


def fly(stage: Stage, name: str, ports: Sequence[Running], flight: Flight) -> Landed:
    """Send all sessions through a contender, told to its ports in equal parts."""
    for _ in range(2):  # what is made once, when it is first used or a moment later, is no turn's
        for port in ports:
            stage.play(port, "--sessions", "32", "--conversations", "64", "--max-tokens", "200-300")
        time.sleep(_SETTLE_SECONDS)
    idle, cpu_before = sum(each.usage().pss_bytes for each in ports), sum(each.cpu_seconds() for each in ports)
    # Two at least: a generator holds a descriptor a session, as everybody here does.
    doors = list(ports) * (2 if len(ports) == 1 else 1)
    generators = [_generator(stage, door, flight, number, len(doors)) for number, door in enumerate(doors)]
    try:
        samples = _watch(stage, ports, generators, idle, flight.patience_seconds)
        played = [each.result(timeout_seconds=flight.patience_seconds) for each in generators]
    finally:
        for each in generators:
            each.close()
    records = np.concatenate([each.records for each in played])
    good = records[records["status"] == 200]
    cpu_seconds = sum(each.cpu_seconds() for each in ports) - cpu_before
    return Landed(
        contender=name,
        processes=sum(each.usage().num_processes for each in ports),
        turns=len(records),
        errors=len(records) - len(good),
        peak_in_flight=most_at_once(records),
        idle_pss_bytes=idle,
        added_ms=(good["latency"] * 1e3 - good["max_tokens"]).astype(np.float64),
        cpu_us=1e6 * cpu_seconds / max(1, len(records)),
        samples=samples,
    )


def most_at_once(records: npt.NDArray[Any]) -> int:
    """How many turns were asked and not answered at the fullest moment, as their agents saw it."""
    moments = np.concatenate([records["start"], records["start"] + records["latency"]])
    changes = np.concatenate([np.ones(len(records), dtype=int), -np.ones(len(records), dtype=int)])
    # Of one moment, ends before beginnings: an agent that asks again at once counts once.
    order = np.lexsort((changes, moments))
    return int(np.cumsum(changes[order]).max(initial=0))


def _generator(stage: Stage, door: Running, flight: Flight, number: int, of: int) -> Generator:
    sessions = flight.sessions // of + (number < flight.sessions % of)
    return stage.generator(
        door,
        *("--sessions", str(sessions), "--conversations", str(sessions), "--seed", str(number + 1)),
        *("--ramp-seconds", f"{flight.ramp_seconds:g}", "--max-tokens", f"{flight.from_ms}-{flight.to_ms}"),
    )


def _watch(
    stage: Stage, ports: Sequence[Running], generators: Sequence[Generator], idle: int, patience_seconds: float
) -> list[Sample]:
    """Samples until all agents have ended."""
    began = time.monotonic()
    samples = []
    while any(each.process.poll() is None for each in generators):
        usages = [each.usage() for each in ports]
        samples.append(
            Sample(
                seconds=time.monotonic() - began,
                in_flight=int(stage.engine.statistics()["in_flight"]),
                pss_bytes=max(0, sum(usage.pss_bytes for usage in usages) - idle),
                num_descriptors=max(usage.most_descriptors for usage in usages),
            )
        )
        if time.monotonic() - began > patience_seconds:
            raise EngineUnavailable(f"turns are still under way after {patience_seconds:g} s")
        _wait_a_moment(generators)
    return samples


def _wait_a_moment(generators: Sequence[Generator]) -> None:
    """Until the next sample is due, or all have ended."""
    until = time.monotonic() + _SAMPLE_SECONDS
    while time.monotonic() < until and any(each.process.poll() is None for each in generators):
        time.sleep(0.05)
