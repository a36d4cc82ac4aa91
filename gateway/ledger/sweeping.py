"""Which finished rollouts are dropped by themselves: by age, by size; a plan first, then one drop after another.

    stored rollouts ─▶ plan_sweep (pure) ─▶ drop each, with the snapshot that was planned ─▶ reclaim ─▶ SweepReport

A rollout that somebody has leased is never dropped. One that nobody has acknowledged goes by `keep_seconds`, which says
so, and by size only where `drop_unacknowledged` is set. Sessions that are not finished are never touched.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from gateway.contracts.errors import ConfigurationError, Conflict, NotFound
from gateway.contracts.ports import Ledger
from gateway.contracts.rollouts import Reclaimed, StoredRollout

_log = logging.getLogger(__name__)

_PAGE = 1000


@dataclass(frozen=True, slots=True)
class StorageSettings:
    """Room and retention; 0 means never or none.

    min_free_bytes: free space below which no new turns begin. reserve_bytes: preallocated for what is under way when
    the disk is full. full_wait_seconds: how long a sampled turn waits for room before its agent is told.
    keep_seconds: after their end, rollouts are dropped, acknowledged or not. keep_acknowledged_seconds: the same for
    acknowledged ones. keep_bytes: of all sessions together; the oldest acknowledged rollouts are dropped above it.
    drop_unacknowledged: then the oldest others too. consumers: who must have acknowledged a rollout (empty: anybody).
    sweep_seconds: how often this is looked at. compress: whether routing rows of full files are then packed by zstd,
    which takes an eighth to a third less; compress_bytes_per_second: at what pace (0: as fast as it can be).
    """

    min_free_bytes: int = 128 * 2**20
    reserve_bytes: int = 32 * 2**20
    full_wait_seconds: float = 60.0
    keep_seconds: float = 0.0
    keep_acknowledged_seconds: float = 0.0
    keep_bytes: int = 0
    drop_unacknowledged: bool = False
    consumers: tuple[str, ...] = ()
    sweep_seconds: float = 60.0
    compress: bool = True
    compress_bytes_per_second: int = 64 * 2**20

    def __post_init__(self) -> None:
        for name in ("min_free_bytes", "reserve_bytes", "full_wait_seconds", "keep_seconds"):
            _check_not_negative(name, getattr(self, name))
        for name in ("keep_acknowledged_seconds", "keep_bytes", "compress_bytes_per_second"):
            _check_not_negative(name, getattr(self, name))
        if self.sweep_seconds <= 0:
            raise ConfigurationError(f"storage.sweep_seconds is {self.sweep_seconds}: expected more than 0")
        if self.drop_unacknowledged and not self.keep_bytes:
            raise ConfigurationError("storage.drop_unacknowledged says what goes above keep_bytes, which is not set")

    @property
    def rules(self) -> KeepRules:
        """What a regular sweep goes by."""
        return KeepRules(
            seconds=self.keep_seconds or None,
            acknowledged_seconds=self.keep_acknowledged_seconds or None,
            num_bytes=self.keep_bytes or None,
            acknowledged_only=not self.drop_unacknowledged,
            consumers=self.consumers,
        )


@dataclass(frozen=True, slots=True)
class KeepRules:
    """Of one sweep; None where nothing is asked. acknowledged_only: of what goes by size."""

    seconds: float | None = None
    acknowledged_seconds: float | None = None
    num_bytes: int | None = None
    acknowledged_only: bool = True
    consumers: tuple[str, ...] = ()

    @property
    def drop_nothing(self) -> bool:
        """Whether there is nothing to look for."""
        return self.seconds is None and self.acknowledged_seconds is None and self.num_bytes is None

    def is_acknowledged(self, rollout: StoredRollout) -> bool:
        """By all of `consumers`, or by anybody where none are named."""
        if not self.consumers:
            return bool(rollout.acknowledged_by)
        return set(self.consumers) <= set(rollout.acknowledged_by)


class DropReason(StrEnum):
    """Why a rollout was dropped."""

    AGE = "age"
    ACKNOWLEDGED_AGE = "acknowledged_age"
    SIZE = "size"


@dataclass(frozen=True, slots=True)
class Dropped:
    """One rollout that a sweep drops."""

    session_id: str
    snapshot: str
    num_bytes: int
    reason: DropReason


@dataclass(frozen=True, slots=True)
class SweepReport:
    """What one sweep did, or with `dry_run` would have done. stored_bytes: of all sessions, before it.

    missed: session ids whose rollout changed between plan and drop (a new snapshot, dropped by another).
    """

    started_at: float
    seconds: float
    dry_run: bool
    num_rollouts: int
    num_leased: int
    stored_bytes: int
    dropped: tuple[Dropped, ...]
    missed: tuple[str, ...] = ()
    reclaimed: Reclaimed = field(default_factory=Reclaimed)

    @property
    def num_dropped_bytes(self) -> int:
        """Of all dropped rollouts."""
        return sum(each.num_bytes for each in self.dropped)


async def sweep(ledger: Ledger, rules: KeepRules, *, now: float, dry_run: bool = False) -> SweepReport:
    """Drop what `rules` do not keep."""
    began = time.monotonic()
    stored_bytes = await ledger.stored_bytes()
    rollouts = [] if rules.drop_nothing else await _all_rollouts(ledger, now)
    planned = list(plan_sweep(rollouts, rules, stored_bytes=stored_bytes, now=now))
    dropped, missed = (planned, []) if dry_run else await _drop(ledger, planned)
    reclaimed = Reclaimed() if dry_run else await ledger.reclaim()
    return SweepReport(
        started_at=now,
        seconds=time.monotonic() - began,
        dry_run=dry_run,
        num_rollouts=len(rollouts),
        num_leased=sum(rollout.leased for rollout in rollouts),
        stored_bytes=stored_bytes,
        dropped=tuple(dropped),
        missed=tuple(missed),
        reclaimed=reclaimed,
    )


def plan_sweep(
    rollouts: Sequence[StoredRollout], rules: KeepRules, *, stored_bytes: int, now: float
) -> Iterator[Dropped]:
    """What goes, in the order in which it goes; `rollouts` oldest first."""
    left: list[StoredRollout] = []
    for rollout in rollouts:
        if rollout.leased:
            continue
        reason = _too_old(rollout, rules, now)
        if reason is None:
            left.append(rollout)
        else:
            stored_bytes -= rollout.num_bytes
            yield Dropped(rollout.session_id, rollout.snapshot, rollout.num_bytes, reason)
    if rules.num_bytes is None:
        return
    acknowledged = [rollout for rollout in left if rules.is_acknowledged(rollout)]
    others = [] if rules.acknowledged_only else [each for each in left if not rules.is_acknowledged(each)]
    for rollout in (*acknowledged, *others):
        if stored_bytes <= rules.num_bytes:
            return
        stored_bytes -= rollout.num_bytes
        yield Dropped(rollout.session_id, rollout.snapshot, rollout.num_bytes, DropReason.SIZE)


def _too_old(rollout: StoredRollout, rules: KeepRules, now: float) -> DropReason | None:
    age = now - rollout.finished_at
    if rules.seconds is not None and age > rules.seconds:
        return DropReason.AGE
    if rules.acknowledged_seconds is not None and age > rules.acknowledged_seconds and rules.is_acknowledged(rollout):
        return DropReason.ACKNOWLEDGED_AGE
    return None


async def _all_rollouts(ledger: Ledger, now: float) -> list[StoredRollout]:
    found: list[StoredRollout] = []
    while True:
        after = found[-1] if found else None
        page = await ledger.stored_rollouts(finished_before=now, limit=_PAGE, after=after)
        found += page
        if len(page) < _PAGE:
            return found


async def _drop(ledger: Ledger, planned: Sequence[Dropped]) -> tuple[list[Dropped], list[str]]:
    dropped: list[Dropped] = []
    missed: list[str] = []
    for each in planned:
        try:
            await ledger.drop_rollout(each.session_id, each.snapshot)
        except (Conflict, NotFound) as error:
            _log.info("rollout %s is kept: %s", each.session_id, error)
            missed.append(each.session_id)
        else:
            _log.info("rollout %s (%s, %d bytes) was dropped: %s", each.session_id, each.snapshot, each.num_bytes,
                      each.reason.value)  # fmt: skip
            dropped.append(each)
    return dropped, missed


def _check_not_negative(name: str, value: float) -> None:
    if value < 0:
        raise ConfigurationError(f"storage.{name} is {value}: expected 0 or more")
