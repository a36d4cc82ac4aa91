"""How far two policies are apart on sampled tokens: KL estimators and the share of extreme tokens. Pure functions.

Shape letters: S = sampled tokens. `logratio_S = log p(token) - log q(token)`, the tokens drawn from q;
estimators are of KL(q || p). For the gap between engine and trainer q is the rollout policy, p the trainer's.
Source of k1, k2, k3: J. Schulman, "Approximating KL divergence", 2020.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def k1(logratio_S: Tensor) -> Tensor:
    """`-log r`: unbiased, high variance, may be negative."""
    return -logratio_S


def k2(logratio_S: Tensor) -> Tensor:
    """`(log r)^2 / 2`: biased, low variance."""
    return logratio_S.square() / 2


def k3(logratio_S: Tensor) -> Tensor:
    """`r - 1 - log r`: unbiased and never negative; used by GRPO and by the routing-replay paper (arXiv 2510.11370)."""
    return torch.expm1(logratio_S) - logratio_S


def extreme_share(logratio_S: Tensor, *, tau: float = 2.0) -> float:
    """F(tau) of arXiv 2510.11370: the share of tokens with `max(r, 1/r) > tau`, in [0, 1]; 0 without tokens."""
    if not logratio_S.numel():
        return 0.0
    return float((logratio_S.abs() > math.log(tau)).double().mean())
