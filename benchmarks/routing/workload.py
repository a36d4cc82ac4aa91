"""Routing as two kinds of models have it: experts at random, and experts that a layer and a text prefer.

random       every set of experts is as likely as any other: what cannot be made smaller than log2(E! / (E-K)!) bits
correlated   each layer likes some experts, each stretch of text others: what trained models look like
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from gateway.contracts.experts import RoutingShape

SHAPE = RoutingShape(num_layers=48, num_experts=128, top_k=8)
"""Of Qwen3-30B-A3B: 384 bytes a token at one byte an id."""

WORKLOADS = ("random", "correlated")

_BLOCK_ROWS = 512


def routing_blocks(
    workload: str, num_rows: int, *, seed: int, shape: RoutingShape = SHAPE
) -> Iterator[npt.NDArray[np.int32]]:
    """int32 [rows, layers, top_k], block by block; the likeliest expert first, as engines send them."""
    generator = np.random.default_rng(seed)
    size = (shape.num_layers, shape.num_experts)
    preferred = (
        generator.normal(size=size).astype(np.float32) if workload == "correlated" else np.zeros(size, np.float32)
    )
    theme = np.zeros(size, np.float32)
    for start in range(0, num_rows, _BLOCK_ROWS):
        scores = generator.random((min(_BLOCK_ROWS, num_rows - start), *size), dtype=np.float32)
        if workload == "correlated":
            theme = 0.7 * theme + 0.7 * generator.normal(size=size).astype(np.float32)
            scores = 4 * scores + preferred + theme
        likeliest = np.argpartition(scores, -shape.top_k, axis=-1)[..., -shape.top_k :]
        order = np.argsort(-np.take_along_axis(scores, likeliest, -1), axis=-1)
        yield np.take_along_axis(likeliest, order, -1).astype(np.int32)


def bound_bytes(shape: RoutingShape = SHAPE) -> float:
    """Of one token, were the order of its experts not kept: log2 of the number of sets, in bytes."""
    return shape.num_layers * math.log2(math.comb(shape.num_experts, shape.top_k)) / 8
