"""What a finished run shows, read back from where it is kept: the gateway's ledger (over its feed) and metrics.jsonl.

Nothing comes from the memory of the processes that ran, so anybody can read the same numbers again. Tokens are counted
twice and independently: `tokens_sampled` from the ledger's turns, `tokens_trained` from the trainer's log (I3).
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gateway.client import GatewayClient
from gateway.contracts.errors import LedgerError
from gateway.contracts.rollouts import FinishedRollout, LeasedRollout

_MOST_ROLLOUTS = 100_000
_CONCURRENT_READS = 8


@dataclass(frozen=True, slots=True)
class LedgerFigures:
    """Of the training rollouts that have a reward, as the ledger holds them.

    `tokens_sampled`: output tokens of all their turns. `policy_versions`: of these tokens, sorted.
    `tokens_unrewarded`: output tokens of training rollouts without a reward (failed, abandoned), which nobody trains.
    `eval_rewards`: mean reward of held-out rollouts by policy version.
    """

    tokens_sampled: int
    tokens_unrewarded: int
    num_rollouts: int
    policy_versions: tuple[int, ...]
    eval_rewards: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class MetricsFigures:
    """Of all steps in metrics.jsonl; KL (nats a token) and extreme-token shares are means over trained tokens."""

    steps: int
    tokens_trained: int
    rows_verified_share: float | None
    kl_with_replay: float | None
    kl_without_replay: float | None
    extreme_share_with_replay: float | None
    extreme_share_without_replay: float | None


async def read_ledger(gateway_url: str, *, run_name: str, operator_key: str | None = None) -> LedgerFigures:
    """Read every finished rollout of a run through the feed, as a consumer of its own that gives all back."""
    async with GatewayClient(gateway_url, api_key=operator_key) as gateway:
        training = await _rollouts(gateway, {"run": run_name, "purpose": "train"})
        held_out = await _rollouts(gateway, {"run": run_name, "purpose": "eval"})
    rewarded = [rollout for rollout in training if rollout.finish.reward is not None]
    versions = [_versions(rollout) for rollout in rewarded]
    tokens = sum(_sampled(rollout) for rollout in rewarded)
    return LedgerFigures(
        tokens_sampled=tokens,
        tokens_unrewarded=sum(_sampled(rollout) for rollout in training) - tokens,
        num_rollouts=len(training),
        policy_versions=tuple(sorted(set().union(*versions))),
        eval_rewards=_rewards_by_version(held_out),
    )


def read_metrics(file: Path) -> MetricsFigures:
    """Sum up a run's metrics.jsonl; raises LedgerError if it has no step."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    steps = [line for line in lines if "step" in line]
    if not steps:
        raise LedgerError(f"{file} holds no finished step")
    rows = sum(step["rows_replayed"] for step in steps)
    return MetricsFigures(
        steps=len(steps),
        tokens_trained=sum(step["tokens_trained"] for step in steps),
        rows_verified_share=sum(step["rows_verified"] for step in steps) / rows if rows else None,
        kl_with_replay=_mean(steps, "kl_with_replay"),
        kl_without_replay=_mean(steps, "kl_without_replay"),
        extreme_share_with_replay=_mean(steps, "extreme_share_with_replay"),
        extreme_share_without_replay=_mean(steps, "extreme_share_without_replay"),
    )


async def _rollouts(gateway: GatewayClient, labels: Mapping[str, str]) -> list[FinishedRollout]:
    consumer = f"report-{uuid.uuid4().hex}"
    lease = await gateway.lease(consumer=consumer, limit=_MOST_ROLLOUTS, whole_groups=False, labels=labels)
    if lease is None:
        return []
    slots = asyncio.Semaphore(_CONCURRENT_READS)

    async def read(leased: LeasedRollout) -> FinishedRollout:
        async with slots:
            return await gateway.rollout(leased.session_id, leased.snapshot)

    try:
        return list(await asyncio.gather(*map(read, lease.rollouts)))
    finally:
        await gateway.release(lease.lease_id)


def _sampled(rollout: FinishedRollout) -> int:
    """Output tokens of all turns, trainable or not."""
    return int(rollout.reports["sampled_tokens"])


def _versions(rollout: FinishedRollout) -> set[int]:
    return {
        int(version) for segment in rollout.segments for version in np.unique(segment.policy_version[segment.loss_mask])
    }


def _rewards_by_version(rollouts: Iterable[FinishedRollout]) -> dict[int, float]:
    rewards: dict[int, list[float]] = {}
    for rollout in rollouts:
        if rollout.finish.reward is not None:
            rewards.setdefault(max(_versions(rollout), default=0), []).append(rollout.finish.reward)
    return {version: sum(values) / len(values) for version, values in sorted(rewards.items())}


def _mean(steps: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Over trained tokens; None if no step measured it."""
    measured = [(step[name], step["tokens_trained"]) for step in steps if step[name] is not None]
    tokens = sum(weight for _, weight in measured)
    return sum(value * weight for value, weight in measured) / tokens if tokens else None
