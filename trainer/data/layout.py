"""TokenLayout: tokens, labels, masks, versions and routes on one axis, so that they cannot drift apart (I2).

The axis is *input positions*: position i feeds token i, predicts token i+1 and is routed by row i. A segment of T
tokens has N = T-1 positions; its last token is a label only. Everything that is known of the predicted token (its
log-prob, mask, version, temperature) is shifted here, once, and never again.

    token_ids      a    b    c    d          segment, T = 4
    input_ids      a    b    c               layout, N = 3
    labels         b    c    d
    routing        r0   r1   r2              row i made the log-prob of label i
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gateway.contracts.errors import ExpertsMismatch, LengthMismatch
from gateway.contracts.generation import LogprobKind, TokenIds
from gateway.contracts.samples import Segment
from gateway.contracts.versions import NOT_SAMPLED
from trainer.replay.rows import RoutingRows


@dataclass(frozen=True, slots=True, eq=False)
class TokenLayout:
    """Aligned arrays over N input positions.

    input_ids, labels, position_ids: int32[N]; positions count from 0 in each sample. trained: bool[N], the label is a
    sampled token that carries loss here. rollout_logprobs: float32[N] of the label (NaN where not sampled).
    policy_version: int32[N] of the label (-1 where not sampled). temperature: float32[N], by which logits are divided
    before their softmax (1 where not sampled, or where log-probs are raw). top_p: float32[N] and top_k: int32[N], of
    the kept set that the label's log-prob is renormalised over (1 and 0: of the whole vocabulary).
    routing: rows of N positions, or None where nothing is replayed.
    """

    input_ids: TokenIds
    labels: TokenIds
    position_ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    rollout_logprobs: npt.NDArray[np.float32]
    policy_version: npt.NDArray[np.int32]
    temperature: npt.NDArray[np.float32]
    top_p: npt.NDArray[np.float32]
    top_k: npt.NDArray[np.int32]
    routing: RoutingRows | None

    def __post_init__(self) -> None:
        num_positions = len(self.input_ids)
        lengths = {field.name: len(getattr(self, field.name)) for field in fields(self) if field.name != "routing"}
        if self.routing is not None:
            lengths["routing"] = self.routing.num_positions
        for name, length in lengths.items():
            if length != num_positions:
                raise LengthMismatch(f"layout: {name} has {length} positions, input_ids {num_positions} (I2)")

    @property
    def num_positions(self) -> int:
        """N."""
        return len(self.input_ids)

    @property
    def num_trained(self) -> int:
        """Positions whose label carries loss."""
        return int(self.trained.sum())


def segment_layout(segment: Segment, routing: RoutingRows | None) -> TokenLayout:
    """The layout of one segment; `routing` are its rows, None where nothing is replayed."""
    num_positions = segment.num_tokens - 1
    sampling = _sampling(segment)
    return TokenLayout(
        input_ids=segment.token_ids[:-1],
        labels=segment.token_ids[1:],
        position_ids=np.arange(num_positions, dtype=np.int32),
        trained=segment.loss_mask[1:],
        rollout_logprobs=segment.rollout_logprobs[1:],
        policy_version=segment.policy_version[1:],
        temperature=sampling.temperature[1:],
        top_p=sampling.top_p[1:],
        top_k=sampling.top_k[1:],
        routing=routing,
    )


def concatenate(layouts: Sequence[TokenLayout]) -> TokenLayout:
    """Samples one behind the other on one axis; all with rows (of one shape, else ExpertsMismatch) or all without."""
    rows = [layout.routing for layout in layouts if layout.routing is not None]
    if rows and len(rows) != len(layouts):
        raise ExpertsMismatch(f"{len(layouts) - len(rows)} of {len(layouts)} samples of a batch have no routing rows")
    return TokenLayout(
        input_ids=np.concatenate([layout.input_ids for layout in layouts]),
        labels=np.concatenate([layout.labels for layout in layouts]),
        position_ids=np.concatenate([layout.position_ids for layout in layouts]),
        trained=np.concatenate([layout.trained for layout in layouts]),
        rollout_logprobs=np.concatenate([layout.rollout_logprobs for layout in layouts]),
        policy_version=np.concatenate([layout.policy_version for layout in layouts]),
        temperature=np.concatenate([layout.temperature for layout in layouts]),
        top_p=np.concatenate([layout.top_p for layout in layouts]),
        top_k=np.concatenate([layout.top_k for layout in layouts]),
        routing=RoutingRows.join(rows) if rows else None,
    )


def head(layout: TokenLayout, num_positions: int) -> TokenLayout:
    """The first `num_positions`, as views."""
    cut = {
        field.name: getattr(layout, field.name)[:num_positions] for field in fields(layout) if field.name != "routing"
    }
    return TokenLayout(**cut, routing=None if layout.routing is None else layout.routing.head(num_positions))


class _Sampling(NamedTuple):
    """Of which distribution each of T tokens' log-prob is: float32[T], float32[T], int32[T]."""

    temperature: npt.NDArray[np.float32]
    top_p: npt.NDArray[np.float32]
    top_k: npt.NDArray[np.int32]


def _sampling(segment: Segment) -> _Sampling:
    num_tokens, kind = segment.num_tokens, segment.logprob_kind
    sampling = _Sampling(
        np.ones(num_tokens, np.float32), np.ones(num_tokens, np.float32), np.zeros(num_tokens, np.int32)
    )
    for turn in segment.turns:
        # 0 is greedy: engines take the largest of all tokens and report the unscaled log-prob
        if kind is LogprobKind.RAW or turn.temperature == 0:
            continue
        is_sampled = segment.policy_version[turn.output_start : turn.stop] != NOT_SAMPLED
        sampling.temperature[turn.output_start : turn.stop][is_sampled] = turn.temperature
        if kind is LogprobKind.KEPT_SET:
            sampling.top_p[turn.output_start : turn.stop][is_sampled] = turn.top_p
            sampling.top_k[turn.output_start : turn.stop][is_sampled] = max(turn.top_k, 0)
    return sampling
