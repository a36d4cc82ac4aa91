"""The `[batch]` table of a recipe file: what a step trains on. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from gateway.contracts.errors import ConfigurationError


class Unfit(StrEnum):
    """What becomes of tokens that a policy speaks against: they train all the same, stay as context without loss, or
    their whole rollout is left out."""

    KEEP = "keep"
    MASK = "mask"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """`tokens_per_microbatch`: input tokens packed into one forward; attention costs their square on CPU, where about
    the length of the longest sample is best. `minibatches`: optimiser steps that a step's rollouts are cut into.

    `max_staleness`: policy versions a trained token may be behind the trainer; `stale` (drop or mask) says what becomes
    of older ones. `truncated`: of rollouts that ran out of tokens or turns (masked, their reward still counts in their
    group). `max_tokens`: of one sample, 0 is any; `overlong` says what becomes of longer ones (drop, or mask: the
    sample ends there). `zero_variance` (keep or drop): groups whose rewards are all equal. `train_incomplete`: also
    rollouts whose conversation was sampled in part elsewhere, or whose record lost a turn (`complete: false`).
    `max_fallback_share`: of a sample's routing rows, by position and layer, that may be missing or invalid before its
    rollout is left out, where recorded rows are replayed. All that is left out is counted by reason.
    `pick`: which sampled turns of a rollout train (all, delivered, final-path, or the gateway operator's own); without
    it the gateway's default.
    """

    tokens_per_microbatch: int = 2048
    minibatches: int = 1
    max_staleness: int = 1
    stale: Unfit = Unfit.DROP
    truncated: Unfit = Unfit.KEEP
    max_tokens: int = 0
    overlong: Unfit = Unfit.DROP
    zero_variance: Unfit = Unfit.KEEP
    max_fallback_share: float = 0.1
    pick: str | None = None
    train_incomplete: bool = False

    def __post_init__(self) -> None:
        for holds, message in (
            (self.tokens_per_microbatch >= 1, "tokens_per_microbatch must be at least 1"),
            (self.minibatches >= 1, "minibatches must be at least 1"),
            (self.max_staleness >= 0, "max_staleness must not be negative"),
            (self.max_tokens >= 0, "max_tokens must not be negative"),
            (0 <= self.max_fallback_share <= 1, "max_fallback_share must be in [0, 1]"),
            (self.stale is not Unfit.KEEP, "stale is drop or mask; raise max_staleness to keep older tokens"),
            (self.overlong is not Unfit.KEEP, "overlong is drop or mask; set max_tokens to 0 to keep long samples"),
            (self.zero_variance is not Unfit.MASK, "zero_variance is keep or drop"),
        ):
            if not holds:
                raise ConfigurationError(f"batch.{message}")
