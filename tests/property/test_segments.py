"""Segments of random turn trees: every trainable sampled token is trained once, arrays line up (I1, I2, I3, I5, I9).

The trees fork, have untrainable turns, missing log-probs, missing and damaged routing rows, and versions that change
inside a turn. What each token and row should be is worked out here from the tree itself, path by path.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.contracts.errors import ExpertsMismatch, LedgerCorrupt
from gateway.contracts.examples import example_turn
from gateway.contracts.experts import RoutedExperts
from gateway.contracts.generation import LogprobKind
from gateway.contracts.records import Attachment, FinishRecord, MatchTier, RootContext, SegmentReason, TurnRecord
from gateway.contracts.samples import Segment
from gateway.contracts.versions import VersionSpan, expand_spans
from gateway.sessions.picks import BUILT_IN, DeliveredTurns, OperatorPick, Pick, pick_turns, trainable_tokens
from gateway.sessions.segments import build_segments, sealed_turns, segment_leaves, tree_reports

NUM_LAYERS, NUM_EXPERTS, TOP_K = 3, 8, 2
DENSE_LAYER = 1


@dataclass(frozen=True, slots=True)
class Drawn:
    """A tree: its turns, and the routing rows stored with them."""

    turns: list[TurnRecord]
    experts: dict[str, RoutedExperts | None]


def a_turn(index: int, parent: TurnRecord | None, **changes: object) -> TurnRecord:
    record = example_turn(
        index,
        attachment=Attachment(
            parent_id=None if parent is None else parent.turn_id,
            follows_id=None,
            tier=MatchTier.NONE if parent is None else MatchTier.EXACT,
            segment_reason=SegmentReason.FIRST if parent is None else None,
        ),
        root=RootContext((), {}) if parent is None else None,
        prompt_token_ids=np.array([1000 + index], dtype=np.int32),
        output_token_ids=np.array([2000 + index], dtype=np.int32),
        output_logprobs=np.array([-1.0], dtype=np.float32),
        version_spans=(VersionSpan(0, 1, 0),),
        sampling={"temperature": 0.5, "top_k": 20},
        num_layers=NUM_LAYERS,
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
    )
    return replace(record, **changes)


def rows_between(draw: st.DrawFn, start: int, stop: int) -> RoutedExperts:
    """Rows with distinct ids in the layers that route, zeros in the dense one, and now and then an uncaptured row."""
    seed = draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    ids = generator.permuted(np.tile(np.arange(NUM_EXPERTS, dtype=np.uint8), (stop - start, NUM_LAYERS, 1)), axis=-1)
    ids = np.ascontiguousarray(ids[..., :TOP_K])
    ids[:, DENSE_LAYER] = 0
    ids[generator.random(stop - start) < 0.2] = 0
    return RoutedExperts(ids, start)


@st.composite
def trees(draw: st.DrawFn) -> Drawn:
    turns: list[TurnRecord] = []
    experts: dict[str, RoutedExperts | None] = {}
    ends: dict[str, int] = {}
    for index in range(draw(st.integers(0, 12))):
        parent = draw(st.sampled_from([None, *turns]))
        follows = draw(st.sampled_from([parent, *turns]))
        begin = 0 if parent is None else ends[parent.turn_id]
        num_prompt = draw(st.integers(1 if parent is None else 0, 4))
        num_output = draw(st.integers(0, 5))
        stop = begin + num_prompt + num_output
        change = draw(st.integers(0, num_output))
        rows = None
        if stop > 1 and draw(st.booleans()):
            rows = rows_between(draw, draw(st.integers(0, stop - 1)), stop - 1)
        turn = a_turn(
            index,
            parent,
            prompt_token_ids=np.arange(num_prompt, dtype=np.int32) + 100 * index,
            output_token_ids=np.arange(num_output, dtype=np.int32) + 100 * index + 50,
            output_logprobs=np.array(
                draw(st.lists(st.sampled_from([-0.5, -2.0, np.nan]), min_size=num_output, max_size=num_output)),
                dtype=np.float32,
            ),
            version_spans=(VersionSpan(0, change, index), VersionSpan(change, num_output, index + 1)),
            logprob_kind=draw(st.sampled_from([LogprobKind.TEMPERATURE_SCALED] * 3 + [LogprobKind.RAW])),
            untrainable_reason=draw(st.sampled_from([None, None, None, "junction"])),
            experts_start=0 if rows is None else rows.start,
            experts_stop=0 if rows is None else rows.stop,
            delivered_at=draw(st.sampled_from([None, 5.0, float(index), 100.0 - index])),
        )
        attachment = replace(turn.attachment, follows_id=None if follows is None else follows.turn_id)
        turn = replace(turn, attachment=attachment)
        turns.append(turn)
        experts[turn.turn_id] = rows
        ends[turn.turn_id] = stop
    return Drawn(turns, experts)


def turn_of(drawn: Drawn, turn_id: str) -> TurnRecord:
    return next(turn for turn in drawn.turns if turn.turn_id == turn_id)


def path_of(drawn: Drawn, segment: Segment) -> list[TurnRecord]:
    """Root … leaf, walked upwards from the segment's last turn."""
    turn = turn_of(drawn, segment.turns[-1].turn_id)
    path = [turn]
    while turn.attachment.parent_id is not None:
        turn = turn_of(drawn, turn.attachment.parent_id)
        path.insert(0, turn)
    return path


