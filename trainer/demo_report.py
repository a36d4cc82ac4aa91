"""What a finished demo shows, read back from where it is kept: the gateway's ledger (over its feed) and metrics.jsonl.

Nothing comes from the memory of the processes that ran, so anybody can read the same numbers again. Tokens are counted
twice and independently: `tokens_sampled` from the ledger's turns, `tokens_trained` from the trainer's log (I3).
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from gateway.client import GatewayClient
from gateway.contracts.errors import LedgerError
from gateway.contracts.rollouts import FinishedRollout, LeasedRollout
from trainer.metrics import MetricsLog, StepMetrics, token_mean

_MOST_ROLLOUTS = 100_000
_CONCURRENT_READS = 8


@dataclass(frozen=True, slots=True)
class LedgerFigures:
    """Of the training rollouts that have a reward, as the ledger holds them.

    `tokens_sampled`: output tokens of all their turns. `tokens_left_out`: those that the pick left out, by reason.
    `policy_versions`: of the tokens that train, sorted.
    `tokens_unrewarded`: output tokens of training rollouts without a reward (failed, abandoned), which nobody trains.
    `eval_rewards`: mean reward of held-out rollouts by policy version.
    """

    tokens_sampled: int
    tokens_left_out: Mapping[str, int]
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


@dataclass(frozen=True, slots=True)
class DemoReport:
    """The demo's result; its fields are those of `verbatim demo --json`.

    Rewards are means over held-out tasks before the first and after the last step. `tokens_sampled` equals
    `tokens_trained` plus `tokens_left_out` (by reason) unless something was lost (I3). KL in nats a token. None where
    nothing was measured.
    """

    seed: int
    steps: int
    reward_before: float | None
    reward_after: float | None
    tokens_sampled: int
    tokens_trained: int
    tokens_left_out: Mapping[str, int]
    tokens_unrewarded: int
    rollouts: int
    rows_verified_share: float | None
    kl_with_replay: float | None
    kl_without_replay: float | None
    extreme_share_with_replay: float | None
    extreme_share_without_replay: float | None
    policy_versions: tuple[int, ...]
    seconds: float
    peak_rss_bytes: int

    def with_costs(self, *, seconds: float, peak_rss_bytes: int) -> DemoReport:
        """The same report with what the call cost."""
        return replace(self, seconds=seconds, peak_rss_bytes=peak_rss_bytes)


async def make_report(
    gateway_url: str, *, run_name: str, metrics_file: Path, seed: int, pick: str | None = None
) -> DemoReport:
    """Read ledger and metrics; `pick` is what the trainer asked for. Time and memory are 0 until `with_costs`."""
    ledger = await read_ledger(gateway_url, run_name=run_name, pick=pick)
    metrics = read_metrics(metrics_file)
    versions = sorted(ledger.eval_rewards)
    return DemoReport(
        seed=seed,
        steps=metrics.steps,
        reward_before=ledger.eval_rewards.get(0),
        reward_after=ledger.eval_rewards[versions[-1]] if versions and versions[-1] > 0 else None,
        tokens_sampled=ledger.tokens_sampled,
        tokens_trained=metrics.tokens_trained,
        tokens_left_out=ledger.tokens_left_out,
        tokens_unrewarded=ledger.tokens_unrewarded,
        rollouts=ledger.num_rollouts,
        rows_verified_share=metrics.rows_verified_share,
        kl_with_replay=metrics.kl_with_replay,
        kl_without_replay=metrics.kl_without_replay,
        extreme_share_with_replay=metrics.extreme_share_with_replay,
        extreme_share_without_replay=metrics.extreme_share_without_replay,
        policy_versions=ledger.policy_versions,
        seconds=0.0,
        peak_rss_bytes=0,
    )


def show_report(report: DemoReport, *, folder: Path, console: Console) -> None:
    """The report for people, and what to type next."""
    table = Table(title="Verbatim demo", show_header=False, title_justify="left")
    left_out = sum(report.tokens_left_out.values())
    equal = "equal" if report.tokens_sampled == report.tokens_trained + left_out else "NOT EQUAL"
    versions = report.policy_versions
    seen = f"{len(versions)} ({versions[0]} to {versions[-1]})" if versions else "none"
    rows = (
        ("held-out reward", f"{_figure(report.reward_before)} before, {_figure(report.reward_after)} after"),
        ("tokens", f"{report.tokens_sampled} sampled (ledger), {report.tokens_trained} trained (trainer)"
         f"{_reasons(report.tokens_left_out)}: {equal}"),
        ("replayed rows verified", _percent(report.rows_verified_share)),
        ("KL rollout to train", f"{_figure(report.kl_with_replay)} with replay, "
         f"{_figure(report.kl_without_replay)} without"),
        ("extreme tokens", f"{_percent(report.extreme_share_with_replay)} with replay, "
         f"{_percent(report.extreme_share_without_replay)} without"),
        ("policy versions seen", seen),
        ("steps, rollouts", f"{report.steps}, {report.rollouts} (seed {report.seed})"),
        ("time, peak memory", f"{report.seconds:.0f} s, {report.peak_rss_bytes / 2**30:.2f} GiB of all processes"),
        ("ledger", str(folder / "ledger")),
        ("checkpoints", str(folder / "run" / "checkpoints")),
    )  # fmt: skip
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)
    for line in (
        f"next: `verbatim sessions --data {folder / 'ledger'} --label purpose=train` shows what was recorded",
        f"      `verbatim demo --data {folder} --steps {report.steps * 2}` goes on; --keep leaves servers up",
        "      `verbatim train --config trainer/recipes/gsm8k.toml --print-config` shows a run with a real model",
    ):
        console.print(line, soft_wrap=True)


async def read_ledger(
    gateway_url: str, *, run_name: str, pick: str | None = None, operator_key: str | None = None
) -> LedgerFigures:
    """Read every finished rollout of a run through the feed, as a consumer of its own that gives all back."""
    async with GatewayClient(gateway_url, api_key=operator_key) as gateway:
        training = await _rollouts(gateway, {"run": run_name, "purpose": "train"}, pick)
        held_out = await _rollouts(gateway, {"run": run_name, "purpose": "eval"}, pick)
    rewarded = [rollout for rollout in training if rollout.finish.reward is not None]
    versions = [_versions(rollout) for rollout in rewarded]
    tokens = sum(rollout.num_sampled_tokens for rollout in rewarded)
    return LedgerFigures(
        tokens_sampled=tokens,
        tokens_left_out=dict(sum((Counter(rollout.pick.left_out_tokens) for rollout in rewarded), Counter())),
        tokens_unrewarded=sum(rollout.num_sampled_tokens for rollout in training) - tokens,
        num_rollouts=len(training),
        policy_versions=tuple(sorted(set().union(*versions))),
        eval_rewards=_rewards_by_version(held_out),
    )


def read_metrics(file: Path) -> MetricsFigures:
    """Sum up a run's metrics.jsonl; raises LedgerError if it has no step."""
    steps = [entry for entry in MetricsLog(file).entries() if isinstance(entry, StepMetrics)]
    if not steps:
        raise LedgerError(f"{file} holds no finished step")
    rows = sum(step.rows_replayed for step in steps)
    return MetricsFigures(
        steps=len(steps),
        tokens_trained=sum(step.tokens_trained for step in steps),
        rows_verified_share=sum(step.rows_verified for step in steps) / rows if rows else None,
        kl_with_replay=token_mean(steps, "kl_with_replay"),
        kl_without_replay=token_mean(steps, "kl_without_replay"),
        extreme_share_with_replay=token_mean(steps, "extreme_share_with_replay"),
        extreme_share_without_replay=token_mean(steps, "extreme_share_without_replay"),
    )


async def _rollouts(gateway: GatewayClient, labels: Mapping[str, str], pick: str | None) -> list[FinishedRollout]:
    consumer = f"report-{uuid.uuid4().hex}"
    lease = await gateway.lease(consumer=consumer, limit=_MOST_ROLLOUTS, whole_groups=False, labels=labels)
    if lease is None:
        return []
    slots = asyncio.Semaphore(_CONCURRENT_READS)

    async def read(leased: LeasedRollout) -> FinishedRollout:
        async with slots:
            return await gateway.rollout(leased.session_id, leased.snapshot, pick=pick)

    try:
        return list(await asyncio.gather(*map(read, lease.rollouts)))
    finally:
        await gateway.release(lease.lease_id)


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


def _reasons(tokens_left_out: Mapping[str, int]) -> str:
    return "".join(f", {tokens} left out ({reason})" for reason, tokens in tokens_left_out.items())


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.4g} %"
