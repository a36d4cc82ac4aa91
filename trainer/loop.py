"""The training loop: take → check → advantage → loss → step → checkpoint → acknowledge → publish.

Rollouts may come from anywhere: `produce` is asked for a step's rollouts when the feed does not hold enough groups yet,
and returns when they have ended. What a step consumes is decided by the feed alone, so a restarted trainer first
takes what its predecessor had produced.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Protocol

from gateway.contracts.errors import TrainingError
from trainer.algorithms.kl import extreme_share, k3
from trainer.algorithms.objective import Objective
from trainer.backends.protocol import Measured, TrainBackend, Update
from trainer.checkpoint import CheckpointStore, RunState, check_same_run
from trainer.data.batch import StepBatch, step_batch
from trainer.data.packing import ScoredBatch, pack
from trainer.data.source import RolloutSource, TakenRollouts
from trainer.metrics import Evaluation, MetricsLog, StepMetrics
from trainer.publish import Publisher
from trainer.replay.verify import RoutingReport
from trainer.settings import ReplayMode, TrainSettings

_log = logging.getLogger(__name__)

_FEED_WAIT_SECONDS = 60.0
"""How long finished rollouts may take to appear in the feed once their production has ended."""
_MOST_EMPTY_STEPS = 3


class Produce(Protocol):
    """Makes the rollouts of one step (counted from 0) as far as they do not exist yet; returns when all have ended."""

    async def __call__(self, *, step: int) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class LoopParts:
    """What the loop is composed of. `evaluate` gives the score of the policy that engines serve; None: never."""

    backend: TrainBackend
    objective: Objective
    source: RolloutSource
    produce: Produce
    publisher: Publisher
    checkpoints: CheckpointStore
    metrics: MetricsLog
    evaluate: Callable[[int], Awaitable[Evaluation]] | None = None
    on_step: Callable[[StepMetrics], None] | None = None
    on_evaluation: Callable[[Evaluation], None] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Trained:
    """One step's update, and the same batch measured through the live router; None where not asked for or empty."""

    update: Update | None
    without_replay: Measured | None
    seconds: float


async def train(settings: TrainSettings, parts: LoopParts, *, stop: asyncio.Event) -> RunState:
    """Run to `settings.run.steps`, or until the step in which `stop` was set has ended; returns where it stands."""
    state = await _begin(settings, parts)
    empty_steps = 0
    await _evaluate(settings, parts, state)
    while state.step < settings.run.steps and not stop.is_set():
        state = await _step(settings, parts, state)
        empty_steps = 0 if state.metrics is not None and state.metrics.tokens_trained else empty_steps + 1
        if empty_steps == _MOST_EMPTY_STEPS:
            raise TrainingError(
                f"{empty_steps} steps in a row had no rollout to train on (the last dropped "
                f"{state.metrics.dropped_rollouts if state.metrics else 0}); see the sessions' outcomes"
            )
        await _evaluate(settings, parts, state)
    return state


async def _begin(settings: TrainSettings, parts: LoopParts) -> RunState:
    """Take up the newest checkpoint, settle its leases, and make the engines serve its policy."""
    state = RunState(run_name=settings.run.name, seed=settings.run.seed, step=0, policy_version=0)
    latest = parts.checkpoints.latest()
    if latest is not None:
        state, folder = latest
        check_same_run(state, run_name=settings.run.name, seed=settings.run.seed, where=folder)
        await asyncio.to_thread(parts.backend.load, folder)
        _log.info("going on after step %d from %s", state.step, folder)
    await parts.source.resume(lease_ids=state.lease_ids, consumed=state.session_ids)
    # Always, not only where labels differ: another run's policy may carry the same label.
    started = time.monotonic()
    await parts.publisher.publish(parts.backend, policy_version=state.policy_version)
    parts.metrics.resume(step=state.step)
    if state.metrics is not None and parts.metrics.last_step() < state.step:
        parts.metrics.step(replace(state.metrics, seconds_publish=time.monotonic() - started))
    return state


async def _step(settings: TrainSettings, parts: LoopParts, state: RunState) -> RunState:
    started, served = time.monotonic(), state.policy_version
    taken = await _take(settings, parts, state)
    seconds_rollout = time.monotonic() - started
    async with parts.source.holding(taken):
        state, metrics = await _learn(settings, parts, state, taken, seconds_rollout=seconds_rollout)
    published = time.monotonic()
    if state.policy_version != served:
        await parts.publisher.publish(parts.backend, policy_version=state.policy_version)
    metrics = replace(metrics, seconds_publish=time.monotonic() - published)
    parts.metrics.step(metrics)
    if parts.on_step is not None:
        parts.on_step(metrics)
    return state


async def _learn(
    settings: TrainSettings, parts: LoopParts, state: RunState, taken: TakenRollouts, *, seconds_rollout: float
) -> tuple[RunState, StepMetrics]:
    """From rollouts to an update that is on disk, and only then acknowledged: each is trained once (I3)."""
    batch = _check(settings, parts, state, taken)
    trained = await asyncio.to_thread(_train, settings, parts, batch)
    state = RunState(
        run_name=state.run_name,
        seed=state.seed,
        step=state.step + 1,
        policy_version=state.policy_version + (trained.update is not None),
        lease_ids=taken.lease_ids,
        session_ids=taken.session_ids,
    )
    metrics = _step_metrics(state, batch, trained, seconds_rollout=seconds_rollout)
    state = replace(state, metrics=metrics)
    await asyncio.to_thread(parts.checkpoints.save, state, parts.backend.save)
    await parts.source.acknowledge(taken.lease_ids)
    return state, metrics


