"""What the cores of a machine do together, in what one of them does alone.

Two cores of a virtual machine may be the two threads of one: then no program does twice as much on both, and each
second of processor time does less. What is measured on several cores is to be read beside this.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence

_LOOP = """\
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
num_loops = 0
sys.stdin.readline()
end = time.perf_counter() + float(sys.argv[2])
while time.perf_counter() < end:
    for _ in range(10_000):
        pass
    num_loops += 1
print(num_loops)
"""


def yield_together(cores: Sequence[int], count: Callable[[Sequence[int]], int]) -> float:
    """What `count` says of all cores at once, in what it says of one while the others have nothing to do."""
    return count(cores) * len(cores) / sum(count([core]) for core in cores)


def empty_loops(cores: Sequence[int], *, seconds: float) -> int:
    """How many the interpreter does in all, in a process on each core; they begin together."""
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", _LOOP, str(core), str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for core in cores
    ]
    for program in programs:
        if program.stdin is not None:
            program.stdin.write("\n")
            program.stdin.flush()
    return sum(int(program.communicate()[0]) for program in programs)
