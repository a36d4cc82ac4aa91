"""The contract of `gateway.contracts.ports.Ledger`, run against every implementation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gateway.contracts.errors import (
    Conflict,
    ExpertsMismatch,
    InvalidRequest,
    LedgerError,
    NotFound,
    SessionSealed,
    TurnIndexTaken,
)
from gateway.contracts.examples import example_turn
from gateway.contracts.experts import RoutedExperts
from gateway.contracts.generation import Finish, FinishReason, JsonValue
from gateway.contracts.media import Blob
from gateway.contracts.ports import Ledger
from gateway.contracts.records import (
    Attachment,
    FinishRecord,
    MatchTier,
    RootContext,
    SegmentReason,
    SessionOrigin,
    SessionRecord,
    TurnRecord,
    snapshot_of,
)
from gateway.contracts.rollouts import FeedCounts, IncompleteGroup, Lease
from gateway.contracts.versions import VersionSpan
from gateway.ledger.postgres import PostgresLedger
from gateway.ledger.sqlite import SqliteLedger


@pytest.fixture(params=["sqlite", "postgres"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Ledger]:
    """Open the same store once more."""
    if request.param == "sqlite":
        return lambda: SqliteLedger.open(tmp_path / "data")
    dsn: str = request.getfixturevalue("postgres_dsn")
    return lambda: PostgresLedger.open(dsn, (tmp_path / "objects").as_uri())


@pytest.fixture
async def ledger(reopen: Callable[[], Ledger]) -> AsyncIterator[Ledger]:
    opened = reopen()
    yield opened
    await opened.aclose()


def a_session(session_id: str = "s", **changes: JsonValue) -> SessionRecord:
    record = SessionRecord(
        session_id=session_id,
        group=None,
        group_size=None,
        task={"question": "48/2"},
        labels={},
        metadata={"big": 2**80, "half": 0.1},
        sampling={},
        ttl_seconds=None,
        key_hash="",
        origin=SessionOrigin.CREATED,
        complete=True,
        created_at=1.0,
    )
    return replace(record, **changes)


def a_turn(session_id: str = "s", index: int = 0, *, parent_id: str | None = None, **changes: JsonValue) -> TurnRecord:
    record = example_turn(
        index,
        session_id=session_id,
        attachment=Attachment(
            parent_id=parent_id,
            follows_id=parent_id,
            tier=MatchTier.SEMANTIC if parent_id else MatchTier.NONE,
            segment_reason=None if parent_id else SegmentReason.FIRST,
        ),
        root=None if parent_id else RootContext(tools=({"name": "calculator"},), template_arguments={"a": None}),
        added_messages=({"role": "user", "content": "q \ud800 🙂"},),
        reply={"role": "assistant", "content": None},
        prompt_token_ids=np.array([5, 6, 7], dtype=np.int32),
        output_token_ids=np.array([8, 2**31 - 1], dtype=np.int32),
        output_logprobs=np.array([-0.1, np.nan], dtype=np.float32),
        version_spans=(VersionSpan(0, 1, 3), VersionSpan(1, 2, 4)),
        finish=Finish(FinishReason.STOP, 2),
        sampling={"temperature": 0.7},
        num_layers=2,
        num_experts=8,
        top_k=2,
        engine_id="sglang-0",
        model="tiny",
        request_digest="ab",
        meta={"nested": [1, None, {"x": 1e300}]},
        created_at=2.0,
    )
    return replace(record, **changes)


def routing(start: int, stop: int, *, num_layers: int = 2, top_k: int = 2) -> RoutedExperts:
    generator = np.random.default_rng(start * 1000 + stop)
    return RoutedExperts(generator.integers(0, 8, (stop - start, num_layers, top_k), dtype=np.uint8), start)


async def finish(ledger: Ledger, session_id: str = "s", **changes: JsonValue) -> FinishRecord:
    said = {"reward": 1.0, "outcome": "completed", "metadata": {"n": 1}, "finished_at": 10.0} | changes
    return await ledger.finish(session_id, **said)


async def finished(ledger: Ledger, session_id: str, *, at: float = 10.0, **properties: JsonValue) -> None:
    await ledger.create_session(a_session(session_id, **properties))
    await ledger.append_turn(a_turn(session_id), None)
    await finish(ledger, session_id, finished_at=at)


async def lease(
    ledger: Ledger,
    *,
    consumer: str = "trainer",
    limit: int = 100,
    now: float = 100.0,
    whole_groups: bool = True,
    labels: dict[str, str] | None = None,
    group_deadline_seconds: float | None = None,
    lease_id: str | None = None,
) -> Lease | None:
    return await ledger.lease(
        consumer=consumer,
        limit=limit,
        lease_seconds=60.0,
        whole_groups=whole_groups,
        labels=labels,
        now=now,
        group_deadline_seconds=group_deadline_seconds,
        lease_id=lease_id,
    )


def ids(found: Lease | None) -> list[str]:
    return [] if found is None else [rollout.session_id for rollout in found.rollouts]


def assert_same_turn(found: TurnRecord, stored: TurnRecord) -> None:
    for name in TurnRecord.__slots__:
        mine, theirs = getattr(found, name), getattr(stored, name)
        if isinstance(mine, np.ndarray):
            assert mine.dtype == theirs.dtype, name
            np.testing.assert_array_equal(mine, theirs, err_msg=name)
        else:
            assert mine == theirs, name


# ---- sessions and turns ----


async def test_what_was_stored_is_read_back_equal_after_reopening(reopen: Callable[[], Ledger]) -> None:
    """I1, I5, I8: ids, log-probs (NaN too), versions and unknown JSON come back as they were."""
    ledger = reopen()
    session = a_session(group="g", labels={"run": "é"}, ttl_seconds=3.5)
    turns = [a_turn(), a_turn(index=1, parent_id="t0", experts_start=4, experts_stop=9)]
    rows = routing(4, 9)
    await ledger.create_session(session)
    await ledger.append_turn(turns[0], None)
    await ledger.append_turn(turns[1], rows)
    ended = await finish(ledger, reward=None)
    await ledger.set_policy(4, "w-4")
    await ledger.aclose()

    again = reopen()
    assert await again.session("s") == session
    for found, stored in zip(await again.turns("s"), turns, strict=True):
        assert_same_turn(found, stored)
    found_rows = await again.experts("s", "t1")
    assert found_rows is not None
    assert found_rows.start == 4
    assert found_rows.ids.dtype == np.uint8
    np.testing.assert_array_equal(found_rows.ids, rows.ids)
    assert await again.experts("s", "t0") is None
    assert await again.finish_record("s") == ended
    assert ended == FinishRecord("s", snapshot_of("s", ["t0", "t1"]), None, "completed", {"n": 1}, 10.0)
    assert await again.policies() == {"w-4": 4}
    await again.aclose()


async def test_wide_expert_ids_are_stored_as_sixteen_bits(ledger: Ledger) -> None:
    await ledger.create_session(a_session())
    wide = RoutedExperts(np.array([[[300, 65_535], [0, 256]]], dtype=np.uint16), start=7)
    await ledger.append_turn(a_turn(num_experts=65_536, experts_start=7, experts_stop=8), wide)
    found = await ledger.experts("s", "t0")
    assert found is not None
    assert found.ids.dtype == np.uint16
    np.testing.assert_array_equal(found.ids, wide.ids)


async def test_an_equal_session_is_returned_and_another_of_its_id_is_refused(ledger: Ledger) -> None:
    first = await ledger.create_session(a_session("a/b é", group="g"))
    assert await ledger.create_session(a_session("a/b é", group="g", created_at=99.0)) == first
    with pytest.raises(Conflict):
        await ledger.create_session(a_session("a/b é", group="other"))


async def test_any_unicode_text_is_an_id_a_group_a_label_and_a_consumer(ledger: Ledger) -> None:
    """NUL and its neighbours too, which stores may have no place for; and ids keep their order."""
    names = ["a", "a\x00", "a\x00b", "a\x01", "a\x01\x02", "a\x02", "b'\"?%s{}", "é🙂"]
    for name in names:
        await finished(ledger, name, group=name + "g", labels={name: name, "\ud800": "\udfff\x00"})
    assert [session.session_id for session in await ledger.sessions()] == names
    assert [session.session_id for session in await ledger.sessions(after="a\x00")] == names[2:]
    for name in names:
        listed = await ledger.sessions(labels={name: name, "\ud800": "\udfff\x00"})
        assert [session.session_id for session in listed] == [name]
        assert [turn.session_id for turn in await ledger.turns(name)] == [name]
        lent = await lease(ledger, consumer=name, labels={name: name})
        assert lent is not None
        assert [(rollout.session_id, rollout.group) for rollout in lent.rollouts] == [(name, name + "g")]
        assert await ledger.acknowledge(lent.lease_id) == [name]
    assert await ledger.consumers() == names


async def test_a_session_id_that_is_no_unicode_text_is_refused_as_a_request(ledger: Ledger) -> None:
    with pytest.raises(InvalidRequest, match="session_id"):
        await ledger.create_session(a_session("\ud800"))


async def test_sessions_are_listed_in_order_of_id_by_label_and_page(ledger: Ledger) -> None:
    for name in ("c", "a", "b", "d"):
        await ledger.create_session(a_session(name, labels={"ru'n \"é": "x" if name != "b" else "y", "z": "1"}))
    listed = await ledger.sessions(labels={"ru'n \"é": "x", "z": "1"}, limit=2)
    assert [session.session_id for session in listed] == ["a", "c"]
    listed = await ledger.sessions(labels={"ru'n \"é": "x"}, limit=2, after="c")
    assert [session.session_id for session in listed] == ["d"]


async def test_appending_the_same_turn_again_changes_nothing(ledger: Ledger) -> None:
    """I3: a retried append is no second turn; also after the session was sealed."""
    await ledger.create_session(a_session())
    turn = a_turn(experts_start=0, experts_stop=4)
    await asyncio.gather(*(ledger.append_turn(turn, routing(0, 4)) for _ in range(5)))
    await finish(ledger)
    await ledger.append_turn(turn, routing(0, 4))
    assert len(await ledger.turns("s")) == 1


async def test_a_turn_id_with_another_content_is_refused(ledger: Ledger) -> None:
    """I9: what an agent saw is never replaced silently by something else of the same name."""
    await ledger.create_session(a_session())
    await ledger.append_turn(a_turn(), None)
    with pytest.raises(Conflict):
        await ledger.append_turn(a_turn(output_token_ids=np.array([8, 9], dtype=np.int32)), None)


async def test_a_turn_of_an_unknown_session_or_parent_is_refused(ledger: Ledger) -> None:
    with pytest.raises(NotFound):
        await ledger.append_turn(a_turn(), None)
    await ledger.create_session(a_session())
    with pytest.raises(Conflict, match="parent"):
        await ledger.append_turn(a_turn(index=1, parent_id="t0"), None)


async def test_rows_that_do_not_fit_their_turn_are_refused_before_anything_is_stored(ledger: Ledger) -> None:
    """I2, I9."""
    await ledger.create_session(a_session())
    turn = a_turn(experts_start=0, experts_stop=4)
    for rows in (None, routing(0, 3), routing(1, 4), routing(0, 4, num_layers=3), routing(0, 4, top_k=1)):
        with pytest.raises(ExpertsMismatch):
            await ledger.append_turn(turn, rows)
    assert await ledger.turns("s") == []


async def test_turns_come_in_order_of_index_whatever_the_order_of_arrival(ledger: Ledger) -> None:
    await ledger.create_session(a_session())
    await asyncio.gather(*(ledger.append_turn(a_turn(index=index), None) for index in (3, 1, 0, 2)))
    assert [turn.index for turn in await ledger.turns("s")] == [0, 1, 2, 3]


async def test_delivery_is_noted_on_the_turn(ledger: Ledger) -> None:
    await ledger.create_session(a_session())
    await ledger.append_turn(a_turn(), None)
    await ledger.mark_delivered("s", "t0", 12.5)
    assert (await ledger.turns("s"))[0].delivered_at == 12.5
    with pytest.raises(NotFound):
        await ledger.mark_delivered("s", "t1", 12.5)


async def test_what_became_of_a_reply_is_unknown_until_it_is_noted(ledger: Ledger) -> None:
    """I3: who answered a turn may die before it can say; a delivery counts more than a loss."""
    await ledger.create_session(a_session())
    for index in range(4):
        await ledger.append_turn(a_turn(index=index), None)
    assert sorted(await ledger.unknown_deliveries("s")) == ["t0", "t1", "t2", "t3"]
    await ledger.mark_delivered("s", "t0", 12.5)
    await ledger.mark_lost("s", "t1", 12.5)
    await ledger.mark_lost("s", "t2", 12.5)
    await ledger.mark_delivered("s", "t2", 13.5)
    await ledger.mark_lost("s", "t0", 13.5)
    assert await ledger.unknown_deliveries("s") == ["t3"]
    assert await ledger.deliveries("s") == {"t0": 12.5, "t2": 13.5}
    assert await ledger.unknown_deliveries("unknown") == []
    with pytest.raises(NotFound):
        await ledger.mark_lost("s", "t9", 12.5)


async def test_a_taken_index_is_refused_and_the_next_one_is_free(ledger: Ledger) -> None:
    """I3: of two processes that append at once one is told to read what the other wrote; nothing is overwritten."""
    await ledger.create_session(a_session())
    racing = [a_turn(turn_id=f"racer-{n}") for n in range(6)]
    results = await asyncio.gather(*(ledger.append_turn(turn, None) for turn in racing), return_exceptions=True)
    lost = [turn for turn, result in zip(racing, results, strict=True) if isinstance(result, TurnIndexTaken)]
    assert [type(result) for result in results].count(TurnIndexTaken) == len(lost) == 5
    await ledger.append_turn(replace(lost[0], index=1), None)
    assert [turn.index for turn in await ledger.turns("s")] == [0, 1]
    assert (await ledger.turns("s"))[1].turn_id == lost[0].turn_id


async def test_turns_and_deliveries_since_the_last_look_are_read_alone(ledger: Ledger) -> None:
    await ledger.create_session(a_session())
    for index in range(4):
        await ledger.append_turn(a_turn(index=index, delivered_at=None), None)
    await ledger.mark_delivered("s", "t2", 5.0)
    await ledger.mark_delivered("s", "t0", 6.0)
    assert [turn.index for turn in await ledger.turns("s", after=1)] == [2, 3]
    assert await ledger.turns("s", after=3) == []
    assert await ledger.deliveries("s") == {"t0": 6.0, "t2": 5.0}
    assert await ledger.deliveries("unknown") == {}


async def test_hundreds_of_concurrent_appends_are_all_stored(ledger: Ledger) -> None:
    """I4: whatever was answered is there."""
    await asyncio.gather(*(ledger.create_session(a_session(f"s{n}")) for n in range(20)))
    await asyncio.gather(
        *(
            ledger.append_turn(a_turn(f"s{n % 20}", n // 20, experts_start=0, experts_stop=4), routing(0, 4))
            for n in range(400)
        )
    )
    for n in range(20):
        assert [turn.index for turn in await ledger.turns(f"s{n}")] == list(range(20))
        assert await ledger.experts(f"s{n}", "t19") is not None


# ---- finish and delete ----


async def test_a_finished_session_takes_no_more_turns(ledger: Ledger) -> None:
    await finished(ledger, "s")
    with pytest.raises(SessionSealed):
        await ledger.append_turn(a_turn(index=1, parent_id="t0"), None)


async def test_an_append_that_races_with_finish_is_counted_or_refused(ledger: Ledger) -> None:
    """I3: a turn is either in the snapshot or its caller knows that it is not."""
    for n in range(20):
        session_id = f"s{n}"
        await ledger.create_session(a_session(session_id))
        results = await asyncio.gather(
            *(ledger.append_turn(a_turn(session_id, index), None) for index in range(3)),
            finish(ledger, session_id),
            *(ledger.append_turn(a_turn(session_id, index), None) for index in range(3, 6)),
            return_exceptions=True,
        )
        refused = [result for result in results if isinstance(result, SessionSealed)]
        assert len(await ledger.turns(session_id)) == 6 - len(refused)
    found = await lease(ledger)
    assert found is not None
    for rollout in found.rollouts:
        assert rollout.num_tokens == 5 * len(await ledger.turns(rollout.session_id))


async def test_an_equal_finish_returns_the_first_and_another_is_refused(ledger: Ledger) -> None:
    await ledger.create_session(a_session())
    first = await finish(ledger)
    assert await finish(ledger, finished_at=99.0) == first
    with pytest.raises(Conflict):
        await finish(ledger, reward=0.0)
    with pytest.raises(NotFound):
        await finish(ledger, "unknown")
    with pytest.raises(InvalidRequest, match="reward"):
        await finish(ledger, reward=float("nan"))


async def test_a_late_turn_makes_another_snapshot_and_leaves_the_first_as_it_was(ledger: Ledger) -> None:
    """I3: what a trainer leased is what it reads, whatever is recorded meanwhile."""
    await finished(ledger, "s")
    first = await ledger.finish_record("s")
    lent = await lease(ledger)
    late = a_turn(index=1, parent_id="t0", experts_start=4, experts_stop=9)
    second = await ledger.append_late_turn(late, routing(4, 9))
    assert await ledger.append_late_turn(late, routing(4, 9)) == second
    assert first is not None
    assert second == replace(first, snapshot=snapshot_of("s", ["t0", "t1"]))
    assert [turn.turn_id for turn in await ledger.turns("s")] == ["t0", "t1"]
    assert [turn.turn_id for turn in await ledger.turns("s", snapshot=first.snapshot)] == ["t0"]
    assert [turn.turn_id for turn in await ledger.turns("s", snapshot=second.snapshot)] == ["t0", "t1"]
    assert await ledger.turns("s", snapshot="another") == []
    assert await ledger.finish_record("s") == await ledger.finish_record("s", snapshot=second.snapshot) == second
    assert await ledger.finish_record("s", snapshot=first.snapshot) == first
    assert await ledger.finish_record("s", snapshot="another") is None
    assert await finish(ledger) == second
    assert lent is not None
    assert lent.rollouts[0].snapshot == first.snapshot
    with pytest.raises(Conflict, match=second.snapshot):
        await ledger.drop_rollout("s", first.snapshot)
    await ledger.drop_rollout("s", second.snapshot)


async def test_each_consumer_gets_the_snapshot_that_is_the_latest_when_it_leases(ledger: Ledger) -> None:
    """I3: a rollout is lent once to each, and acknowledged ones do not come back."""
    await finished(ledger, "s")
    first = await lease(ledger, consumer="done")
    assert first is not None
    await ledger.acknowledge(first.lease_id)
    held = await lease(ledger, consumer="holds", lease_id="held")
    second = await ledger.append_late_turn(a_turn(index=1, parent_id="t0"), None)
    assert await lease(ledger, consumer="done", now=1000.0) is None
    new = await lease(ledger, consumer="new")
    assert new is not None
    assert (new.rollouts[0].snapshot, new.rollouts[0].num_tokens) == (second.snapshot, 10)
    assert held is not None
    assert await lease(ledger, consumer="holds", lease_id="held") == held
    assert (held.rollouts[0].snapshot, held.rollouts[0].num_tokens) == (first.rollouts[0].snapshot, 5)
    again = await lease(ledger, consumer="holds", now=1000.0)
    assert again is not None
    assert again.rollouts[0].snapshot == second.snapshot


async def test_a_late_turn_needs_a_finished_session_with_data_and_a_free_index(ledger: Ledger) -> None:
    late = a_turn(index=1, parent_id="t0")
    with pytest.raises(NotFound):
        await ledger.append_late_turn(late, None)
    await ledger.create_session(a_session())
    await ledger.append_turn(a_turn(), None)
    with pytest.raises(Conflict, match="not finished"):
        await ledger.append_late_turn(late, None)
    ended = await finish(ledger)
    with pytest.raises(TurnIndexTaken):
        await ledger.append_late_turn(a_turn(turn_id="other"), None)
    with pytest.raises(Conflict, match="parent"):
        await ledger.append_late_turn(a_turn(index=1, parent_id="t9"), None)
    with pytest.raises(ExpertsMismatch):
        await ledger.append_late_turn(replace(late, experts_stop=4), None)
    await ledger.drop_rollout("s", ended.snapshot)
    with pytest.raises(SessionSealed, match="dropped"):
        await ledger.append_late_turn(late, None)
    assert await ledger.turns("s") == []


async def test_bytes_are_kept_for_the_sessions_that_refer_to_them(reopen: Callable[[], Ledger]) -> None:
    """I4: they are on disk when `put_blob` returns, and no other session can have them by their name."""
    ledger = reopen()
    blob = Blob.of(bytes(range(256)) * 500, "image/png")
    await ledger.create_session(a_session("a"))
    await ledger.create_session(a_session("b"))
    await asyncio.gather(*(ledger.put_blob("a", blob) for _ in range(8)))
    assert await ledger.blob("a", blob.sha256) == blob
    assert await ledger.blob("b", blob.sha256) is None
    assert await ledger.blob("a", "0" * 64) is None
    await ledger.aclose()
    again = reopen()
    assert await again.blob("a", blob.sha256) == blob
    await again.aclose()


async def test_bytes_go_with_the_last_session_that_refers_to_them(ledger: Ledger) -> None:
    blob = Blob.of(b"x", "image/png")
    for name in ("a", "b"):
        await ledger.create_session(a_session(name))
        await ledger.put_blob(name, blob)
    await ledger.delete_session("a")
    assert await ledger.blob("a", blob.sha256) is None
    assert await ledger.blob("b", blob.sha256) == blob
    ended = await finish(ledger, "b")
    assert await ledger.blob("b", blob.sha256) == blob
    await ledger.drop_rollout("b", ended.snapshot)
    assert await ledger.blob("b", blob.sha256) is None
    await ledger.create_session(a_session("a"))
    assert await ledger.blob("a", blob.sha256) is None  # a session of the same name is another one
    await ledger.put_blob("a", blob)
    assert await ledger.blob("a", blob.sha256) == blob


async def test_bytes_are_kept_for_a_session_until_its_rollout_is_dropped(ledger: Ledger) -> None:
    """I3: a turn that comes after its session's finish brings its bytes."""
    blob = Blob.of(b"x", "image/png")
    with pytest.raises(NotFound):
        await ledger.put_blob("s", blob)
    await ledger.create_session(a_session())
    record = await finish(ledger)
    await ledger.put_blob("s", blob)
    assert await ledger.blob("s", blob.sha256) == blob
    await ledger.drop_rollout("s", record.snapshot)
    with pytest.raises(SessionSealed):
        await ledger.put_blob("s", blob)


