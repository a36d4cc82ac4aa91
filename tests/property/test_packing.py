"""Property tests of layout and packing: whatever the lengths, nothing moves against anything else (I2, I3)."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.contracts.experts import RoutingShape
from gateway.contracts.generation import LogprobKind
from gateway.contracts.records import FinishRecord, SessionOrigin, SessionRecord
from gateway.contracts.rollouts import FinishedRollout, PickReport
from gateway.contracts.samples import Segment, TurnSpan
from trainer.data.assemble import TrainSample, assemble
from trainer.data.packing import SampleWeights, pack
from trainer.replay.rows import RoutingRows
from trainer.replay.validate import RoutedLayers

ROUTED = RoutedLayers(RoutingShape(num_layers=2, num_experts=16, top_k=2), (0, 1))


def tagged_segment(tag: int, turns: list[tuple[int, int]], *, routed: bool) -> Segment:
    """A segment whose every value tells its token's index: any shift between arrays shows."""
    spans, token_count = [], 0
    sampled: list[bool] = []
    for i, (num_prompt, num_output) in enumerate(turns):
        start, out, stop = token_count, token_count + num_prompt, token_count + num_prompt + num_output
        spans.append(TurnSpan(f"t{i}", start, out, stop, True, "stop", 0.5 + i, 1.0, -1))
        sampled += [False] * num_prompt + [True] * num_output
        token_count = stop
    index = np.arange(token_count)
    mask = np.array(sampled, dtype=np.bool_)
    first = index[:-1] % 15  # two distinct ids of row i, both telling i
    rows = np.stack([np.stack([first, first + 1], -1)] * 2, axis=1).astype(np.uint8)
    return Segment(
        segment_id=f"seg-{tag}",
        turns=tuple(spans),
        token_ids=(1000 * tag + index).astype(np.int32),
        loss_mask=mask,
        rollout_logprobs=np.where(mask, -index.astype(np.float64), np.nan).astype(np.float32),
        policy_version=np.where(mask, index, -1).astype(np.int32),
        routed_experts=rows if routed else None,
        routed_valid=np.full(token_count - 1, routed),
        logprob_kind=LogprobKind.TEMPERATURE_SCALED,
    )


def sample_of(segment: Segment) -> TrainSample:
    session = SessionRecord("s", None, None, None, {}, {}, {}, None, "", SessionOrigin.CREATED, True, created_at=0.0)
    finish = FinishRecord("s", "snap", 1.0, "completed", {}, 1.0)
    trained = int(segment.loss_mask.sum())
    pick = PickReport("all", trained, trained, ())
    (sample,) = assemble(FinishedRollout(session, finish, (segment,), 16, {}, pick), ROUTED)
    return sample


turn_lengths = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4)
segments = st.lists(st.tuples(turn_lengths, st.booleans()), min_size=1, max_size=12)


@given(segments=segments, capacity=st.integers(1, 80))
@settings(max_examples=60)
def test_packing_keeps_every_array_in_step_and_every_trained_token_once(
    segments: list[tuple[list[tuple[int, int]], bool]], capacity: int
) -> None:
    originals = [tagged_segment(tag, turns, routed=routed) for tag, (turns, routed) in enumerate(segments)]
    samples = [sample_of(segment) for segment in originals]
    weights = [SampleWeights(advantage=tag + 1.0, weight=0.5 / (tag + 1)) for tag in range(len(samples))]
    batches = pack(samples, weights, tokens_per_microbatch=capacity)
    seen: list[int] = []
    for batch in batches:
        layout = batch.layout
        assert layout.num_positions <= capacity or len(batch.sample_starts) == 1
        stops = (*batch.sample_starts[1:], layout.num_positions)
        for start, stop in zip(batch.sample_starts, stops, strict=True):
            tag = int(layout.input_ids[start]) // 1000
            original = originals[tag]
            index = np.arange(stop - start)
            seen.append(tag)
            assert stop - start == original.num_tokens - 1
            part = slice(start, stop)
            assert (layout.input_ids[part] == 1000 * tag + index).all()
            assert (layout.labels[part] == 1000 * tag + index + 1).all()
            assert (layout.position_ids[part] == index).all()
            assert (layout.trained[part] == original.loss_mask[1:]).all()
            trained = index[layout.trained[part]] + start
            label_index = trained - start + 1
            assert (layout.rollout_logprobs[trained] == -label_index).all()
            assert (layout.policy_version[trained] == label_index).all()
            assert (batch.advantages[trained] == tag + 1).all()
            assert (batch.weights[trained] == np.float32(0.5 / (tag + 1))).all()
            assert layout.routing is not None
            for layer in ROUTED.layers:
                ids, valid = layout.routing.layer(layer)
                assert (valid[part] == original.routed_valid).all()
                if original.routed_experts is not None:
                    assert (ids[part, 0] == index % 15).all()
            for i, turn in enumerate(original.turns):
                assert (layout.temperature[start + turn.output_start - 1 : start + turn.stop - 1] == 0.5 + i).all()
        assert (batch.advantages[~layout.trained] == 0).all()
        assert (batch.weights[~layout.trained] == 0).all()
    assert sorted(seen) == list(range(len(samples)))
    assert sum(batch.layout.num_trained for batch in batches) == sum(int(s.loss_mask.sum()) for s in originals)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), capacity=st.integers(1, 60))
@settings(max_examples=60)
def test_packing_is_deterministic_and_wastes_less_than_half(lengths: list[int], capacity: int) -> None:
    samples = [sample_of(tagged_segment(tag, [(1, n)], routed=False)) for tag, n in enumerate(lengths)]
    weights = [SampleWeights(advantage=0.0, weight=1.0)] * len(samples)
    first = pack(samples, weights, tokens_per_microbatch=capacity)
    second = pack(samples, weights, tokens_per_microbatch=capacity)
    assert [b.layout.input_ids.tolist() for b in first] == [b.layout.input_ids.tolist() for b in second]
    half_full = [b for b in first if b.layout.num_positions * 2 <= capacity]
    assert len(half_full) <= 1


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    cut=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_the_head_of_joined_rows_is_their_beginning_with_its_validity(
    lengths: list[int], cut: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    ids = random.integers(0, 9, (sum(lengths), 11, 2)).astype(np.uint8)
    valid = random.random((sum(lengths), 11)) < 0.5
    stops = np.cumsum(lengths)
    parts = [
        RoutingRows.of(ids[stop - n : stop], valid[stop - n : stop]) for n, stop in zip(lengths, stops, strict=True)
    ]
    whole = RoutingRows.join(parts)
    num_kept = int(cut * sum(lengths))
    head = whole.head(num_kept)
    assert (whole.num_positions, head.num_positions) == (sum(lengths), num_kept)
    for layer in range(11):
        np.testing.assert_array_equal(head.layer(layer).ids, ids[:num_kept, layer])
        np.testing.assert_array_equal(head.layer(layer).valid, valid[:num_kept, layer])
    assert head.num_valid((0, 3, 10)) == int(valid[:num_kept, [0, 3, 10]].sum())
