"""Policy losses, one term a token; aggregation is elsewhere. Pure functions, each with its paper.

The gradient flows through `logprobs` only; `old_logprobs` and advantages are constants.
Shape letters: S = trained (sampled, unmasked) tokens of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gateway.contracts.errors import ConfigurationError
from trainer.algorithms.extension import checked_tensor
from trainer.algorithms.objective import LiveTokens, Share, TokenTerms, TrainedTokens
from trainer.algorithms.ratios import mean_per_sample, ratio
from trainer.algorithms.settings import Bounds, LossSettings, is_reference
from trainer.extension import load_extension

PolicyLoss = Callable[[LiveTokens, TrainedTokens], TokenTerms]


def ppo_clip_loss(
    logprobs_S: Tensor, old_logprobs_S: Tensor, advantages_S: Tensor, clip: Bounds, *, clip_dual: float = 0.0
) -> TokenTerms:
    """`-min(r A, clip(r, 1 - low, 1 + high) A)` with `r = exp(logprobs - old_logprobs)`.

    PPO (arXiv 1707.06347, equation 7); a `high` above `low` is DAPO's clip-higher (arXiv 2503.14476, section 3.1).
    clip_dual c > 1 bounds the loss of negative advantages at `-c A` (dual clip, arXiv 1912.09729, equation 5); 0: off.
    """
    return _clipped(ratio(logprobs_S - old_logprobs_S), advantages_S, clip, clip_dual)


def gspo_loss(
    logprobs_S: Tensor,
    old_logprobs_S: Tensor,
    advantages_S: Tensor,
    sample_index_S: Tensor,
    num_samples: int,
    clip: Bounds,
) -> TokenTerms:
    """`-min(s A, clip(s, 1 - low, 1 + high) A)` with one ratio a sequence, `s = exp(mean of its tokens' log r)`.

    GSPO (arXiv 2507.18071, equations 5 to 7) in its token form (GSPO-token, equations 13 and 14): each token carries
    the value of s and the gradient of its own log-prob, `sg(s) p / sg(p)`. Where a sequence's tokens share weight and
    advantage, value and gradient of the sum are GSPO's; with a factor or advantage of its own, a token keeps it.
    A sequence is a sample; its length is the number of its tokens among the S.
    """
    logratio_S = (logprobs_S - old_logprobs_S).detach()
    mean_S = mean_per_sample(logratio_S, sample_index_S, num_samples)[sample_index_S]
    return _clipped(ratio(mean_S) * torch.exp(logprobs_S - logprobs_S.detach()), advantages_S, clip, 0.0)


def cispo_loss(logprobs_S: Tensor, old_logprobs_S: Tensor, advantages_S: Tensor, clip: Bounds) -> TokenTerms:
    """`-sg(clip(r, 1 - low, 1 + high)) A log p`: the weight is bounded, and no token loses its gradient.

    CISPO (MiniMax-M1, arXiv 2506.13585, equations 4 and 5); low = 1 leaves the lower bound out. clipped shares count
    the tokens whose weight is bounded.
    """
    ratio_S = ratio((logprobs_S - old_logprobs_S).detach())
    weight_S = ratio_S.clamp(1.0 - clip.low, 1.0 + clip.high)
    shares: dict[str, Tensor] = {
        Share.CLIPPED_LOW: ratio_S < 1.0 - clip.low,
        Share.CLIPPED_HIGH: ratio_S > 1.0 + clip.high,
        Share.RATIO_MEAN: ratio_S,
    }
    return TokenTerms(-weight_S * advantages_S * logprobs_S, shares)


def reinforce_loss(logprobs_S: Tensor, advantages_S: Tensor) -> TokenTerms:
    """`-A log p`: the policy gradient without ratio or clip (Williams, 1992)."""
    return TokenTerms(-advantages_S * logprobs_S)


def make_policy_loss(settings: LossSettings) -> PolicyLoss:
    """The policy loss that the settings name; a user's own is checked at each call.

    Raises ConfigurationError for a reference that cannot be loaded.
    """
    if is_reference(settings.policy):
        return _checked(settings.policy)
    clip, dual = settings.clip or Bounds(0.0, 0.0), settings.clip_dual
    losses: Mapping[str, PolicyLoss] = {
        "ppo": lambda live, t: ppo_clip_loss(live.logprobs, t.old_logprobs, t.advantages, clip, clip_dual=dual),
        "gspo": lambda live, t: gspo_loss(
            live.logprobs, t.old_logprobs, t.advantages, t.sample_index, t.num_samples, clip
        ),
        "cispo": lambda live, t: cispo_loss(live.logprobs, t.old_logprobs, t.advantages, clip),
        "reinforce": lambda live, t: reinforce_loss(live.logprobs, t.advantages),
    }
    return losses[settings.policy]


def _clipped(ratio_S: Tensor, advantages_S: Tensor, clip: Bounds, clip_dual: float) -> TokenTerms:
    """The clipped surrogate. A ratio exactly at a bound is inside: it keeps its whole gradient."""
    low_S = (advantages_S < 0) & (ratio_S < 1.0 - clip.low)
    high_S = (advantages_S > 0) & (ratio_S > 1.0 + clip.high)
    held_S = torch.where(low_S, 1.0 - clip.low, torch.where(high_S, 1.0 + clip.high, ratio_S))
    shares: dict[str, Tensor] = {
        Share.CLIPPED_LOW: low_S,
        Share.CLIPPED_HIGH: high_S,
        Share.RATIO_MEAN: ratio_S.detach(),
    }
    if clip_dual:
        dual_S = (advantages_S < 0) & (ratio_S > clip_dual)
        held_S = torch.where(dual_S, clip_dual, held_S)
        shares[Share.CLIPPED_DUAL] = dual_S
    return TokenTerms(-held_S * advantages_S, shares)


def _checked(reference: str) -> PolicyLoss:
    what = f"loss.policy {reference}"
    own = load_extension(reference, key="loss.policy", takes=("live", "tokens"))

    def loss(live: LiveTokens, tokens: TrainedTokens) -> TokenTerms:
        if not live.logprobs.numel():
            return TokenTerms(live.logprobs)  # all masked; a function of the user's need not bear that
        result = own(live, tokens)
        terms = result if isinstance(result, TokenTerms) else TokenTerms(result)
        known = (live.logprobs, live.entropy, tokens.old_logprobs, tokens.rollout_logprobs, tokens.advantages)
        finite = all(bool(torch.isfinite(each).all()) for each in known)
        checked_tensor(terms.loss, what=what, like=live.logprobs, inputs_finite=finite)
        if live.logprobs.requires_grad and not terms.loss.requires_grad:
            raise ConfigurationError(f"{what} returned a loss that has no gradient; compute it from live.logprobs")
        for name, values in terms.shares.items():
            checked_tensor(values.to(live.logprobs.dtype), what=f"{what}, share {name},", like=live.logprobs)
        return terms

    return loss
