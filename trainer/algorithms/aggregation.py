"""From losses per token to one number: the weight of each token in the step's sum. Denominators are the whole step's,
never the micro-batch's or the rank's, so that no cut of a step changes loss or gradient. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence


def token_weights(tokens_of_rollout: Sequence[int]) -> tuple[float, ...]:
    """The weight of each token of each rollout, `1 / sum(tokens)`: every token weighs the same.

    DAPO (arXiv 2503.14476, section 3.3).
    """
    total = sum(tokens_of_rollout)
    return tuple(1.0 / total for _ in tokens_of_rollout)
