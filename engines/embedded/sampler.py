"""Sampling: logits of a step → one token, its log-prob, and the likeliest tokens, for each sequence.

The log-prob is of the temperature-scaled distribution before top-k, top-p and min-p (SGLang's meaning), or with
`kept_set_logprobs` behind them (vLLM's `processed_logprobs`); greedy requests use temperature 1 and filter nothing.
With `LogprobKind.RAW` it is of the unscaled one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from gateway.contracts.generation import LogprobKind, TopLogprob

NO_TOP_K = 1 << 30
"""What a top_k of -1 stands for."""


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How one request is sampled and when it stops; names are SGLang's, checked where the request is read.

    `seed` None draws from the engine's own seed. `stop_trim`: cut the matched stop off the text. `kept_set_logprobs`:
    filter in vLLM's order, and give log-probs of what that keeps.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = NO_TOP_K
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    min_new_tokens: int = 0
    seed: int | None = None
    skip_special_tokens: bool = True
    stop_trim: bool = True
    stream_interval: int | None = None
    kept_set_logprobs: bool = False

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def filtered(self) -> bool:
        """Whether only a part of the vocabulary may be sampled."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k < NO_TOP_K or self.min_p > 0)


@dataclass(slots=True)
class Draw:
    """One sequence's turn at the sampler: its settings, its own random numbers, tokens that must not come yet, and how
    many of the likeliest tokens it wants to hear of."""

    settings: SamplingSettings
    randomness: random.Random
    forbidden: list[int] = field(default_factory=list)
    num_top_logprobs: int = 0


class Sampled(NamedTuple):
    """What came of B draws; the likeliest tokens are of the distribution that log-probs are of, likeliest first."""

    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[list[TopLogprob]]


def sample(logits_BV: torch.Tensor, draws: Sequence[Draw], *, kind: LogprobKind) -> Sampled:
    """Tokens and log-probs, one for each of B rows. Overwrites nothing of `logits_BV`.

    A sequence's tokens depend on its logits and its own random numbers only, never on its neighbours in the batch, and
    not on how many of the likeliest it wants to hear of (I7). kind: RAW or TEMPERATURE_SCALED; requests say more.
    """
    logits = logits_BV.float()
    if any(draw.forbidden for draw in draws):
        logits = _without_forbidden(logits, draws)
    temperatures = [1.0 if draw.settings.greedy else draw.settings.temperature for draw in draws]
    scaled = logits
    if any(temperature != 1.0 for temperature in temperatures):
        scaled = logits / torch.tensor(temperatures)[:, None]
    logprobs = torch.log_softmax(scaled, dim=-1)
    narrowed = [row for row, draw in enumerate(draws) if draw.settings.kept_set_logprobs and draw.settings.filtered]
    if narrowed:
        logprobs[narrowed] = _kept_set_logprobs(scaled[narrowed], [draws[row].settings for row in narrowed])
    tokens = _choose(logits, logprobs, draws)
    if kind is LogprobKind.RAW and (narrowed or scaled is not logits):
        logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, tokens[:, None])[:, 0]
    tops = [top_logprobs(row_V, draw.num_top_logprobs) for row_V, draw in zip(logprobs, draws, strict=True)]
    return Sampled(tokens.tolist(), chosen.tolist(), tops)


def top_logprobs(logprobs_V: torch.Tensor, number: int) -> list[TopLogprob]:
    """The `number` likeliest tokens of one distribution, or as many as are possible at all, likeliest first."""
    if not number:
        return []
    values, indices = logprobs_V.topk(min(number, len(logprobs_V)))
    pairs = zip(indices.tolist(), values.tolist(), strict=True)
    return [TopLogprob(token_id, logprob) for token_id, logprob in pairs if logprob > float("-inf")]


def _without_forbidden(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    masked = logits.clone()
    for row, draw in enumerate(draws):
        if draw.forbidden:
            masked[row, draw.forbidden] = float("-inf")
    return masked


def _choose(logits: torch.Tensor, logprobs: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    greedy = [draw.settings.greedy for draw in draws]
    if all(greedy):
        return logits.argmax(dim=-1)
    uniform = torch.tensor([0.5 if draw.settings.greedy else draw.randomness.random() for draw in draws])
    tokens = _inverse_transform(logprobs.exp(), uniform)
    rows = [row for row, draw in enumerate(draws) if draw.settings.filtered and not draw.settings.kept_set_logprobs]
    if rows:
        tokens[rows] = _sample_filtered(logprobs[rows].exp(), uniform[rows], [draws[row].settings for row in rows])
    if any(greedy):
        tokens = torch.where(torch.tensor(greedy), logits.argmax(dim=-1), tokens)
    return tokens


def _inverse_transform(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Index drawn in proportion to each row's weights, by one uniform number a row."""
    cumulative = weights.double().cumsum(dim=-1)
    total = cumulative[:, -1]
    # Strictly below the total, so that the index found has a weight above zero.
    threshold = torch.minimum(uniform.double() * total, total * (1 - 1e-12))
    return torch.searchsorted(cumulative, threshold[:, None], right=True)[:, 0]


def _sample_filtered(probs: torch.Tensor, uniform: torch.Tensor, settings: Sequence[SamplingSettings]) -> torch.Tensor:
    """top-k, then top-p, then min-p over the sorted distribution, as SGLang's PyTorch backend orders them."""
    ordered, indices = probs.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    top_p = torch.tensor([s.top_p for s in settings])[:, None]
    min_p = torch.tensor([s.min_p for s in settings])[:, None]
    top_k = torch.from_numpy(np.array([s.top_k for s in settings], dtype=np.int64))[:, None]
    dropped = (torch.arange(ordered.shape[-1]) >= top_k) | (before > top_p) | (ordered < ordered[:, :1] * min_p)
    kept = ordered.masked_fill(dropped, 0.0)
    return indices.gather(1, _inverse_transform(kept, uniform)[:, None])[:, 0]


def _kept_set_logprobs(scaled: torch.Tensor, settings: Sequence[SamplingSettings]) -> torch.Tensor:
    """Log-probs renormalised over what min-p, then top-k (ties stay), then top-p of the rest keep; -inf elsewhere.

    That is vLLM's order: each filter sees the distribution that the one before it left.
    """
    top_p = torch.tensor([s.top_p for s in settings])[:, None]
    min_p = torch.tensor([s.min_p for s in settings])[:, None]
    last = torch.tensor([min(s.top_k, scaled.shape[-1]) - 1 for s in settings])[:, None]
    probs = torch.softmax(scaled, dim=-1)
    ordered, indices = scaled.masked_fill(probs < probs.amax(-1, keepdim=True) * min_p, float("-inf")).sort(
        dim=-1, descending=True
    )
    ordered = ordered.masked_fill(ordered < ordered.gather(1, last), float("-inf"))
    probs = torch.softmax(ordered, dim=-1)
    before = probs.cumsum(dim=-1) - probs
    ordered = ordered.masked_fill((before >= top_p) & (top_p < 1), float("-inf"))
    return torch.log_softmax(torch.empty_like(scaled).scatter_(1, indices, ordered), dim=-1)
