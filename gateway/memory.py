"""What the gateway's process does about its own memory: less of it, and less time spent on looking through it."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import mmap
import re
import time
from collections.abc import Callable
from pathlib import Path

_M_ARENA_MAX = -8
_NUM_ARENAS = 2
_GC_THRESHOLDS = (20_000, 1_000_000, 1_000_000)
"""Of the collector's generations: a pass over the youngest takes milliseconds; others are made by `collect_cycles`."""

_MAPPINGS = Path("/proc/self/smaps")
_UNCHANGED_CODE = re.compile(
    r"^(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) r-xp \S+ \S+ (?!0 )\d+ .*\n"
    r"(?:(?!Anonymous:)[A-Z].*\n)*Anonymous: +0 kB\n(?:(?!Swap:)[A-Z].*\n)*Swap: +0 kB$",
    re.MULTILINE,
)
"""Of proc(5): a mapping of a file (it has an inode) to be run, not written, with no page of this process alone."""

_FEWEST_YOUNG_PASSES = 20
"""Before a full pass is worth it: as many hundred thousand objects were made."""


def prepare_memory() -> None:
    """Before any thread is started: few arenas. glibc makes one for every thread, and what a thread frees stays there.

    One thread at a time allocates anyway, but for the libraries that compute without the interpreter's lock.
    """
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:  # glibc's own, as is malloc_trim
        mallopt(_M_ARENA_MAX, _NUM_ARENAS)


def settle_memory() -> None:
    """Once everything stands: what the start has left behind goes back to the system, and what stays is not collected.

    From now on the collector itself looks through the youngest objects only.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
    give_back_memory()
    give_back_code()


def give_back_memory() -> None:
    """What was freed goes back to the system: of reading a large vocabulary that is 80 MB."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def give_back_code() -> None:
    """What has been run so far of programs' files is in this process's memory no more: the start runs much that serving
    does not. It stays in the system's page cache, and what is run again is taken from there.

    Only of code that nobody has changed (a debugger, a loader that had to): else the changes would be lost.
    """
    if (madvise := getattr(ctypes.CDLL(None), "madvise", None)) is None or not _MAPPINGS.exists():
        return
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for code in _UNCHANGED_CODE.finditer(_MAPPINGS.read_text()):
        start, end = int(code["start"], 16), int(code["end"], 16)
        madvise(start, end - start, mmap.MADV_DONTNEED)


async def collect_cycles(
    num_running: Callable[[], int], *, look_seconds: float = 5.0, longest_seconds: float = 900.0
) -> None:
    """Have the collector look through everything when no turn has run for two looks, and every `longest_seconds`.

    A pass over thousands of sessions stops everything for a second and finds next to nothing: what turns leave behind
    has no cycles, nor have sessions. Left to itself, the collector makes one whenever what is in memory has grown by a
    quarter, and shorter ones of some hundred milliseconds every few seconds. What is left where no turn runs is not
    looked through again: the next pass may come just when agents come back.
    """
    last, young_passes, was_idle = time.monotonic(), _young_passes(), False
    while True:
        await asyncio.sleep(look_seconds)
        is_idle = not num_running()
        is_due = (is_idle and was_idle) or time.monotonic() - last > longest_seconds
        was_idle = is_idle
        if is_due and _young_passes() - young_passes >= _FEWEST_YOUNG_PASSES:
            gc.collect()
            if is_idle:  # else what a turn under way leaves behind would never be found
                gc.freeze()
            give_back_memory()
            last, young_passes = time.monotonic(), _young_passes()


def _young_passes() -> int:
    return int(gc.get_stats()[0]["collections"])
