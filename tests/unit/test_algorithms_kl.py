"""KL estimators as metrics and as loss terms, and the share of extreme tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.algorithms.kl import extreme_share, k1, k2, k3, reference_kl


def test_kl_estimators_agree_with_the_exact_divergence_in_expectation() -> None:
    q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    p = torch.tensor([0.48, 0.33, 0.19], dtype=torch.float64)
    exact = (q * (q / p).log()).sum().item()
    logratio = (p / q).log()
    assert (q * k1(logratio)).sum().item() == pytest.approx(exact, rel=1e-9)
    assert (q * k3(logratio)).sum().item() == pytest.approx(exact, rel=1e-9)
    assert (q * k2(logratio)).sum().item() == pytest.approx(exact, rel=0.05)
    assert bool((k3(logratio) >= 0).all())


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    [
        ("k1", lambda d: d, lambda d: d),  # the gradient of k1 in the reward, which is k2's
        ("k2", lambda d: d * d / 2, lambda d: d),
        ("k3", lambda d: torch.exp(-d) - 1 + d, lambda d: 1 - torch.exp(-d)),
    ],
)
def test_reference_kl_has_the_documented_value_and_gradient(estimator: str, value: object, gradient: object) -> None:
    assert callable(value)
    assert callable(gradient)
    live = torch.tensor([-1.0, -2.5, -0.3, -4.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-1.0, -2.0, -3.0, -0.1], dtype=torch.float64)
    terms = reference_kl(live, ref, estimator=estimator)
    difference = (live - ref).detach()
    torch.testing.assert_close(terms.detach(), value(difference))
    (actual,) = torch.autograd.grad(terms.sum(), live)
    torch.testing.assert_close(actual, gradient(difference))


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_reference_kl_gradient_agrees_with_finite_differences(estimator: str) -> None:
    torch.manual_seed(0)
    ref = torch.randn(16, dtype=torch.float64)
    live = (ref + torch.randn(16, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reference_kl(x, ref, estimator=estimator), (live,))


def _expected_gradient(logits: Tensor, ref: Tensor, estimator: str) -> Tensor:
    """Of the loss over the whole vocabulary, each token as often as the live policy draws it."""
    logprobs = torch.log_softmax(logits, 0)
    terms = reference_kl(logprobs, ref, estimator=estimator)
    return torch.autograd.grad((logprobs.detach().exp() * terms).sum(), logits)[0]


def test_k1_and_k2_have_the_gradient_of_the_reverse_kl_and_k3_that_of_the_forward_one() -> None:
    logits = torch.tensor([0.1, -0.7, 1.3, 0.4], dtype=torch.float64, requires_grad=True)
    ref = torch.log_softmax(torch.tensor([0.6, 0.2, -0.5, 0.0], dtype=torch.float64), 0)
    logprobs = torch.log_softmax(logits, 0)
    (reverse,) = torch.autograd.grad((logprobs.exp() * (logprobs - ref)).sum(), logits, retain_graph=True)
    (forward,) = torch.autograd.grad((ref.exp() * (ref - logprobs)).sum(), logits)
    assert not torch.allclose(reverse, forward, atol=1e-2), "the two directions differ here"
    torch.testing.assert_close(_expected_gradient(logits, ref, "k1"), reverse)
    torch.testing.assert_close(_expected_gradient(logits, ref, "k2"), reverse)
    torch.testing.assert_close(_expected_gradient(logits, ref, "k3"), forward)


def test_k3_of_a_token_that_float32_cannot_hold_is_finite() -> None:
    live = torch.tensor([-500.0], requires_grad=True)
    terms = reference_kl(live, torch.tensor([-0.1]), estimator="k3")
    (gradient,) = torch.autograd.grad(terms.sum(), live)
    assert torch.isfinite(terms).all()
    assert gradient.item() < 0, "a token that became too rare is pulled back"


def test_extreme_share_counts_ratios_beyond_tau_on_both_sides() -> None:
    ratios = torch.tensor([1.0, 1.9, 2.1, 0.51, 0.4])
    assert extreme_share(ratios.log()) == pytest.approx(2 / 5)
    assert extreme_share(torch.empty(0)) == 0.0