async def test_bytes_that_come_while_equal_ones_go_are_kept(ledger: Ledger) -> None:
    """I4: whatever the order in which a deletion frees a file and another session asks for it."""
    for i in range(30):
        blob = Blob.of(f"picture {i}".encode(), "image/png")
        await ledger.create_session(a_session(f"old-{i}"))
        await ledger.create_session(a_session(f"new-{i}"))
        await ledger.put_blob(f"old-{i}", blob)
        await asyncio.gather(ledger.delete_session(f"old-{i}"), ledger.put_blob(f"new-{i}", blob))
        await ledger.counts("trainer", 0.0)
        assert await ledger.blob(f"new-{i}", blob.sha256) == blob


async def test_a_session_is_deleted_only_when_nobody_waits_for_its_rollout(ledger: Ledger) -> None:
    """I3: an unread rollout cannot be deleted by mistake."""
    await ledger.create_session(a_session("open"))
    await ledger.delete_session("open")
    assert await ledger.session("open") is None
    await finished(ledger, "s")
    with pytest.raises(Conflict):
        await ledger.delete_session("s")
    found = await lease(ledger)
    assert found is not None
    with pytest.raises(Conflict):
        await ledger.delete_session("s")
    await ledger.acknowledge(found.lease_id)
    await ledger.delete_session("s")
    assert await ledger.turns("s") == []
    assert await ledger.finish_record("s") is None
    with pytest.raises(NotFound):
        await ledger.delete_session("s")


