"""The objective that `[loss]` names, composed for each token:

    factor * policy loss  +  kl_coefficient * KL against the reference  -  entropy_coefficient * entropy

Tokens with factor 0 (masked by the correction) are taken out before any term is computed and put back as exactly 0,
so nothing of theirs, not even a NaN, reaches loss or gradient. A GSPO sequence is then its unmasked tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gateway.contracts.errors import TrainingError
from trainer.algorithms.corrections import make_correction
from trainer.algorithms.kl import reference_kl
from trainer.algorithms.losses import make_policy_loss
from trainer.algorithms.objective import LiveTokens, Share, TokenTerms, TrainedTokens
from trainer.algorithms.settings import LossSettings, OldPolicy


class PolicyObjective:
    """An `Objective` from settings; picklable as these, so that other processes can build it too.

    Raises ConfigurationError at once for a function of the user's that cannot be loaded.
    """

    def __init__(self, settings: LossSettings) -> None:
        self._settings = settings
        self._policy_loss = make_policy_loss(settings)
        self._correction = make_correction(settings)
        self._needs_rollout = settings.correction != "off" or settings.old_policy is OldPolicy.ROLLOUT

    def __reduce__(self) -> tuple[type[PolicyObjective], tuple[LossSettings]]:
        return PolicyObjective, (self._settings,)

    @property
    def needs_reference(self) -> bool:
        """With a KL coefficient."""
        return self._settings.kl_coefficient > 0

    @property
    def needs_entropy_gradient(self) -> bool:
        """With an entropy coefficient."""
        return self._settings.entropy_coefficient > 0

    def __call__(self, live: LiveTokens, tokens: TrainedTokens) -> TokenTerms:
        """The loss of S tokens; the gradient flows through `live` only.

        Raises TrainingError if a reference is needed and not there; for a user's function see `extension`.
        """
        if not live.logprobs.numel():  # a rank's filler, of which nothing was measured
            return TokenTerms(live.logprobs)
        if self.needs_reference and tokens.ref_logprobs is None:
            raise TrainingError("loss.kl_coefficient is set, but no log-probs of a reference policy were measured")
        recorded_S = torch.isfinite(tokens.rollout_logprobs)
        tokens = replace(tokens, rollout_logprobs=torch.where(recorded_S, tokens.rollout_logprobs, tokens.old_logprobs))
        factor_S = self._correction(tokens)
        if self._needs_rollout:
            factor_S = torch.where(recorded_S, factor_S, torch.zeros_like(factor_S))
        if self._settings.old_policy is OldPolicy.ROLLOUT:
            tokens = replace(tokens, old_logprobs=tokens.rollout_logprobs)
        kept_K = (factor_S != 0).nonzero()[:, 0]
        terms = self._terms(live.only(kept_K), tokens.only(kept_K), factor_S[kept_K])
        shares = {name: _put_back(values, kept_K, recorded_S, name=name) for name, values in terms.shares.items()}
        shares |= {Share.MASKED: factor_S == 0, Share.CORRECTION_MEAN: factor_S}
        if self._needs_rollout:
            shares[Share.UNRECORDED] = ~recorded_S
        return TokenTerms(torch.zeros_like(live.logprobs).index_copy(0, kept_K, terms.loss), shares)

    def _terms(self, live: LiveTokens, tokens: TrainedTokens, factor_K: Tensor) -> TokenTerms:
        """Of the K unmasked tokens."""
        policy = self._policy_loss(live, tokens)
        loss_K, shares = factor_K * policy.loss, dict(policy.shares)
        if tokens.ref_logprobs is not None and self.needs_reference:
            kl_K = reference_kl(live.logprobs, tokens.ref_logprobs, estimator=self._settings.kl_estimator)
            loss_K = loss_K + self._settings.kl_coefficient * kl_K
            shares[Share.KL_REFERENCE] = kl_K.detach()
        if self.needs_entropy_gradient:
            loss_K = loss_K - self._settings.entropy_coefficient * live.entropy
        return TokenTerms(loss_K.to(live.logprobs.dtype), shares)


def _put_back(values_K: Tensor, kept_K: Tensor, like_S: Tensor, *, name: str) -> Tensor:
    """[S]: values at their tokens; a masked token has 0, and 1 as its ratio."""
    rest = 1.0 if name == Share.RATIO_MEAN else 0.0
    whole_S = torch.full(like_S.shape, rest, dtype=torch.float32, device=values_K.device)
    return whole_S.index_copy(0, kept_K, values_K.detach().float())
