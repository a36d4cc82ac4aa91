"""Rows of alignment padding: experts spread evenly over expert-parallel ranks, so that padding overloads none of them.

A constant row would send every padding position to the same few experts, and with many of them to one rank's memory.
"""

from __future__ import annotations

import numpy as np

from gateway.contracts.errors import ExpertsMismatch
from gateway.contracts.experts import RoutingShape
from trainer.replay.rows import RoutingRows


def padding_rows(num_positions: int, shape: RoutingShape, num_ranks: int = 1) -> RoutingRows:
    """Rows of distinct experts for positions that only fill up a micro-batch; replayed, and counted nowhere.

    Each rank holds one block of `num_experts / num_ranks` consecutive experts. Slots are dealt to ranks in turn, so in
    each layer loads of ranks differ by at most one. All layers share one copy. Raises ExpertsMismatch where experts
    cannot be cut into equal blocks.
    """
    if num_ranks < 1 or shape.num_experts % num_ranks:
        raise ExpertsMismatch(f"{shape.num_experts} experts cannot be cut into {num_ranks} equal blocks, one a rank")
    per_rank = shape.num_experts // num_ranks
    slots = np.arange(num_positions * shape.top_k, dtype=np.int64)
    ids = (slots % num_ranks * per_rank + slots // num_ranks % per_rank).astype(shape.dtype)
    rows = np.broadcast_to(ids.reshape(num_positions, 1, shape.top_k), (num_positions, shape.num_layers, shape.top_k))
    bits = np.broadcast_to(np.full(1, 0xFF, np.uint8), (num_positions, -(-shape.num_layers // 8)))
    return RoutingRows((rows,), (bits,), (True,))