async def test_a_deleted_session_can_be_made_anew_and_is_lent_anew(ledger: Ledger) -> None:
    await finished(ledger, "s")
    first = await lease(ledger)
    assert first is not None
    await ledger.acknowledge(first.lease_id)
    await ledger.delete_session("s")
    await finished(ledger, "s")
    assert ids(await lease(ledger)) == ["s"]


async def test_drop_needs_the_snapshot_that_was_read_and_frees_the_turns(ledger: Ledger) -> None:
    await finished(ledger, "s")
    with pytest.raises(Conflict):
        await ledger.drop_rollout("s", "another")
    with pytest.raises(NotFound):
        await ledger.drop_rollout("unknown", "x")
    await ledger.drop_rollout("s", snapshot_of("s", ["t0"]))
    await ledger.drop_rollout("s", snapshot_of("s", ["t0"]))
    assert await ledger.turns("s") == []
    record = await ledger.finish_record("s")
    assert record is not None
    assert record.dropped_at is not None
    assert await lease(ledger) is None
    with pytest.raises(SessionSealed):
        await ledger.append_turn(a_turn(index=1), None)
    await ledger.delete_session("s")


# ---- leases ----


async def test_rollouts_are_lent_oldest_first_and_once(ledger: Ledger) -> None:
    for at, name in ((3.0, "c"), (1.0, "a"), (2.0, "b")):
        await finished(ledger, name, at=at)
    await ledger.create_session(a_session("open"))
    assert ids(await lease(ledger, limit=2)) == ["a", "b"]
    assert ids(await lease(ledger, limit=2)) == ["c"]
    assert await lease(ledger) is None


