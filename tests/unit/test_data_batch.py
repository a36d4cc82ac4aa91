"""What a step trains on: every policy of `[batch]`, its account, its groups and its optimiser steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from gateway.contracts.errors import ConfigurationError, IntegrityError, TrainingError
from gateway.contracts.rollouts import FinishedRollout
from tests.tagged_rollouts import ROUTED, Turn, tagged_rollout, tagged_segment
from trainer.algorithms.advantages import Estimator, dr_grpo
from trainer.algorithms.aggregation import Aggregation, constant_weights, sequence_weights, token_weights
from trainer.data.assemble import TrainSample
from trainer.data.batch import StepBatch, step_batch
from trainer.data.settings import BatchSettings, Unfit
from trainer.replay.validate import RoutedLayers


def batch_of(
    rollouts: Sequence[FinishedRollout],
    settings: BatchSettings = BatchSettings(),  # noqa: B008  # frozen
    *,
    policy_version: int = 0,
    routed: RoutedLayers | None = ROUTED,
    estimator: Estimator = dr_grpo,
    aggregate: Aggregation = token_weights,
    seed: int = 0,
    step: int = 0,
) -> StepBatch:
    return step_batch(
        rollouts,
        routed=routed,
        policy_version=policy_version,
        settings=settings,
        estimator=estimator,
        aggregate=aggregate,
        seed=seed,
        step=step,
    )


def one(
    tag: int, *turns: Turn, group: str = "g", reward: float | None = 1.0, outcome: str = "completed"
) -> FinishedRollout:
    segment = tagged_segment(tag, turns or (Turn(3, 6),))
    return tagged_rollout(segment, session_id=f"s{tag}", group=group, reward=reward, outcome=outcome)


def samples_of(batch: StepBatch) -> list[TrainSample]:
    return [sample for minibatch in batch.minibatches for sample in minibatch.samples]


def advantages_of(batch: StepBatch) -> dict[str, float]:
    return {
        sample.session_id: weight.advantage
        for minibatch in batch.minibatches
        for sample, weight in zip(minibatch.samples, minibatch.weights, strict=True)
    }


def test_rollouts_without_a_lesson_are_dropped_with_the_first_reason_that_holds() -> None:
    rollouts = [
        one(0, outcome="failed", reward=None),
        one(1, outcome="abandoned"),
        one(2, reward=None),
        tagged_rollout(tagged_segment(3, [Turn(2, 4)]), session_id="s3", complete=False),
        one(4),
    ]
    batch = batch_of(rollouts)
    assert batch.dropped_by == {"outcome": 2, "no_reward": 1, "incomplete": 1}
    assert batch.dropped_tokens_by == {"outcome": 12, "no_reward": 6, "incomplete": 4}
    assert [sample.session_id for sample in samples_of(batch)] == ["s4"]
    assert batch_of(rollouts, BatchSettings(train_incomplete=True)).rollouts == 2


def test_stale_tokens_drop_their_rollout_or_lose_their_loss_and_stay_context() -> None:
    """I5: age is a token's own; a token newer than the trainer is of another history."""
    mixed = one(1, Turn(3, 6, versions=(3, 3, 4, 5)))
    newer, fresh, old = one(2, Turn(3, 6, versions=(6,))), one(3, Turn(3, 6, versions=(5,))), one(4)
    rollouts = [mixed, newer, fresh, old]
    dropped = batch_of(rollouts, BatchSettings(max_staleness=1), policy_version=5)
    assert (dropped.dropped_by, dropped.rollouts) == ({"stale": 3}, 1)
    masked = batch_of(rollouts, BatchSettings(max_staleness=1, stale=Unfit.MASK), policy_version=5)
    assert (masked.dropped_by, masked.dropped_tokens_by, masked.left_out_by) == (
        {"stale": 2},
        {"stale": 12},
        {"stale": 2},
    )
    sample = samples_of(masked)[0]
    assert sample.layout.num_positions == 8
    assert sample.layout.policy_version[sample.layout.trained].tolist() == [4, 5, 5, 5]
    assert (masked.staleness_mean, masked.staleness_max) == (0.1, 1)


def test_a_sample_beyond_the_limit_drops_its_rollout_or_is_cut_there() -> None:
    """Memory is bounded: nothing behind the limit is in the batch, not even as context."""
    long, short = one(1, Turn(3, 6), Turn(2, 5)), one(2)
    dropped = batch_of([long, short], BatchSettings(max_tokens=10))
    assert (dropped.dropped_by, dropped.dropped_tokens_by) == ({"overlong": 1}, {"overlong": 11})
    masked = batch_of([long, short], BatchSettings(max_tokens=13, overlong=Unfit.MASK))
    cut, whole = (sample.layout for sample in samples_of(masked))
    assert (cut.num_positions, whole.num_positions) == (12, 8)
    assert cut.labels[cut.trained].tolist() == [1003, 1004, 1005, 1006, 1007, 1008, 1011, 1012]
    assert cut.routing is not None
    assert cut.routing.num_positions == 12
    assert (masked.left_out_by, masked.tokens_trained) == ({"overlong": 3}, 14)
    assert batch_of([long], BatchSettings(max_tokens=16)).tokens_trained == 11
    context_behind = one(3, Turn(3, 6), Turn(2, 5, trained=False))
    (sample,) = samples_of(batch_of([context_behind], BatchSettings(max_tokens=12)))
    assert (sample.layout.num_positions, sample.layout.num_trained) == (11, 6)
    for limit in (1, 2):
        assert batch_of([long], BatchSettings(max_tokens=limit)).dropped_by == {"overlong": 1}
    nothing_left = batch_of([long], BatchSettings(max_tokens=3, overlong=Unfit.MASK))
    assert (nothing_left.dropped_by, nothing_left.minibatches) == ({"overlong": 1}, ())


