"""What the feed hands out: leases on finished rollouts, and a finished rollout with its segments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gateway.contracts.generation import JsonValue
from gateway.contracts.records import FinishRecord, SessionRecord
from gateway.contracts.samples import Segment


@dataclass(frozen=True, slots=True)
class LeasedRollout:
    """One rollout in a lease: enough to fetch it and to plan with."""

    session_id: str
    snapshot: str
    group: str | None
    reward: float | None
    outcome: str
    num_tokens: int
    num_sampled_tokens: int


@dataclass(frozen=True, slots=True)
class Lease:
    """Rollouts lent to `consumer` until `expires_at` (seconds since the epoch); then they return to the feed."""

    lease_id: str
    consumer: str
    expires_at: float
    rollouts: tuple[LeasedRollout, ...]


@dataclass(frozen=True, slots=True)
class FeedCounts:
    """Back-pressure figures of the feed for one consumer group."""

    finished: int
    leased: int
    acknowledged: int
    oldest_unleased_seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class FinishedRollout:
    """A finished session with its segments, as a trainer reads it (`GET /feed/rollouts/{session_id}`).

    `num_experts` 0 where no turn has routing. `reports`: counts of the turn tree (turns, tiers, segment reasons).
    """

    session: SessionRecord
    finish: FinishRecord
    segments: tuple[Segment, ...]
    num_experts: int
    reports: Mapping[str, JsonValue]

    @property
    def num_sampled_tokens(self) -> int:
        """Trainable sampled tokens over all segments; each is counted once (I3)."""
        return sum(int(segment.loss_mask.sum()) for segment in self.segments)
