"""The `[advantage]` and `[loss]` tables of a recipe file. Names only; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from gateway.contracts.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class AdvantageSettings:
    """`estimator`: grpo, dr_grpo, rloo, reinforce++, reinforce++-baseline, or a function of yours as `FILE.py:NAME`."""

    estimator: str = "grpo"


class OldPolicy(StrEnum):
    """Whose log-probs stand below the ratio: the trainer's own before the step, or the engine's as recorded."""

    TRAIN = "train"
    ROLLOUT = "rollout"


@dataclass(frozen=True, slots=True)
class LossSettings:
    """`policy`: ppo, gspo, cispo, reinforce, or a loss of yours as `FILE.py:NAME`.

    clip_low, clip_high: distances of the ratio's bounds from 1. clip_dual: PPO's upper bound of the loss where the
    advantage is negative, as a multiple of it; 0 is off. aggregation: token, sequence or constant;
    constant_tokens: the denominator of a rollout in the last. kl_coefficient: of `kl_estimator` (k1, k2, k3) against
    the reference policy; 0 needs none. entropy_coefficient: of the entropy bonus.
    correction: of the gap between engine and trainer, over w = exp(old - rollout): off, tis, mask (tokens outside
    [correction_low, correction_high] do not train), icepop, mis-sequence, mis-geometric, or `FILE.py:NAME`.
    """

    policy: str = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    clip_dual: float = 0.0
    aggregation: str = "token"
    constant_tokens: int = 0
    old_policy: OldPolicy = OldPolicy.TRAIN
    kl_coefficient: float = 0.0
    kl_estimator: str = "k3"
    entropy_coefficient: float = 0.0
    correction: str = "mask"
    correction_low: float = 0.5
    correction_high: float = 2.0

    def __post_init__(self) -> None:
        for holds, message in (
            (0 < self.clip_low <= 1, f"clip_low is {self.clip_low}; it must be in (0, 1]"),
            (self.clip_high > 0, f"clip_high is {self.clip_high}; it must be positive"),
            (self.clip_dual == 0 or self.clip_dual > 1, f"clip_dual is {self.clip_dual}; it must be 0 or above 1"),
            (self.constant_tokens >= 0, f"constant_tokens is {self.constant_tokens}; it must not be negative"),
            (self.kl_coefficient >= 0, f"kl_coefficient is {self.kl_coefficient}; it must not be negative"),
            (
                0 <= self.correction_low < self.correction_high,
                f"correction_low {self.correction_low} must be below correction_high {self.correction_high}",
            ),
        ):
            if not holds:
                raise ConfigurationError(f"loss.{message}")