async def test_a_lease_says_what_is_needed_to_plan_with(ledger: Ledger) -> None:
    await ledger.create_session(a_session("s", group="g"))
    await ledger.append_turn(a_turn(), None)
    await ledger.append_turn(a_turn(index=1, untrainable_reason="junction"), None)
    await finish(ledger, reward=0.5, outcome="truncated")
    found = await lease(ledger)
    assert found is not None
    (rollout,) = found.rollouts
    assert (rollout.snapshot, rollout.group, rollout.reward, rollout.outcome) == (
        snapshot_of("s", ["t0", "t1"]),
        "g",
        0.5,
        "truncated",
    )
    assert (rollout.num_tokens, rollout.num_sampled_tokens) == (10, 1)  # a token without log-prob cannot be trained
    assert found.expires_at == 160.0


async def test_two_consumers_each_get_everything(ledger: Ledger) -> None:
    await finished(ledger, "s")
    mine, theirs = await lease(ledger, consumer="one"), await lease(ledger, consumer="two")
    assert ids(mine) == ids(theirs) == ["s"]
    assert mine is not None
    await ledger.acknowledge(mine.lease_id)
    assert await lease(ledger, consumer="one", now=1000.0) is None
    assert ids(await lease(ledger, consumer="two", now=1000.0)) == ["s"]


