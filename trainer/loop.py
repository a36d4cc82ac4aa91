"""The training loop: take → check → learn → checkpoint → acknowledge → publish.

Rollouts may come from anywhere: `Rollouts.produce` is asked for a step's when the feed does not hold enough groups
yet, and returns when they have ended. What a step consumes is decided by the feed alone, so a restarted trainer first
takes what its predecessor had produced.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from gateway.contracts.errors import TrainingError
from gateway.contracts.settings import settings_toml
from trainer.accounting import step_metrics
from trainer.algorithms.advantages import Estimator
from trainer.algorithms.aggregation import Aggregation
from trainer.backends.protocol import TrainBackend
from trainer.checkpoint import CheckpointStore, RunState, check_same_run
from trainer.data.batch import StepBatch, step_batch
from trainer.data.source import RolloutSource, TakenRollouts
from trainer.durable import write_text
from trainer.learning import Learner
from trainer.metrics import Evaluation, StepMetrics
from trainer.phases import Phase, PhaseClock
from trainer.progress import Progress
from trainer.publish import Publisher
from trainer.samples import SampleLog
from trainer.settings import ReplayMode, TrainSettings
from trainer.sinks import RunMetrics

_log = logging.getLogger(__name__)

_FEED_WAIT_SECONDS = 60.0
"""How long finished rollouts may take to appear in the feed once their production has ended."""
_MOST_EMPTY_STEPS = 3


class Rollouts(Protocol):
    """Where a run's rollouts come from."""

    async def produce(self, *, step: int) -> None:
        """Make the rollouts of one step (counted from 0) that do not exist yet; returns when all have ended."""
        ...

    async def evaluate(self, policy_version: int) -> Evaluation:
        """The score of the policy that the engines serve."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class LoopParts:
    """What the loop is composed of."""

    backend: TrainBackend
    learner: Learner
    estimator: Estimator
    aggregate: Aggregation
    source: RolloutSource
    rollouts: Rollouts
    publisher: Publisher
    checkpoints: CheckpointStore
    metrics: RunMetrics
    samples: SampleLog
    watcher: Progress


async def train(settings: TrainSettings, parts: LoopParts, *, stop: asyncio.Event) -> RunState:
    """Run to `settings.run.steps`, or until the step in which `stop` was set has ended; returns where it stands."""
    state = await _begin(settings, parts)
    empty_steps = 0
    await _evaluate(settings, parts, state)
    while state.step < settings.run.steps and not stop.is_set():
        state = await _step(settings, parts, state)
        empty_steps = 0 if _has_lesson(state.metrics) else empty_steps + 1
        if empty_steps == _MOST_EMPTY_STEPS:
            raise TrainingError(f"{empty_steps} steps in a row trained no token; {_left_out(state.metrics)}")
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
    parts.samples.resume(step=state.step)
    write_text(settings.run.dir / "settings.toml", settings_toml(settings))  # not before the folder is known as ours
    if state.metrics is not None and parts.metrics.last_step() < state.step:
        seconds = {**state.metrics.seconds, Phase.PUBLISH.value: time.monotonic() - started}
        parts.metrics.step(replace(state.metrics, seconds=seconds))
    return state


async def _step(settings: TrainSettings, parts: LoopParts, state: RunState) -> RunState:
    served, clock = state.policy_version, PhaseClock(parts.watcher.phase)
    with clock.phase(Phase.ROLLOUT):
        taken = await _take(settings, parts, state)
    async with parts.source.holding(taken):
        state, metrics = await _learn(settings, parts, state, taken, clock)
    if state.policy_version != served:
        with clock.phase(Phase.PUBLISH):
            await parts.publisher.publish(parts.backend, policy_version=state.policy_version)
    metrics = replace(metrics, seconds=clock.seconds())
    parts.metrics.step(metrics)
    parts.watcher.step(metrics)
    return state


async def _learn(
    settings: TrainSettings, parts: LoopParts, state: RunState, taken: TakenRollouts, clock: PhaseClock
) -> tuple[RunState, StepMetrics]:
    """From rollouts to updates that are on disk, and only then acknowledged: each is trained once (I3)."""
    with clock.phase(Phase.ASSEMBLE):
        batch = await asyncio.to_thread(_check, settings, parts, state, taken)
    learned = await asyncio.to_thread(parts.learner.learn, batch, clock)
    state = RunState(
        run_name=state.run_name,
        seed=state.seed,
        step=state.step + 1,
        policy_version=state.policy_version + bool(learned.updates),
        lease_ids=taken.lease_ids,
        session_ids=taken.session_ids,
    )
    metrics = step_metrics(
        batch,
        learned.updates,
        step=state.step,
        policy_version=state.policy_version,
        seconds=clock.seconds(),
        with_replay=learned.trained,
        without_replay=learned.live,
    )
    state = replace(state, metrics=metrics)
    with clock.phase(Phase.CHECKPOINT):
        await asyncio.to_thread(parts.checkpoints.save, state, parts.backend.save)
    await parts.source.acknowledge(taken.lease_ids)
    rewards = {r.session.session_id: r.finish.reward for r in taken.rollouts if r.finish.reward is not None}
    parts.samples.write(state.step, learned.batches, learned.logprobs, rewards=rewards)
    return state, metrics


async def _take(settings: TrainSettings, parts: LoopParts, state: RunState) -> TakenRollouts:
    """The step's groups: what the feed holds already, then what is produced for it."""
    wanted = settings.rollouts.groups_per_step
    taken = await parts.source.take(wanted, wait_seconds=0.0)
    if len(taken.groups) < wanted:
        async with parts.source.holding(taken):
            await parts.rollouts.produce(step=state.step)
        taken += await parts.source.take(wanted - len(taken.groups), wait_seconds=_FEED_WAIT_SECONDS)
    if len(taken.groups) < wanted:
        _log.warning("step %d goes on with %d whole groups of %d", state.step + 1, len(taken.groups), wanted)
    return taken


