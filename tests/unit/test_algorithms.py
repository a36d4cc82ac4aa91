"""Advantages, losses, aggregation and KL estimators: closed forms, clip boundaries, gradients."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.algorithms.advantages import grpo_advantages, has_zero_variance
from trainer.algorithms.aggregation import token_mean
from trainer.algorithms.kl import extreme_share, k1, k2, k3
from trainer.algorithms.losses import PpoObjective, TrainedTokens, ppo_clip_loss
from trainer.settings import LossSettings, OldPolicy


def test_grpo_advantage_of_half_right_group_is_plus_and_minus_one() -> None:
    advantages = grpo_advantages(torch.tensor([1.0, 0.0, 1.0, 0.0]), normalize=True)
    assert torch.allclose(advantages, torch.tensor([1.0, -1.0, 1.0, -1.0]), atol=1e-5)


def test_grpo_without_normalizing_is_reward_minus_mean() -> None:
    advantages = grpo_advantages(torch.tensor([3.0, 1.0, 2.0]), normalize=False)
    assert advantages.tolist() == pytest.approx([1.0, -1.0, 0.0])


@pytest.mark.parametrize("rewards", [[0.1, 0.1, 0.1], [1.0], [0.0, 0.0]])
def test_group_of_equal_rewards_has_exactly_zero_advantage(rewards: list[float]) -> None:
    assert has_zero_variance(torch.tensor(rewards))
    assert grpo_advantages(torch.tensor(rewards), normalize=True).tolist() == [0.0] * len(rewards)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.28, 1.0, -1.28, False),  # at the upper bound nothing is cut
        (1.5, 1.0, -1.28, True),  # a good action already pushed far: held
        (0.5, 1.0, -0.5, False),  # a good action that became rare may come back
        (0.5, -1.0, 0.8, True),  # a bad action already pushed far: held
        (1.5, -1.0, 1.5, False),  # a bad action that became likely is pushed down in full
    ],
)
def test_ppo_clip_loss_at_and_beyond_its_bounds(ratio: float, advantage: float, loss: float, clipped: bool) -> None:
    logprobs = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    terms = ppo_clip_loss(
        logprobs, torch.zeros(1, dtype=torch.float64), torch.tensor([advantage]), clip_low=0.2, clip_high=0.28
    )
    assert terms.loss.item() == pytest.approx(loss, abs=1e-6)
    assert terms.clipped.tolist() == [clipped]
    terms.loss.sum().backward()
    assert logprobs.grad is not None
    assert (logprobs.grad.item() == 0.0) is clipped


def test_ppo_clip_loss_gradient_agrees_with_finite_differences() -> None:
    torch.manual_seed(0)
    old = torch.randn(16, dtype=torch.float64)
    advantages = torch.randn(16, dtype=torch.float64)
    logprobs = (old + 0.5 * torch.randn(16, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: ppo_clip_loss(x, old, advantages, clip_low=0.2, clip_high=0.28).loss, (logprobs,)
    )


def test_objective_over_own_logprobs_has_the_policy_gradient_whatever_the_engine_recorded() -> None:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    tokens = TrainedTokens(
        rollout_logprobs=torch.tensor([-5.0, -0.1]),
        advantages=torch.tensor([2.0, -3.0]),
        sample_index=torch.tensor([0, 0]),
    )
    terms = PpoObjective(LossSettings(old_policy=OldPolicy.TRAIN))(logprobs, tokens)
    terms.loss.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-2.0, 3.0]


def test_objective_over_rollout_logprobs_clips_what_drifted_from_the_engine() -> None:
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    tokens = TrainedTokens(
        rollout_logprobs=torch.tensor([-2.0, -1.0]),
        advantages=torch.tensor([1.0, 1.0]),
        sample_index=torch.tensor([0, 1]),
    )
    terms = PpoObjective(LossSettings(old_policy=OldPolicy.ROLLOUT))(logprobs, tokens)
    assert terms.clipped.tolist() == [True, False]


def test_token_mean_does_not_depend_on_how_tokens_are_cut_into_microbatches() -> None:
    losses = torch.arange(10, dtype=torch.float64)
    whole = token_mean(losses, num_trained_tokens=10)
    parts = sum(token_mean(part, num_trained_tokens=10) for part in losses.split([1, 7, 2]))
    assert whole.item() == pytest.approx(float(parts))
    assert whole.item() == pytest.approx(4.5)


def test_kl_estimators_agree_with_the_exact_divergence_in_expectation() -> None:
    q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    p = torch.tensor([0.48, 0.33, 0.19], dtype=torch.float64)
    exact = (q * (q / p).log()).sum().item()
    logratio = (p / q).log()
    assert (q * k1(logratio)).sum().item() == pytest.approx(exact, rel=1e-9)
    assert (q * k3(logratio)).sum().item() == pytest.approx(exact, rel=1e-9)
    assert (q * k2(logratio)).sum().item() == pytest.approx(exact, rel=0.05)
    assert bool((k3(logratio) >= 0).all())


def test_extreme_share_counts_ratios_beyond_tau_on_both_sides() -> None:
    ratios = torch.tensor([1.0, 1.9, 2.1, 0.51, 0.4])
    assert extreme_share(ratios.log()) == pytest.approx(2 / 5)
    assert extreme_share(torch.empty(0)) == 0.0