async def test_concurrent_leases_never_lend_a_rollout_twice(ledger: Ledger) -> None:
    """I3."""
    await asyncio.gather(*(finished(ledger, f"s{n}") for n in range(30)))
    found = await asyncio.gather(*(lease(ledger, limit=4) for _ in range(12)))
    lent = [session_id for one in found for session_id in ids(one)]
    assert sorted(lent) == sorted(f"s{n}" for n in range(30))


async def test_an_expired_lease_returns_its_rollouts(ledger: Ledger) -> None:
    await finished(ledger, "s")
    first = await lease(ledger, now=100.0)
    assert await lease(ledger, now=159.9) is None
    second = await lease(ledger, now=160.0)
    assert ids(second) == ["s"]
    assert first is not None
    assert second is not None
    with pytest.raises(Conflict):
        await ledger.acknowledge(first.lease_id)
    assert await ledger.acknowledge(second.lease_id) == ["s"]
    with pytest.raises(Conflict):
        await ledger.acknowledge(first.lease_id)


async def test_a_late_acknowledgement_counts_if_nobody_else_took_the_rollouts(ledger: Ledger) -> None:
    await finished(ledger, "s")
    first = await lease(ledger, now=100.0)
    assert first is not None
    assert await ledger.acknowledge(first.lease_id) == ["s"]
    assert await ledger.acknowledge(first.lease_id) == ["s"]
    assert await lease(ledger, now=1000.0) is None
    with pytest.raises(NotFound):
        await ledger.acknowledge("unknown")