@given(trees())
@settings(max_examples=200)
def test_every_trainable_token_is_trained_in_exactly_one_segment(drawn: Drawn) -> None:
    """I3: whatever the agent did to its history."""
    segments = build_segments(drawn.turns, drawn.experts)
    trained: Counter[tuple[str, int]] = Counter()
    for segment in segments:
        for span in segment.turns:
            positions = np.flatnonzero(segment.loss_mask[span.output_start : span.stop])
            trained.update((span.turn_id, int(position)) for position in positions)
            assert not segment.loss_mask[span.start : span.output_start].any()
            assert span.trained or not positions.size
        assert segment.loss_mask.any()
    expected = {
        (turn.turn_id, int(position)) for turn in drawn.turns for position in np.flatnonzero(trainable_tokens(turn))
    }
    assert set(trained) == expected
    assert set(trained.values()) <= {1}
    assert sum(int(segment.loss_mask.sum()) for segment in segments) == tree_reports(drawn.turns)["trainable_tokens"]


def every_other(turns: Sequence[TurnRecord]) -> list[str]:
    return [turn.turn_id for turn in turns[::2]]


PICKS = [*BUILT_IN, OperatorPick("mine:every_other", every_other)]


@given(trees(), st.sampled_from(PICKS))
@settings(max_examples=300)
def test_every_picked_token_is_trained_once_and_every_other_has_a_reason(drawn: Drawn, pick: Pick) -> None:
    """I3: sampled tokens = trained tokens + tokens left out by reason, whatever is picked."""
    picked = pick_turns(drawn.turns, pick)
    segments = build_segments(drawn.turns, drawn.experts, picked=picked.turn_ids)
    trained = Counter(
        (span.turn_id, int(position))
        for segment in segments
        for span in segment.turns
        for position in np.flatnonzero(segment.loss_mask[span.output_start : span.stop])
    )
    expected = {
        (turn.turn_id, int(position))
        for turn in drawn.turns
        if turn.turn_id in picked.turn_ids
        for position in np.flatnonzero(trainable_tokens(turn))
    }
    assert set(trained) == expected
    assert set(trained.values()) <= {1}
    report = picked.report
    assert sum(int(segment.loss_mask.sum()) for segment in segments) == report.num_trained_tokens
    assert report.num_sampled_tokens == sum(len(turn.output_token_ids) for turn in drawn.turns)
    assert report.num_sampled_tokens == report.num_trained_tokens + sum(report.left_out_tokens.values())
    assert len(segment_leaves(drawn.turns, picked=picked.turn_ids)) == len(segments)
    assert not any(left.num_turns == 0 for left in report.left_out)


