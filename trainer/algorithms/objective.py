"""What a loss is handed and what it gives back; the one seam between algorithms and backends.

    live forward ─▶ LiveTokens ──┐
    ScoredBatch ──▶ TrainedTokens┴─▶ Objective ─▶ TokenTerms ─▶ sum(weights * loss), by the backend

Shape letters: S = trained (sampled, unmasked) tokens of one micro-batch. A sample is never cut, so that a loss over
whole sequences sees all of its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class TrainedTokens:
    """What is known of the S trained tokens besides the live forward; all are constants of the step.

    rollout_logprobs: of the engine, of the distribution that it sampled from; NaN where it gave none. old_logprobs: of
    the trainer before the step's first update. ref_logprobs: of the reference policy, None where none is measured.
    advantages: float32[S] like all of these.
    sample_index: int64[S], in [0, num_samples), which sample of the micro-batch a token is of. Samples may be
    interleaved: losses go by the index alone.
    """

    rollout_logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    sample_index: Tensor
    num_samples: int

    def only(self, index_K: Tensor) -> TrainedTokens:
        """The tokens at positions int64[K] of the S; samples keep their numbers."""
        return replace(
            self,
            rollout_logprobs=self.rollout_logprobs[index_K],
            old_logprobs=self.old_logprobs[index_K],
            ref_logprobs=None if self.ref_logprobs is None else self.ref_logprobs[index_K],
            advantages=self.advantages[index_K],
            sample_index=self.sample_index[index_K],
        )


@dataclass(frozen=True, slots=True, eq=False)
class LiveTokens:
    """The live forward's log-probs and entropies (nats), float32[S], with gradient (entropy: where the objective needs
    it, else detached)."""

    logprobs: Tensor
    entropy: Tensor

    def only(self, index_K: Tensor) -> LiveTokens:
        """The tokens at positions int64[K] of the S."""
        return LiveTokens(self.logprobs.index_select(0, index_K), self.entropy.index_select(0, index_K))


class Share(StrEnum):
    """Names of what losses say of each token; logged as means over all trained tokens of a step.

    CLIPPED_LOW, CLIPPED_HIGH: the ratio was beyond this bound and the bound decided (for CISPO: the weight is bounded).
    CLIPPED_DUAL: the dual clip decided. MASKED: the correction's factor is 0, the token trained nothing.
    UNRECORDED: masked because the engine gave no log-prob. RATIO_MEAN: the ratio that the loss used, a masked token's
    counting as 1. CORRECTION_MEAN: the correction's factor, 0 where it masks. KL_REFERENCE: the KL estimate against
    the reference policy, nats, before its coefficient.
    """

    CLIPPED_LOW = "clipped_low"
    CLIPPED_HIGH = "clipped_high"
    CLIPPED_DUAL = "clipped_dual"
    MASKED = "masked"
    UNRECORDED = "unrecorded"
    RATIO_MEAN = "ratio_mean"
    CORRECTION_MEAN = "correction_mean"
    KL_REFERENCE = "kl_reference"


@dataclass(frozen=True, slots=True, eq=False)
class TokenTerms:
    """One loss term a token: float32[S], to be minimised, with gradient. shares: bool or float32[S], without gradient,
    by name (`Share`, or one of your own), whose means over all trained tokens of the step are logged."""

    loss: Tensor
    shares: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """A loss over trained tokens."""

    @property
    def needs_reference(self) -> bool:
        """Whether `TrainedTokens.ref_logprobs` must be there."""
        ...

    @property
    def needs_entropy_gradient(self) -> bool:
        """Whether `LiveTokens.entropy` must carry a gradient."""
        ...

    def __call__(self, live: LiveTokens, tokens: TrainedTokens) -> TokenTerms: ...
