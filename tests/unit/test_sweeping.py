"""What is dropped by itself, and whether the disk gets its space back."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.contracts.errors import ConfigurationError
from gateway.contracts.rollouts import StoredRollout
from gateway.ledger.sqlite import SqliteLedger
from gateway.ledger.sweeping import DropReason, KeepRules, StorageSettings, plan_sweep, sweep
from gateway.ledger_check import verify_ledger
from tests.small_ledger import a_turn, fill_ledger, rows_of

NOW = 1_000.0


def stored(name: str, age: float, num_bytes: int = 10, *, by: str = "", leased: bool = False) -> StoredRollout:
    return StoredRollout(name, f"snapshot-{name}", NOW - age, num_bytes, tuple(by), leased)


def planned(rollouts: list[StoredRollout], rules: KeepRules) -> dict[str, DropReason]:
    total = sum(rollout.num_bytes for rollout in rollouts)
    return {each.session_id: each.reason for each in plan_sweep(rollouts, rules, stored_bytes=total, now=NOW)}


def test_by_age_all_go_but_those_that_are_lent() -> None:
    rollouts = [stored("old", 100), stored("lent", 100, leased=True), stored("young", 10)]
    assert planned(rollouts, KeepRules(seconds=50)) == {"old": DropReason.AGE}


def test_acknowledged_ones_may_go_earlier() -> None:
    rollouts = [stored("read", 60, by="t"), stored("unread", 60)]
    assert planned(rollouts, KeepRules(seconds=100, acknowledged_seconds=50)) == {"read": DropReason.ACKNOWLEDGED_AGE}


def test_by_size_the_oldest_acknowledged_go_first_and_others_only_if_it_is_said() -> None:
    rollouts = [stored("a", 9), stored("b", 8, by="t"), stored("c", 7, by="t"), stored("d", 6)]
    assert list(planned(rollouts, KeepRules(num_bytes=30))) == ["b"]
    assert list(planned(rollouts, KeepRules(num_bytes=0))) == ["b", "c"]
    assert list(planned(rollouts, KeepRules(num_bytes=5, acknowledged_only=False))) == ["b", "c", "a", "d"]


def test_all_named_consumers_must_have_acknowledged() -> None:
    rollouts = [stored("a", 9, by="t"), stored("b", 9, by="tu")]
    assert list(planned(rollouts, KeepRules(acknowledged_seconds=1, consumers=("t", "u")))) == ["b"]


@given(
    st.lists(st.tuples(st.floats(0, 100), st.integers(0, 50), st.booleans(), st.booleans()), max_size=8),
    st.integers(0, 200),
    st.booleans(),
)
def test_a_sweep_by_size_drops_no_more_than_it_must(
    facts: list[tuple[float, int, bool, bool]], keep: int, only: bool
) -> None:
    rollouts = [
        stored(f"r{i}", age, size, by="t" if read else "", leased=leased)
        for i, (age, size, read, leased) in enumerate(sorted(facts, reverse=True))
    ]
    names = list(planned(rollouts, KeepRules(num_bytes=keep, acknowledged_only=only)))
    by_name = {rollout.session_id: rollout for rollout in rollouts}
    assert not any(by_name[name].leased or (only and not by_name[name].acknowledged_by) for name in names)
    left = sum(rollout.num_bytes for rollout in rollouts) - sum(by_name[name].num_bytes for name in names[:-1])
    assert not names or left > keep, "the last one was needed"


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"storage\.keep_seconds is -1"):
        StorageSettings(keep_seconds=-1)
    with pytest.raises(ConfigurationError, match="keep_bytes, which is not set"):
        StorageSettings(drop_unacknowledged=True)


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[SqliteLedger]:
    opened = SqliteLedger.open(tmp_path / "data")
    yield opened
    await opened.aclose()


async def test_a_dry_run_says_what_a_sweep_then_drops(ledger: SqliteLedger) -> None:
    await fill_ledger(ledger, "abc", finished="ab")
    rules = KeepRules(seconds=0)
    dry = await sweep(ledger, rules, now=time.time() + 10, dry_run=True)
    assert [each.session_id for each in dry.dropped] == ["a", "b"]
    assert len(await ledger.turns("a")) == 4
    report = await sweep(ledger, rules, now=time.time() + 10)
    assert report.dropped == dry.dropped
    assert await ledger.turns("a") == []
    assert len(await ledger.turns("c")) == 4
    assert await ledger.stored_bytes() == report.stored_bytes - report.num_dropped_bytes


async def test_a_file_with_one_live_rollout_among_dead_ones_is_emptied_and_goes(
    ledger: SqliteLedger, tmp_path: Path
) -> None:
    """The live one reads as it did, and so it does after the next start."""
    names = [f"s{i:03d}" for i in range(60)]
    for name in names:
        await fill_ledger(ledger, [name], finished=[name])
    before = await ledger.usage()
    for name in names[1:]:
        finish = await ledger.finish_record(name)
        assert finish is not None
        await ledger.drop_rollout(name, finish.snapshot)
    assert (await ledger.usage()).routing_bytes == before.routing_bytes, "one live rollout holds the whole file"
    reclaimed = await ledger.reclaim()
    after = await ledger.usage()
    assert reclaimed.num_moved_bytes > 0
    assert after.dead_routing_bytes == 0
    assert after.routing_bytes < before.routing_bytes / 20
    assert after.reusable_bytes == 0, "no empty pages are left in the database"
    for index in range(4):
        rows = await ledger.experts("s000", f"t{index}")
        assert rows is not None
        np.testing.assert_array_equal(rows.ids, rows_of(a_turn("s000", index)).ids)
    assert verify_ledger(tmp_path / "data").damages == []
