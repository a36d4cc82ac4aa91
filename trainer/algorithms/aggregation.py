"""From losses per token to one number: the weight of each token in the step's sum. Pure functions.

`(tokens_of_rollout: Sequence[int]) -> tuple[float, ...]`: from how many tokens each rollout trains on (all its samples
together) in one optimiser step, the weight of each of its tokens. Denominators are those of the whole optimiser step,
never of a micro-batch or a rank, so no cut changes loss or gradient: the step's loss is `sum(weight * loss)`.
Tokens that a correction masks are in the denominators: masking lowers a step's gradient and never raises the others'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from gateway.contracts.errors import ConfigurationError
from trainer.algorithms.settings import LossSettings, is_reference
from trainer.extension import load_extension

Aggregation = Callable[[Sequence[int]], tuple[float, ...]]
"""`tokens_of_rollout -> weight of each of its tokens`."""


def token_weights(tokens_of_rollout: Sequence[int]) -> tuple[float, ...]:
    """`1 / sum(tokens)`: every token weighs the same. DAPO (arXiv 2503.14476, section 3.3).

    >>> token_weights([1, 3])
    (0.25, 0.25)
    """
    total = sum(tokens_of_rollout)
    return tuple(1.0 / total if total else 0.0 for _ in tokens_of_rollout)


def sequence_weights(tokens_of_rollout: Sequence[int]) -> tuple[float, ...]:
    """`1 / (rollouts * tokens of its rollout)`: every rollout weighs the same, its tokens share that.

    GRPO (arXiv 2402.03300, equation 3) and GSPO (arXiv 2507.18071, equation 5). Rollouts without a token do not count.

    >>> sequence_weights([1, 4])
    (0.5, 0.125)
    """
    rollouts = sum(tokens > 0 for tokens in tokens_of_rollout)
    return tuple(1.0 / (rollouts * tokens) if tokens else 0.0 for tokens in tokens_of_rollout)


def constant_weights(tokens_of_rollout: Sequence[int], *, constant_tokens: int) -> tuple[float, ...]:
    """`1 / (rollouts * constant_tokens)`: a rollout weighs by its length, by no batch's statistics.

    Dr. GRPO (arXiv 2503.20783, section 3.2), where the constant is the generation budget.

    >>> constant_weights([1, 4], constant_tokens=10)
    (0.05, 0.05)
    """
    return tuple(1.0 / (len(tokens_of_rollout) * constant_tokens) for _ in tokens_of_rollout)


def make_aggregation(settings: LossSettings) -> Aggregation:
    """The aggregation that the settings name; a user's own is checked at each call.

    Raises ConfigurationError for a reference that cannot be loaded.
    """
    name = settings.aggregation_in_force
    if is_reference(name):
        return _checked(name)
    if name == "constant":
        return lambda tokens: constant_weights(tokens, constant_tokens=settings.constant_tokens)
    return {"token": token_weights, "sequence": sequence_weights}[name]


def _checked(reference: str) -> Aggregation:
    key = "loss.aggregation"
    own = load_extension(reference, key=key, takes=("tokens_of_rollout",))

    def aggregate(tokens_of_rollout: Sequence[int]) -> tuple[float, ...]:
        weights = tuple(float(weight) for weight in own(tuple(tokens_of_rollout)))
        if len(weights) != len(tokens_of_rollout):
            raise ConfigurationError(
                f"{key} {reference} returned {len(weights)} weights for {len(tokens_of_rollout)} rollouts"
            )
        for at, weight in enumerate(weights):
            if not (math.isfinite(weight) and weight >= 0):
                raise ConfigurationError(
                    f"{key} {reference} returned {weight} for rollout {at}; a weight is not negative"
                )
        return weights

    return aggregate
