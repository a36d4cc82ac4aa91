"""Ratios of probabilities from differences of log-probs, and sums over the tokens of a sample. Pure functions.

On a GPU the tokens of a sample are added in no fixed order; there two runs agree to rounding, on CPU bit by bit.

Shape letters: S = trained tokens of one micro-batch, B = its samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOGRATIO_LIMIT = 80.0
"""exp(80) = 5.5e34 is held by float32 with room for a factor; a clip or a mask decides long before."""


def ratio(logratio_S: Tensor) -> Tensor:
    """`exp(logratio)`, the exponent held at 80 from above so that no infinity meets a zero advantage or weight.

    Below the limit this is exp, bit for bit. Above it the gradient is that of the limit, exp(80), not zero: a bad token
    that became likely is still pushed down. NaN stays NaN, for the backend to stop at.

    >>> ratio(torch.tensor([0.0, 1000.0, -1000.0])).tolist()[0::2]
    [1.0, 0.0]
    """
    return torch.exp(logratio_S - (logratio_S.detach() - LOGRATIO_LIMIT).clamp(min=0.0))


def sum_per_sample(values_S: Tensor, sample_index_S: Tensor, num_samples: int) -> Tensor:
    """[B]: the sum of each sample's tokens; 0 for a sample without any."""
    return values_S.new_zeros(num_samples).index_add(0, sample_index_S, values_S)


def mean_per_sample(values_S: Tensor, sample_index_S: Tensor, num_samples: int) -> Tensor:
    """[B]: the mean of each sample's tokens; 0 for a sample without any."""
    counts_B = sum_per_sample(torch.ones_like(values_S), sample_index_S, num_samples)
    return sum_per_sample(values_S, sample_index_S, num_samples) / counts_B.clamp(min=1.0)
