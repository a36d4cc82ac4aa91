"""From turns to packed micro-batches nothing moves against anything else (I2, I3, I5).

Random sessions fork, sample several turns, change weights inside a turn, and record routing as deltas that begin with
the last token of the turn before. Every token of a run has an id of its own, and everything that is known of a token
is worked out from its id: after assembly, trimming, cutting into minibatches and packing it must stand beside it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.contracts.examples import example_turn
from gateway.contracts.experts import RoutedExperts, RoutingShape
from gateway.contracts.generation import LogprobKind
from gateway.contracts.records import (
    Attachment,
    FinishRecord,
    MatchTier,
    RootContext,
    SegmentReason,
    SessionOrigin,
    SessionRecord,
    TurnRecord,
)
from gateway.contracts.rollouts import FinishedRollout, PickReport
from gateway.contracts.samples import Segment
from gateway.contracts.versions import VersionSpan
from gateway.sessions.segments import build_segments
from trainer.algorithms.aggregation import sequence_weights
from trainer.data.batch import StepBatch, step_batch
from trainer.data.packing import PackedBatch, pack
from trainer.data.settings import BatchSettings, Unfit
from trainer.replay.validate import RoutedLayers

ROUTED = RoutedLayers(RoutingShape(num_layers=3, num_experts=64, top_k=2), (0, 2))
NEWEST = 3


@dataclass(slots=True)
class Run:
    """Sessions and what is known of each of their tokens, by its id."""

    rollouts: list[FinishedRollout] = field(default_factory=list)
    segments: dict[str, Segment] = field(default_factory=dict)
    sampled: dict[int, TurnRecord] = field(default_factory=dict)
    versions: dict[int, int] = field(default_factory=dict)
    num_tokens: int = 0

    def new_tokens(self, number: int) -> np.ndarray:  # type: ignore[type-arg]
        start = self.num_tokens
        self.num_tokens += number
        return np.arange(start, start + number, dtype=np.int32)


def logprob_of(token: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    return -token.astype(np.float32) / 16


def experts_of(tokens: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """uint8[tokens, L, K] of input tokens; the dense layer has zeros."""
    ids = np.zeros((len(tokens), 3, 2), dtype=np.uint8)
    ids[:, 0] = np.stack([tokens % 61, tokens % 61 + 1], axis=-1)
    ids[:, 2] = np.stack([tokens % 59 + 2, tokens % 59], axis=-1)
    return ids


def temperature_of(turn: int) -> float:
    return 0.5 + turn / 8


@st.composite
def runs(draw: st.DrawFn) -> Run:
    run = Run()
    for index in range(draw(st.integers(1, 5))):
        add_session(run, draw, f"s{index}", group=f"g{draw(st.integers(0, 2))}")
    return run


def add_session(run: Run, draw: st.DrawFn, name: str, *, group: str) -> None:
    turns: list[TurnRecord] = []
    paths: dict[str, np.ndarray] = {}  # type: ignore[type-arg]  # all tokens up to a turn's end
    experts: dict[str, RoutedExperts | None] = {}
    for index in range(draw(st.integers(1, 5))):
        parent = draw(st.sampled_from([None, *turns])) if turns else None
        before = np.empty(0, np.int32) if parent is None else paths[parent.turn_id]
        prompt = run.new_tokens(draw(st.integers(1 if parent is None else 0, 4)))
        output = run.new_tokens(draw(st.integers(1, 6)))
        whole = np.concatenate([before, prompt, output])
        # A delta begins with the last token of the turn before, which was an input in no earlier turn (I2).
        begins = draw(st.sampled_from([0, max(len(before) - 1, 0)]))
        rows = RoutedExperts(experts_of(whole[begins:-1]), begins) if draw(st.integers(0, 5)) else None
        change, first = draw(st.integers(0, len(output))), draw(st.integers(0, NEWEST - 1))
        turn = example_turn(
            index,
            session_id=name,
            turn_id=f"{name}-{index}",
            attachment=Attachment(
                parent_id=None if parent is None else parent.turn_id,
                follows_id=None,
                tier=MatchTier.NONE if parent is None else MatchTier.EXACT,
                segment_reason=SegmentReason.FIRST if parent is None else None,
            ),
            root=RootContext((), {}) if parent is None else None,
            prompt_token_ids=prompt,
            output_token_ids=output,
            output_logprobs=logprob_of(output),
            version_spans=(VersionSpan(0, change, first), VersionSpan(change, len(output), first + 1)),
            sampling={"temperature": temperature_of(index), "top_p": 1 - index / 64, "top_k": 3 + index},
            logprob_kind=LogprobKind.KEPT_SET,
            num_layers=3,
            num_experts=64,
            top_k=2,
            experts_start=0 if rows is None else rows.start,
            experts_stop=0 if rows is None else rows.stop,
        )
        turns.append(turn)
        paths[turn.turn_id], experts[turn.turn_id] = whole, rows
        run.sampled |= dict.fromkeys(output.tolist(), turn)
        run.versions |= {int(token): first + (i >= change) for i, token in enumerate(output)}
    segments = build_segments(turns, experts)
    run.segments |= {segment.segment_id: segment for segment in segments}
    session = SessionRecord(name, group, None, None, {}, {}, {}, None, "", SessionOrigin.CREATED, True, created_at=0.0)
    finish = FinishRecord(name, "snap", float(draw(st.integers(0, 3))), "completed", {}, 1.0)
    num_trained = sum(int(segment.loss_mask.sum()) for segment in segments)
    pick = PickReport("all", num_trained, num_trained, ())
    run.rollouts.append(FinishedRollout(session, finish, segments, 64, {}, pick))


policies = st.builds(
    BatchSettings,
    minibatches=st.integers(1, 3),
    max_staleness=st.integers(0, NEWEST),
    stale=st.sampled_from([Unfit.DROP, Unfit.MASK]),
    max_tokens=st.sampled_from([0, 2, 7, 12]),
    overlong=st.sampled_from([Unfit.DROP, Unfit.MASK]),
    zero_variance=st.sampled_from([Unfit.KEEP, Unfit.DROP]),
    max_fallback_share=st.sampled_from([0.0, 0.5, 1.0]),
)


def batch_of(run: Run, policy: BatchSettings) -> StepBatch:
    return step_batch(
        run.rollouts,
        routed=ROUTED,
        policy_version=NEWEST,
        settings=policy,
        # Each rollout's own number, so that a weight of another rollout shows.
        estimator=lambda rewards_R, group_R: torch.arange(1.0, len(rewards_R) + 1),
        aggregate=sequence_weights,
        seed=1,
        step=2,
    )


@given(run=runs(), policy=policies, capacity=st.integers(1, 60))
@settings(max_examples=150)
def test_whatever_is_known_of_a_token_stands_beside_it_in_every_micro_batch(
    run: Run, policy: BatchSettings, capacity: int
) -> None:
    batch = batch_of(run, policy)
    trained: Counter[int] = Counter()
    for minibatch in batch.minibatches:
        for packed in pack(minibatch.samples, minibatch.weights, tokens_per_microbatch=capacity):
            trained.update(packed.layout.labels[packed.layout.trained].tolist())
            check_tokens(run, packed)
            check_samples(run, packed, policy)
    assert set(trained.values()) <= {1}
    check_account(run, batch, policy, set(trained))


def check_tokens(run: Run, packed: PackedBatch) -> None:
    """Everything position by position, from the ids of input token and label."""
    layout = packed.layout
    for position, label in enumerate(layout.labels.tolist()):
        turn = run.sampled.get(label)
        found = (
            layout.policy_version[position],
            layout.temperature[position],
            layout.top_p[position],
            layout.top_k[position],
        )
        if turn is None:
            assert found == (-1, 1.0, 1.0, 0)
            assert not layout.trained[position]
            assert np.isnan(layout.rollout_logprobs[position])
        else:
            expected = (
                run.versions[label],
                temperature_of(turn.index),
                1 - turn.index / 64,
                3 + turn.index,
            )
            assert found == expected
            assert layout.rollout_logprobs[position] == logprob_of(np.array(label))
    assert layout.routing is not None
    expected_rows = experts_of(layout.input_ids)
    for layer in ROUTED.layers:
        ids, valid = layout.routing.layer(layer)
        np.testing.assert_array_equal(ids[valid], expected_rows[valid, layer])
    assert not layout.routing.layer(1).valid.any()


def check_samples(run: Run, packed: PackedBatch, policy: BatchSettings) -> None:
    """Sample by sample: where it starts, that it is a segment's beginning, its rows, and what it counts with."""
    layout, stops = packed.layout, (*packed.sample_starts[1:], packed.layout.num_positions)
    for i, (start, stop, origin) in enumerate(zip(packed.sample_starts, stops, packed.origins, strict=True)):
        segment, part = run.segments[origin.segment_id], slice(start, stop)
        length = segment.num_tokens if not policy.max_tokens else min(segment.num_tokens, policy.max_tokens)
        assert stop - start == length - 1
        assert (layout.position_ids[part] == np.arange(length - 1)).all()
        assert (packed.sample_index[part] == i).all()
        np.testing.assert_array_equal(layout.input_ids[part], segment.token_ids[: length - 1])
        np.testing.assert_array_equal(layout.labels[part], segment.token_ids[1:length])
        fresh = NEWEST - segment.policy_version[1:length] <= policy.max_staleness
        np.testing.assert_array_equal(layout.trained[part], segment.loss_mask[1:length] & fresh)
        assert layout.routing is not None
        valid = layout.routing.layer(0).valid[part]
        np.testing.assert_array_equal(valid, segment.routed_valid[: length - 1])
        assert 1 - valid.mean() <= policy.max_fallback_share
        counted = layout.trained[part]
        assert (
            len(set(packed.advantages[part][counted].tolist())) == len(set(packed.weights[part][counted].tolist())) == 1
        )
        assert not packed.advantages[part][~counted].any()
        assert not packed.weights[part][~counted].any()


