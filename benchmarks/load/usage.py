"""What a process and all its children use, told by Linux: CPU time, memory, descriptors."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_CPU_CLOCK = 2
_CHILDREN_TICKS = slice(13, 15)
"""cutime and cstime of proc(5), behind the name."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Of a process tree at one moment.

    cpu_seconds: of all threads since their processes began (to the nanosecond, as the scheduler counts).
    rss_bytes: pages that several of its processes share count in each; pss_bytes: once altogether.
    most_descriptors: of its fullest process, which is what its limit counts.
    """

    cpu_seconds: float
    rss_bytes: int
    pss_bytes: int
    most_descriptors: int
    num_processes: int


def usage_of(pid: int) -> Usage:
    """All figures of the tree under pid; what ends meanwhile is left out."""
    pids = list(tree(pid))
    memory = [_memory(each) for each in pids]
    return Usage(
        cpu_seconds=sum(_cpu_seconds(each) for each in pids),
        rss_bytes=sum(rss for rss, _ in memory),
        pss_bytes=sum(pss for _, pss in memory),
        most_descriptors=max(_num_descriptors(each) for each in pids),
        num_processes=len(pids),
    )


def cpu_seconds_of(pid: int) -> float:
    """CPU time of the tree alone: a few microseconds of work."""
    return sum(_cpu_seconds(each) for each in tree(pid))


def tree(pid: int) -> Iterator[int]:
    """A process and all under it."""
    yield pid
    try:
        threads = list((_PROC / str(pid) / "task").iterdir())
        children = [child for thread in threads for child in (thread / "children").read_text().split()]
    except OSError:
        return
    for child in children:
        yield from tree(int(child))


def _cpu_seconds(pid: int) -> float:
    """Of a process and its children that have ended, which counted by themselves before."""
    # The clock of another process, as clock_getcpuclockid(3) numbers it; /proc/PID/stat counts in steps of 10 ms.
    try:
        own = time.clock_gettime(~pid << 3 | _CPU_CLOCK)
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return 0.0
    return own + sum(map(int, fields[_CHILDREN_TICKS])) / os.sysconf("SC_CLK_TCK")


def _memory(pid: int) -> tuple[int, int]:
    """RSS and PSS in bytes."""
    try:
        lines = (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0, 0
    kib = {line.partition(":")[0]: int(line.split()[1]) for line in lines[1:]}
    return kib["Rss"] * 1024, kib["Pss"] * 1024


def _num_descriptors(pid: int) -> int:
    try:
        return sum(1 for _ in (_PROC / str(pid) / "fd").iterdir())
    except OSError:
        return 0
