"""TrainSample → PackedBatch: samples one behind the other in one row, without padding.

Positions restart at 0 in each sample. Attention stays inside a sample because the model derives its block-diagonal
causal mask from those restarts (transformers' packed format; full, sliding-window and chunked layers alike). Backends
check at load that this holds for their model, and pack one sample a batch where it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainer.data.assemble import TrainSample
from trainer.data.layout import TokenLayout, concatenate


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """One micro-batch of N positions.

    sample_starts: first position of each sample. sample_index: int32[N], the sample that a position is of.
    advantages: float32[N], 0 where not trained.
    """

    layout: TokenLayout
    sample_starts: tuple[int, ...]
    sample_index: npt.NDArray[np.int32]
    advantages: npt.NDArray[np.float32]


def pack(
    samples: Sequence[TrainSample], advantages: Sequence[float], *, tokens_per_microbatch: int
) -> tuple[PackedBatch, ...]:
    """Micro-batches of at most `tokens_per_microbatch` input positions; a longer sample gets one of its own.

    advantages: one a sample. First-fit decreasing, ties in the given order, so the same samples pack the same way.
    """
    bins = _first_fit_decreasing([sample.layout.num_positions for sample in samples], tokens_per_microbatch)
    return tuple(_packed([samples[i] for i in members], [advantages[i] for i in members]) for members in bins)


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


def _packed(samples: Sequence[TrainSample], advantages: Sequence[float]) -> PackedBatch:
    layout = concatenate([sample.layout for sample in samples])
    lengths = [sample.layout.num_positions for sample in samples]
    sample_index = np.repeat(np.arange(len(samples), dtype=np.int32), lengths)
    per_position = np.asarray(advantages, dtype=np.float32)[sample_index]
    return PackedBatch(
        layout=layout,
        sample_starts=tuple(int(start) for start in np.cumsum([0, *lengths[:-1]])),
        sample_index=sample_index,
        advantages=np.where(layout.trained, per_position, np.float32(0.0)).astype(np.float32),
    )
