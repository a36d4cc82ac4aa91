"""What the ledger keeps of sessions and turns: written by `gateway.sessions`, stored by `gateway.ledger`.

Delta storage: a turn holds what it added to its parent, so that a session costs O(tokens), not O(turns x tokens).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from gateway.contracts.errors import LengthMismatch
from gateway.contracts.frozen import frozen_dataclass
from gateway.contracts.generation import Finish, JsonValue, LogprobKind, TokenIds, TopLogprob
from gateway.contracts.versions import CacheFlag, VersionSpan, check_spans

SCHEMA_VERSION = 3
"""Of everything stored; raised with every change of a format (2: attachments that continue a reply; 3: one turn an
index, several snapshots a session)."""


class SessionOrigin(StrEnum):
    """How a session came to be."""

    CREATED = "created"
    ON_THE_SPOT = "on_the_spot"
    RECREATED = "recreated"


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """One agent's conversation space.

    `group`: name of the set of attempts at one task; `group_size`: how many sessions it will have in all
    (None: as many as exist when all of them have ended). `sampling`: the operator's overrides for each of its turns.
    `key_hash`: sha256 hex of the session's key, "" where keys are off. Times are seconds since the epoch.
    `complete`: False where sampled tokens of the conversation are not in the record: a RECREATED session's, or one that
    a repair could not make whole. `gaps`: positions in a RECREATED session's first request of the assistant messages
    that no turn of ours made; 0 is its first message.
    """

    session_id: str
    group: str | None
    group_size: int | None
    task: JsonValue
    labels: Mapping[str, str]
    metadata: Mapping[str, JsonValue]
    sampling: Mapping[str, JsonValue]
    ttl_seconds: float | None
    key_hash: str
    origin: SessionOrigin
    complete: bool
    created_at: float
    gaps: tuple[int, ...] = ()


class MatchTier(StrEnum):
    """How a request's messages were found in the turn tree (design 4)."""

    EXACT = "exact"
    SEMANTIC = "semantic"
    PROJECTION = "projection"
    NONE = "none"


class SegmentReason(StrEnum):
    """Why a turn did not extend recorded tokens but opened a new segment."""

    FIRST = "first"
    NO_MATCH = "no_match"
    TOOLS_CHANGED = "tools_changed"
    TEMPLATE_ARGUMENTS_CHANGED = "template_arguments_changed"
    REWRITE_REASONING = "rewrite:reasoning"
    REWRITE_OTHER = "rewrite:other"
    STOP_MISMATCH = "stop_mismatch"
    TRUNCATED = "truncated"
    DROPPED_MESSAGE = "dropped_message"
    TEMPLATE_RAISED = "raise"
    UNCERTIFIED = "uncertified"


@frozen_dataclass(frozen=True, slots=True)
class Attachment:
    """Where a turn stands in the tree.

    `parent_id`: the turn whose recorded tokens this one extends, or None for a root (a new segment).
    `follows_id`: the turn that it continues as a conversation, also where its tokens start anew.
    `segment_reason`: None iff `parent_id` is set. `continues`: the parent's reply broke off, and this turn is the rest
    of it: it answers what the parent was asked, and its reply (text of both) stands in the parent's place.
    """

    parent_id: str | None
    follows_id: str | None
    tier: MatchTier
    segment_reason: SegmentReason | None
    continues: bool = False

    def __post_init__(self) -> None:
        if self.continues and self.parent_id is None:
            raise LengthMismatch("a turn that goes on with a reply needs the turn that began it")
        if (self.parent_id is None) == (self.segment_reason is None):
            raise LengthMismatch(
                "a turn either extends a parent or has a reason for a new segment, not both or neither"
            )


@frozen_dataclass(frozen=True, slots=True)
class RootContext:
    """Part of a root's identity: what the template was given besides messages."""

    tools: tuple[JsonValue, ...]
    template_arguments: Mapping[str, JsonValue]


