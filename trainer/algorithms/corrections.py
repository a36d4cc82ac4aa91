"""Corrections of the gap between engine and trainer: a factor for each token's policy loss. Pure functions.

All are over `w = exp(old - rollout)`: the trainer's log-prob before the step against the engine's of the distribution
that it sampled from. Factors are constants: no gradient flows through them. A factor of 0 masks its token, which then
trains nothing at all, KL and entropy included. A bound itself is inside.
Shape letters: S = trained tokens of one micro-batch. `logw_S = old - rollout`; a sequence is a sample.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gateway.contracts.errors import ConfigurationError
from trainer.algorithms.extension import checked_tensor
from trainer.algorithms.objective import TrainedTokens
from trainer.algorithms.ratios import mean_per_sample, ratio, sum_per_sample
from trainer.algorithms.settings import Bounds, LossSettings, is_reference
from trainer.extension import load_extension

Correction = Callable[[TrainedTokens], Tensor]
"""`tokens -> factor_S`, not negative; 0 masks."""


def token_mask(logw_S: Tensor, bounds: Bounds) -> Tensor:
    """1 where `low <= w <= high`, else 0: tokens on which engine and trainer differ too much do not train."""
    return _inside(ratio(logw_S.detach()), bounds)


def token_tis(logw_S: Tensor, *, cap: float) -> Tensor:
    """`min(w, cap)`: truncated importance sampling, token by token.

    F. Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025; cap 2 is common.
    """
    return ratio(logw_S.detach()).clamp(max=cap)


def sequence_tis(logw_S: Tensor, sample_index_S: Tensor, num_samples: int, *, cap: float) -> Tensor:
    """`min(product of the sample's w, cap)` for each of its tokens.

    Liu, Li et al., "When Speed Kills Stability", 2025 (sequence-level TIS).
    """
    return _sequence_w(logw_S, sample_index_S, num_samples).clamp(max=cap)


def icepop(logw_S: Tensor, bounds: Bounds) -> Tensor:
    """`w` where `low <= w <= high`, else 0, token by token.

    IcePop (Ling team, "Small Leak Can Sink a Great Ship", 2025), with bounds 0.5 and 5.
    """
    w_S = ratio(logw_S.detach())
    return _kept(w_S, _inside(w_S, bounds))


def sequence_mis(logw_S: Tensor, sample_index_S: Tensor, num_samples: int, bounds: Bounds) -> Tensor:
    """The product of the sample's w where it is inside the bounds, else 0, for each of its tokens.

    Liu, Li et al., "When Speed Kills Stability", 2025 (sequence-level MIS; an upper bound only, as low = 0 gives).
    """
    w_S = _sequence_w(logw_S, sample_index_S, num_samples)
    return _kept(w_S, _inside(w_S, bounds))


def geometric_mis(logw_S: Tensor, sample_index_S: Tensor, num_samples: int, bounds: Bounds) -> Tensor:
    """1 for all tokens of a sample whose geometric mean of w is inside the bounds, else 0: a mask without weight.

    Liu, Li et al., "When Speed Kills Stability", 2025 (geometric masking).
    """
    mean_S = mean_per_sample(logw_S.detach(), sample_index_S, num_samples)[sample_index_S]
    return _inside(ratio(mean_S), bounds)


def make_correction(settings: LossSettings) -> Correction:
    """The correction that the settings name; a user's own is checked at each call.

    Raises ConfigurationError for a reference that cannot be loaded.
    """
    if is_reference(settings.correction):
        return _checked(settings.correction)
    bounds = settings.correction_bounds
    return {
        "off": lambda tokens: torch.ones_like(_logw(tokens)),
        "mask": lambda tokens: token_mask(_logw(tokens), bounds),
        "tis": lambda tokens: token_tis(_logw(tokens), cap=bounds.high),
        "tis-sequence": lambda tokens: sequence_tis(*_by_sample(tokens), cap=bounds.high),
        "icepop": lambda tokens: icepop(_logw(tokens), bounds),
        "mis-sequence": lambda tokens: sequence_mis(*_by_sample(tokens), bounds),
        "mis-geometric": lambda tokens: geometric_mis(*_by_sample(tokens), bounds),
    }[settings.correction]


def _checked(reference: str) -> Correction:
    what = f"loss.correction {reference}"
    own = load_extension(reference, key="loss.correction", takes=("tokens",))

    def correct(tokens: TrainedTokens) -> Tensor:
        finite = bool(torch.isfinite(_logw(tokens)).all())
        factor_S = checked_tensor(own(tokens), what=what, like=_logw(tokens), inputs_finite=finite)
        if bool((factor_S < 0).any()):
            at = int((factor_S < 0).nonzero()[0, 0])
            raise ConfigurationError(f"{what} returned {float(factor_S[at])} at [{at}]; a factor is not negative")
        return factor_S.detach()

    return correct


def _logw(tokens: TrainedTokens) -> Tensor:
    return tokens.old_logprobs - tokens.rollout_logprobs


def _by_sample(tokens: TrainedTokens) -> tuple[Tensor, Tensor, int]:
    return _logw(tokens), tokens.sample_index, tokens.num_samples


def _sequence_w(logw_S: Tensor, sample_index_S: Tensor, num_samples: int) -> Tensor:
    return ratio(sum_per_sample(logw_S.detach(), sample_index_S, num_samples)[sample_index_S])


def _inside(w_S: Tensor, bounds: Bounds) -> Tensor:
    """1 or 0. NaN counts as inside: a trainer's forward that gives NaN is to be seen, not masked away."""
    return (~((w_S < bounds.low) | (w_S > bounds.high))).to(w_S.dtype)


def _kept(w_S: Tensor, inside_S: Tensor) -> Tensor:
    return torch.where(inside_S.bool(), w_S, torch.zeros_like(w_S))
