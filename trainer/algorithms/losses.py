"""Policy losses, one term a token; aggregation is elsewhere. Pure functions, each with its paper.

Shape letters: S = trained (sampled, unmasked) tokens of one micro-batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trainer.algorithms.objective import LiveTokens, TokenTerms, TrainedTokens
from trainer.algorithms.settings import LossSettings, OldPolicy


class TokenLoss(NamedTuple):
    """loss float32[S] (to be minimised, with gradient) and clipped bool[S] (where the clip took the gradient away)."""

    loss: Tensor
    clipped: Tensor


def ppo_clip_loss(
    logprobs_S: Tensor, old_logprobs_S: Tensor, advantages_S: Tensor, *, clip_low: float, clip_high: float
) -> TokenLoss:
    """`-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)` with `r = exp(logprobs - old_logprobs)`.

    PPO (arXiv 1707.06347, equation 7); a `clip_high` above `clip_low` is DAPO's clip-higher (arXiv 2503.14476, 3.1).
    """
    ratio_S = torch.exp(logprobs_S - old_logprobs_S)
    free_S = ratio_S * advantages_S
    held_S = ratio_S.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages_S
    return TokenLoss(loss=-torch.minimum(free_S, held_S), clipped=held_S.detach() < free_S.detach())


class PolicyObjective:
    """The objective that the settings name."""

    needs_reference = False
    needs_entropy_gradient = False

    def __init__(self, settings: LossSettings) -> None:
        self._settings = settings

    def __call__(self, live: LiveTokens, tokens: TrainedTokens) -> TokenTerms:
        """The loss of S tokens; the gradient flows through `live` only."""
        old_S = tokens.old_logprobs if self._settings.old_policy is OldPolicy.TRAIN else tokens.rollout_logprobs
        terms = ppo_clip_loss(
            live.logprobs,
            old_S,
            tokens.advantages,
            clip_low=self._settings.clip_low,
            clip_high=self._settings.clip_high,
        )
        return TokenTerms(terms.loss, {"clipped": terms.clipped})
