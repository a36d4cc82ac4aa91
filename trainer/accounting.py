"""A step's account: `StepMetrics` out of what was taken, measured and updated; the only place that makes one."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gateway.contracts.errors import IntegrityError
from trainer.algorithms.kl import extreme_share, k3
from trainer.backends.protocol import Measured, Update
from trainer.data.batch import StepBatch
from trainer.metrics import StepMetrics
from trainer.phases import TRAINING_PHASES
from trainer.replay.verify import RoutingReport


def step_metrics(
    batch: StepBatch,
    updates: Sequence[Update],
    *,
    step: int,
    policy_version: int,
    seconds: Mapping[str, float],
    with_replay: Measured | None = None,
    without_replay: Measured | None = None,
) -> StepMetrics:
    """The account of one step; `step` and `policy_version` are those after it, `seconds` of its phases so far.

    with_replay: all tokens before the first update, under the routing that trains, where the step measured that; else
    the updates' own forwards stand for it; with r2 it is the forward that was recorded, which chose those experts by
    itself. without_replay: the same tokens through the live router.
    Raises IntegrityError if a sampled token is neither trained nor left out, or both (I3).
    """
    trained = _Forwards.of([update.measured for update in updates])
    measured = _Forwards.of([] if with_replay is None else [with_replay])
    live = _Forwards.of([] if without_replay is None else [without_replay])
    # After the first update a forward sees parameters that no engine had. With r2 the forward before it ran through the
    # live router, whose choice is what the updates replay.
    before = measured if measured.num_tokens else trained
    if not trained.routing.replayed:  # replay off, a dense model, or nothing recorded: all are the live router's
        before, live = _Forwards.of([]), live if live.num_tokens else before
    if batch.tokens_sampled != trained.num_tokens + batch.tokens_left_out:
        raise IntegrityError(
            f"step {step}: {batch.tokens_sampled} tokens were sampled, {trained.num_tokens} trained and "
            f"{batch.tokens_left_out} left out (I3)"
        )
    rewards, shares = torch.tensor(batch.rewards, dtype=torch.float64), _shares(updates)
    rows, compared = trained.routing, live.routing if live.routing.compared else trained.routing
    training_seconds = sum(seconds.get(phase.value, 0.0) for phase in TRAINING_PHASES)
    return StepMetrics(
        step=step,
        policy_version=policy_version,
        rollouts=batch.rollouts,
        groups=batch.groups,
        zero_variance_groups=batch.zero_variance_groups,
        dropped_rollouts=batch.dropped_rollouts,
        reward_mean=_mean(batch.rewards),
        reward_std=float(rewards.std(correction=0)) if batch.rewards else None,
        reward_min=min(batch.rewards, default=None),
        reward_max=max(batch.rewards, default=None),
        response_tokens_mean=_mean(batch.response_tokens),
        response_tokens_max=max(batch.response_tokens, default=None),
        turns_mean=_mean(batch.turns),
        staleness_mean=batch.staleness_mean,
        staleness_max=batch.staleness_max,
        tokens_sampled=batch.tokens_sampled,
        tokens_trained=trained.num_tokens,
        tokens_left_out=batch.tokens_left_out,
        tokens_dropped=batch.tokens_dropped,
        updates=len(updates),
        loss=_mean([update.loss for update in updates]),
        grad_norm=_mean([update.grad_norm for update in updates]),
        learning_rate=updates[-1].learning_rate if updates else None,
        entropy=float(trained.entropy.mean()) if trained.num_tokens else None,
        clipped_low_share=shares.pop("clipped_low", None),
        clipped_high_share=shares.pop("clipped_high", None),
        masked_share=shares.pop("masked", None),
        kl_reference=shares.pop("kl_reference", None),
        kl_with_replay=before.kl,
        kl_without_replay=live.kl,
        extreme_share_with_replay=before.extreme_share,
        extreme_share_without_replay=live.extreme_share,
        rows_total=rows.total,
        rows_replayed=rows.replayed,
        rows_verified=rows.verified,
        rows_fallback=rows.fallback,
        rows_compared=compared.compared,
        rows_flipped=compared.flipped,
        rows_verified_share=_share(rows.verified, rows.replayed),
        rows_fallback_share=_share(rows.fallback, rows.total),
        rows_flipped_share=_share(compared.flipped, compared.compared),
        tokens_per_second=trained.num_tokens / training_seconds if training_seconds and trained.num_tokens else None,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux counts in KiB
        peak_device_bytes=max((u.device_bytes for u in updates if u.device_bytes is not None), default=None),
        seconds=seconds,
        dropped_by=batch.dropped_by,
        dropped_tokens_by=batch.dropped_tokens_by,
        left_out_by=batch.left_out_by,
        shares=shares,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Forwards:
    """Forwards over S tokens in all: logratio (train - rollout) and entropy, float64[S], and their routing."""

    logratio: Tensor
    entropy: Tensor
    routing: RoutingReport

    @classmethod
    def of(cls, forwards: Sequence[Measured]) -> _Forwards:
        nothing = torch.empty(0, dtype=torch.float64)
        return cls(
            torch.cat([nothing, *((each.logprobs - each.rollout_logprobs).cpu().double() for each in forwards)]),
            torch.cat([nothing, *(each.entropy.detach().cpu().double() for each in forwards)]),
            sum((each.routing for each in forwards), RoutingReport()),
        )

    @property
    def num_tokens(self) -> int:
        return self.logratio.numel()

    @property
    def kl(self) -> float | None:
        return float(k3(self.logratio).mean()) if self.num_tokens else None

    @property
    def extreme_share(self) -> float | None:
        return extreme_share(self.logratio) if self.num_tokens else None


def _shares(updates: Sequence[Update]) -> dict[str, float]:
    """Means over the trained tokens of all updates; a share that an update does not name has no tokens there."""
    totals: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for update in updates:
        num_tokens = update.measured.logprobs.numel()
        for name, mean in update.shares.items():
            totals[name] = totals.get(name, 0.0) + mean * num_tokens
            tokens[name] = tokens.get(name, 0) + num_tokens
    return {name: total / tokens[name] for name, total in totals.items() if tokens[name]}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
