"""Advantages: one number a rollout, from the rewards of a step. Pure functions, each with its paper.

All estimators share one signature, `(rewards_R: float32[R], group_R: int64[R]) -> float32[R]`: the rewards of all
rollouts of a step, and which group (attempts at one task) each is of, by any numbering and in any order.
Shape letters: R = rollouts of a step, G = rollouts of one group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gateway.contracts.errors import TrainingError
from trainer.algorithms.extension import checked_tensor
from trainer.algorithms.settings import AdvantageSettings, is_reference
from trainer.extension import load_extension

Estimator = Callable[[Tensor, Tensor], Tensor]
"""`(rewards_R, group_R) -> advantages_R`."""

_STD_FLOOR = 1e-6


def grpo(rewards_R: Tensor, group_R: Tensor) -> Tensor:
    """`(r - mean) / (std + 1e-6)` over the rollout's group, float32[R].

    GRPO (DeepSeekMath, arXiv 2402.03300, section 4.1.2). The deviation is the population's (divided by G; the paper
    does not say). A group of one, or of equal rewards, has advantage 0 exactly.

    >>> grpo(torch.tensor([1.0, 0.0, 5.0]), torch.tensor([7, 7, 8])).round(decimals=3).tolist()
    [1.0, -1.0, 0.0]
    """
    centred_R, index_R = _centred(rewards_R, group_R)
    std_R = _group_mean(centred_R.square(), index_R)[index_R].sqrt()
    return (centred_R / (std_R + _STD_FLOOR)).float()


def dr_grpo(rewards_R: Tensor, group_R: Tensor) -> Tensor:
    """`r - mean` over the rollout's group, float32[R]: without the division, which favours tasks of little spread.

    Dr. GRPO (arXiv 2503.20783, section 3.2); its other half is aggregation = constant.
    """
    return _centred(rewards_R, group_R)[0].float()


def rloo(rewards_R: Tensor, group_R: Tensor) -> Tensor:
    """`r - mean of the group's other rollouts` = `G / (G - 1) * (r - mean)`, float32[R]; 0 for a group of one.

    RLOO (arXiv 2402.14740, section 2.2; Kool et al. 2019).
    """
    centred_R, index_R = _centred(rewards_R, group_R)
    size_R = torch.bincount(index_R)[index_R].double()
    return (centred_R * size_R / (size_R - 1).clamp(min=1)).float()


def reinforce_plus_plus(rewards_R: Tensor, group_R: Tensor) -> Tensor:
    """`(r - mean) / (std + 1e-6)` over all rollouts of the step, whatever their group, float32[R].

    REINFORCE++ (arXiv 2501.03262), global advantage normalisation without its KL in the reward. Mean and deviation
    are over rollouts, where the paper takes them over tokens: a long rollout counts once.
    """
    return grpo(rewards_R, torch.zeros_like(group_R))


def reinforce_plus_plus_baseline(rewards_R: Tensor, group_R: Tensor) -> Tensor:
    """`r - mean of its group`, then normalised by the deviation over all rollouts of the step, float32[R].

    REINFORCE++ with baseline (arXiv 2501.03262). The step's mean is 0 after the first part. A group of one has 0.
    """
    centred_R, _ = _centred(rewards_R, group_R)
    return (centred_R / (centred_R.square().mean().sqrt() + _STD_FLOOR)).float()


ESTIMATORS: Mapping[str, Estimator] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce++": reinforce_plus_plus,
    "reinforce++-baseline": reinforce_plus_plus_baseline,
}


def make_estimator(settings: AdvantageSettings) -> Estimator:
    """The estimator that the settings name; a user's own is checked at each call.

    Raises ConfigurationError for a reference that cannot be loaded.
    """
    if not is_reference(settings.estimator):
        return ESTIMATORS[settings.estimator]
    key = "advantage.estimator"
    own = load_extension(settings.estimator, key=key, takes=("rewards_R", "group_R"))

    def estimate(rewards_R: Tensor, group_R: Tensor) -> Tensor:
        _check(rewards_R, group_R)
        return checked_tensor(own(rewards_R, group_R), what=f"{key} {settings.estimator}", like=rewards_R).float()

    return estimate


def has_zero_variance(rewards_G: Tensor) -> bool:
    """Whether all rewards of a group are equal, so that it teaches nothing (DAPO, arXiv 2503.14476, section 3.2)."""
    return bool((rewards_G == rewards_G[0]).all())


def _centred(rewards_R: Tensor, group_R: Tensor) -> tuple[Tensor, Tensor]:
    """float64[R]: rewards less their group's mean; and int64[R]: the group's index, from 0."""
    _check(rewards_R, group_R)
    # float64 holds sums of float32 rewards exactly, so that equal rewards leave no rounding of their mean behind.
    rewards_R = rewards_R.float().double()
    _, index_R = torch.unique(group_R, return_inverse=True)
    return rewards_R - _group_mean(rewards_R, index_R)[index_R], index_R


def _group_mean(values_R: Tensor, index_R: Tensor) -> Tensor:
    counts = torch.bincount(index_R)
    return torch.zeros(len(counts), dtype=values_R.dtype).index_add(0, index_R, values_R) / counts


def _check(rewards_R: Tensor, group_R: Tensor) -> None:
    if rewards_R.ndim != 1 or rewards_R.shape != group_R.shape:
        raise TrainingError(f"rewards of shape {list(rewards_R.shape)} do not fit groups of {list(group_R.shape)}")
    finite_R = torch.isfinite(rewards_R)
    if not bool(finite_R.all()):
        at = int((~finite_R).nonzero()[0, 0])
        raise TrainingError(f"the reward of rollout {at} (group {int(group_R[at])}) is {float(rewards_R[at])}")
