"""Which recorded routing rows may be replayed. numpy only; rows are looked at once, when they come in.

A row of a layer is valid iff it was recorded and all its ids are in range and distinct: that also finds the zero-filled
and duplicated rows that engines are known to return. Invalid rows are not repaired: the live router decides for them,
and they are counted (I9). What no look at a row can find: another token's row in its place (a stale slot), holes that
an engine filled with unused ids, and with one expert a token anything but an id out of range. The step's gap between
recorded and replayed log-probs shows those.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.contracts.errors import ExpertsMismatch
from gateway.contracts.experts import RoutingShape, valid_row_bits
from gateway.contracts.samples import Segment
from trainer.replay.rows import RoutingRows, shared_bits


@dataclass(frozen=True, slots=True)
class RoutedLayers:
    """The routing of a model: its shape, and the global indices of the decoder layers that route, ascending."""

    shape: RoutingShape
    layers: tuple[int, ...]


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
    bits = valid_row_bits(rows, shape.num_experts, recorded=segment.routed_valid, routed_layers=routed.layers)
    return RoutingRows((rows,), (shared_bits(bits),))