def test_truncated_rollouts_train_or_count_in_the_baseline_only_or_not_at_all() -> None:
    cut, whole = one(1, reward=0.0, outcome="truncated"), one(2)
    kept = batch_of([cut, whole])
    assert advantages_of(kept) == {"s1": -0.5, "s2": 0.5}
    masked = batch_of([cut, whole], BatchSettings(truncated=Unfit.MASK))
    assert advantages_of(masked) == {"s2": 0.5}
    assert (masked.rollouts, masked.left_out_by, masked.dropped_by) == (2, {"truncated": 6}, {})
    dropped = batch_of([cut, whole], BatchSettings(truncated=Unfit.DROP))
    assert advantages_of(dropped) == {"s2": 0.0}
    assert (dropped.rollouts, dropped.dropped_by) == (1, {"truncated": 1})


def test_groups_of_equal_rewards_stay_or_go_and_are_counted_either_way() -> None:
    rollouts = [one(1), one(2), one(3, group="h", reward=0.0), one(4, group="h")]
    kept = batch_of(rollouts)
    assert (kept.zero_variance_groups, kept.groups, kept.tokens_trained) == (1, 2, 24)
    assert advantages_of(kept)["s1"] == 0.0
    dropped = batch_of(rollouts, BatchSettings(zero_variance=Unfit.DROP))
    assert (dropped.zero_variance_groups, dropped.groups, dropped.dropped_by) == (1, 1, {"zero_variance": 2})
    assert [sample.session_id for sample in samples_of(dropped)] == ["s3", "s4"]


def test_a_sample_with_too_many_unusable_routing_rows_drops_its_rollout() -> None:
    """I9, I10: missing rows count like corrupt ones, by layer; without replay nobody looks at them."""
    rollout = one(1, Turn(4, 7))
    (segment,) = rollout.segments
    assert segment.routed_experts is not None
    rows = segment.routed_experts.copy()
    rows[3, 2] = 0
    rows[6, 0] = 9
    valid = segment.routed_valid.copy()
    valid[8] = False
    broken = replace(rollout, segments=(replace(segment, routed_experts=rows, routed_valid=valid),))
    share = (1 + 1 + 2) / (10 * 2)
    assert batch_of([broken], BatchSettings(max_fallback_share=share)).rollouts == 1
    dropped = batch_of([broken], BatchSettings(max_fallback_share=share - 0.01))
    assert (dropped.dropped_by, dropped.dropped_tokens_by) == ({"routing": 1}, {"routing": 7})
    unrecorded = tagged_rollout(tagged_segment(2, [Turn(2, 5)], routed=False))
    assert batch_of([unrecorded]).dropped_by == {"routing": 1}
    assert batch_of([unrecorded], BatchSettings(max_fallback_share=1.0)).rollouts == 1
    (sample,) = samples_of(batch_of([broken], BatchSettings(max_fallback_share=0.0), routed=None))
    assert sample.layout.routing is None


@pytest.mark.parametrize(
    ("aggregate", "weights"),
    [
        (token_weights, {"a": 1 / 16, "b": 1 / 16}),
        (sequence_weights, {"a": 1 / (2 * 10), "b": 1 / (2 * 6)}),
        (partial(constant_weights, constant_tokens=50), {"a": 1 / (2 * 50), "b": 1 / (2 * 50)}),
    ],
    ids=["token", "sequence", "constant"],
)
def test_segments_of_a_rollout_share_its_advantage_and_its_denominator(
    aggregate: Aggregation, weights: dict[str, float]
) -> None:
    """Denominators are over whole rollouts: a branch is no rollout of its own."""
    branches = (tagged_segment(1, [Turn(3, 4)]), tagged_segment(2, [Turn(2, 6)]))
    rollouts = [
        tagged_rollout(*branches, session_id="a", reward=0.0),
        tagged_rollout(tagged_segment(3, [Turn(3, 6)]), session_id="b"),
    ]
    (minibatch,) = batch_of(rollouts, aggregate=aggregate).minibatches
    found = list(zip((s.session_id for s in minibatch.samples), minibatch.weights, strict=True))
    assert [name for name, _ in found] == ["a", "a", "b"]
    for name, weight in found:
        assert weight.weight == pytest.approx(weights[name])
        assert weight.advantage == (0.5 if name == "b" else -0.5)


