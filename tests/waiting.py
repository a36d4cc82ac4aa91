"""Waiting for what another process, thread or task does: by looking again, with one patience for all tests.

It is far above what anything takes: a machine under load makes a test slow, not red.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

_PATIENCE_SECONDS = 60.0
_PAUSE_SECONDS = 0.01

Look = TypeVar("Look")


def until(look: Callable[[], Look]) -> Look:
    """What `look` gives as soon as it is true; AssertionError with what it gave last, where it never is."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not (seen := look()):
        assert time.monotonic() < deadline, f"still {seen!r} after {_PATIENCE_SECONDS:g} s"
        time.sleep(_PAUSE_SECONDS)
    return seen


async def until_async(look: Callable[[], Look]) -> Look:
    """As `until`, while the event loop runs."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not (seen := look()):
        assert time.monotonic() < deadline, f"still {seen!r} after {_PATIENCE_SECONDS:g} s"
        await asyncio.sleep(_PAUSE_SECONDS)
    return seen
