"""A step's learning by replay mode and minibatches: which forwards are made, and of which policy (I10)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gateway.contracts.errors import NonFiniteLoss
from tests.train_samples import random_samples, token_mean_weights
from trainer.algorithms.objective import LiveTokens, Objective, Share, TokenTerms, TrainedTokens
from trainer.algorithms.policy_objective import PolicyObjective
from trainer.algorithms.settings import LossSettings
from trainer.backends.hf import HFBackend
from trainer.backends.settings import ModelSettings, OptimizerSettings
from trainer.data.batch import Minibatch, StepBatch
from trainer.data.packing import ScoredBatch
from trainer.learning import Learned, Learner
from trainer.phases import Phase, PhaseClock
from trainer.settings import ReplayMode

LENGTHS = ((9, 23, 14), (31, 6), (12,))
PPO = PolicyObjective(LossSettings(correction="off"))


class Kept:
    """What a learner asked to keep."""

    def __init__(self) -> None:
        self.minibatches: Sequence[Sequence[ScoredBatch]] = ()

    def __call__(self, minibatches: Sequence[Sequence[ScoredBatch]], error: NonFiniteLoss) -> Path:
        self.minibatches = minibatches
        return Path("kept.safetensors")


def make_backend(model: Path, replay: ReplayMode, *, needs_reference: bool = False) -> HFBackend:
    optimizer = OptimizerSettings(learning_rate=1e-2)
    return HFBackend(
        ModelSettings(model), optimizer, replay=replay, seed=0, num_updates=10, needs_reference=needs_reference
    )


def learner(backend: HFBackend, objective: Objective, replay: ReplayMode, *, live: bool = False) -> Learner:
    return Learner(
        backend,
        objective,
        replay=replay,
        tokens_per_microbatch=40,
        measure_without_replay=live,
        save_batches=Kept(),
    )


def step_of(backend: HFBackend, lengths: Sequence[Sequence[int]], replay: ReplayMode) -> StepBatch:
    routed = backend.routed if replay is ReplayMode.R3 else None
    minibatches = []
    for number, each in enumerate(lengths):
        samples = random_samples(each, seed=number, routed=routed)
        minibatches.append(Minibatch(samples, token_mean_weights(samples)))
    tokens = sum(sample.layout.num_trained for minibatch in minibatches for sample in minibatch.samples)
    return StepBatch(
        minibatches=tuple(minibatches),
        rollouts=sum(map(len, lengths)),
        groups=1,
        zero_variance_groups=0,
        dropped_by={},
        dropped_tokens_by={},
        left_out_by={},
        tokens_sampled=tokens,
        tokens_trained=tokens,
        staleness_mean=0.0,
        staleness_max=0,
        rewards=(),
        response_tokens=(),
        turns=(),
    )


def learn(model: Path, replay: ReplayMode, lengths: Sequence[Sequence[int]], **options: Any) -> tuple[Learned, Tensor]:
    """What a fresh learner did, and all of its parameters afterwards."""
    backend = make_backend(model, replay)
    learned = learner(backend, PPO, replay, **options).learn(step_of(backend, lengths, replay), PhaseClock())
    return learned, torch.cat([p.detach().flatten() for p in backend._masters.by_name.values()])


def test_one_minibatch_learns_the_same_under_its_own_routing_as_without_replay(tiny_model: Path) -> None:
    """r2 records what the live router would choose anyway, as long as nothing has changed in between."""
    off, without = learn(tiny_model, ReplayMode.OFF, LENGTHS[:1])
    r2, with_own = learn(tiny_model, ReplayMode.R2, LENGTHS[:1])
    assert torch.equal(with_own, without)
    assert off.updates[0].loss == r2.updates[0].loss
    routing = r2.updates[0].measured.routing
    assert routing.verified == routing.replayed == routing.total > 0


@pytest.mark.parametrize("replay", list(ReplayMode))
def test_every_minibatch_is_held_against_the_policy_before_the_step(tiny_model: Path, replay: ReplayMode) -> None:
    learned, _ = learn(tiny_model, replay, LENGTHS)
    assert learned.trained is not None
    sizes = [update.measured.logprobs.numel() for update in learned.updates]
    first, *later = learned.trained.logprobs.split(sizes)
    assert torch.equal(learned.updates[0].measured.logprobs, first)
    assert learned.updates[0].shares[Share.RATIO_MEAN] == pytest.approx(1.0, abs=1e-6)
    for update, before in zip(learned.updates[1:], later, strict=True):
        ratio = torch.exp(update.measured.logprobs - before)
        assert float((ratio - 1).abs().max()) > 1e-3, "the policy has moved"
        assert update.shares[Share.RATIO_MEAN] == pytest.approx(float(ratio.mean()), rel=1e-4)


def test_the_own_routing_of_before_the_step_is_replayed_in_each_of_its_updates(tiny_model: Path) -> None:
    """r2: the ids of the old policy are used after the policy has moved, too (I10)."""
    learned, _ = learn(tiny_model, ReplayMode.R2, LENGTHS)
    for update, minibatch in zip(learned.updates, learned.minibatches, strict=True):
        assert update.measured.routing.verified == update.measured.routing.total > 0
        assert all(batch.layout.routing is not None for batch in minibatch)


@pytest.mark.parametrize(
    ("replay", "live", "measured"),
    [(ReplayMode.OFF, True, False), (ReplayMode.R3, False, False), (ReplayMode.R3, True, True)],
)
def test_forwards_are_made_only_for_who_asks(tiny_model: Path, replay: ReplayMode, live: bool, measured: bool) -> None:
    learned, _ = learn(tiny_model, replay, LENGTHS[:1], live=live)
    assert learned.trained is None
    assert (learned.live is not None) == measured
    if learned.live is not None:
        assert learned.live.routing.compared > 0


@pytest.mark.parametrize("replay", [ReplayMode.R2, ReplayMode.R3])
def test_a_dense_model_makes_no_forward_for_routing_that_it_has_not(dense_model: Path, replay: ReplayMode) -> None:
    learned, _ = learn(dense_model, replay, LENGTHS[:1], live=True)
    assert (learned.trained, learned.live) == (None, None)
    assert len(learned.updates) == 1


def test_the_reference_is_measured_for_a_loss_that_needs_it(tiny_model: Path) -> None:
    objective = PolicyObjective(LossSettings(kl_coefficient=0.1, correction="off"))
    backend = make_backend(tiny_model, ReplayMode.OFF, needs_reference=True)
    begun: list[Phase] = []
    made = learner(backend, objective, ReplayMode.OFF)
    learned = made.learn(step_of(backend, LENGTHS, ReplayMode.OFF), PhaseClock(begun.append))
    assert begun == [Phase.ASSEMBLE, Phase.MEASURE, Phase.REFERENCE, Phase.UPDATE]
    first, *later = [update.shares[Share.KL_REFERENCE] for update in learned.updates]
    assert first == pytest.approx(0.0, abs=1e-9), "the policy is its own reference at first"
    assert all(kl > 0 for kl in later)


class NanInSecond:
    """Not finite in the second minibatch."""

    needs_reference = False
    needs_entropy_gradient = False

    def __call__(self, live: LiveTokens, tokens: TrainedTokens) -> TokenTerms:
        is_second = bool((tokens.advantages == 1.0).all()) and len(tokens.advantages) == 8
        return TokenTerms(live.logprobs * (float("nan") if is_second else 1.0))


def test_a_step_that_is_not_finite_is_kept_up_to_the_minibatch_that_failed(tiny_model: Path) -> None:
    backend = make_backend(tiny_model, ReplayMode.R3)
    kept = Kept()
    made = Learner(
        backend,
        NanInSecond(),
        replay=ReplayMode.R3,
        tokens_per_microbatch=40,
        measure_without_replay=False,
        save_batches=kept,
    )
    step = step_of(backend, ((9, 23), (12,), (7,)), ReplayMode.R3)
    with pytest.raises(NonFiniteLoss, match=r"kept\.safetensors"):
        made.learn(step, PhaseClock())
    assert len(kept.minibatches) == 2