@frozen_dataclass(frozen=True, slots=True, eq=False)
class TurnRecord:
    """One model call, as recorded.

    added_messages: messages between the parent's reply and this call (for a root: all of them).
    reply: the assistant message parsed from the output tokens, with those before it where it continues its parent's.
    prompt_token_ids: int32[A], tokens this turn's prompt added to the parent's recorded ids (a root: the whole prompt).
    output_token_ids: int32[C]; output_logprobs: float32[C], NaN where the engine gave none (I9).
    version_spans: cover [0, C). experts_start/experts_stop: routing rows stored for this turn, equal if none.
    sampling: as sent to the engine. request_digest: sha256 hex of the agent's body. delivered_at: when the last byte of
    the reply left (or its session ended, where the process that gave it had died unheard), None if it never did.
    untrainable_reason: why no token of it may be trained, None if they may.

    Example: a turn that follows a parent of 100 recorded tokens, adds 12 prompt tokens and samples 8, stores 12 + 8 ids
    and routing rows [99, 119): the parent's last token had no row until this turn's prefill (I2).
    """

    session_id: str
    turn_id: str
    index: int
    attachment: Attachment
    root: RootContext | None
    added_messages: tuple[JsonValue, ...]
    reply: JsonValue
    prompt_token_ids: TokenIds
    output_token_ids: TokenIds
    output_logprobs: npt.NDArray[np.float32]
    version_spans: tuple[VersionSpan, ...]
    finish: Finish
    logprob_kind: LogprobKind
    sampling: Mapping[str, JsonValue]
    num_layers: int
    num_experts: int
    top_k: int
    experts_start: int
    experts_stop: int
    engine_id: str
    model: str
    request_digest: str
    cached_tokens: int
    num_retractions: int
    meta: Mapping[str, JsonValue]
    untrainable_reason: str | None
    created_at: float
    delivered_at: float | None

    def __post_init__(self) -> None:
        num_output = len(self.output_token_ids)
        if len(self.output_logprobs) != num_output:
            raise LengthMismatch(
                f"session {self.session_id} turn {self.index}: {num_output} output tokens, "
                f"{len(self.output_logprobs)} log-probs (engine {self.engine_id})"
            )
        check_spans(self.version_spans, num_output)
        if (self.root is None) != (self.attachment.parent_id is not None):
            raise LengthMismatch(f"session {self.session_id} turn {self.index}: exactly the roots carry a root context")

    @property
    def trainable(self) -> bool:
        """Whether this turn's sampled tokens may be trained."""
        return self.untrainable_reason is None

    @property
    def top_logprobs(self) -> Sequence[Sequence[TopLogprob]]:
        """For each output token the likeliest at its position, as `recorded_top_logprobs` wrote them; () where the
        agent asked for none."""
        rows = self.meta.get("top_logprobs", ())
        return [tuple(map(TopLogprob, row[::2], row[1::2])) for row in rows]

    @property
    def cache_flags(self) -> tuple[CacheFlag, ...]:
        """What weights that changed under this turn did to its cache; () where none did."""
        return tuple(map(CacheFlag, self.meta.get("cache", {}).get("flags", ())))

    @property
    def recomputed_rows(self) -> tuple[tuple[int, int], ...]:
        """Ranges [start, stop) of its routing rows that other weights computed than sampled the token after each."""
        return tuple((start, stop) for start, stop in self.meta.get("cache", {}).get("recomputed_rows", ()))


def recorded_top_logprobs(top_logprobs: Sequence[Sequence[TopLogprob]]) -> list[JsonValue]:
    """The likeliest tokens as a record's meta "top_logprobs" holds them: a list [id, log-prob, id, …] a token."""
    return [[value for entry in row for value in entry] for row in top_logprobs]


class Outcome(StrEnum):
    """How a rollout ended, as data; the first two are regular ends."""

    COMPLETED = "completed"
    TRUNCATED = "truncated"
    FAILED = "failed"
    ABANDONED = "abandoned"


def conversation(path: Sequence[TurnRecord]) -> list[JsonValue]:
    """The messages of turns from a root on, the last one's reply included."""
    messages: list[JsonValue] = []
    for turn in path:
        if turn.attachment.continues:
            messages.pop()
        messages += (*turn.added_messages, turn.reply)
    return messages


@dataclass(frozen=True, slots=True)
class FinishRecord:
    """The end of a session: sealed at `finished_at`, its rollout enters the feed as `snapshot`.

    A turn that began before the end and was recorded after it makes another snapshot; all else stays as it is.

    `reward` None means that none could be computed, which is not zero. `outcome` is one of `Outcome` or a user's word.
    `dropped_at`: when the ledger freed the rollout's data; None while it can be read.
    """

    session_id: str
    snapshot: str
    reward: float | None
    outcome: str
    metadata: Mapping[str, JsonValue]
    finished_at: float
    dropped_at: float | None = None


def snapshot_of(session_id: str, turn_ids: Iterable[str]) -> str:
    """The name of the set of turns that a rollout is made of: 32 hex digits."""
    digest = hashlib.sha256(session_id.encode("utf-8", "surrogatepass"))
    for turn_id in sorted(turn_ids):
        digest.update(turn_id.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]
