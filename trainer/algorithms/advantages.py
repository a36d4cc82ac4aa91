"""Advantages: one number a rollout, from the rewards of its group. Pure functions, each with its paper.

Shape letters: G = rollouts of one group (attempts at one task).
"""

from __future__ import annotations

import torch
from torch import Tensor

_STD_FLOOR = 1e-6


def grpo_advantages(rewards_G: Tensor, *, normalize: bool) -> Tensor:
    """Rewards relative to their group: `(R - mean) / (std + 1e-6)`, float32[G].

    GRPO (DeepSeekMath, arXiv 2402.03300, section 4.1.1). `normalize=False` leaves the division out, which is Dr. GRPO
    (arXiv 2503.20783). The deviation is the population's (divided by G), so a group of one has advantage 0, and so has
    every member of a group whose rewards are all equal.

    >>> grpo_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]), normalize=False).tolist()
    [0.5, -0.5, -0.5, 0.5]
    """
    rewards_G = rewards_G.to(torch.float32)
    centred_G = rewards_G - rewards_G.mean()
    if has_zero_variance(rewards_G):
        return torch.zeros_like(centred_G)  # equal rewards must not leave the rounding of their mean behind
    if not normalize:
        return centred_G
    return centred_G / (centred_G.square().mean().sqrt() + _STD_FLOOR)


def has_zero_variance(rewards_G: Tensor) -> bool:
    """Whether all rewards of a group are equal, so that it teaches nothing (DAPO, arXiv 2503.14476, section 3.2)."""
    return bool((rewards_G == rewards_G[0]).all())
