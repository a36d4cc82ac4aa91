"""What the gateway's process does about its own memory: less of it, and less time spent on looking through it."""

from __future__ import annotations

import ctypes
import gc

_M_ARENA_MAX = -8
_NUM_ARENAS = 2
_GC_THRESHOLDS = (50_000, 20, 50)


def prepare_memory() -> None:
    """Before any thread is started: few arenas. glibc makes one for every thread, and what a thread frees stays there.

    One thread at a time allocates anyway, but for the libraries that compute without the interpreter's lock.
    """
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:  # glibc's own, as is malloc_trim
        mallopt(_M_ARENA_MAX, _NUM_ARENAS)


def settle_memory() -> None:
    """Once everything stands: what the start has left behind goes back to the system, and what stays is not collected.

    A pass of the collector over all sessions in memory takes tens of milliseconds and finds nothing, because sessions
    have no cycles; so it is made less often, and never over what lives as long as the process.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
    give_back_memory()


def give_back_memory() -> None:
    """What was freed goes back to the system: of reading a large vocabulary that is 80 MB."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
