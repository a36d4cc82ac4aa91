"""Routers whose selection cannot be answered by replacing one call: how each is replayed, or why it cannot be.

A router is looked up by the name of its class. The table is explicit because each entry was read in the model's code;
a router that is in no entry and makes no call that selects is refused by the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Override: TypeAlias = Callable[[Any, Tensor, Tensor], Any]
"""(router, its hidden states [N, H], ids int64[N, K]) → what its forward returns when these experts are chosen."""

NOT_REPLAYED: Mapping[str, str] = {
    "DeepseekV4HashRouter": "experts are a fixed function of the token id",
}
"""Routers that make no choice: there is nothing to replay, and they are left alone."""

REFUSED: Mapping[str, str] = {
    "DogeCDMoE": "it selects among products of two smaller selections, so what is selected is no expert id",
    "JetMoeMoA": "attention chooses experts too, and a routing row has one set of experts a layer",
}
"""Modules whose choice does not fit a routing row."""


def sparse_mixer(router: Any, hidden_NH: Tensor, ids_NK: Tensor) -> Any:
    """PhiMoE's SparseMixer for two given experts (arXiv 2409.12136, its deterministic form, which engines compute).

    The weight of each expert is its softmax among the scores that lie within the jitter band of the largest score; for
    the second, the first one is taken out before. A given expert always counts as within the band.
    """
    scores_NE = nn.functional.linear(hidden_NH, router.weight, router.bias)
    first_N1, second_N1 = ids_NK[:, :1], ids_NK[:, 1:]
    weights = [_banded_weight(scores_NE, scores_NE, first_N1, router.router_jitter_noise)]
    without_first_NE = scores_NE.scatter(-1, first_N1, float("-inf"))
    weights.append(_banded_weight(scores_NE, without_first_NE, second_N1, router.router_jitter_noise))
    return scores_NE, torch.cat(weights, dim=-1), ids_NK


def _banded_weight(scores_NE: Tensor, left_NE: Tensor, chosen_N1: Tensor, jitter: float) -> Tensor:
    with torch.no_grad():
        largest_N1 = left_NE.amax(dim=-1, keepdim=True)
        scale_NE = scores_NE.abs().clamp(min=largest_N1)
        is_outside_NE = ((largest_N1 - scores_NE) / scale_NE) > 2 * jitter
        is_outside_NE = is_outside_NE.scatter(-1, chosen_N1, False)
    return torch.softmax(left_NE.masked_fill(is_outside_NE, float("-inf")), dim=-1).gather(-1, chosen_N1)


OVERRIDES: Mapping[str, Override] = {"PhimoeTopKRouter": sparse_mixer}
"""Routers that select without a call that could be answered, and their forward for given experts."""
