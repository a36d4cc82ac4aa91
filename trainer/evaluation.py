"""Held-out tasks under the policy that the engines serve: attempts, their records read back, and the figures of them.

    tasks ─▶ RolloutController (purpose "eval") ─▶ gateway ─▶ records ─▶ figures
                                                     └─▶ out of the feed: nobody trains on them

Used by the training loop and by `verbatim eval`. Records come from the gateway and not from this process's memory, so
those of a call that was killed count in the next one, which makes only the attempts that are missing.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gateway.client import GatewayClient
from gateway.contracts.generation import JsonValue
from gateway.contracts.records import Outcome
from trainer.metrics import Evaluation
from trainer.rollouts.controller import RolloutController
from trainer.rollouts.settings import RolloutSettings
from trainer.rollouts.tasks import Task, Verdict
from trainer.settings import EvaluationSettings

BOOTSTRAP_RESAMPLES = 1000
_BOOTSTRAP_SEED = 0
_CONCURRENT_READS = 8
_LEASE_LIMIT = 256


@dataclass(frozen=True, slots=True)
class EvalRecord:
    """One attempt, as the gateway recorded it: enough to score it again.

    task_index: place among the evaluation's tasks (a recipe may ask one question twice). reward, verdict: None where no
    score could be computed; then `error` is the code that the rollout failed with, or its outcome.
    facts: what the task compares with. reply: the last assistant message's text. messages: all that followed the task's
    own. num_tokens: sampled, of all turns. seconds: from the first request to the score, waiting for an engine
    included; None without a score. policy_versions: that sampled its tokens.
    """

    session_id: str
    task_index: int
    task_id: str
    attempt: int
    outcome: str
    reward: float | None
    verdict: str | None
    error: str | None
    facts: JsonValue
    reply: str | None
    messages: tuple[JsonValue, ...]
    num_turns: int
    num_tokens: int
    seconds: float | None
    policy_versions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over tasks, and its 95 % bootstrap interval [low, high]."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Spread:
    """Of values: mean, median and 95th percentile (linear between values)."""

    mean: float
    p50: float
    p95: float


@dataclass(frozen=True, slots=True)
class EvalFigures:
    """What the records of an evaluation say.

    reward: of a task's attempts, their mean. pass_at_1: the share of a task's attempts that are correct. pass_any: the
    share of tasks with a correct attempt (pass@k for k = `samples`). verdicts: attempts by kind. truncated_share: of
    attempts, correct or not. tokens: sampled in one attempt; seconds: of one attempt.
    Attempts without a score (`num_failed`, by `errors`) count nowhere else but in tokens_sampled; None where that
    leaves none.
    """

    num_tasks: int
    samples: int
    num_rollouts: int
    num_failed: int
    reward: Estimate | None
    pass_at_1: Estimate | None
    pass_any: float | None
    truncated_share: float | None
    verdicts: Mapping[str, int]
    errors: Mapping[str, int]
    tokens_sampled: int
    tokens: Spread | None
    seconds: Spread | None
    policy_versions: tuple[int, ...]


def evaluation_rollouts(rollouts: RolloutSettings, evaluation: EvaluationSettings) -> RolloutSettings:
    """How an evaluation's rollouts are made: as the training's, but sampled as `[evaluation]` says."""
    return replace(
        rollouts,
        temperature=evaluation.temperature,
        top_p=evaluation.top_p,
        max_new_tokens=evaluation.max_new_tokens or rollouts.max_new_tokens,
    )


async def evaluate(
    gateway: GatewayClient,
    controller: RolloutController,
    tasks: Sequence[Task],
    *,
    run_name: str,
    policy_version: int,
    samples: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[EvalRecord]:
    """Attempt each task `samples` times and return the records in order of task and attempt.

    What an earlier call with the same names has scored is not attempted again; what it left without a score is, once.
    `run_name` is the controller's. Raises VerbatimError if the gateway itself cannot be used.
    """
    summary = await controller.run_groups(
        tasks,
        group_size=samples,
        purpose="eval",
        step=policy_version,
        on_progress=on_progress,
        again_without_reward=True,
    )
    await _take_out_of_the_feed(gateway, run_name, policy_version)
    slots = asyncio.Semaphore(_CONCURRENT_READS)

    async def read(index: int, session_id: str) -> EvalRecord:
        async with slots:
            return await _record(gateway, session_id, tasks[index // samples], index // samples, index % samples)

    try:
        async with asyncio.TaskGroup() as reads:
            records = [reads.create_task(read(i, session_id)) for i, session_id in enumerate(summary.session_ids)]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures  # one line for the user: the first of them
    return [record.result() for record in records]


def eval_figures(records: Sequence[EvalRecord], *, samples: int) -> EvalFigures:
    """Sum up the records of one evaluation."""
    scored = [record for record in records if record.reward is not None]
    shares = _by_task(scored, lambda record: float(record.verdict == Verdict.CORRECT))
    seconds = [record.seconds for record in scored if record.seconds is not None]
    truncated = sum(record.outcome == Outcome.TRUNCATED for record in scored)
    return EvalFigures(
        num_tasks=len({record.task_index for record in records}),
        samples=samples,
        num_rollouts=len(records),
        num_failed=len(records) - len(scored),
        reward=_estimate(_by_task(scored, lambda record: record.reward or 0.0)),
        pass_at_1=_estimate(shares),
        pass_any=sum(share > 0 for share in shares) / len(shares) if shares else None,
        truncated_share=truncated / len(scored) if scored else None,
        verdicts=dict(Counter(record.verdict or "none" for record in scored).most_common()),
        errors=dict(Counter(str(record.error) for record in records if record.reward is None).most_common()),
        tokens_sampled=sum(record.num_tokens for record in records),
        tokens=_spread([float(record.num_tokens) for record in scored]),
        seconds=_spread(seconds),
        policy_versions=tuple(sorted({version for record in records for version in record.policy_versions})),
    )


def evaluation_of(figures: EvalFigures, policy_version: int) -> Evaluation:
    """The same as the training run's metrics keep it."""
    correct = figures.pass_at_1
    return Evaluation(
        policy_version=policy_version,
        num_tasks=figures.num_tasks,
        num_failed=figures.num_failed,
        reward_mean=None if figures.reward is None else figures.reward.mean,
        tokens_sampled=figures.tokens_sampled,
        pass_at_1=None if correct is None else correct.mean,
        ci_low=None if correct is None else correct.low,
        ci_high=None if correct is None else correct.high,
        truncated_share=figures.truncated_share,
        verdicts=figures.verdicts,
    )


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of the means of 1000 resamples of at least one value; equal values in equal order
    give equal intervals. B. Efron, "Bootstrap methods: another look at the jackknife", 1979.
    """
    draw = np.random.default_rng(_BOOTSTRAP_SEED)
    array = np.asarray(values, dtype=np.float64)
    means = [float(array[draw.integers(len(array), size=len(array))].mean()) for _ in range(BOOTSTRAP_RESAMPLES)]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def _by_task(scored: Sequence[EvalRecord], value: Callable[[EvalRecord], float]) -> list[float]:
    """Of each task that has a scored attempt: the mean of their values."""
    values: dict[int, list[float]] = {}
    for record in scored:
        values.setdefault(record.task_index, []).append(value(record))
    return [sum(of_task) / len(of_task) for of_task in values.values()]


async def _take_out_of_the_feed(gateway: GatewayClient, run_name: str, policy_version: int) -> None:
    """Lease and acknowledge an evaluation's rollouts, as a consumer of its own: they would wait there for ever."""
    labels = {"run": run_name, "purpose": "eval", "step": str(policy_version)}
    while lease := await gateway.lease(
        consumer=f"{run_name}.eval", limit=_LEASE_LIMIT, whole_groups=False, labels=labels
    ):
        await gateway.acknowledge(lease.lease_id)


