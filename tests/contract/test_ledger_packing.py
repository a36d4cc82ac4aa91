"""Routing rows that are packed in the background: the same rows at any moment, whatever is cut off where."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.contracts.errors import LedgerCorrupt
from gateway.contracts.rollouts import Compressed
from gateway.ledger.backend import Location
from gateway.ledger.compaction import LiveRecord, pack_records
from gateway.ledger.packing import pack, unpack
from gateway.ledger.segments_file import SegmentFileWriter, is_packed, read_record, read_stored, scan_records
from gateway.ledger.sqlite import SqliteLedger
from gateway.ledger_check import verify_ledger
from tests.small_ledger import NUM_TURNS, a_session, a_turn, fill_ledger, rows_of

SESSIONS = ("a", "b", "c")


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[SqliteLedger]:
    """Three sessions of a few turns, of which two have ended."""
    opened = SqliteLedger.open(tmp_path / "data")
    await fill_ledger(opened, SESSIONS, finished="ab")
    yield opened
    await opened.aclose()


async def packed_at_once(ledger: SqliteLedger) -> Compressed:
    return await ledger.compress(bytes_per_second=0, full_bytes=1)


async def check_rows(ledger: SqliteLedger, sessions: tuple[str, ...] = SESSIONS) -> None:
    for session_id in sessions:
        for index in range(NUM_TURNS):
            stored = await ledger.experts(session_id, f"t{index}")
            assert stored is not None
            expected = rows_of(a_turn(session_id, index))
            assert stored.start == expected.start
            np.testing.assert_array_equal(stored.ids, expected.ids)


def places(data: Path) -> list[LiveRecord]:
    """Where the rows of all turns lie."""
    query = "SELECT session_id, turn_id, experts_file, experts_offset, experts_bytes FROM turns ORDER BY 1, 2"
    with closing(sqlite3.connect(data / "ledger.sqlite")) as store:
        return [LiveRecord(session, turn, Location(*place)) for session, turn, *place in store.execute(query)]


@given(data=st.data())
def test_rows_come_back_from_their_frame_as_they_were(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 50), st.integers(1, 4), st.integers(1, 8)))
    dtype = data.draw(st.sampled_from([np.uint8, np.uint16]))
    ids = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 128, shape).astype(dtype)
    facts = {"dtype": ids.dtype.name, "shape": list(shape), "start": 0}
    frame = pack(ids.reshape(-1).view(np.uint8).data, facts)
    assert bytes(unpack(frame, facts, name="a turn")) == ids.tobytes()
    with pytest.raises(LedgerCorrupt, match="a turn"):
        unpack(frame, facts | {"shape": [shape[0] + 1, *shape[1:]]}, name="a turn")
    with pytest.raises(LedgerCorrupt, match="a turn"):
        unpack(frame[:-1], facts, name="a turn")


async def test_full_files_are_packed_and_every_row_reads_as_before(ledger: SqliteLedger, tmp_path: Path) -> None:
    before = await ledger.stored_bytes()
    done = await packed_at_once(ledger)
    assert done.num_records == len(SESSIONS) * NUM_TURNS
    assert 0 < done.num_saved_bytes < done.num_bytes
    assert await ledger.stored_bytes() == before - done.num_saved_bytes
    data = tmp_path / "data"
    assert all(is_packed(data / "routing", place.location) for place in places(data))
    assert not (data / "routing" / "routing-00000001.seg").exists()
    assert await packed_at_once(ledger) == Compressed()
    await check_rows(ledger)
    found = verify_ledger(data)
    assert (found.damages, found.num_routing_records) == ([], done.num_records)
    rollouts = await ledger.stored_rollouts(finished_before=9e9, limit=9)
    with closing(sqlite3.connect(data / "ledger.sqlite")) as store:
        query = "SELECT session_id, sum(experts_bytes) FROM turns GROUP BY 1"
        routing = dict(store.execute(query).fetchall())
    assert {each.session_id for each in rollouts} == {"a", "b"}
    assert all(each.num_bytes > routing[each.session_id] for each in rollouts)


async def test_packed_rows_read_after_the_next_start_and_beside_new_ones(ledger: SqliteLedger, tmp_path: Path) -> None:
    """A file of packed rows is not gone on with: it would not be packed again."""
    await packed_at_once(ledger)
    await ledger.aclose()
    reopened = SqliteLedger.open(tmp_path / "data")
    await fill_ledger(reopened, ["d"], finished="d")
    await check_rows(reopened, (*SESSIONS, "d"))
    new = [place.location for place in places(tmp_path / "data") if place.session_id == "d"]
    old = [place.location for place in places(tmp_path / "data") if place.session_id != "d"]
    assert not {place.file for place in new} & {place.file for place in old}
    assert (await packed_at_once(reopened)).num_records == NUM_TURNS
    await check_rows(reopened, (*SESSIONS, "d"))
    await reopened.aclose()
    assert verify_ledger(tmp_path / "data").damages == []


async def test_readers_see_every_row_while_files_are_packed(ledger: SqliteLedger) -> None:
    """What a reader had looked up may be gone: it looks again."""
    await asyncio.gather(*(fill_ledger(ledger, [f"s{index}"], finished=[]) for index in range(40)))
    packing = asyncio.create_task(packed_at_once(ledger))
    while not packing.done():
        await check_rows(ledger, ("s0", "s20", "s39"))
    assert (await packing).num_records == 43 * NUM_TURNS
    await check_rows(ledger, ("s0", "s20", "s39"))


@pytest.mark.parametrize("kept_bytes", [0, 3, 40, -1, None])
async def test_a_crash_before_the_rows_point_there_leaves_them_as_they_were(
    ledger: SqliteLedger, tmp_path: Path, kept_bytes: int | None
) -> None:
    """I4: packed copies that no row points at, whole or cut anywhere, harm nothing and go with their file."""
    data = tmp_path / "data"
    await ledger.aclose()
    writer = SegmentFileWriter(data / "routing")
    writer.begin_next()
    copies = pack_records(data / "routing", writer, places(data))
    writer.close()
    file = data / "routing" / f"routing-{copies[0].location.file:08d}.seg"
    if kept_bytes is not None:
        os.truncate(file, file.stat().st_size + kept_bytes if kept_bytes < 0 else kept_bytes)
    assert verify_ledger(data).damages == []
    reopened = SqliteLedger.open(data)
    await fill_ledger(reopened, ["d"], finished="d")
    await check_rows(reopened, (*SESSIONS, "d"))
    await packed_at_once(reopened)
    await check_rows(reopened, (*SESSIONS, "d"))
    assert not file.exists()
    await reopened.aclose()
    assert verify_ledger(data).damages == []


async def test_what_was_dropped_or_moved_meanwhile_is_not_pointed_at(ledger: SqliteLedger, tmp_path: Path) -> None:
    """A crash half-way through a file, and a drop between: the next run does the rest."""
    data = tmp_path / "data"
    finish = await ledger.finish_record("a")
    assert finish is not None
    before = places(data)
    await ledger.drop_rollout("a", finish.snapshot)
    await packed_at_once(ledger)
    assert [place.session_id for place in places(data)] == [p.session_id for p in before if p.session_id != "a"]
    await check_rows(ledger, ("b", "c"))
    await packed_at_once(ledger)
    await ledger.aclose()
    assert verify_ledger(data).damages == []


async def test_damage_in_a_packed_record_is_named_and_keeps_its_file(ledger: SqliteLedger, tmp_path: Path) -> None:
    """Both before it is packed, which then is not done, and after."""
    data = tmp_path / "data"
    await packed_at_once(ledger)
    place = places(data)[5]
    file = data / "routing" / f"routing-{place.location.file:08d}.seg"
    _flip(file, place.location.offset + place.location.num_bytes - 2)
    with pytest.raises(LedgerCorrupt, match=f"session {place.session_id} turn {place.turn_id}.*checksum"):
        await ledger.experts(place.session_id, place.turn_id)
    [damage] = verify_ledger(data).damages
    assert (damage.session_id, damage.turn_id) == (place.session_id, place.turn_id)


async def test_a_file_with_a_damaged_record_is_not_packed(ledger: SqliteLedger, tmp_path: Path) -> None:
    """So that it can still be examined."""
    data = tmp_path / "data"
    place = places(data)[5]
    file = data / "routing" / f"routing-{place.location.file:08d}.seg"
    _flip(file, place.location.offset + place.location.num_bytes - 2)
    await packed_at_once(ledger)
    assert places(data)[5] == place
    assert len(verify_ledger(data).damages) == 1


async def test_mostly_dead_files_of_packed_and_plain_rows_are_emptied_alike(
    ledger: SqliteLedger, tmp_path: Path
) -> None:
    """Packed rows move as they are."""
    names = [f"s{index:03d}" for index in range(120)]
    await asyncio.gather(*(fill_ledger(ledger, [name], finished=[name]) for name in names))
    await packed_at_once(ledger)
    await fill_ledger(ledger, ["plain"], finished=["plain"])
    for name in names[1:]:
        finish = await ledger.finish_record(name)
        assert finish is not None
        await ledger.drop_rollout(name, finish.snapshot)
    reclaimed = await ledger.reclaim()
    await check_rows(ledger, (*SESSIONS, names[0], "plain"))
    await ledger.aclose()
    reopened = SqliteLedger.open(tmp_path / "data")  # the packed file is nobody's now
    reclaimed_later = await reopened.reclaim()
    assert reclaimed.num_moved_bytes + reclaimed_later.num_moved_bytes > 0
    await check_rows(reopened, (*SESSIONS, names[0], "plain"))
    await packed_at_once(reopened)
    await check_rows(reopened, (*SESSIONS, names[0], "plain"))
    await reopened.aclose()
    assert verify_ledger(tmp_path / "data").damages == []


async def test_rows_that_would_not_become_smaller_stay_where_they_are(tmp_path: Path) -> None:
    """256 experts, each as likely as any other: nothing is written for nothing."""
    ledger = SqliteLedger.open(tmp_path / "data")
    await ledger.create_session(a_session("wide"))
    turn = a_turn("wide", 0)
    rows = rows_of(turn)
    noise = np.random.default_rng(0).integers(0, 256, rows.ids.shape, dtype=np.uint8)
    await ledger.append_turn(turn, type(rows)(noise, rows.start))
    before = places(tmp_path / "data")
    assert await packed_at_once(ledger) == Compressed()
    assert places(tmp_path / "data") == before
    await ledger.aclose()


async def test_a_store_that_an_older_program_may_have_open_is_not_packed(ledger: SqliteLedger, tmp_path: Path) -> None:
    """It reads plain rows only: version 3 stays 3 in a hand-over, and becomes 4 when opened alone."""
    data = tmp_path / "data"
    await ledger.aclose()
    _set_version(data, 3)
    lock = os.open(data / "ledger.lock", os.O_RDWR)
    taken_over = SqliteLedger.open(data, lock=lock)
    assert await packed_at_once(taken_over) == Compressed()
    await check_rows(taken_over)
    await taken_over.aclose()
    assert _version(data) == 3
    reading = SqliteLedger.open(data, read_only=True)
    await check_rows(reading)
    await reading.aclose()
    alone = SqliteLedger.open(data)
    assert _version(data) == 4
    assert (await packed_at_once(alone)).num_records == len(SESSIONS) * NUM_TURNS
    await check_rows(alone)
    await alone.aclose()


def test_records_of_both_kinds_are_found_in_a_file_by_themselves(tmp_path: Path) -> None:
    """What a repair makes its index from."""
    writer = SegmentFileWriter(tmp_path / "routing")
    rows = np.arange(24, dtype=np.uint8).reshape(3, 4, 2) % 5
    key = b'{"dtype":"uint8","shape":[3,4,2],"start":0}'
    facts: dict[str, Any] = {"dtype": "uint8", "shape": [3, 4, 2]}
    plain = writer.append(key, rows.reshape(-1).data)
    packed = writer.append(key, pack(rows.reshape(-1).data, facts), is_packed=True)
    writer.close()
    folder = tmp_path / "routing"
    assert [record.location for record in scan_records(folder, 1)] == [plain, packed]
    for location in (plain, packed):
        assert bytes(read_record(folder, location, name="a turn")[1]) == rows.tobytes()
    assert read_stored(folder, packed, name="a turn").is_packed


def _flip(file: Path, offset: int) -> None:
    with file.open("r+b") as content:
        content.seek(offset)
        (byte,) = content.read(1)
        content.seek(offset)
        content.write(bytes([byte ^ 1]))


def _version(data: Path) -> int:
    with closing(sqlite3.connect(data / "ledger.sqlite")) as store:
        return int(store.execute("PRAGMA user_version").fetchone()[0])


def _set_version(data: Path, version: int) -> None:
    with closing(sqlite3.connect(data / "ledger.sqlite", isolation_level=None)) as store:
        store.execute(f"PRAGMA user_version = {version}")
