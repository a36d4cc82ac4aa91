"""A step's account, from what was taken, measured and updated."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from gateway.contracts.errors import IntegrityError
from tests.packed_batches import a_batch
from trainer.accounting import step_metrics
from trainer.backends.protocol import Measured, Update
from trainer.data.assemble import TrainSample
from trainer.data.batch import Minibatch, StepBatch
from trainer.data.packing import SampleWeights
from trainer.metrics import StepMetrics
from trainer.phases import Phase, PhaseClock
from trainer.replay.verify import RoutingReport

REPLAYED = RoutingReport(total=10, replayed=8, verified=8, fallback=2)
LIVE = RoutingReport(total=10, fallback=10, compared=8, flipped=2)


def measured(*gaps: float, routing: RoutingReport = REPLAYED, entropy: float = 1.0) -> Measured:
    """Tokens whose train log-prob is `gap` above the engine's."""
    rollout = torch.full((len(gaps),), -1.0)
    return Measured(rollout + torch.tensor(gaps), rollout, torch.full((len(gaps),), entropy), routing)


def update(tokens: Measured, **shares: float) -> Update:
    return Update(loss=0.5, grad_norm=2.0, learning_rate=1e-6, shares=shares, measured=tokens)


def minibatch(num_tokens: int) -> Minibatch:
    sample = TrainSample("s", "seg", a_batch((2 * num_tokens,)).layout)
    return Minibatch((sample,), (SampleWeights(1.0, 1.0),))


def batch(**changes: object) -> StepBatch:
    fields = {
        "minibatches": (minibatch(4),),
        "rollouts": 3,
        "groups": 2,
        "zero_variance_groups": 1,
        "dropped_by": {"stale": 2},
        "dropped_tokens_by": {"stale": 7},
        "left_out_by": {"undelivered": 1},
        "tokens_sampled": 5,
        "tokens_trained": 4,
        "staleness_mean": 0.5,
        "staleness_max": 1,
        "rewards": (0.0, 1.0, 0.5),
        "response_tokens": (1, 1, 4),
        "turns": (1, 2, 3),
    }
    return StepBatch(**{**fields, **changes})  # type: ignore[arg-type]  # names of StepBatch


def account(batch_: StepBatch, updates: list[Update], **options: Measured | None) -> StepMetrics:
    seconds = {"rollout": 5.0, "measure": 1.0, "reference": 0.5, "update": 0.5}
    return step_metrics(batch_, updates, step=3, policy_version=2, seconds=seconds, **options)


def k3(gap: float) -> float:
    return math.exp(gap) - 1 - gap


def test_figures_are_over_all_tokens_of_all_updates() -> None:
    """Two optimiser steps of unequal size: means weigh by token, losses by update."""
    updates = [update(measured(0.1, 0.2, 1.0, entropy=2.0), clipped_low=0.3, extra=1.0), update(measured(0.0))]
    metrics = account(batch(), [updates[0], replace(updates[1], loss=1.5, learning_rate=2e-6, device_bytes=9)])
    assert (metrics.step, metrics.policy_version, metrics.updates) == (3, 2, 2)
    assert (metrics.loss, metrics.grad_norm, metrics.learning_rate) == (1.0, 2.0, 2e-6)
    assert metrics.entropy == pytest.approx((3 * 2.0 + 1.0) / 4)
    assert metrics.kl_with_replay == pytest.approx((k3(0.1) + k3(0.2) + k3(1.0)) / 4, abs=1e-6)
    assert metrics.extreme_share_with_replay == 0.25
    assert metrics.kl_without_replay is None
    assert metrics.clipped_low_share == pytest.approx(0.3)
    assert metrics.clipped_high_share is None
    assert dict(metrics.shares) == {"extra": 1.0}
    assert (metrics.rows_total, metrics.rows_replayed, metrics.rows_fallback) == (20, 16, 4)
    assert (metrics.rows_verified_share, metrics.rows_fallback_share, metrics.rows_flipped_share) == (1.0, 0.2, None)
    assert (metrics.reward_mean, metrics.reward_min, metrics.reward_max) == (0.5, 0.0, 1.0)
    assert metrics.reward_std == pytest.approx(math.sqrt(1 / 6))
    assert (metrics.response_tokens_mean, metrics.response_tokens_max, metrics.turns_mean) == (2.0, 4, 2.0)
    assert metrics.tokens_per_second == 4 / 2.0
    assert metrics.peak_device_bytes == 9
    assert metrics.peak_rss_bytes > 2**20
    assert (metrics.tokens_left_out, dict(metrics.left_out_by)) == (1, {"undelivered": 1})
    assert (metrics.tokens_dropped, dict(metrics.dropped_tokens_by)) == (7, {"stale": 7})