@given(trees())
@settings(max_examples=200)
def test_picks_keep_what_was_seen_and_the_path_to_the_last_delivery(drawn: Drawn) -> None:
    """I3, told again from the definitions: seen is delivered or gone on from, the final path is a chain of links."""
    links = {turn.turn_id: {turn.attachment.parent_id, turn.attachment.follows_id} for turn in drawn.turns}
    every, delivered, final = (pick_turns(drawn.turns, pick).turn_ids for pick in BUILT_IN)
    assert every == links.keys()
    gone_on_from = set().union(*links.values())
    assert delivered == {t.turn_id for t in drawn.turns if t.delivered_at is not None or t.turn_id in gone_on_from}
    assert final <= delivered
    assert bool(final) == bool(delivered)
    times = {turn.turn_id: (turn.delivered_at, turn.index) for turn in drawn.turns if turn.delivered_at is not None}
    if times:
        last = max(times, key=times.__getitem__)
        assert last in final
        for turn_id in final - {last}:
            assert any(turn_id in links[other] for other in final), "every other turn is gone on from within the path"
        assert all(link is None or link in final for turn_id in final for link in links[turn_id])


@given(trees())
@settings(max_examples=200)
def test_a_segment_is_the_concatenation_of_its_path(drawn: Drawn) -> None:
    """I1, I2, I5: ids, log-probs and versions are those recorded, in place; nothing else is filled in."""
    for segment in build_segments(drawn.turns, drawn.experts):
        path = path_of(drawn, segment)
        assert [span.turn_id for span in segment.turns] == [turn.turn_id for turn in path]
        parts = [part for turn in path for part in (turn.prompt_token_ids, turn.output_token_ids)]
        np.testing.assert_array_equal(segment.token_ids, np.concatenate(parts))
        assert [segment.turns[0].start, *(s.stop for s in segment.turns)][:-1] == [s.start for s in segment.turns]
        sampled = np.zeros(segment.num_tokens, dtype=np.bool_)
        for turn, span in zip(path, segment.turns, strict=True):
            sampled[span.output_start : span.stop] = True
            found = segment.rollout_logprobs[span.output_start : span.stop]
            np.testing.assert_array_equal(found, turn.output_logprobs)
            versions = expand_spans(turn.version_spans, len(turn.output_token_ids))
            np.testing.assert_array_equal(segment.policy_version[span.output_start : span.stop], versions)
            assert (span.temperature, span.top_p, span.top_k) == (0.5, 1.0, 20)
            assert not span.trained or turn.logprob_kind is segment.logprob_kind
        assert np.isnan(segment.rollout_logprobs[~sampled]).all()
        assert (segment.policy_version[~sampled] == -1).all()


@given(trees())
@settings(max_examples=200)
def test_routing_rows_stand_at_their_tokens_and_gaps_are_marked(drawn: Drawn) -> None:
    """I2, I9: the first sound row of a position along the path is the one; where there is none, nothing is invented."""
    seen = [rows.ids for rows in drawn.experts.values() if rows is not None and len(rows.ids)]
    for segment in build_segments(drawn.turns, drawn.experts):
        assert segment.routed_valid.dtype == np.bool_
        if not seen:
            assert segment.routed_experts is None
            assert not segment.routed_valid.any()
            continue
        assert segment.routed_experts is not None
        assert segment.routed_experts.dtype == np.uint8
        for position in range(segment.num_tokens - 1):
            expected = None
            for turn in path_of(drawn, segment):
                rows = drawn.experts[turn.turn_id]
                if rows is not None and expected is None and rows.start <= position < rows.stop:
                    row = rows.ids[position - rows.start]
                    expected = row if row.any() else None
            assert bool(segment.routed_valid[position]) == (expected is not None)
            np.testing.assert_array_equal(segment.routed_experts[position], 0 if expected is None else expected)


def some_rows(start: int, stop: int, *, first: int = 0) -> RoutedExperts:
    ids = np.empty((stop - start, NUM_LAYERS, TOP_K), dtype=np.uint8)
    ids[..., 0], ids[..., 1] = first, first + 1
    return RoutedExperts(ids, start)