async def test_released_rollouts_come_back_at_once_and_cannot_be_acknowledged(ledger: Ledger) -> None:
    await finished(ledger, "s")
    first = await lease(ledger)
    assert first is not None
    await ledger.release(first.lease_id)
    await ledger.release(first.lease_id)
    await ledger.release("unknown")
    with pytest.raises(Conflict):
        await ledger.acknowledge(first.lease_id)
    assert ids(await lease(ledger)) == ["s"]


async def test_a_restarted_consumer_gets_back_what_it_held_and_nothing_else(ledger: Ledger) -> None:
    for name in ("a", "b", "c"):
        await finished(ledger, name)
    done = await lease(ledger, limit=1)
    await lease(ledger, limit=1)
    await lease(ledger, limit=1, consumer="other")
    assert done is not None
    await ledger.acknowledge(done.lease_id)
    assert await ledger.release_consumer("trainer") == 1
    assert await ledger.release_consumer("trainer") == 0
    assert ids(await lease(ledger)) == ["b", "c"]
    assert ids(await lease(ledger, consumer="other")) == ["b", "c"]


async def test_leases_survive_reopening(reopen: Callable[[], Ledger]) -> None:
    ledger = reopen()
    await finished(ledger, "a")
    await finished(ledger, "b")
    found = await lease(ledger, limit=1)
    await ledger.aclose()
    again = reopen()
    assert ids(await lease(again)) == ["b"]
    assert found is not None
    assert await again.acknowledge(found.lease_id) == ["a"]
    await again.aclose()


async def test_a_group_is_lent_when_all_of_it_has_ended_never_in_part(ledger: Ledger) -> None:
    for n in range(2):
        await finished(ledger, f"g{n}", at=float(n), group="g", group_size=3)
    assert await lease(ledger) is None  # the third one does not exist yet
    await ledger.create_session(a_session("g2", group="g", group_size=3))
    assert await lease(ledger) is None  # it is still open
    await finished(ledger, "alone", at=50.0)
    assert ids(await lease(ledger)) == ["alone"]
    await finish(ledger, "g2", finished_at=60.0)
    assert ids(await lease(ledger)) == ["g0", "g1", "g2"]


async def test_a_group_of_unknown_size_is_whole_when_all_that_exist_have_ended(ledger: Ledger) -> None:
    await finished(ledger, "g0", group="g")
    await ledger.create_session(a_session("g1", group="g"))
    assert await lease(ledger) is None
    await finish(ledger, "g1", finished_at=60.0)
    assert ids(await lease(ledger)) == ["g0", "g1"]


async def test_groups_fill_a_lease_up_to_its_limit_and_a_larger_one_goes_alone(ledger: Ledger) -> None:
    for n in range(2):
        await finished(ledger, f"a{n}", at=1.0 + n, group="a")
    for n in range(5):
        await finished(ledger, f"b{n}", at=10.0 + n, group="b")
    await finished(ledger, "c", at=20.0)
    assert ids(await lease(ledger, limit=3)) == ["a0", "a1"]
    assert ids(await lease(ledger, limit=3)) == [f"b{n}" for n in range(5)]
    assert ids(await lease(ledger, limit=3)) == ["c"]


async def test_without_whole_groups_every_finished_rollout_is_lent(ledger: Ledger) -> None:
    await finished(ledger, "g0", group="g", group_size=2)
    first = await lease(ledger, whole_groups=False)
    assert ids(first) == ["g0"]
    await finished(ledger, "g1", group="g", group_size=2)
    assert await lease(ledger) is None  # the group's other half is lent at the moment
    assert first is not None
    await ledger.release(first.lease_id)
    assert ids(await lease(ledger)) == ["g0", "g1"]


async def test_a_group_past_its_deadline_is_lent_in_part_naming_what_is_missing(ledger: Ledger) -> None:
    await finished(ledger, "g0", at=10.0, group="g", group_size=4)
    await finished(ledger, "g1", at=30.0, group="g", group_size=4)
    await ledger.create_session(a_session("g2", group="g", group_size=4))
    assert await lease(ledger, now=59.9, group_deadline_seconds=50.0) is None
    assert await lease(ledger, now=60.0) is None
    found = await lease(ledger, now=60.0, group_deadline_seconds=50.0)
    assert ids(found) == ["g0", "g1"]
    assert found is not None
    assert found.incomplete == (IncompleteGroup("g", 4, ("g2",), 1, ()),)


