"""What a loss is handed and what it gives back; the one seam between algorithms and backends.

    live forward ─▶ LiveTokens ──┐
    ScoredBatch ──▶ TrainedTokens┴─▶ Objective ─▶ TokenTerms ─▶ sum(weights * loss), by the backend

Shape letters: S = trained (sampled, unmasked) tokens of one micro-batch. A sample is never cut, so that a loss over
whole sequences sees all of its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class TrainedTokens:
    """What is known of the S trained tokens besides the live forward; all are constants of the step.

    rollout_logprobs: of the engine. old_logprobs: of the trainer before the step's first update. ref_logprobs: of the
    reference policy, None where none is measured. advantages: float32[S] like all of these.
    sample_index: int64[S], in [0, num_samples), which sample of the micro-batch a token is of; ascending.
    """

    rollout_logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    sample_index: Tensor
    num_samples: int


@dataclass(frozen=True, slots=True, eq=False)
class LiveTokens:
    """The live forward's log-probs and entropies (nats), float32[S], with gradient (entropy: where the objective needs
    it, else detached)."""

    logprobs: Tensor
    entropy: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class TokenTerms:
    """One loss term a token: float32[S], to be minimised, with gradient. shares: bool or float32[S] by name, whose
    means over all trained tokens of the step are logged (`clipped_low`, `clipped_high`, `masked`, `kl_reference`)."""

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
