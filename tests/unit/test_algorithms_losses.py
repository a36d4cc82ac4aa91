"""Policy losses: value and gradient against formulas written out by hand, at the clip boundaries too."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.algorithms.losses import cispo_loss, gspo_loss, ppo_clip_loss, reinforce_loss
from trainer.algorithms.objective import Share, TokenTerms
from trainer.algorithms.settings import Bounds

CLIP = Bounds(0.2, 0.28)
EXACT = Bounds(0.5, 1.0)
"""Bounds 0.5 and 2 of the ratio: both are powers of two, and exp of their logarithm is exact in float64."""


class _Hand(NamedTuple):
    loss: float
    gradient: float


def _ppo_by_hand(ratio: float, advantage: float, clip: Bounds, dual: float) -> _Hand:
    """Equation 7 of 1707.06347 and equation 5 of 1912.09729, by cases; d loss / d logprob."""
    objective = min(ratio * advantage, min(max(ratio, 1 - clip.low), 1 + clip.high) * advantage)
    moves = objective == ratio * advantage
    if dual and advantage < 0 and dual * advantage > objective:
        objective, moves = dual * advantage, False
    return _Hand(-objective, -ratio * advantage if moves else 0.0)


def _gradient(loss: Callable[[Tensor], TokenTerms], logprobs: Tensor) -> tuple[TokenTerms, Tensor]:
    logprobs = logprobs.clone().requires_grad_()
    terms = loss(logprobs)
    assert not any(values.requires_grad for values in terms.shares.values())
    (gradient,) = torch.autograd.grad(terms.loss.sum(), logprobs)
    return terms, gradient


def _ppo(ratio: float, advantage: float, clip: Bounds, dual: float = 0.0) -> tuple[TokenTerms, Tensor]:
    old = torch.zeros(1, dtype=torch.float64)
    logprobs = torch.tensor([math.log(ratio)], dtype=torch.float64)
    assert torch.exp(logprobs).item() == pytest.approx(ratio)
    a = torch.tensor([advantage], dtype=torch.float64)
    return _gradient(lambda live: ppo_clip_loss(live, old, a, clip, clip_dual=dual), logprobs)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, None),
        (1.27, 1.0, -1.27, None),
        (1.5, 1.0, -1.28, Share.CLIPPED_HIGH),  # a good action already pushed far: held
        (0.5, 1.0, -0.5, None),  # a good action that became rare may come back
        (0.5, -1.0, 0.8, Share.CLIPPED_LOW),  # a bad action already pushed far: held
        (0.81, -1.0, 0.81, None),
        (1.5, -1.0, 1.5, None),  # a bad action that became likely is pushed down in full
        (3.0, 0.0, 0.0, None),
    ],
)
def test_ppo_loss_inside_and_beyond_its_bounds(
    ratio: float, advantage: float, loss: float, clipped: Share | None
) -> None:
    terms, gradient = _ppo(ratio, advantage, CLIP)
    assert terms.loss.item() == pytest.approx(loss)
    for share in (Share.CLIPPED_LOW, Share.CLIPPED_HIGH):
        assert terms.shares[share].tolist() == [share == clipped]
    assert gradient.item() == pytest.approx(0.0 if clipped else -ratio * advantage)
    assert terms.shares[Share.RATIO_MEAN].item() == pytest.approx(ratio)


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("bound", [0.5, 2.0])
def test_ratio_exactly_at_a_bound_keeps_its_whole_gradient(bound: float, advantage: float) -> None:
    assert torch.exp(torch.tensor(math.log(bound), dtype=torch.float64)).item() == bound
    terms, gradient = _ppo(bound, advantage, EXACT)
    assert terms.loss.item() == -bound * advantage
    assert gradient.item() == -bound * advantage
    assert not terms.shares[Share.CLIPPED_LOW].item()
    assert not terms.shares[Share.CLIPPED_HIGH].item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "dual"),
    [
        (4.0, -1.0, 4.0, 4.0, False),  # exactly at the corner
        (8.0, -1.0, 4.0, 0.0, True),
        (3.9, -1.0, 3.9, 3.9, False),
        (8.0, 1.0, -2.0, 0.0, False),  # only the common clip holds a good action
        (0.25, -1.0, 0.5, 0.0, False),  # and a bad one that became rare
    ],
)
def test_dual_clip_bounds_the_loss_of_bad_actions_only(
    ratio: float, advantage: float, loss: float, gradient: float, dual: bool
) -> None:
    terms, actual = _ppo(ratio, advantage, EXACT, dual=4.0)
    assert terms.loss.item() == pytest.approx(loss, rel=1e-15)
    assert actual.item() == pytest.approx(gradient, rel=1e-15)
    assert terms.shares[Share.CLIPPED_DUAL].tolist() == [dual]


@hypothesis_settings(max_examples=200)
@given(
    logratio=st.floats(-4, 4),
    advantage=st.floats(-3, 3),
    low=st.floats(0.01, 1.0),
    high=st.floats(0.01, 5.0),
    dual=st.sampled_from([0.0, 1.5, 3.0]),
)
def test_ppo_loss_equals_its_formula_by_cases(
    logratio: float, advantage: float, low: float, high: float, dual: float
) -> None:
    ratio = math.exp(logratio)
    expected = _ppo_by_hand(ratio, advantage, Bounds(low, high), dual)
    if min(abs(ratio - b) for b in (1 - low, 1 + high, dual)) < 1e-9:
        return  # exactly at a bound: tested above
    terms, gradient = _ppo(ratio, advantage, Bounds(low, high), dual)
    assert terms.loss.item() == pytest.approx(expected.loss, rel=1e-9, abs=1e-12)
    assert gradient.item() == pytest.approx(expected.gradient, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("dual", [0.0, 2.5])
def test_ppo_gradient_agrees_with_finite_differences(dual: float) -> None:
    torch.manual_seed(0)
    old = torch.randn(32, dtype=torch.float64)
    advantages = torch.randn(32, dtype=torch.float64)
    logprobs = (old + torch.randn(32, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ppo_clip_loss(x, old, advantages, CLIP, clip_dual=dual).loss, (logprobs,))


def _gspo_by_hand(logprobs: Tensor, old: Tensor, advantages: list[float], samples: list[int], clip: Bounds) -> Tensor:
    """Equations 5 to 7 of 2507.18071 as they stand: one term a sequence, differentiated through s itself."""
    total = torch.zeros((), dtype=logprobs.dtype)
    for sample, advantage in enumerate(advantages):
        at = [t for t, of in enumerate(samples) if of == sample]
        if at:
            s = torch.exp((logprobs[at] - old[at]).mean())
            total = total - torch.minimum(s * advantage, s.clamp(1 - clip.low, 1 + clip.high) * advantage)
    return total


@hypothesis_settings(max_examples=60)
@given(data=st.data())
def test_gspo_equals_the_papers_sequence_form_in_value_and_gradient_with_samples_interleaved(
    data: st.DataObject,
) -> None:
    samples = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=12))
    seed = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(len(samples), generator=generator, dtype=torch.float64)
    logprobs = (old + 0.02 * torch.randn(len(samples), generator=generator, dtype=torch.float64)).requires_grad_()
    advantages = torch.randn(4, generator=generator, dtype=torch.float64)
    clip = Bounds(0.003, 0.004)
    index = torch.tensor(samples)
    expected = _gspo_by_hand(logprobs, old, advantages.tolist(), samples, clip)
    terms = gspo_loss(logprobs, old, advantages[index], index, 4, clip)
    weights = 1.0 / torch.bincount(index, minlength=4)[index].double()  # each sequence's mean
    actual = (weights * terms.loss).sum()
    assert actual.item() == pytest.approx(expected.item(), rel=1e-12, abs=1e-14)
    (wanted,) = torch.autograd.grad(expected, logprobs)
    (gradient,) = torch.autograd.grad(actual, logprobs)
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-14)


def test_gspo_clips_whole_sequences_and_leaves_their_neighbours_alone() -> None:
    old = torch.zeros(5, dtype=torch.float64)
    logprobs = torch.tensor([0.3, 0.0001, -0.1, 0.0001, 0.1], dtype=torch.float64)  # sample 0: mean 0.1
    samples = torch.tensor([0, 1, 0, 1, 0])
    ones = torch.ones(5, dtype=torch.float64)
    terms, gradient = _gradient(lambda x: gspo_loss(x, old, ones, samples, 2, Bounds(3e-4, 4e-4)), logprobs)
    assert terms.shares[Share.CLIPPED_HIGH].tolist() == [True, False, True, False, True]
    assert terms.loss.tolist() == pytest.approx([-1.0004, -math.exp(1e-4), -1.0004, -math.exp(1e-4), -1.0004])
    assert gradient.tolist() == pytest.approx([0.0, -math.exp(1e-4), 0.0, -math.exp(1e-4), 0.0])


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize(
    ("ratio", "weight", "bounded"),
    [
        (1.0, 1.0, None),
        (2.0, 2.0, None),  # exactly at the upper bound
        (7.0, 2.0, Share.CLIPPED_HIGH),
        (0.5, 0.5, None),  # exactly at the lower
        (0.1, 0.5, Share.CLIPPED_LOW),
    ],
)
def test_cispo_bounds_the_weight_and_keeps_every_tokens_gradient(
    ratio: float, weight: float, bounded: Share | None, advantage: float
) -> None:
    logprobs = torch.tensor([-1.5], dtype=torch.float64)
    old = logprobs - math.log(ratio)
    a = torch.tensor([advantage], dtype=torch.float64)
    terms, gradient = _gradient(lambda live: cispo_loss(live, old, a, EXACT), logprobs)
    assert terms.loss.item() == pytest.approx(-weight * advantage * -1.5)
    assert gradient.item() == pytest.approx(-weight * advantage)
    for share in (Share.CLIPPED_LOW, Share.CLIPPED_HIGH):
        assert terms.shares[share].tolist() == [share == bounded]


def test_reinforce_is_advantage_times_logprob() -> None:
    terms, gradient = _gradient(
        lambda live: reinforce_loss(live, torch.tensor([2.0, -3.0])), torch.tensor([-1.0, -4.0])
    )
    assert terms.loss.tolist() == [2.0, -12.0]
    assert gradient.tolist() == [-2.0, 3.0]


@pytest.mark.parametrize("logratio", [1000.0, -1000.0, 89.0, -110.0])
@pytest.mark.parametrize("advantage", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("policy", ["ppo", "gspo", "cispo"])
def test_float32_ratios_beyond_its_range_give_finite_losses_and_gradients(
    policy: str, advantage: float, logratio: float
) -> None:
    index = torch.zeros(1, dtype=torch.int64)
    losses: dict[str, Callable[[Tensor, Tensor, Tensor], TokenTerms]] = {
        "ppo": lambda live, old, a: ppo_clip_loss(live, old, a, CLIP),
        "gspo": lambda live, old, a: gspo_loss(live, old, a, index, 1, CLIP),
        "cispo": lambda live, old, a: cispo_loss(live, old, a, Bounds(1.0, 4.0)),
    }
    live = torch.tensor([logratio if logratio < 0 else -1.0])
    old = torch.tensor([0.0 if logratio < 0 else -1.0 - logratio])
    terms, gradient = _gradient(lambda x: losses[policy](x, old, torch.tensor([advantage])), live)
    assert torch.isfinite(terms.loss).all()
    assert torch.isfinite(gradient).all()
    if not advantage:
        assert terms.loss.item() == 0.0
        assert gradient.item() == 0.0
    if advantage < 0 < logratio:
        assert gradient.item() > 0, "a bad token that became likely is still pushed down"
