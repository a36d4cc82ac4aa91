"""Rollouts whose every value tells which token it belongs to, so that any shift between arrays shows.

Token i of segment `tag` has the id `1000 * tag + i`, the log-prob -i, and input token i is routed to experts
`first_expert(tag, i)` and the one behind it in every layer. Temperatures and kept sets differ by turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gateway.contracts.experts import RoutingShape
from gateway.contracts.generation import LogprobKind
from gateway.contracts.records import FinishRecord, SessionOrigin, SessionRecord
from gateway.contracts.rollouts import FinishedRollout, LeftOut, PickReport
from gateway.contracts.samples import Segment, TurnSpan
from trainer.replay.validate import RoutedLayers

ROUTED = RoutedLayers(RoutingShape(num_layers=3, num_experts=64, top_k=2), (0, 2))
"""Layer 1 has no experts."""


class Turn(NamedTuple):
    """Prompt and sampled tokens of one turn; `versions` of the sampled ones, repeated to the end."""

    num_prompt: int
    num_output: int
    versions: tuple[int, ...] = (0,)
    trained: bool = True


def first_expert(tag: int, index: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """The lower expert of input token `index`."""
    return (7 * tag + index) % 63


def turn_temperature(turn: int) -> float:
    """Exact in float32."""
    return 0.5 + turn / 8


def tagged_segment(
    tag: int, turns: Sequence[Turn], *, routed: bool = True, kind: LogprobKind = LogprobKind.KEPT_SET
) -> Segment:
    """One segment; see the top of this file."""
    spans: list[TurnSpan] = []
    mask: list[bool] = []
    versions: list[int] = []
    for i, turn in enumerate(turns):
        start = len(mask)
        mask += [False] * turn.num_prompt + [turn.trained] * turn.num_output
        own = [turn.versions[min(j, len(turn.versions) - 1)] for j in range(turn.num_output)]
        versions += [-1] * turn.num_prompt + own
        out = start + turn.num_prompt
        spans.append(
            TurnSpan(
                f"{tag}-{i}", start, out, len(mask), turn.trained, "stop", turn_temperature(i), 1 - (i + 1) / 64, 5 + i
            )
        )
    index = np.arange(len(mask))
    sampled = np.array(versions) >= 0
    rows = np.zeros((len(mask) - 1, ROUTED.shape.num_layers, ROUTED.shape.top_k), dtype=np.uint8)
    rows[:, ROUTED.layers, :] = (first_expert(tag, index[:-1])[:, None] + np.arange(2))[:, None]
    return Segment(
        segment_id=f"seg-{tag}",
        turns=tuple(spans),
        token_ids=(1000 * tag + index).astype(np.int32),
        loss_mask=np.array(mask, dtype=np.bool_),
        rollout_logprobs=np.where(sampled, -index.astype(np.float64), np.nan).astype(np.float32),
        policy_version=np.array(versions, dtype=np.int32),
        routed_experts=rows if routed else None,
        routed_valid=np.full(len(mask) - 1, routed),
        logprob_kind=kind,
    )


def tagged_rollout(
    *segments: Segment,
    session_id: str = "s",
    group: str | None = "g",
    reward: float | None = 1.0,
    outcome: str = "completed",
    complete: bool = True,
    num_left_out: int = 0,
) -> FinishedRollout:
    """A finished rollout of these segments, of which a pick left `num_left_out` sampled tokens out."""
    session = SessionRecord(
        session_id, group, None, None, {}, {}, {}, None, "", SessionOrigin.CREATED, complete, created_at=0.0
    )
    trained = sum(int(segment.loss_mask.sum()) for segment in segments)
    left_out = (LeftOut("undelivered", 1, num_left_out),) if num_left_out else ()
    return FinishedRollout(
        session=session,
        finish=FinishRecord(session_id, "snap", reward, outcome, {}, 1.0),
        segments=segments,
        num_experts=ROUTED.shape.num_experts,
        reports={},
        pick=PickReport("delivered", trained + num_left_out, trained, left_out),
    )
