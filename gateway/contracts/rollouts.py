"""What the feed hands out: leases on finished rollouts, and a finished rollout with its segments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gateway.contracts.errors import LengthMismatch
from gateway.contracts.generation import JsonValue
from gateway.contracts.records import FinishRecord, SessionRecord
from gateway.contracts.samples import Segment


@dataclass(frozen=True, slots=True)
class LeasedRollout:
    """One rollout in a lease: enough to fetch it and to plan with.

    num_sampled_tokens: sampled tokens that may be trained, before any pick. complete: as in its SessionRecord.
    """

    session_id: str
    snapshot: str
    group: str | None
    reward: float | None
    outcome: str
    num_tokens: int
    num_sampled_tokens: int
    complete: bool = True


@dataclass(frozen=True, slots=True)
class IncompleteGroup:
    """A group of which a lease holds a part: what is missing, by name.

    expected: how many sessions it should have (None: nobody said). unfinished: those that have not ended.
    num_not_created: how many nobody has made yet. lent_before: those that this consumer has, or has acknowledged.
    dropped: those whose data were freed before this consumer had them. damaged: those whose record cannot be read
    (`verbatim doctor --data` says more).

    Example: of 4 attempts one runs, one was never made: `IncompleteGroup("task-7", 4, ("s3",), 1, ())`.
    """

    group: str
    expected: int | None
    unfinished: tuple[str, ...]
    num_not_created: int
    lent_before: tuple[str, ...]
    dropped: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()

    @classmethod
    def of_json(cls, facts: Mapping[str, JsonValue]) -> IncompleteGroup:
        """What `dataclasses.asdict` made, after a way through JSON."""
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in facts.items()}
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Lease:
    """Rollouts lent to `consumer` until `expires_at` (seconds since the epoch); then they return to the feed.

    incomplete: the groups in it that are not whole; only where a group's deadline had passed, or parts of a group went
    to this consumer before.
    """

    lease_id: str
    consumer: str
    expires_at: float
    rollouts: tuple[LeasedRollout, ...]
    incomplete: tuple[IncompleteGroup, ...] = ()


@dataclass(frozen=True, slots=True)
class FeedCounts:
    """Back-pressure figures of the feed for one consumer group; finished = unleased + leased + acknowledged.

    oldest_seconds: age of the oldest rollout that the consumer has neither leased nor acknowledged, 0 if there is none.
    """

    finished: int
    unleased: int
    leased: int
    acknowledged: int
    oldest_seconds: float


@dataclass(frozen=True, slots=True)
class StoredRollout:
    """A finished rollout that still holds data, for retention.

    num_bytes: of its turns, routing rows and blobs (a blob that several sessions refer to counts for each of them).
    acknowledged_by: consumers that are done with it. leased: a lease on it may still run (expired ones count until the
    rollout is lent anew or released).
    """

    session_id: str
    snapshot: str
    finished_at: float
    num_bytes: int
    acknowledged_by: tuple[str, ...]
    leased: bool


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """What a ledger gave back to its disk. num_files: files that went. num_bytes: by which it is smaller now.
    num_moved_bytes: what was written anew elsewhere, so that a file of which little was left could go."""

    num_files: int = 0
    num_bytes: int = 0
    num_moved_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Compressed:
    """What a ledger wrote anew in less room. num_bytes: what the records took before. num_saved_bytes: and no more."""

    num_records: int = 0
    num_bytes: int = 0
    num_saved_bytes: int = 0

    def __add__(self, other: Compressed) -> Compressed:
        """Of both."""
        return Compressed(
            self.num_records + other.num_records,
            self.num_bytes + other.num_bytes,
            self.num_saved_bytes + other.num_saved_bytes,
        )


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """What a ledger takes, by kind, in bytes; 0 where an implementation cannot say.

    rows_bytes: the database, of which reusable_bytes hold nothing and log_bytes are not merged yet. routing_bytes: of
    the routing rows' files, of which dead_routing_bytes belong to no turn. blob_bytes: of images and their like.
    """

    rows_bytes: int
    reusable_bytes: int
    log_bytes: int
    routing_bytes: int
    dead_routing_bytes: int
    blob_bytes: int


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Sampled tokens of one session that carry no loss, and how many turns they belong to, for one reason."""

    reason: str
    num_turns: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class PickReport:
    """Which pick made a session's segments, and what became of every sampled token (I3).

    num_sampled_tokens = num_trained_tokens + the tokens of `left_out`, checked at construction.

    Example: `PickReport("delivered", 10, 7, (LeftOut("undelivered", 1, 3),))`.
    """

    pick: str
    num_sampled_tokens: int
    num_trained_tokens: int
    left_out: tuple[LeftOut, ...]

    def __post_init__(self) -> None:
        if self.num_sampled_tokens != self.num_trained_tokens + self.num_left_out_tokens:
            raise LengthMismatch(
                f"pick {self.pick}: {self.num_sampled_tokens} sampled tokens, {self.num_trained_tokens} trained and "
                f"{self.num_left_out_tokens} left out (I3)"
            )

    @property
    def num_left_out_tokens(self) -> int:
        """Sampled tokens without loss, for whatever reason."""
        return sum(left.num_tokens for left in self.left_out)

    @property
    def left_out_tokens(self) -> dict[str, int]:
        """Tokens by reason."""
        return {left.reason: left.num_tokens for left in self.left_out}


@dataclass(frozen=True, slots=True, eq=False)
class FinishedRollout:
    """A finished session with its segments, as a trainer reads it (`GET /feed/rollouts/{session_id}`).

    `num_experts` 0 where no turn has routing. `reports`: counts of the turn tree (turns, tiers, segment reasons).
    `pick`: which turns train here and what was left out; the segments' loss masks are checked against it (I3).
    """

    session: SessionRecord
    finish: FinishRecord
    segments: tuple[Segment, ...]
    num_experts: int
    reports: Mapping[str, JsonValue]
    pick: PickReport

    def __post_init__(self) -> None:
        masked = sum(int(segment.loss_mask.sum()) for segment in self.segments)
        if masked != self.pick.num_trained_tokens:
            raise LengthMismatch(
                f"session {self.session.session_id}: its segments train {masked} tokens, "
                f"its pick {self.pick.pick} {self.pick.num_trained_tokens} (I3)"
            )

    @property
    def num_sampled_tokens(self) -> int:
        """Sampled tokens of all turns, each counted once, trained or not."""
        return self.pick.num_sampled_tokens

    @property
    def num_trained_tokens(self) -> int:
        """Sampled tokens that carry loss: the sum of the segments' loss masks."""
        return self.pick.num_trained_tokens
