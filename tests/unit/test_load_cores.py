"""What cores do together is counted in real processes, each on its own core."""

from __future__ import annotations

import os

from benchmarks.load.cores import yield_together


def test_one_core_does_about_what_it_does() -> None:
    core = min(os.sched_getaffinity(0))
    assert 0.1 < yield_together([core], seconds=0.3) < 10


def test_two_programs_on_one_core_do_no_more_than_one() -> None:
    """So it is the cores that are counted, not the programs; each program alone would do one."""
    core = min(os.sched_getaffinity(0))
    assert yield_together([core, core], seconds=0.5) < 1.9