def test_minibatches_hold_whole_groups_about_equally_large_with_denominators_of_their_own() -> None:
    rollouts = [one(10 * g + i, Turn(3, 5 + 3 * g + i), group=f"g{g}") for g in range(8) for i in range(3)]
    batch = batch_of(rollouts, BatchSettings(minibatches=3))
    assert len(batch.minibatches) == 3
    assert sorted(s.session_id for s in samples_of(batch)) == sorted(r.session.session_id for r in rollouts)
    tokens = []
    for minibatch in batch.minibatches:
        groups = {int(sample.session_id[1:]) // 10 for sample in minibatch.samples}
        assert len(minibatch.samples) == 3 * len(groups)
        trained = [sample.layout.num_trained for sample in minibatch.samples]
        tokens.append(sum(trained))
        assert sum(w.weight * n for w, n in zip(minibatch.weights, trained, strict=True)) == pytest.approx(1.0)
    assert max(tokens) - min(tokens) <= 3 * (5 + 3 * 7 + 2)  # the largest group
    assert max(tokens) < 1.5 * min(tokens)


def test_the_cut_into_minibatches_depends_on_seed_and_step_alone() -> None:
    rollouts = [one(10 * g + i, group=f"g{g}") for g in range(6) for i in range(2)]

    def cut(seed: int, step: int) -> list[list[str]]:
        batch = batch_of(rollouts, BatchSettings(minibatches=3), seed=seed, step=step)
        return [[sample.session_id for sample in minibatch.samples] for minibatch in batch.minibatches]

    assert cut(-1, 2) == cut(-1, 2)
    assert len({str(cut(0, step)) for step in range(8)}) > 4
    assert len({str(cut(seed, 0)) for seed in range(8)}) > 4


def test_there_are_no_more_minibatches_than_groups_that_train() -> None:
    masked = BatchSettings(minibatches=4, truncated=Unfit.MASK)
    batch = batch_of([one(1), one(2, group="h"), one(3, group="i", outcome="truncated")], masked)
    assert [len(minibatch.samples) for minibatch in batch.minibatches] == [1, 1]
    assert (batch.groups, batch.left_out_by) == (3, {"truncated": 6})
    empty = batch_of([])
    assert (empty.minibatches, empty.rollouts, empty.staleness_mean, empty.rewards) == ((), 0, None, ())


def test_what_a_pick_left_out_is_in_the_account_also_where_nothing_of_a_rollout_trains() -> None:
    """I3."""
    partly = tagged_rollout(tagged_segment(1, [Turn(3, 6)]), session_id="a", num_left_out=5)
    nothing = tagged_rollout(session_id="b", num_left_out=4)
    batch = batch_of([partly, nothing])
    assert (batch.tokens_sampled, batch.tokens_trained, batch.left_out_by) == (15, 6, {"undelivered": 9})
    assert (batch.rollouts, batch.response_tokens, batch.turns) == (2, (11, 4), (1, 0))


def test_a_batch_that_loses_a_token_cannot_be_made() -> None:
    """I3."""
    batch = batch_of([one(1)])
    with pytest.raises(IntegrityError, match="6 tokens sampled, 5 trained"):
        replace(batch, tokens_trained=5)
    with pytest.raises(IntegrityError, match="7 tokens sampled, 7 trained"):
        replace(batch, tokens_sampled=7, tokens_trained=7)


@pytest.mark.parametrize("values", [[1.0], [1.0, float("nan")]])
def test_an_estimator_that_does_not_fit_is_an_error_that_shows_its_values(values: list[float]) -> None:
    with pytest.raises(TrainingError, match=r"advantage estimator gave .* for rewards \[1\.0, 1\.0\]"):
        batch_of([one(1), one(2)], estimator=lambda rewards_R, group_R: torch.tensor(values))


def test_the_estimator_sees_rewards_and_groups_in_the_order_of_the_rollouts() -> None:
    seen = []

    def watch(rewards_R: torch.Tensor, group_R: torch.Tensor) -> torch.Tensor:
        seen.append((rewards_R.tolist(), group_R.tolist(), group_R.dtype))
        return rewards_R

    batch_of([one(1, reward=0.25), one(2, group="h"), one(3, reward=None), one(4, reward=0.5)], estimator=watch)
    assert seen == [([0.25, 1.0, 0.5], [0, 1, 0], torch.int64)]


@pytest.mark.parametrize(
    "settings", [{"stale": Unfit.KEEP}, {"overlong": Unfit.KEEP}, {"zero_variance": Unfit.MASK}, {"minibatches": 0}]
)
def test_policies_that_mean_nothing_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        BatchSettings(**settings)  # type: ignore[arg-type]


def test_temperatures_of_a_masked_sample_stay_where_they_were() -> None:
    long = one(1, Turn(3, 6), Turn(2, 5))
    (sample,) = samples_of(batch_of([long], BatchSettings(max_tokens=12, overlong=Unfit.MASK)))
    assert sample.layout.temperature.tolist() == [1.0] * 2 + [0.5] * 6 + [1.0] * 2 + [0.625]
    assert np.isclose(sample.layout.top_p[2], 1 - 1 / 64)
