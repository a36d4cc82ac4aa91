"""What cores do together, in what one of them does alone."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

from benchmarks.load.cores import empty_loops, yield_together


def test_all_together_are_compared_with_the_mean_of_each_alone() -> None:
    """As two threads of one core would do: 90 and 110 alone, 150 together."""
    counts = {(0,): 90, (1,): 110, (0, 1): 150}

    def count(cores: Sequence[int]) -> int:
        return counts[tuple(cores)]

    assert yield_together([0, 1], count) == pytest.approx(1.5)
    assert yield_together([1], count) == 1


def test_loops_are_counted_by_processes_on_their_cores() -> None:
    core = min(os.sched_getaffinity(0))
    assert empty_loops([core, core], seconds=0.2) > 0