FOUR = measured(0.1, 0.1, 0.1, 0.1)


def test_the_live_router_is_compared_with_replay_on_the_same_tokens() -> None:
    """I10."""
    live = measured(1.0, 0.0, 0.0, 0.0, routing=LIVE)
    metrics = account(batch(), [update(FOUR)], without_replay=live)
    assert metrics.kl_with_replay == pytest.approx(k3(0.1), abs=1e-6)
    assert metrics.kl_without_replay == pytest.approx(k3(1.0) / 4)
    assert (metrics.extreme_share_with_replay, metrics.extreme_share_without_replay) == (0.0, 0.25)
    assert (metrics.rows_compared, metrics.rows_flipped, metrics.rows_flipped_share) == (8, 2, 0.25)


def test_a_forward_before_the_first_update_stands_for_those_of_later_minibatches() -> None:
    """Later updates' forwards see parameters that the engine never had."""
    before = measured(0.2, 0.2, 0.2, 0.2)
    metrics = account(batch(), [update(measured(0.2, 0.2)), update(measured(0.9, 0.9))], with_replay=before)
    assert metrics.kl_with_replay == pytest.approx(k3(0.2), abs=1e-6)


def test_what_nothing_was_replayed_in_is_the_live_routers() -> None:
    """Replay off, or a dense model."""
    live = measured(0.3, 0.3, 0.3, 0.3, routing=RoutingReport(total=10, fallback=10))
    metrics = account(batch(), [update(live)])
    assert metrics.kl_with_replay is None
    assert metrics.extreme_share_with_replay is None
    assert metrics.kl_without_replay == pytest.approx(k3(0.3), abs=1e-6)
    assert metrics.rows_verified_share is None


def test_under_r2_the_recorded_forward_is_the_live_one_and_stands_for_the_updates_of_all_minibatches() -> None:
    """The gap is that of the policy which the engine had, not of one that earlier minibatches have moved."""
    recorded = measured(0.3, 0.3, 0.3, 0.3, routing=RoutingReport(total=10, fallback=10))
    updates = [update(measured(0.3, 0.3)), update(measured(0.9, 0.9))]
    metrics = account(batch(), updates, with_replay=recorded, without_replay=recorded)
    assert metrics.kl_with_replay == metrics.kl_without_replay == pytest.approx(k3(0.3), abs=1e-6)


def test_under_r2_too_later_minibatches_are_told_from_before_the_first_update() -> None:
    """The recorded routing is the live one there, so both figures are of that forward."""
    recorded = measured(0.3, 0.3, 0.3, 0.3, routing=RoutingReport(total=10, fallback=10))
    updates = [update(measured(0.3, 0.3)), update(measured(0.9, 0.9))]
    metrics = account(batch(), updates, with_replay=recorded, without_replay=recorded)
    assert metrics.kl_with_replay == metrics.kl_without_replay == pytest.approx(k3(0.3), abs=1e-6)
    assert metrics.rows_verified_share == 1.0


@pytest.mark.parametrize("num_tokens", [3, 5])
def test_a_token_that_the_updates_lost_or_trained_twice_stops_the_step(num_tokens: int) -> None:
    """I3."""
    with pytest.raises(IntegrityError, match=r"step 3: 5 tokens were sampled, . trained and 1 left out"):
        account(batch(), [update(measured(*[0.1] * num_tokens))])


def test_a_step_without_a_sample_has_counts_and_no_means() -> None:
    empty = batch(
        minibatches=(), rollouts=0, groups=0, tokens_sampled=0, tokens_trained=0, left_out_by={}, rewards=(),
        response_tokens=(), turns=(), staleness_mean=None, staleness_max=None,
    )  # fmt: skip
    metrics = account(empty, [])
    assert (metrics.updates, metrics.tokens_trained, metrics.dropped_rollouts) == (0, 0, 2)
    for name in ("reward_mean", "reward_std", "loss", "learning_rate", "entropy", "kl_without_replay", "turns_mean"):
        assert getattr(metrics, name) is None
    assert metrics.tokens_per_second is None


def test_phases_are_told_as_they_begin_and_their_times_add_up() -> None:
    begun: list[Phase] = []
    clock = PhaseClock(begun.append)
    for phase in (Phase.ROLLOUT, Phase.UPDATE, Phase.UPDATE):
        with clock.phase(phase):
            pass
    with pytest.raises(ZeroDivisionError), clock.phase(Phase.PUBLISH):
        raise ZeroDivisionError
    assert begun == [Phase.ROLLOUT, Phase.UPDATE, Phase.UPDATE, Phase.PUBLISH]
    assert list(clock.seconds()) == ["rollout", "update", "publish"]
    assert all(seconds >= 0 for seconds in clock.seconds().values())
