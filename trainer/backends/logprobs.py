"""Log-probs and entropy of the distribution that a token was sampled from: logits divided by the temperature, cut to
the kept set of top-k and top-p, and normalised again.

The softmax over the vocabulary is taken chunk by chunk of positions and computed again in the backward pass, so that
no float32 array of [S, V] exists beside the logits and their gradient. Each position's figures come from its own row
of logits alone, so that chunks change no bit.

Shape letters: S = trained positions of a micro-batch, V = vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 23


class TokenScores(NamedTuple):
    """float32[S] each; entropy in nats."""

    logprobs: Tensor
    entropy: Tensor


class Sampled(NamedTuple):
    """The S tokens that are asked for and how they were sampled; None stands for what changes nothing.

    labels: int64[S]. temperature: float32[S]. top_p: float32[S] and top_k: int64[S], of the kept set; 1 and 0 keep all.
    """

    labels: Tensor
    temperature: Tensor | None = None
    top_p: Tensor | None = None
    top_k: Tensor | None = None

    @property
    def has_limits(self) -> bool:
        """Whether some token's set is not the whole vocabulary."""
        return self.top_p is not None or self.top_k is not None

    def rows(self, rows: slice) -> Sampled:
        """Those of a chunk of positions."""
        return Sampled(*(None if values is None else values[rows] for values in self))  # type: ignore[arg-type]


def token_scores(logits_SV: Tensor, sampled: Sampled, *, entropy_gradient: bool = False) -> TokenScores:
    """Scores of the sampled tokens; gradient reaches `logits_SV` through the log-probs, and through the entropy where
    asked for. The kept set is a constant of the gradient."""
    return TokenScores(*_ChunkedScores.apply(logits_SV, sampled, entropy_gradient))


class _ChunkedScores(torch.autograd.Function):
    """With p the distribution and l the label: d logprob / d z_j = (1[j = l] - p_j) / temperature, and
    d entropy / d z_j = -p_j (log p_j + entropy) / temperature."""

    @staticmethod
    def forward(ctx: Any, logits_SV: Tensor, sampled: Sampled, entropy_gradient: bool) -> tuple[Tensor, Tensor]:
        parts = [_scores(logits_SV[rows], sampled.rows(rows)) for rows in _chunks(logits_SV)]
        logprobs_S, entropy_S = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(logits_SV, *sampled)
        ctx.set_materialize_grads(False)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy_S)
        return logprobs_S, entropy_S

    @staticmethod
    def backward(ctx: Any, grad_logprobs_S: Tensor | None, grad_entropy_S: Tensor | None) -> tuple[Tensor, None, None]:
        logits_SV, sampled = ctx.saved_tensors[0], Sampled(*ctx.saved_tensors[1:])
        grad_logits_SV = torch.zeros_like(logits_SV) if grad_logprobs_S is None else torch.empty_like(logits_SV)
        for rows in _chunks(logits_SV):
            part = sampled.rows(rows)
            scaled_CV = _scaled(logits_SV[rows], part)
            probs_CV = torch.softmax(scaled_CV, -1)
            grad_CV = torch.zeros_like(probs_CV)
            if grad_logprobs_S is not None:
                grad_C1 = grad_logprobs_S[rows, None]
                grad_CV = (probs_CV * -grad_C1).scatter_add_(1, part.labels[:, None], grad_C1)
            if grad_entropy_S is not None:
                plogp_CV = _plogp(probs_CV, torch.log_softmax(scaled_CV, -1), part)
                grad_CV -= grad_entropy_S[rows, None] * (plogp_CV - probs_CV * plogp_CV.sum(-1, keepdim=True))
            if part.temperature is not None:
                grad_CV /= part.temperature[:, None]
            grad_logits_SV[rows] = grad_CV
        return grad_logits_SV, None, None


def _chunks(logits_SV: Tensor) -> list[slice]:
    """At least one chunk, so that no tokens are no special case."""
    num_positions, vocabulary = logits_SV.shape
    step = max(1, _CHUNK_ELEMENTS // vocabulary)
    return [slice(start, start + step) for start in range(0, max(num_positions, 1), step)]


def _scores(logits_CV: Tensor, sampled: Sampled) -> tuple[Tensor, Tensor]:
    logprobs_CV = torch.log_softmax(_scaled(logits_CV, sampled), -1)
    entropy_C = -_plogp(logprobs_CV.exp(), logprobs_CV, sampled).sum(-1)
    return logprobs_CV.gather(1, sampled.labels[:, None])[:, 0], entropy_C


def _plogp(probs_CV: Tensor, logprobs_CV: Tensor, sampled: Sampled) -> Tensor:
    """`p log p`, 0 where a token is not in the kept set."""
    if sampled.has_limits:
        logprobs_CV = logprobs_CV.masked_fill(logprobs_CV == -torch.inf, 0.0)
    return probs_CV * logprobs_CV


def _scaled(logits_CV: Tensor, sampled: Sampled) -> Tensor:
    """float32[C, V]: the logits of the sampled distribution, -inf outside of the kept set."""
    scaled_CV = logits_CV.float()
    if sampled.temperature is not None:
        scaled_CV = scaled_CV / sampled.temperature[:, None]
    if sampled.has_limits:
        scaled_CV = scaled_CV.masked_fill(~kept_set(scaled_CV, sampled), -torch.inf)
    return scaled_CV


def kept_set(scaled_CV: Tensor, sampled: Sampled) -> Tensor:
    """bool[C, V]: the tokens that could be sampled. The top_k largest logits (all that equal the k-th); of these, by
    falling probability among them, as many as it takes to reach top_p. The order of the two is vLLM's. The sampled
    token is always in: the engine had it in its set, and rounding here must not make its probability 0.
    """
    sorted_CV, order_CV = scaled_CV.sort(dim=-1, descending=True)
    vocabulary = scaled_CV.shape[-1]
    kept_CV = torch.ones_like(sorted_CV, dtype=torch.bool)
    if sampled.top_k is not None:
        last_C = torch.where(sampled.top_k > 0, sampled.top_k, vocabulary).clamp(max=vocabulary) - 1
        kept_CV &= sorted_CV >= sorted_CV.gather(1, last_C[:, None])
    if sampled.top_p is not None:
        probs_CV = sorted_CV.masked_fill(~kept_CV, -torch.inf).softmax(-1)
        before_CV = probs_CV.cumsum(-1) - probs_CV
        kept_CV &= (before_CV < sampled.top_p[:, None]) | (sampled.top_p >= 1.0)[:, None]
    return torch.zeros_like(kept_CV).scatter(1, order_CV, kept_CV).scatter(1, sampled.labels[:, None], True)