def _check(settings: TrainSettings, parts: LoopParts, state: RunState, taken: TakenRollouts) -> StepBatch:
    batch = step_batch(
        taken.rollouts,
        # Only r3 replays what engines recorded; the other modes leave it aside.
        routed=parts.backend.routed if settings.replay.mode is ReplayMode.R3 else None,
        policy_version=state.policy_version,
        settings=settings.batch,
        estimator=parts.estimator,
        aggregate=parts.aggregate,
        seed=settings.run.seed,
        step=state.step,
    )
    if batch.dropped_rollouts:
        reasons = _by_reason(batch.dropped_by)
        _log.warning("step %d leaves out %d rollouts (%s)", state.step + 1, batch.dropped_rollouts, reasons)
    return batch


async def _evaluate(settings: TrainSettings, parts: LoopParts, state: RunState) -> None:
    """Evaluate the served policy where the settings ask for it and the metrics do not have it yet."""
    due = settings.evaluation
    if not due.num_tasks or parts.metrics.is_evaluated(state.policy_version):
        return
    at_start = due.at_start and state.step == 0
    at_end = due.at_end and state.step == settings.run.steps
    between = due.every > 0 and 0 < state.step < settings.run.steps and state.step % due.every == 0
    if at_start or at_end or between:
        evaluation = await parts.rollouts.evaluate(state.policy_version)
        parts.metrics.evaluation(evaluation)
        parts.watcher.evaluation(evaluation)


def _has_lesson(metrics: StepMetrics | None) -> bool:
    """Whether a step trained a token, or had rollouts that could have: groups of equal rewards are no fault."""
    return metrics is not None and bool(metrics.tokens_trained or metrics.zero_variance_groups)


def _left_out(metrics: StepMetrics | None) -> str:
    if metrics is None or not (metrics.dropped_by or metrics.left_out_by):
        return "no rollout came; see the sessions' outcomes"
    return (
        f"the last left out rollouts: {_by_reason(metrics.dropped_by) or 'none'}; tokens of the others: "
        f"{_by_reason(metrics.left_out_by) or 'none'}"
    )


def _by_reason(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counts.items())