async def _take(settings: TrainSettings, parts: LoopParts, state: RunState) -> TakenRollouts:
    """The step's groups: what the feed holds already, then what is produced for it."""
    wanted = settings.rollouts.groups_per_step
    taken = await parts.source.take(wanted, wait_seconds=0.0)
    if len(taken.groups) < wanted:
        async with parts.source.holding(taken):
            await parts.produce(step=state.step)
        taken += await parts.source.take(wanted - len(taken.groups), wait_seconds=_FEED_WAIT_SECONDS)
    if len(taken.groups) < wanted:
        _log.warning("step %d goes on with %d whole groups of %d", state.step + 1, len(taken.groups), wanted)
    return taken


def _check(settings: TrainSettings, parts: LoopParts, state: RunState, taken: TakenRollouts) -> StepBatch:
    batch = step_batch(
        taken.rollouts,
        routed=parts.backend.routed,
        policy_version=state.policy_version,
        max_staleness=settings.batch.max_staleness,
        train_incomplete=settings.batch.train_incomplete,
    )
    if batch.dropped_rollouts:
        reasons = ", ".join(f"{reason} {count}" for reason, count in batch.dropped_by.items())
        _log.warning("step %d leaves out %d rollouts (%s)", state.step + 1, batch.dropped_rollouts, reasons)
    return batch


def _train(settings: TrainSettings, parts: LoopParts, batch: StepBatch) -> _Trained:
    """The forward under the live router for comparison, then loss and step; runs in a worker thread."""
    started = time.monotonic()
    if not batch.minibatches:
        return _Trained(None, None, 0.0)
    (minibatch,) = batch.minibatches
    tokens = settings.batch.tokens_per_microbatch if parts.backend.packs_samples else 1
    microbatches = pack(minibatch.samples, minibatch.weights, tokens_per_microbatch=tokens)
    without_replay = None
    if settings.replay.mode is not ReplayMode.OFF and settings.replay.measure_without_replay:
        without_replay = parts.backend.measure(microbatches, replay=False)
    update = parts.backend.update([ScoredBatch(batch) for batch in microbatches], parts.objective)
    return _Trained(update, without_replay, time.monotonic() - started)


async def _evaluate(settings: TrainSettings, parts: LoopParts, state: RunState) -> None:
    """Evaluate the served policy where the settings ask for it and the metrics do not have it yet."""
    due = settings.evaluation
    if parts.evaluate is None or not due.num_tasks or parts.metrics.is_evaluated(state.policy_version):
        return
    at_start = due.at_start and state.step == 0
    at_end = due.at_end and state.step == settings.run.steps
    between = due.every > 0 and 0 < state.step < settings.run.steps and state.step % due.every == 0
    if at_start or at_end or between:
        evaluation = await parts.evaluate(state.policy_version)
        parts.metrics.evaluation(evaluation)
        if parts.on_evaluation is not None:
            parts.on_evaluation(evaluation)


def _step_metrics(state: RunState, batch: StepBatch, trained: _Trained, *, seconds_rollout: float) -> StepMetrics:
    update, without = trained.update, trained.without_replay
    measured = None if update is None else update.measured
    routing = RoutingReport() if measured is None else measured.routing
    gap, gap_without = _logratio_figures(measured), _logratio_figures(without)
    return StepMetrics(
        step=state.step,
        policy_version=state.policy_version,
        reward_mean=batch.reward_mean,
        tokens_sampled=batch.tokens_sampled,
        tokens_trained=0 if measured is None else measured.logprobs.numel(),
        tokens_left_out=batch.tokens_left_out,
        tokens_dropped=batch.tokens_dropped,
        rollouts=batch.rollouts,
        groups=batch.groups,
        zero_variance_groups=batch.zero_variance_groups,
        dropped_rollouts=batch.dropped_rollouts,
        dropped_by=batch.dropped_by,
        rows_total=routing.total,
        rows_replayed=routing.replayed,
        rows_verified=routing.verified,
        rows_fallback=routing.fallback,
        kl_with_replay=gap.kl,
        kl_without_replay=gap_without.kl,
        extreme_share_with_replay=gap.extreme_share,
        extreme_share_without_replay=gap_without.extreme_share,
        loss=None if update is None else update.loss,
        grad_norm=None if update is None else update.grad_norm,
        clipped_share=None if update is None else update.shares.get("clipped"),
        entropy=None if measured is None else float(measured.entropy.double().mean()),
        staleness_mean=batch.staleness_mean,
        seconds_rollout=seconds_rollout,
        seconds_train=trained.seconds,
        seconds_publish=0.0,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


@dataclass(frozen=True, slots=True)
class _Gap:
    """KL (k3, nats a token) and F(2) of rollout against train; None where nothing was measured."""

    kl: float | None
    extreme_share: float | None


def _logratio_figures(measured: Measured | None) -> _Gap:
    if measured is None:
        return _Gap(None, None)
    logratio = (measured.logprobs - measured.rollout_logprobs).double()
    return _Gap(float(k3(logratio).mean()), extreme_share(logratio))
