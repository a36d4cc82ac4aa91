"""Figures of the load benchmarks: percentiles, medians over rounds, ratios within a round, targets, turns at once."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.load.figures import (
    Measured,
    Spread,
    Target,
    compared,
    differences,
    measured,
    over_rounds,
    percentiles,
    plain,
    ratios,
    spread,
)
from benchmarks.load.flight import most_at_once
from benchmarks.load.programs import RECORD, Played
from benchmarks.load.turns import targets
from benchmarks.load.usage import cpu_seconds_of, tree, usage_of

RUN = Measured(
    contender="verbatim",
    sessions=32,
    round=1,
    turns=100,
    errors=0,
    turns_per_second=1000.0,
    p50_ms=1.0,
    p90_ms=2.0,
    p99_ms=3.0,
    cpu_us=200.0,
    engine_us=7.0,
    generator_us=7.0,
    rss_mb=80.0,
)


def records(*rows: tuple[float, float, int]) -> np.ndarray:
    """Of (start, latency, status)."""
    made = np.zeros(len(rows), dtype=RECORD)
    for row, (start, latency, status) in zip(made, rows, strict=True):
        row["start"], row["latency"], row["status"] = start, latency, status
    return made


def test_turns_that_end_after_the_time_do_not_count_for_throughput() -> None:
    """Nor do failed ones, for throughput or latency; CPU is shared by all turns that were worked on."""
    played = Played(
        {"errors": 1, "cpu_seconds": 0.004},
        records((0.0, 0.5, 200), (0.5, 0.5, 200), (0.9, 0.3, 200), (0.1, 9.0, 500)),
    )
    run = measured("verbatim", 2, 1, played, seconds=1.0, cpu_seconds=0.002, engine_seconds=0.001, rss_bytes=3 * 2**20)
    assert (run.turns, run.errors, run.turns_per_second) == (4, 1, 2.0)
    assert (run.p50_ms, run.cpu_us, run.engine_us, run.generator_us) == (500.0, 500.0, 250.0, 1000.0)
    assert run.rss_mb == 3.0


def test_percentiles_of_nothing_are_not_numbers() -> None:
    assert np.isnan(percentiles([])).all()
    assert percentiles([1.0, 2.0, 3.0])[0] == 2.0


def test_a_spread_tells_median_and_range() -> None:
    assert spread([3.0, 1.0, 2.0, 10.0]) == Spread(2.5, 1.0, 10.0)
    with pytest.raises(ValueError, match="no values"):
        spread([])


def test_who_has_more_sessions_is_compared_with_who_has_fewer_in_the_same_round() -> None:
    runs = [
        replace(RUN, contender="verbatim x2", sessions=64, cpu_us=210.0),
        replace(RUN, contender="verbatim x2", cpu_us=900.0),
        replace(RUN, cpu_us=200.0),
        replace(RUN, sessions=64, cpu_us=1.0),
    ]
    grown = ratios(runs, "cpu_us", "verbatim x2", "verbatim", 64, other_sessions=32)
    assert grown == Spread(1.05, 1.05, 1.05)
    assert ratios(runs, "cpu_us", "verbatim x2", "verbatim", 256, other_sessions=128) is None


def test_ratios_compare_what_ran_in_the_same_round() -> None:
    """The machine was half as fast in round 2: ratios do not show it, a ratio of medians would."""
    runs = [
        replace(RUN, turns_per_second=1200.0),
        replace(RUN, turns_per_second=600.0, round=2),
        replace(RUN, contender="smg", turns_per_second=1000.0),
        replace(RUN, contender="smg", turns_per_second=500.0, round=2),
        replace(RUN, contender="smg", turns_per_second=9.0, round=3),
        replace(RUN, contender="smg", turns_per_second=9.0, sessions=1),
    ]
    assert compared(runs, "turns_per_second", "verbatim", "smg", 32) == [(1200.0, 1000.0), (600.0, 500.0)]
    assert ratios(runs, "turns_per_second", "verbatim", "smg", 32) == Spread(1.2, 1.2, 1.2)
    assert differences(runs, "turns_per_second", "verbatim", "smg", 32) == Spread(150.0, 100.0, 200.0)
    assert ratios(runs, "turns_per_second", "verbatim", "litellm", 32) is None
    assert over_rounds(runs, "smg", 32)["turns_per_second"] == Spread(500.0, 9.0, 1000.0)
    assert over_rounds(runs, "smg", 8) == {}
    slow = replace(RUN, contender="litellm", turns_per_second=0.0)  # it ended nothing in the measured time
    assert ratios([*runs, slow], "turns_per_second", "verbatim", "litellm", 32) is None


@pytest.mark.parametrize(
    ("reached", "at_least", "met"),
    [(250.0, False, True), (250.1, False, False), (250.0, True, True), (249.9, True, False)],
)
def test_the_median_meets_a_target_or_misses_it(reached: float, at_least: bool, met: bool) -> None:
    target = Target("figure", 250.0, Spread(reached, 0.0, 999.0), at_least)
    assert target.met is met
    assert target.line().startswith("met" if met else "MISSED")
    assert target.figures()["met"] is met


def test_targets_of_peers_that_were_not_there_are_not_told() -> None:
    engine = replace(RUN, contender="engine", p50_ms=0.25)
    alone = [RUN, replace(RUN, sessions=1), engine, replace(engine, sessions=1)]
    assert {target.name: target.reached.median for target in targets(alone, "verbatim")} == {
        "CPU us a turn, 32 sessions": 200.0,
        "added p50 in ms, 1 session": 0.75,
        "errors": 0,
    }
    beside = [*alone, replace(RUN, contender="smg", turns_per_second=500.0, p99_ms=1.0)]
    told = {target.name: (target.reached.median, target.met) for target in targets(beside, "verbatim")}
    assert told["turns/s over smg's, 32 sessions"] == (2.0, True)
    assert told["p99 over smg's, 32 sessions"] == (3.0, False)
    assert not any(target.met for target in targets([replace(RUN, errors=1)], "verbatim") if target.name == "errors")


def test_figures_are_rounded_to_what_counts() -> None:
    assert plain({"a": 1234.567, "b": 0.000123456, "c": 7, "d": "x"}) == {"a": 1235.0, "b": 0.0001235, "c": 7, "d": "x"}


def test_turns_at_once_are_counted_where_most_overlap() -> None:
    """An agent that asks again in the moment of its reply has one turn in flight."""
    assert most_at_once(records((0.0, 1.0, 200), (1.0, 1.0, 200))) == 1
    assert most_at_once(records((0.0, 3.0, 200), (1.0, 1.0, 0), (1.5, 1.0, 200), (5.0, 1.0, 200))) == 3
    assert most_at_once(records()) == 0


def test_a_process_tree_is_counted_with_its_children() -> None:
    work = "sum(i * i for i in range(3_000_000))"
    code = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', '''{work}\nprint(\"done\", flush=True); input()'''],"
        " stdin=sys.stdin, stdout=sys.stdout)\n"
        "child.wait()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        pids = list(tree(process.pid))
        usage = usage_of(process.pid)
        alone = usage_of(pids[1])
        assert (pids[0], len(pids), usage.num_processes) == (process.pid, 2, 2)
        assert usage.cpu_seconds > alone.cpu_seconds > 0.05
        assert usage.rss_bytes > alone.rss_bytes > 2**20
        assert 0 < usage.pss_bytes <= usage.rss_bytes
        assert usage.most_descriptors >= 3
    finally:
        process.communicate(b"\n", timeout=20)
    assert cpu_seconds_of(process.pid) == 0.0


def test_the_clock_of_a_process_is_exact() -> None:
    """Finer than the 10 ms of /proc/PID/stat, of which a few hundred turns have only a few."""
    before = cpu_seconds_of(os.getpid())
    sum(range(20_000))
    assert 0 < cpu_seconds_of(os.getpid()) - before < 5
