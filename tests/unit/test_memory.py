"""What goes back to the system, and when the collector looks through all that is in memory, which stops everything."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import mmap
import re
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.background import background
from gateway.memory import collect_cycles, give_back_code


class Ring:
    """Refers to itself, so that only the collector can free it."""

    def __init__(self) -> None:
        self.own = self


@pytest.fixture(autouse=True)
def no_other_collections() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def much_happens() -> None:
    """As many passes over young objects as make a full one worth it."""
    for _ in range(20):
        gc.collect(0)


def old_ring() -> tuple[weakref.ref[Ring], asyncio.Event]:
    """One that outlived the young objects' passes and is garbage now, and what tells that it has gone."""
    ring, gone = Ring(), asyncio.Event()
    gc.collect(0)
    return weakref.ref(ring, lambda _: gone.set()), gone


async def test_cycles_go_when_no_turn_has_run_for_a_moment_and_not_under_turns() -> None:
    running = 1
    async with background(collect_cycles(lambda: running, look_seconds=0.01)):
        await asyncio.sleep(0)  # it has begun
        ring, gone = old_ring()
        much_happens()
        await asyncio.sleep(0.2)
        assert ring() is not None
        running = 0
        await asyncio.wait_for(gone.wait(), 10)


@pytest.mark.parametrize("running", [0, 1])
async def test_what_is_left_where_no_turn_runs_is_not_looked_through_again(running: int) -> None:
    kept = [[number] for number in range(1000)]
    frozen = gc.get_freeze_count()
    async with background(collect_cycles(lambda: running, look_seconds=0.01, longest_seconds=0.05)):
        await asyncio.sleep(0)
        _ring, gone = old_ring()
        much_happens()
        await asyncio.wait_for(gone.wait(), 10)
        await asyncio.sleep(0.05)
    assert (gc.get_freeze_count() - frozen >= len(kept)) is not bool(running)
    gc.unfreeze()


async def test_who_always_has_turns_is_looked_through_at_times() -> None:
    async with background(collect_cycles(lambda: 1, look_seconds=0.01, longest_seconds=0.05)):
        await asyncio.sleep(0)
        _ring, gone = old_ring()
        much_happens()
        await asyncio.wait_for(gone.wait(), 10)


async def test_nothing_is_looked_through_where_nothing_happened() -> None:
    async with background(collect_cycles(lambda: 0, look_seconds=0.01, longest_seconds=0.01)):
        await asyncio.sleep(0)
        ring, gone = old_ring()
        await asyncio.sleep(0.2)
        assert ring() is not None
    gc.collect()
    await asyncio.wait_for(gone.wait(), 10)


NUM_PAGES = 64
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def code_of(file: Path, *, change: bytes = b"") -> tuple[mmap.mmap, int]:
    """A file's content mapped as a program's code is, perhaps changed before; and where it is."""
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    mapped[: len(change)] = change
    view = ctypes.c_char.from_buffer(mapped)
    address = ctypes.addressof(view)
    assert LIBC.mprotect(address, len(mapped), mmap.PROT_READ | mmap.PROT_EXEC) == 0
    return mapped, address


def resident_kib(address: int) -> int:
    """Of the mapping that begins there."""
    found = re.search(rf"^{address:x}-.*\n(?:[A-Z].*\n)*?Rss: +(\d+) kB$", Path("/proc/self/smaps").read_text(), re.M)
    assert found is not None
    return int(found[1])


def test_code_that_was_run_goes_back_and_comes_again(tmp_path: Path) -> None:
    file = tmp_path / "code"
    file.write_bytes(b"verbatim" * (NUM_PAGES * mmap.PAGESIZE // 8))
    mapped, address = code_of(file)
    assert mapped[:] == file.read_bytes()
    assert resident_kib(address) == NUM_PAGES * mmap.PAGESIZE // 1024
    give_back_code()
    assert resident_kib(address) == 0
    assert mapped[:] == file.read_bytes()


def test_code_that_somebody_changed_stays_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "code"
    file.write_bytes(b"verbatim" * (NUM_PAGES * mmap.PAGESIZE // 8))
    mapped, address = code_of(file, change=b"patched")
    assert resident_kib(address) > 0
    give_back_code()
    assert mapped[:7] == b"patched"
