"""From losses per token to one number. The denominator is the whole step's, never the micro-batch's, so that neither
the number of micro-batches nor the way samples are packed changes loss or gradient."""

from __future__ import annotations

from torch import Tensor


def token_mean(losses_S: Tensor, *, num_trained_tokens: int) -> Tensor:
    """This micro-batch's part of the mean over all trained tokens of the step: `sum(losses) / num_trained_tokens`.

    DAPO (arXiv 2503.14476, section 3.3): every token weighs the same, however long its rollout. The parts of all
    micro-batches add up to the step's loss.
    """
    return losses_S.sum() / num_trained_tokens