async def test_members_that_end_after_their_groups_deadline_are_lent_later_naming_who_went_before(
    ledger: Ledger,
) -> None:
    """I3: a rollout that took longer than its group waited is neither lost nor makes the others come twice."""
    await finished(ledger, "g0", at=10.0, group="g", group_size=3)
    await ledger.create_session(a_session("g1", group="g", group_size=3))
    first = await lease(ledger, now=60.0, group_deadline_seconds=50.0)
    assert first is not None
    await finish(ledger, "g1", finished_at=70.0)
    assert await lease(ledger, now=71.0) is None  # one is lent at the moment, and nobody gave a deadline
    second = await lease(ledger, now=71.0, group_deadline_seconds=50.0)
    assert ids(second) == ["g1"]
    assert second is not None
    assert second.incomplete == (IncompleteGroup("g", 3, (), 1, ("g0",)),)
    await ledger.acknowledge(first.lease_id)
    await ledger.release(second.lease_id)
    await finished(ledger, "g2", at=80.0, group="g", group_size=3)
    last = await lease(ledger, now=81.0)
    assert ids(last) == ["g1", "g2"]
    assert last is not None
    assert last.incomplete == (IncompleteGroup("g", 3, (), 0, ("g0",)),)


async def test_whole_groups_and_single_rollouts_miss_nothing(ledger: Ledger) -> None:
    await finished(ledger, "g0", group="g", group_size=1)
    await finished(ledger, "alone", at=20.0)
    await finished(ledger, "h0", at=30.0, group="h", group_size=2)
    found = await lease(ledger, group_deadline_seconds=1000.0)
    assert ids(found) == ["g0", "alone"]
    assert found is not None
    assert found.incomplete == ()
    part = await lease(ledger, whole_groups=False)
    assert ids(part) == ["h0"]
    assert part is not None
    assert part.incomplete == ()


async def test_a_member_that_was_dropped_is_named_as_missing(ledger: Ledger) -> None:
    for n in range(2):
        await finished(ledger, f"g{n}", at=float(n), group="g")
    await ledger.drop_rollout("g0", snapshot_of("g0", ["t0"]))
    found = await lease(ledger)
    assert ids(found) == ["g1"]
    assert found is not None
    assert found.incomplete == (IncompleteGroup("g", None, (), 0, (), dropped=("g0",)),)


async def test_a_lease_of_the_callers_id_is_returned_again_as_it_was_made(reopen: Callable[[], Ledger]) -> None:
    """I3: a call whose reply was lost leaves no second lease behind."""
    ledger = reopen()
    await finished(ledger, "g0", at=10.0, group="g", group_size=2)
    await finished(ledger, "b", at=20.0)
    made = await lease(ledger, lease_id="mine", group_deadline_seconds=0.0, limit=1)
    assert ids(made) == ["g0"]
    await ledger.aclose()
    again = reopen()
    assert await lease(again, lease_id="mine", limit=1) == made
    assert ids(await lease(again, limit=5)) == ["b"]
    with pytest.raises(Conflict, match="another consumer"):
        await lease(again, lease_id="mine", consumer="other")
    with pytest.raises(Conflict, match="has ended"):
        await lease(again, lease_id="mine", now=160.0)
    await again.release("mine")
    with pytest.raises(Conflict, match="has ended"):
        await lease(again, lease_id="mine")
    assert await lease(again, lease_id="theirs", consumer="nobody", labels={"no": "such"}) is None
    await again.aclose()


async def test_an_extended_lease_keeps_its_rollouts_for_longer(ledger: Ledger) -> None:
    await finished(ledger, "s")
    found = await lease(ledger, now=100.0)
    assert found is not None
    assert await ledger.extend_lease(found.lease_id, lease_seconds=60.0, now=150.0) == 210.0
    assert await ledger.extend_lease(found.lease_id, lease_seconds=1.0, now=150.0) == 210.0
    assert await lease(ledger, now=209.9) is None
    assert await ledger.extend_lease(found.lease_id, lease_seconds=60.0, now=220.0) == 280.0  # nobody else took it
    assert ids(await lease(ledger, now=280.0)) == ["s"]
    with pytest.raises(Conflict, match="lent anew"):
        await ledger.extend_lease(found.lease_id, lease_seconds=60.0, now=281.0)
    with pytest.raises(NotFound):
        await ledger.extend_lease("unknown", lease_seconds=60.0, now=0.0)


async def test_a_lease_that_ended_cannot_be_extended(ledger: Ledger) -> None:
    for name, end in (("a", ledger.acknowledge), ("b", ledger.release)):
        await finished(ledger, name)
        found = await lease(ledger)
        assert found is not None
        await end(found.lease_id)
        with pytest.raises(Conflict):
            await ledger.extend_lease(found.lease_id, lease_seconds=60.0, now=100.0)


async def test_consumers_are_those_that_hold_or_have_acknowledged(ledger: Ledger) -> None:
    await finished(ledger, "s")
    assert await ledger.consumers() == []
    for consumer in ("b", "c", "a é"):
        found = await lease(ledger, consumer=consumer)
        assert found is not None
        if consumer == "c":
            await ledger.acknowledge(found.lease_id)
    assert await ledger.consumers() == ["a é", "b", "c"]
    assert await ledger.consumers(limit=2) == ["a é", "b"]


async def test_labels_choose_what_is_lent_and_what_belongs_to_a_group(ledger: Ledger) -> None:
    await finished(ledger, "train", group="g", labels={"split": "train"})
    await ledger.create_session(a_session("test", group="g", labels={"split": "test"}))
    assert await lease(ledger, labels={"split": "other"}) is None
    assert await lease(ledger) is None
    assert ids(await lease(ledger, labels={"split": "train"})) == ["train"]


