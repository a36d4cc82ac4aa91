"""RoutingRows: recorded routing of N input positions, held where it was read.

Experts are the largest part of a batch, so nothing here copies them: rows are views of the rollouts' bodies, one chunk
a sample, and the int64 ids that a router needs exist for one layer at a time. Which rows may be replayed is kept as one
bit for each position and layer.

Shape letters: N = positions, L = decoder layers (those without experts too), K = experts of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gateway.contracts.errors import ExpertsMismatch
from gateway.contracts.experts import ExpertIds, RoutingShape


class LayerRows(NamedTuple):
    """One layer's rows: ids int64[N, K] and valid bool[N], which of them may be replayed."""

    ids: npt.NDArray[np.int64]
    valid: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class RoutingRows:
    """chunks: uint8/uint16[n, L, K] each, their n adding up to N. valid_bits: uint8[n, ceil(L / 8)] beside each chunk,
    layer 0 in the highest bit of the first byte."""

    chunks: tuple[ExpertIds, ...]
    valid_bits: tuple[npt.NDArray[np.uint8], ...]

    def __post_init__(self) -> None:
        kinds = {(chunk.shape[1:], chunk.dtype) for chunk in self.chunks}
        if len(kinds) != 1:
            raise ExpertsMismatch(f"one batch has routing rows of several shapes: {sorted(map(str, kinds))}")
        if [len(chunk) for chunk in self.chunks] != [len(bits) for bits in self.valid_bits]:
            raise ExpertsMismatch("routing rows and their validity differ in length")

    @classmethod
    def of(cls, ids_NLK: ExpertIds, valid_NL: npt.NDArray[np.bool_]) -> RoutingRows:
        """Rows of one sample; `valid_NL` says which may be replayed."""
        return cls((ids_NLK,), (np.packbits(valid_NL, axis=1),))

    @classmethod
    def unrecorded(cls, num_positions: int, shape: RoutingShape) -> RoutingRows:
        """Rows of which none was recorded; they take no memory."""
        ids = np.broadcast_to(np.zeros(1, shape.dtype), (num_positions, shape.num_layers, shape.top_k))
        bits = np.broadcast_to(np.zeros(1, np.uint8), (num_positions, -(-shape.num_layers // 8)))
        return cls((ids,), (bits,))

    @classmethod
    def join(cls, parts: Sequence[RoutingRows]) -> RoutingRows:
        """Rows one behind the other, still where they were."""
        return cls(
            tuple(chunk for part in parts for chunk in part.chunks),
            tuple(bits for part in parts for bits in part.valid_bits),
        )

    @property
    def num_positions(self) -> int:
        """N."""
        return sum(len(chunk) for chunk in self.chunks)

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.chunks[0].shape[1])

    @property
    def top_k(self) -> int:
        """K."""
        return int(self.chunks[0].shape[2])

    def layer(self, layer: int) -> LayerRows:
        """The rows of one layer, by its global index."""
        ids = np.concatenate([chunk[:, layer] for chunk in self.chunks], dtype=np.int64)
        byte, bit = divmod(layer, 8)
        bits = np.concatenate([bits[:, byte] for bits in self.valid_bits])
        return LayerRows(ids, (bits >> (7 - bit) & 1).astype(np.bool_))

    def num_valid(self, layers: Sequence[int]) -> int:
        """How many (position, layer) pairs of these layers may be replayed."""
        wanted = np.packbits(np.isin(np.arange(self.num_layers), layers))
        return sum(int(np.bitwise_count(bits & wanted).sum()) for bits in self.valid_bits)

    def head(self, num_positions: int) -> RoutingRows:
        """The first `num_positions` rows, still where they were."""
        chunks, bits, left = [], [], num_positions
        for chunk, chunk_bits in zip(self.chunks, self.valid_bits, strict=True):
            chunks.append(chunk[:left])
            bits.append(chunk_bits[:left])
            left -= len(chunks[-1])
        return RoutingRows(tuple(chunks), tuple(bits))
