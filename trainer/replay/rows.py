"""RoutingRows: recorded routing of N input positions, held where it was read.

Experts are the largest part of a batch, so nothing here copies them: rows are views of the rollouts' bodies, one chunk
a sample, and the int64 ids that a router needs exist for one layer at a time. Which rows may be replayed is kept as one
bit for each position and layer. Rows of alignment padding are marked: they are replayed, and counted nowhere.

Shape letters: N = positions, L = decoder layers (those without experts too), K = experts of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, cast

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
    layer 0 in the highest bit of the first byte. padding: which chunks are alignment padding; empty if none is."""

    chunks: tuple[ExpertIds, ...]
    valid_bits: tuple[npt.NDArray[np.uint8], ...]
    padding: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        kinds = {(chunk.shape[1:], chunk.dtype) for chunk in self.chunks}
        if len(kinds) != 1:
            raise ExpertsMismatch(f"one batch has routing rows of several shapes: {sorted(map(str, kinds))}")
        ((_, dtype),) = kinds
        if dtype not in (np.uint8, np.uint16):
            raise ExpertsMismatch(f"routing rows must be uint8 or uint16, not {dtype}")
        if [len(chunk) for chunk in self.chunks] != [len(bits) for bits in self.valid_bits]:
            raise ExpertsMismatch("routing rows and their validity differ in length")
        if self.padding and len(self.padding) != len(self.chunks):
            raise ExpertsMismatch("routing rows and their padding marks differ in length")

    @classmethod
    def of(cls, ids_NLK: ExpertIds, valid_NL: npt.NDArray[np.bool_]) -> RoutingRows:
        """Rows of one sample; `valid_NL` says which may be replayed."""
        return cls((ids_NLK,), (shared_bits(np.packbits(valid_NL, axis=1)),))

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
            tuple(mark for part in parts for mark in part.is_padding) if any(part.padding for part in parts) else (),
        )

    @property
    def num_positions(self) -> int:
        """N, padding included."""
        return sum(len(chunk) for chunk in self.chunks)

    @property
    def num_real(self) -> int:
        """Positions that are no padding."""
        return sum(len(chunk) for chunk, mark in zip(self.chunks, self.is_padding, strict=True) if not mark)

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.chunks[0].shape[1])

    @property
    def top_k(self) -> int:
        """K."""
        return int(self.chunks[0].shape[2])

    @property
    def nbytes(self) -> int:
        """Of the ids, as if nothing were shared."""
        return sum(chunk.nbytes for chunk in self.chunks)

    @property
    def is_padding(self) -> tuple[bool, ...]:
        """One mark a chunk."""
        return self.padding or (False,) * len(self.chunks)

    def layer(self, layer: int) -> LayerRows:
        """The rows of one layer, by its global index."""
        ids = np.concatenate([chunk[:, layer] for chunk in self.chunks], dtype=np.int64)
        byte, bit = divmod(layer, 8)
        bits = np.concatenate([bits[:, byte] for bits in self.valid_bits])
        return LayerRows(ids, (bits >> (7 - bit) & 1).astype(np.bool_))

    def counted(self) -> npt.NDArray[np.bool_]:
        """bool[N]: positions that are no padding."""
        return np.repeat(~np.asarray(self.is_padding, dtype=np.bool_), [len(chunk) for chunk in self.chunks])

    def always_valid(self) -> npt.NDArray[np.bool_]:
        """bool[L]: layers in which every row may be replayed."""
        bits = np.full(-(-self.num_layers // 8), 0xFF, dtype=np.uint8)
        for chunk_bits in self.valid_bits:
            if len(chunk_bits):
                bits &= chunk_bits[0] if _is_shared(chunk_bits) else np.bitwise_and.reduce(chunk_bits, axis=0)
        return np.unpackbits(bits, count=self.num_layers).astype(np.bool_)

    def num_valid(self, layers: Sequence[int]) -> int:
        """How many (position, layer) pairs of these layers may be replayed, padding left out."""
        wanted = _bits_of(tuple(layers), self.num_layers)
        return sum(
            (int.from_bytes(bits[0].tobytes()) & int.from_bytes(wanted)).bit_count() * len(bits)
            if _is_shared(bits)
            else int(np.bitwise_count(bits & np.frombuffer(wanted, np.uint8)).sum())
            for bits, mark in zip(self.valid_bits, self.is_padding, strict=True)
            if not mark
        )

    def head(self, num_positions: int) -> RoutingRows:
        """The first `num_positions` rows, still where they were."""
        chunks, bits, left = [], [], num_positions
        for chunk, chunk_bits in zip(self.chunks, self.valid_bits, strict=True):
            chunks.append(chunk[:left])
            bits.append(chunk_bits[:left])
            left -= len(chunks[-1])
        return RoutingRows(tuple(chunks), tuple(bits), self.padding)

    def joined(self) -> ExpertIds:
        """All rows in one array; a copy where there are several chunks."""
        if len(self.chunks) == 1:
            return self.chunks[0]
        return cast(ExpertIds, np.concatenate(self.chunks))

    def largest_id(self) -> int:
        """Of any row, valid or not."""
        return max((int(chunk.max()) for chunk in self.chunks if chunk.size), default=0)


def shared_bits(bits: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """One row of bits for all positions where they are alike, which is what sound recordings are."""
    return np.broadcast_to(bits[:1].copy(), bits.shape) if len(bits) and (bits == bits[0]).all() else bits


def _is_shared(bits: npt.NDArray[np.uint8]) -> bool:
    return bits.strides[0] == 0 and len(bits) > 0


@lru_cache(maxsize=64)
def _bits_of(layers: tuple[int, ...], num_layers: int) -> bytes:
    """One row of bits in which those of `layers` are set."""
    return np.packbits(np.isin(np.arange(num_layers), layers)).tobytes()
