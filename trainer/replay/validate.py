"""Which recorded routing rows may be replayed. numpy only; rows are looked at once, when they come in.

A row of a layer is valid iff it was recorded and all its ids are in range and distinct: that also finds the zero-filled
and duplicated rows that engines are known to return. Invalid rows are not repaired: the live router decides for them,
and they are counted (I9). What no look at a row can find: another token's row in its place (a stale slot), holes that
an engine filled with unused ids, and with one expert a token anything but an id out of range. The step's gap between
recorded and replayed log-probs shows those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gateway.contracts.errors import ExpertsMismatch
from gateway.contracts.experts import RoutingShape, valid_row_bits
from gateway.contracts.samples import Segment
from trainer.replay.rows import RoutingRows, shared_bits


@dataclass(frozen=True, slots=True)
class RoutedLayers:
    """The routing of a model: its shape, and the global indices of the decoder layers that route, ascending.

    sizes: beside each layer its own number of experts and of experts a token, which may be less than the shape's; empty
    where all layers have the shape's. A row of a layer with fewer experts a token has them in its first columns.
    """

    shape: RoutingShape
    layers: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...] = ()

    @property
    def layers_by_size(self) -> Mapping[tuple[int, int], tuple[int, ...]]:
        """Layers that are alike, by their number of experts and of experts a token."""
        sizes = self.sizes or ((self.shape.num_experts, self.shape.top_k),) * len(self.layers)
        return {
            size: tuple(layer for layer, own in zip(self.layers, sizes, strict=True) if own == size)
            for size in dict.fromkeys(sizes)
        }


def replayable_rows(segment: Segment, routed: RoutedLayers) -> RoutingRows:
    """The rows of a segment, N = T-1, with which of them may be replayed; none without recorded rows.

    Raises ExpertsMismatch where the rows have other layers, experts per token or id type than the model.
    """
    rows, shape = segment.routed_experts, routed.shape
    if rows is None:
        return RoutingRows.unrecorded(segment.num_tokens - 1, shape)
    if rows.shape[1:] != (shape.num_layers, shape.top_k) or rows.dtype != shape.dtype:
        raise ExpertsMismatch(
            f"segment {segment.segment_id}: routing rows are {rows.dtype} [{rows.shape[1]} layers, {rows.shape[2]}],"
            f" the model routes {shape.dtype} [{shape.num_layers}, {shape.top_k}]"
        )
    bits = np.zeros((len(rows), -(-shape.num_layers // 8)), dtype=np.uint8)
    for (num_experts, top_k), layers in routed.layers_by_size.items():
        own = rows[..., :top_k]  # what an engine puts behind the experts of a narrower layer is not looked at
        bits |= valid_row_bits(own, num_experts, recorded=segment.routed_valid, routed_layers=layers)
    return RoutingRows((rows,), (shared_bits(bits),))
