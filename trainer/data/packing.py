"""TrainSample → PackedBatch: samples one behind the other in one row, without padding.

Positions restart at 0 in each sample. Attention stays inside a sample because the model derives its block-diagonal
causal mask from those restarts (transformers' packed format; full, sliding-window and chunked layers alike). Backends
check at load that this holds for their model, and pack one sample a batch where it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trainer.data.assemble import TrainSample
from trainer.data.layout import TokenLayout, concatenate


@dataclass(frozen=True, slots=True)
class SampleWeights:
    """What a sample's trained tokens count with: `advantage`, and `weight`, the factor of each token's loss in the
    step's sum. Weights hold the step's global denominators, so parts of any cut add up to the same loss."""

    advantage: float
    weight: float


class SampleOrigin(NamedTuple):
    """Which session and segment a sample is of; both empty for padding."""

    session_id: str
    segment_id: str


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """One micro-batch of N positions.

    sample_starts: first position of each sample. sample_index: int32[N], the sample that a position is of.
    advantages, weights: float32[N], 0 where not trained. origins: of each sample.
    """

    layout: TokenLayout
    sample_starts: tuple[int, ...]
    sample_index: npt.NDArray[np.int32]
    advantages: npt.NDArray[np.float32]
    weights: npt.NDArray[np.float32]
    origins: tuple[SampleOrigin, ...]


@dataclass(frozen=True, slots=True, eq=False)
class ScoredBatch:
    """A micro-batch with what other forwards say of its S trained tokens, in order of their positions; float32[S] each.

    old_logprobs: of the trainer's policy before the step's first update; None: the live forward itself, detached.
    ref_logprobs: of the reference policy; None where no loss asks for it.
    """

    batch: PackedBatch
    old_logprobs: npt.NDArray[np.float32] | None = None
    ref_logprobs: npt.NDArray[np.float32] | None = None


def pack(
    samples: Sequence[TrainSample], weights: Sequence[SampleWeights], *, tokens_per_microbatch: int
) -> tuple[PackedBatch, ...]:
    """Micro-batches of at most `tokens_per_microbatch` input positions; a longer sample gets one of its own.

    First-fit decreasing, ties in the given order, so the same samples pack the same way.
    """
    bins = _first_fit_decreasing([sample.layout.num_positions for sample in samples], tokens_per_microbatch)
    return tuple(_packed([samples[i] for i in members], [weights[i] for i in members]) for members in bins)


def _first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = next((b for b, free in enumerate(room) if free >= lengths[i]), None)
        if at is None:
            bins.append([i])
            room.append(capacity - lengths[i])
        else:
            bins[at].append(i)
            room[at] -= lengths[i]
    return bins


def _packed(samples: Sequence[TrainSample], weights: Sequence[SampleWeights]) -> PackedBatch:
    layout = concatenate([sample.layout for sample in samples])
    lengths = [sample.layout.num_positions for sample in samples]
    sample_index = np.repeat(np.arange(len(samples), dtype=np.int32), lengths)

    def spread(values: Sequence[float]) -> npt.NDArray[np.float32]:
        per_position = np.asarray(values, dtype=np.float32)[sample_index]
        return np.where(layout.trained, per_position, np.float32(0.0)).astype(np.float32)

    return PackedBatch(
        layout=layout,
        sample_starts=tuple(int(start) for start in np.cumsum([0, *lengths[:-1]])),
        sample_index=sample_index,
        advantages=spread([sample.advantage for sample in weights]),
        weights=spread([sample.weight for sample in weights]),
        origins=tuple(SampleOrigin(sample.session_id, sample.segment_id) for sample in samples),
    )