async def test_counts_add_up(ledger: Ledger) -> None:
    assert await ledger.counts("trainer", 100.0) == FeedCounts(0, 0, 0, 0, 0.0)
    for n in range(4):
        await finished(ledger, f"s{n}", at=10.0 + n)
    first = await lease(ledger, limit=1)
    await lease(ledger, limit=1)
    assert first is not None
    await ledger.acknowledge(first.lease_id)
    await ledger.drop_rollout("s0", snapshot_of("s0", ["t0"]))
    assert await ledger.counts("trainer", 100.0) == FeedCounts(4, 2, 1, 1, 88.0)
    assert await ledger.counts("trainer", 1000.0) == FeedCounts(4, 3, 0, 1, 989.0)
    await ledger.drop_rollout("s3", snapshot_of("s3", ["t0"]))
    assert (await ledger.counts("trainer", 100.0)).finished == 3


# ---- what is stored ----


async def test_an_open_session_is_past_its_time_to_live_when_nothing_was_recorded_for_as_long(ledger: Ledger) -> None:
    made = time.time()
    await ledger.create_session(a_session("young", ttl_seconds=1000.0, created_at=made))
    await ledger.create_session(a_session("idle", ttl_seconds=10.0, created_at=made - 100.0))
    await ledger.create_session(a_session("busy", ttl_seconds=10.0, created_at=made - 200.0))
    await ledger.create_session(a_session("ended", ttl_seconds=10.0, created_at=made - 300.0))
    await ledger.create_session(a_session("endless", created_at=made - 400.0))
    await ledger.append_turn(a_turn("busy"), None)
    await finish(ledger, "ended")
    assert await ledger.sessions_past_ttl(made, limit=10) == ["idle"]
    assert await ledger.sessions_past_ttl(time.time() + 5.0, limit=10) == ["idle"]
    assert await ledger.sessions_past_ttl(time.time() + 11.0, limit=10) == ["busy", "idle"]
    assert await ledger.sessions_past_ttl(time.time() + 11.0, limit=1) == ["busy"]
    assert await ledger.sessions_past_ttl(made + 2000.0, limit=10) == ["busy", "idle", "young"]


async def test_stored_rollouts_are_listed_by_age_with_their_size_and_who_is_done(ledger: Ledger) -> None:
    for at, name in ((30.0, "c"), (10.0, "a"), (20.0, "b"), (20.0, "b2"), (40.0, "dropped")):
        await finished(ledger, name, at=at)
    for consumer in ("one", "two"):
        found = await lease(ledger, consumer=consumer, limit=1)
        assert found is not None
        await ledger.acknowledge(found.lease_id)
    await lease(ledger, consumer="two", limit=1)
    await ledger.drop_rollout("dropped", snapshot_of("dropped", ["t0"]))
    listed = await ledger.stored_rollouts(finished_before=30.0, limit=10)
    assert [(rollout.session_id, rollout.acknowledged_by, rollout.leased) for rollout in listed] == [
        ("a", ("one", "two"), False),
        ("b", (), True),
        ("b2", (), False),
    ]
    assert (listed[0].snapshot, listed[0].finished_at) == (snapshot_of("a", ["t0"]), 10.0)
    page = await ledger.stored_rollouts(finished_before=100.0, limit=2, after=listed[0])
    assert page == listed[1:]
    assert [rollout.session_id for rollout in await ledger.stored_rollouts(finished_before=100.0, limit=9)] == [
        "a",
        "b",
        "b2",
        "c",
    ]


async def test_stored_bytes_are_those_of_turns_rows_and_blobs_until_they_are_dropped(ledger: Ledger) -> None:
    assert await ledger.stored_bytes() == 0
    blob = Blob.of(b"x" * 1000, "image/png")
    await ledger.create_session(a_session("a"))
    await ledger.append_turn(a_turn("a"), None)
    turn_bytes = await ledger.stored_bytes()
    assert turn_bytes > 100
    await ledger.create_session(a_session("b"))
    await ledger.append_turn(a_turn("b", experts_start=0, experts_stop=400), routing(0, 400))
    rows_bytes = await ledger.stored_bytes() - 2 * turn_bytes
    assert 400 * 2 * 2 <= rows_bytes < 400 * 2 * 2 + 500
    for name in ("a", "b"):
        await ledger.put_blob(name, blob)
    everything = await ledger.stored_bytes()
    assert everything == 2 * turn_bytes + rows_bytes + 1000
    ended = [await finish(ledger, name) for name in ("a", "b")]
    assert await ledger.stored_bytes() == everything
    late = await ledger.append_late_turn(a_turn("a", 1), None)
    listed = await ledger.stored_rollouts(finished_before=100.0, limit=9)
    assert sum(rollout.num_bytes for rollout in listed) == await ledger.stored_bytes() + 1000
    await ledger.drop_rollout("a", late.snapshot)
    assert await ledger.stored_bytes() == turn_bytes + rows_bytes + 1000
    await ledger.drop_rollout("b", ended[1].snapshot)
    assert await ledger.stored_bytes() == 0


async def test_a_lease_needs_positive_numbers(ledger: Ledger) -> None:
    with pytest.raises(InvalidRequest):
        await lease(ledger, limit=0)


async def test_a_closed_ledger_says_so(reopen: Callable[[], Ledger]) -> None:
    ledger = reopen()
    await ledger.aclose()
    await ledger.aclose()
    with pytest.raises(LedgerError, match="closed"):
        await ledger.create_session(a_session())
    with pytest.raises(LedgerError, match="closed"):
        await ledger.session("s")


async def test_closing_stores_what_was_queued(reopen: Callable[[], Ledger]) -> None:
    """I4."""
    ledger = reopen()
    queued = [asyncio.ensure_future(ledger.create_session(a_session(f"s{n}"))) for n in range(50)]
    await asyncio.sleep(0)
    await ledger.aclose()
    await asyncio.gather(*queued)
    again = reopen()
    assert len(await again.sessions()) == 50
    await again.aclose()
