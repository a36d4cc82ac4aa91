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
class Spread:
    """Of values: mean, median and 95th percentile (linear between values)."""

    mean: float
    p50: float
    p95: float


@dataclass(frozen=True, slots=True)
class EvalFigures:
    """What the records of an evaluation say.

    pass_at_1: share of a task's scored attempts that are correct, mean over tasks; [ci_low, ci_high] is its 95 %
    bootstrap interval over tasks (1000 resamples, seeded). pass_any: share of tasks with a correct attempt (pass@k for
    k = `samples`). All None without a scored attempt; attempts without a score (`num_failed`, by `errors`) count
    nowhere else but in tokens_sampled. verdicts: scored attempts by kind. truncated_share: of scored attempts, correct
    or not. tokens: sampled in one attempt; seconds: of one attempt.
    """

    num_tasks: int
    samples: int
    num_rollouts: int
    num_failed: int
    reward_mean: float | None
    pass_at_1: float | None
    ci_low: float | None
    ci_high: float | None
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
    shares = _correct_shares(scored)
    low, high = bootstrap_interval(shares) if shares else (None, None)
    seconds = [record.seconds for record in scored if record.seconds is not None]
    truncated = sum(record.outcome == Outcome.TRUNCATED for record in scored)
    return EvalFigures(
        num_tasks=len({record.task_index for record in records}),
        samples=samples,
        num_rollouts=len(records),
        num_failed=len(records) - len(scored),
        reward_mean=_mean([record.reward for record in scored if record.reward is not None]),
        pass_at_1=_mean(shares),
        ci_low=low,
        ci_high=high,
        pass_any=_mean([float(share > 0) for share in shares]),
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
    return Evaluation(
        policy_version=policy_version,
        num_tasks=figures.num_tasks,
        num_failed=figures.num_failed,
        reward_mean=figures.reward_mean,
        tokens_sampled=figures.tokens_sampled,
        pass_at_1=figures.pass_at_1,
        ci_low=figures.ci_low,
        ci_high=figures.ci_high,
        truncated_share=figures.truncated_share,
        verdicts=figures.verdicts,
    )


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of the means of 1000 resamples (B. Efron, "Bootstrap methods: another look at the
    jackknife", 1979); the same values give the same interval."""
    draw = np.random.default_rng(_BOOTSTRAP_SEED)
    array = np.asarray(values, dtype=np.float64)
    means = [float(array[draw.integers(len(array), size=len(array))].mean()) for _ in range(BOOTSTRAP_RESAMPLES)]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def _correct_shares(scored: Sequence[EvalRecord]) -> list[float]:
    """Of each task: the share of its scored attempts that are correct."""
    by_task: dict[int, list[bool]] = {}
    for record in scored:
        by_task.setdefault(record.task_index, []).append(record.verdict == Verdict.CORRECT)
    return [sum(correct) / len(correct) for correct in by_task.values()]


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


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    p50, p95 = np.percentile(values, (50, 95))
    return Spread(sum(values) / len(values), float(p50), float(p95))
