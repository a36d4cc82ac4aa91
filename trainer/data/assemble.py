"""Segment → TrainSample: what one segment of a rollout contributes to a batch, checked (I2, I9).

A segment in which nothing is trained contributes nothing and is left out: its sampled tokens are trained in another
segment of the same rollout (I3), or may not be trained at all.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.contracts.errors import IntegrityError
from gateway.contracts.rollouts import FinishedRollout
from trainer.data.layout import TokenLayout, segment_layout
from trainer.replay.validate import RoutedLayers, replayable_rows


@dataclass(frozen=True, slots=True, eq=False)
class TrainSample:
    """One segment, ready for packing."""

    session_id: str
    segment_id: str
    layout: TokenLayout


def assemble(rollout: FinishedRollout, routed: RoutedLayers | None) -> tuple[TrainSample, ...]:
    """The samples of one rollout; `routed` None leaves its routing rows aside (replay off, or a dense model).

    Raises ExpertsMismatch where recorded rows do not fit the model, IntegrityError if a trained token would be lost or
    counted twice on the way (I3).
    """
    samples = tuple(
        TrainSample(
            session_id=rollout.session.session_id,
            segment_id=segment.segment_id,
            layout=segment_layout(segment, None if routed is None else replayable_rows(segment, routed)),
        )
        for segment in rollout.segments
        if segment.loss_mask.any()
    )
    num_kept = sum(sample.layout.num_trained for sample in samples)
    if num_kept != rollout.num_trained_tokens:
        raise IntegrityError(
            f"session {rollout.session.session_id}: {num_kept} tokens can be trained of "
            f"{rollout.num_trained_tokens} (a trained token stands first in its segment, so nothing predicts it)"
        )
    return samples