def test_the_last_sampled_token_gets_its_row_from_the_next_turn() -> None:
    """I2: it became an input only there."""
    one = a_turn(0, None, experts_start=0, experts_stop=1)
    two = a_turn(1, one, experts_start=1, experts_stop=3)
    experts = {"t0": some_rows(0, 1, first=2), "t1": some_rows(1, 3, first=4)}
    (alone,) = build_segments([one], experts)
    assert alone.num_tokens == 2
    assert alone.routed_valid.tolist() == [True]
    (segment,) = build_segments([one, two], experts)
    assert segment.routed_experts is not None
    assert segment.routed_experts[:, 0, 0].tolist() == [2, 4, 4]


def test_a_shared_prefix_trains_with_the_earliest_leaf_that_trains() -> None:
    """I3: turns behind the last trained one are left out, and do not take the prefix with them."""
    root = a_turn(0, None)
    unproved = a_turn(1, root, untrainable_reason="junction")
    one, two = a_turn(2, root), a_turn(3, root)
    first, second = build_segments([root, unproved, one, two], {})
    assert [(span.turn_id, span.trained) for span in first.turns] == [("t0", True), ("t2", True)]
    assert [(span.turn_id, span.trained) for span in second.turns] == [("t0", False), ("t3", True)]


def test_a_prefix_whose_earliest_leaf_is_not_picked_trains_with_the_first_that_is() -> None:
    """I3: an unpicked turn in the middle is context; an unpicked leaf does not take the prefix with it."""
    root = a_turn(0, None)
    unpicked, one = a_turn(1, root), a_turn(2, root)
    below = a_turn(3, one)
    (segment,) = build_segments([root, unpicked, one, below], {}, picked={"t0", "t3"})
    assert [(span.turn_id, span.trained) for span in segment.turns] == [("t0", True), ("t2", False), ("t3", True)]
    assert segment.loss_mask.tolist() == [False, True, False, False, False, True]


def test_what_was_delivered_after_the_seal_was_not_seen_by_then() -> None:
    """I3: a snapshot trains the same tokens whenever it is read."""
    turns = [a_turn(i, None, delivered_at=at) for i, at in enumerate((4.0, 5.0, 6.0, None))]
    finish = FinishRecord("s", "snap", 1.0, "completed", {}, finished_at=5.0)
    for read, expected in (
        (sealed_turns(turns, finish), {"t0", "t1"}),
        (sealed_turns(turns, None), {"t0", "t1", "t2"}),
    ):
        assert pick_turns(read, DeliveredTurns()).turn_ids == expected


def test_rows_of_zeros_everywhere_are_missing_rows() -> None:
    """I9: an engine that captured nothing is not taken for one whose experts were all number 0."""
    turn = a_turn(0, None, experts_start=0, experts_stop=1)
    zeros = RoutedExperts(np.zeros((1, NUM_LAYERS, TOP_K), dtype=np.uint8), 0)
    (segment,) = build_segments([turn], {"t0": zeros})
    assert not segment.routed_valid.any()


def test_rows_past_the_last_input_token_are_refused() -> None:
    """I2: there is no row for a token that was never an input."""
    turn = a_turn(0, None, experts_start=0, experts_stop=2)
    with pytest.raises(ExpertsMismatch, match="session s turn 0: rows end at 2"):
        build_segments([turn], {"t0": some_rows(0, 2)})


def test_rows_of_two_models_in_one_session_are_refused() -> None:
    one = a_turn(0, None, experts_start=0, experts_stop=1)
    two = a_turn(1, None, experts_start=0, experts_stop=1, num_experts=16)
    with pytest.raises(ExpertsMismatch, match="turn 1"):
        build_segments([one, two], {"t0": some_rows(0, 1), "t1": some_rows(0, 1)})


def test_a_parent_that_is_missing_is_named() -> None:
    turn = a_turn(1, a_turn(0, None))
    with pytest.raises(LedgerCorrupt, match="session s turn 1: its parent t0"):
        build_segments([turn], {})


def test_reports_count_what_the_tree_is_made_of() -> None:
    root = a_turn(0, None)
    turns = [root, a_turn(1, root, untrainable_reason="junction"), a_turn(2, None)]
    assert tree_reports(turns) == {
        "turns": 3,
        "tiers": {"exact": 1, "none": 2},
        "segment_reasons": {"first": 2},
        "untrainable": {"junction": 1},
        "cache_flags": {},
        "sampled_tokens": 3,
        "trainable_tokens": 2,
    }
