"""How far two policies are apart on sampled tokens: KL estimators and the share of extreme tokens. Pure functions.

Shape letters: S = sampled tokens. `logratio_S = log p(token) - log q(token)`, the tokens drawn from q;
estimators are of KL(q || p). For the gap between engine and trainer q is the rollout policy, p the trainer's; for the
reference, q is the live policy and p the reference.
Source of k1, k2, k3: J. Schulman, "Approximating KL divergence", 2020.

An unbiased estimate of a KL need not have an unbiased gradient (arXiv 2506.09477; arXiv 2510.01555). With tokens drawn
from the live policy q: k1's own gradient, `grad log q`, has mean 0 and regularises nothing; k2's,
`(log q - log p) grad log q`, is that of KL(q || p) token by token, the same as of k1 put into the reward behind a
stop-gradient; k3's, `(1 - p / q) grad log q`, is that of the other direction, KL(p || q). Nothing here corrects for
tokens of an older policy.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.algorithms.ratios import LOGRATIO_LIMIT


def k1(logratio_S: Tensor) -> Tensor:
    """`-log r`: unbiased, high variance, may be negative."""
    return -logratio_S


def k2(logratio_S: Tensor) -> Tensor:
    """`(log r)^2 / 2`: biased, low variance."""
    return logratio_S.square() / 2


def k3(logratio_S: Tensor) -> Tensor:
    """`r - 1 - log r`: unbiased and never negative; used by GRPO and by the routing-replay paper (arXiv 2510.11370).

    The exponent is held at 80 from above, as in `ratios.ratio`.
    """
    return torch.expm1(logratio_S - (logratio_S.detach() - LOGRATIO_LIMIT).clamp(min=0.0)) - logratio_S


def reference_kl(logprobs_S: Tensor, ref_logprobs_S: Tensor, *, estimator: str) -> Tensor:
    """The KL of the live policy against the reference as a loss term, [S], with gradient to `logprobs_S`.

    "k1" has k1's value and, by a stop-gradient, the gradient of k1 in the reward, which is k2's: its own would have
    mean 0. "k2" is differentiated as it stands, and so is "k3", as in GRPO (arXiv 2402.03300, equation 4).
    """
    if estimator == "k1":
        k1_S = k1(ref_logprobs_S - logprobs_S).detach()
        return k1_S * (1.0 + logprobs_S - logprobs_S.detach())
    return {"k2": k2, "k3": k3}[estimator](ref_logprobs_S - logprobs_S)


def extreme_share(logratio_S: Tensor, *, tau: float = 2.0) -> float:
    """F(tau) of arXiv 2510.11370: the share of tokens with `max(r, 1/r) > tau`, in [0, 1]; 0 without tokens."""
    if not logratio_S.numel():
        return 0.0
    return float((logratio_S.abs() > math.log(tau)).double().mean())