def check_account(run: Run, batch: StepBatch, policy: BatchSettings, trained: set[int]) -> None:
    """I3: every sampled token is trained, left out for one reason, or of a dropped rollout; and weights are whole."""
    sampled = sum(rollout.num_sampled_tokens for rollout in run.rollouts)
    assert batch.tokens_sampled + batch.tokens_dropped == sampled == len(run.sampled)
    assert batch.tokens_trained == len(trained)
    assert batch.rollouts + batch.dropped_rollouts == len(run.rollouts)
    in_batch = {sample.session_id for part in batch.minibatches for sample in part.samples}
    mine = {token for token, turn in run.sampled.items() if turn.session_id in in_batch}
    assert trained <= mine
    if policy.stale is Unfit.DROP and policy.overlong is Unfit.DROP:
        assert trained == mine
        assert not batch.left_out_by
    group_of = {rollout.session.session_id: rollout.session.group for rollout in run.rollouts}
    groups = [{group_of[sample.session_id] for sample in part.samples} for part in batch.minibatches]
    assert sum(map(len, groups)) == len(set().union(*groups))
    for part in batch.minibatches:
        weight_of = {s.session_id: (w.weight, w.advantage) for s, w in zip(part.samples, part.weights, strict=True)}
        assert len({advantage for _, advantage in weight_of.values()}) == len(weight_of)
        for name, (weight, _) in weight_of.items():
            tokens = sum(sample.layout.num_trained for sample in part.samples if sample.session_id == name)
            assert np.isclose(weight * tokens, 1 / len(weight_of))