async def _record(gateway: GatewayClient, session_id: str, task: Task, task_index: int, attempt: int) -> EvalRecord:
    session = await gateway.session(session_id)
    turns = await gateway.turns(session_id)
    finish, metadata = session["finish"], session["finish"]["metadata"]
    messages = tuple(messages_of_turns(turns)[len(task.messages) :])
    replies = [message for message in messages if message.get("role") == "assistant"]
    return EvalRecord(
        session_id=session_id,
        task_index=task_index,
        task_id=task.task_id,
        attempt=attempt,
        outcome=finish["outcome"],
        reward=finish["reward"],
        verdict=metadata.get("verdict"),
        error=None if finish["reward"] is not None else metadata.get("error", finish["outcome"]),
        facts=task.facts,
        reply=replies[-1].get("content") if replies else None,
        messages=messages,
        num_turns=len(turns),
        num_tokens=sum(turn["num_output_tokens"] for turn in turns),
        seconds=metadata.get("seconds") if finish["reward"] is not None else None,
        policy_versions=tuple(sorted({span["policy_version"] for turn in turns for span in turn["version_spans"]})),
    )


def messages_of_turns(turns: Sequence[Mapping[str, Any]]) -> list[JsonValue]:
    """The conversation that the last turn ends (as `gateway.contracts.records.conversation`, of turns as JSON)."""
    by_id = {turn["turn_id"]: turn for turn in turns}
    path = []
    turn = turns[-1] if turns else None
    while turn is not None:
        path.append(turn)
        attachment = turn["attachment"]
        # A root holds all messages before it, also where it follows another turn of the conversation.
        turn = by_id.get(attachment["parent_id"]) if attachment["parent_id"] else None
    messages: list[JsonValue] = []
    for turn in reversed(path):
        if turn["attachment"]["continues"]:
            messages.pop()
        messages += [*turn["added_messages"], turn["reply"]]
    return messages


def _estimate(values: Sequence[float]) -> Estimate | None:
    return Estimate(sum(values) / len(values), *bootstrap_interval(values)) if values else None


def _spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    p50, p95 = np.percentile(values, (50, 95))
    return Spread(sum(values) / len(values), float(p50), float(p95))
