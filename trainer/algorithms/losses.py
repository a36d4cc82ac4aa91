"""Policy losses, one term a token; aggregation is elsewhere. Pure functions, each with its paper.

Shape letters: S = trained (sampled, unmasked) tokens of one micro-batch. A loss that a user adds is a class with the
call of `Objective`; nothing else of the trainer changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from trainer.settings import LossSettings, OldPolicy


@dataclass(frozen=True, slots=True, eq=False)
class TrainedTokens:
    """What is known of the S trained tokens besides the live log-probs; all are constants of the step.

    rollout_logprobs, advantages: float32[S]. sample_index: int64[S], which sample of the micro-batch a token is of.
    """

    rollout_logprobs: Tensor
    advantages: Tensor
    sample_index: Tensor


class TokenLoss(NamedTuple):
    """loss float32[S] (to be minimised, with gradient) and clipped bool[S] (where the clip took the gradient away)."""

    loss: Tensor
    clipped: Tensor


class Objective(Protocol):
    """A loss over trained tokens."""

    def __call__(self, logprobs_S: Tensor, tokens: TrainedTokens) -> TokenLoss: ...


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


class PpoObjective:
    """PPO-clip against the old policy that the settings name.

    `OldPolicy.TRAIN`: the trainer's own log-probs of this batch before its update, under routing replay. With one
    update a batch that is the live forward itself, so the ratio is exactly 1, its gradient is the policy gradient,
    and the gap between engine and trainer does not enter the loss. `OldPolicy.ROLLOUT`: what the engine recorded; then
    the clip also bounds staleness and the gap.
    """

    def __init__(self, settings: LossSettings) -> None:
        self._settings = settings

    def __call__(self, logprobs_S: Tensor, tokens: TrainedTokens) -> TokenLoss:
        """The loss of S tokens; the gradient flows through `logprobs_S` only."""
        old_S = logprobs_S.detach() if self._settings.old_policy is OldPolicy.TRAIN else tokens.rollout_logprobs
        return ppo_clip_loss(
            logprobs_S,
            old_S,
            tokens.advantages,
            clip_low=self._settings.clip_low,
            clip_high=self._settings.clip_high,
        )
