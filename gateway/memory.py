"""What the gateway's process does about its own memory: less of it, and less time spent on looking through it."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import time
from collections.abc import Callable

_M_ARENA_MAX = -8
_NUM_ARENAS = 2
_GC_THRESHOLDS = (20_000, 1_000_000, 1_000_000)
"""Of the collector's generations: a pass over the youngest takes milliseconds; others are made by `collect_cycles`."""

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


def give_back_memory() -> None:
    """What was freed goes back to the system: of reading a large vocabulary that is 80 MB."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


async def collect_cycles(
    num_running: Callable[[], int], *, look_seconds: float = 5.0, longest_seconds: float = 900.0
) -> None:
    """Have the collector look through everything when no turn has run for two looks, and every `longest_seconds`.

    A pass over thousands of sessions stops everything for a second and finds next to nothing: what turns leave behind
    has no cycles. Left to itself, the collector makes one whenever what is in memory has grown by a quarter, and
    shorter ones of some hundred milliseconds every few seconds.
    """
    last, young_passes, was_idle = time.monotonic(), _young_passes(), False
    while True:
        await asyncio.sleep(look_seconds)
        is_idle = not num_running()
        is_due = (is_idle and was_idle) or time.monotonic() - last > longest_seconds
        was_idle = is_idle
        if is_due and _young_passes() - young_passes >= _FEWEST_YOUNG_PASSES:
            gc.collect()
            give_back_memory()
            last, young_passes = time.monotonic(), _young_passes()


def _young_passes() -> int:
    return int(gc.get_stats()[0]["collections"])
