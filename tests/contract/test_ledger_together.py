"""What makes the embedded ledger fast changes nothing: statements for a whole batch, quick JSON, its log, indexes."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.contracts.examples import example_turn
from gateway.contracts.records import (
    Attachment,
    MatchTier,
    RootContext,
    SegmentReason,
    SessionOrigin,
    SessionRecord,
    TurnRecord,
)
from gateway.contracts.versions import VersionSpan
from gateway.ledger.reserve import NO_ROOM_TO_MAKE
from gateway.ledger.rows import decode_json, encode_json
from gateway.ledger.sqlite import SqliteBackend, SqliteLedger

NO_LABELS: Mapping[str, str] = {}


def a_session(session_id: str, labels: Mapping[str, str] = NO_LABELS, created_at: float = 1.0) -> SessionRecord:
    return SessionRecord(
        session_id, None, None, None, {}, labels, {}, None, "", SessionOrigin.CREATED, True, created_at
    )


def a_turn(session_id: str, name: int, index: int, parent: int | None, token: int = 4) -> TurnRecord:
    return example_turn(
        index,
        session_id=session_id,
        turn_id=f"t{name}",
        attachment=Attachment(None, None, MatchTier.NONE, SegmentReason.FIRST)
        if parent is None
        else Attachment(f"t{parent}", f"t{parent}", MatchTier.EXACT, None),
        root=RootContext((), {}) if parent is None else None,
        output_token_ids=np.array([token], dtype=np.int32),
        output_logprobs=np.array([-0.5], dtype=np.float32),
        version_spans=(VersionSpan(0, 1, 0),),
    )


class OneByOne(SqliteBackend):
    """A store in which nothing is done together."""

    alone_in_transaction = False


turns = st.builds(
    a_turn,
    st.sampled_from(["open", "ended", "nobody's"]),
    st.integers(0, 5),
    st.integers(0, 5),
    st.none() | st.integers(0, 5),
    st.integers(4, 5),
)
notes = st.tuples(st.sampled_from(["open", "ended"]), st.integers(0, 7), st.booleans(), st.floats(1, 9))
sessions = st.builds(
    a_session,
    st.sampled_from(["open", "ended", "new", "newer", "newest", "nobody's"]),
    st.dictionaries(st.sampled_from(["run", "task"]), st.text(max_size=2), max_size=2),
    st.floats(1, 2),
)
steps = st.lists(st.lists(turns, max_size=8) | st.lists(notes, max_size=8) | st.lists(sessions, max_size=8), max_size=5)


@settings(max_examples=25)
@given(steps)
def test_a_batch_ends_as_its_operations_would_one_by_one(batches: Sequence[Sequence[object]]) -> None:
    """I3, I4: conflicts, taken indexes, sealed sessions and unknown parents are found in company too."""

    async def outcome(kind: type[SqliteBackend], folder: Path) -> object:
        ledger = SqliteLedger(kind.open(folder, read_only=False, lock=None), NO_ROOM_TO_MAKE)
        for name in ("open", "ended"):
            await ledger.create_session(a_session(name))
        await ledger.finish("ended", reward=None, outcome="completed", metadata={}, finished_at=1.0)
        said: list[str] = []
        for batch in batches:
            answers = await asyncio.gather(*(carry_out(ledger, step) for step in batch), return_exceptions=True)
            said += [repr(answer) for answer in answers]
        stored = [(t.turn_id, t.index, t.output_token_ids.tolist(), t.delivered_at) for t in await ledger.turns("open")]
        unknown = list(await ledger.unknown_deliveries("open"))
        made = list(await ledger.sessions())
        labelled = list(await ledger.sessions(labels={"run": ""}))
        await ledger.aclose()
        return said, stored, sorted(unknown), made, labelled

    with tempfile.TemporaryDirectory() as folder:
        together = asyncio.run(outcome(SqliteBackend, Path(folder) / "together"))
        alone = asyncio.run(outcome(OneByOne, Path(folder) / "alone"))
    assert together == alone


async def carry_out(ledger: SqliteLedger, step: object) -> bool | None:
    """Of a session: whether it was made just now."""
    if isinstance(step, SessionRecord):
        return await ledger.create_session(step) is step
    if isinstance(step, TurnRecord):
        await ledger.append_turn(step, None)
    else:
        assert isinstance(step, tuple)
        session_id, name, is_lost, at = step
        await (ledger.mark_lost if is_lost else ledger.mark_delivered)(session_id, f"t{name}", at)
    return None


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters()),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters()), inner, max_size=3),
        max_leaves=8,
    )
)
def test_json_is_read_back_as_it_was_written(value: object) -> None:
    """I8: integers of any size, floats that are none, and lone surrogates too."""
    assert repr(decode_json(encode_json(value))) == repr(value)


def test_a_number_that_is_none_is_stored_as_such() -> None:
    """I9: it must not become null."""
    assert repr(decode_json(encode_json({"x": [float("nan"), 1.0]}))) == "{'x': [nan, 1.0]}"


# ---- the log is emptied beside the writer ----


async def test_the_log_moves_into_the_file_while_the_ledger_is_used(tmp_path: Path) -> None:
    ledger = SqliteLedger.open(tmp_path)
    await ledger.create_session(a_session("s"))
    size = (tmp_path / "ledger.sqlite").stat().st_size
    index = 0
    while (tmp_path / "ledger.sqlite").stat().st_size == size:
        await ledger.append_turn(a_turn("s", index, index, None), None)
        index += 1
        assert index < 20_000  # about twice as many turns as SQLite itself would wait for
    assert len(await ledger.turns("s")) == index
    await ledger.aclose()


# ---- no look-up reads a table from end to end ----


async def test_hot_statements_find_their_rows_by_index(tmp_path: Path) -> None:
    statements: list[str] = []
    ledger = SqliteLedger.open(tmp_path)
    readers = [ledger._idle.get() for _ in range(4)]
    for reader in readers:
        reader._raw.set_trace_callback(statements.append)  # type: ignore[attr-defined]
        ledger._idle.put(reader)
    writer = ledger._writer
    assert writer is not None
    writer._connection._raw.set_trace_callback(statements.append)  # type: ignore[attr-defined]
    await ledger.create_session(a_session("s"))
    await ledger.append_turn(a_turn("s", 0, 0, None), None)
    await ledger.append_turn(a_turn("s", 1, 1, 0), None)
    await ledger.mark_delivered("s", "t0", 2.0)
    await ledger.mark_lost("s", "t1", 2.0)
    for look in (ledger.session, ledger.turns, ledger.deliveries, ledger.unknown_deliveries, ledger.finish_record):
        await look("s")
    await ledger.experts("s", "t0")
    await ledger.sessions(after="a")
    await ledger.sessions_past_ttl(5.0, limit=10)
    finish = await ledger.finish("s", reward=1.0, outcome="completed", metadata={}, finished_at=3.0)
    lease = await ledger.lease(
        consumer="c", limit=1, lease_seconds=9.0, whole_groups=True, labels=None, now=4.0, lease_id="l"
    )
    assert lease is not None
    await ledger.extend_lease("l", lease_seconds=9.0, now=5.0)
    await ledger.acknowledge("l")
    await ledger.drop_rollout("s", finish.snapshot)
    backend = ledger._backend
    connection = backend.connect(read_only=True)
    for statement in {text for text in statements if text.split()[0] in ("SELECT", "UPDATE", "DELETE", "INSERT")}:
        plan = [row[3] for row in connection.execute("EXPLAIN QUERY PLAN " + statement.replace("-Inf", "-9e999"))]
        scans = [
            step for step in plan if step.startswith("SCAN") and "CONSTANT ROW" not in step and "given" not in step
        ]
        ordered = [step for step in scans if "USING" not in step]  # by an index, in its order, with a limit
        assert not ordered, (statement, plan)
    connection.close()
    await ledger.aclose()
