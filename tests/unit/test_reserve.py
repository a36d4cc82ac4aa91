"""Room on the disk: when new turns are refused, what is given up when it is full, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.contracts.errors import LedgerFull
from gateway.ledger.reserve import SpaceReserve, SpaceState
from tests.small_disk import fill, small_disk

MIB = 2**20


@pytest.fixture
def disk() -> Iterator[Path]:
    with small_disk(8 * MIB) as made:
        yield made.folder


@pytest.fixture
def reserve(disk: Path) -> SpaceReserve:
    made = SpaceReserve(disk / "data", min_free_bytes=2 * MIB, reserve_bytes=2 * MIB)
    made.prepare()
    return made


def test_new_turns_are_refused_while_there_is_little_room_and_taken_again_afterwards(
    disk: Path, reserve: SpaceReserve
) -> None:
    reserve.check(0)
    fill(disk / "other", leave_bytes=MIB)
    assert reserve.refresh().state is SpaceState.LOW
    with pytest.raises(LedgerFull, match="no room for new turns"):
        reserve.check(0)
    (disk / "other").unlink()
    assert reserve.refresh().state is SpaceState.OPEN
    reserve.check(0)


def test_room_is_kept_for_the_turns_that_are_under_way(reserve: SpaceReserve) -> None:
    """Each of them may become as large as the largest so far."""
    reserve.note_turn(MIB)
    reserve.check(0)
    with pytest.raises(LedgerFull):
        reserve.check(10)


def test_a_full_disk_has_a_reserve_for_turns_and_a_last_one_for_what_frees_space(
    disk: Path, reserve: SpaceReserve
) -> None:
    fill(disk / "other")
    assert reserve.make_room(grows=True)
    assert reserve.space.state is SpaceState.RESERVE
    fill(disk / "more", leave_bytes=0)
    assert not reserve.make_room(grows=True), "the last reserve is not for what grows"
    assert reserve.space.state is SpaceState.FULL
    assert not reserve.takes_growth()
    assert reserve.make_room(grows=False)
    (disk / "still").write_bytes(b"." * (MIB // 4))
    fill(disk / "rest")
    assert not reserve.make_room(grows=False)


def test_the_reserve_is_made_anew_before_new_turns_are_taken(disk: Path, reserve: SpaceReserve) -> None:
    fill(disk / "other")
    reserve.make_room(grows=True)
    fill(disk / "more")
    reserve.make_room(grows=True)
    (disk / "more").unlink()  # as much as the reserve was: turns under way may go on, new ones must wait
    assert reserve.refresh().state is SpaceState.RESERVE
    assert reserve.takes_growth()
    with pytest.raises(LedgerFull):
        reserve.check(0)
    (disk / "other").unlink()
    space = reserve.refresh()
    assert (space.state, space.reserve_bytes) == (SpaceState.OPEN, 2 * MIB)


def test_a_disk_without_room_for_the_reserve_takes_no_turns_from_the_start(disk: Path) -> None:
    fill(disk / "other", leave_bytes=3 * MIB)
    reserve = SpaceReserve(disk / "data", min_free_bytes=2 * MIB, reserve_bytes=2 * MIB)
    reserve.prepare()
    assert reserve.space.state is SpaceState.LOW
    assert reserve.space.reserve_bytes == 0


def test_a_folder_that_is_closed_holds_no_reserve(disk: Path, reserve: SpaceReserve) -> None:
    reserve.close()
    assert list((disk / "data").iterdir()) == []
