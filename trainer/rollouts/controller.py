"""Runs the attempts of a training step or an evaluation: a session, a sandbox and an agent each, several at once.

An attempt that fails is data: its session is finished without a reward and with the error's code, its siblings go on.
Names are made from (run, purpose, step, task, attempt), so that a step that was interrupted is completed, not repeated.
Where every attempt must have a score (an evaluation), one that ended without is made again under a name of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from openai import AsyncOpenAI, OpenAIError

from gateway.client import GatewayClient
from gateway.contracts.errors import VerbatimError
from gateway.contracts.generation import JsonValue
from gateway.contracts.ports import Sandbox, SandboxSpec
from gateway.contracts.records import Outcome
from trainer.rollouts.agent import AgentLimits, Conversation, Sampling, converse
from trainer.rollouts.recipe import Recipe
from trainer.rollouts.settings import RolloutSettings
from trainer.rollouts.tasks import Task, Verdict

_PAGE = 1000
_CALL_RETRIES = 20
"""Of a chat call whose gateway is away; the pauses of OpenAI's client add up to two minutes."""


class Sandboxes(Protocol):
    """Lends a fresh sandbox for the length of a rollout."""

    def take(self, spec: SandboxSpec) -> AbstractAsyncContextManager[Sandbox]: ...


@dataclass(frozen=True, slots=True)
class RolloutSummary:
    """Of one call of `run_groups`: `rewards` of the rollouts that have one, in order of task and attempt.

    `session_ids`: of all, in the same order; where an attempt was made again, of the last.
    """

    session_ids: tuple[str, ...]
    rewards: tuple[float, ...]
    num_failed: int
    seconds: float

    @property
    def num_rollouts(self) -> int:
        """Those without a reward included."""
        return len(self.session_ids)

    @property
    def mean_reward(self) -> float:
        """NaN if no rollout has a reward."""
        return sum(self.rewards) / len(self.rewards) if self.rewards else float("nan")


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One rollout to run."""

    session_id: str
    group: str
    task: Task


class RolloutController:
    """Runs rollouts of one recipe for one run, through the gateway."""

    def __init__(
        self,
        *,
        gateway: GatewayClient,
        sandboxes: Sandboxes,
        recipe: Recipe,
        settings: RolloutSettings,
        run_name: str,
    ) -> None:
        self._gateway = gateway
        self._sandboxes = sandboxes
        self._recipe = recipe
        self._settings = settings
        self._run_name = run_name

    async def run_groups(
        self,
        tasks: Sequence[Task],
        *,
        group_size: int,
        purpose: str,
        step: int,
        on_progress: Callable[[int, int], None] | None = None,
        again_without_reward: bool = False,
    ) -> RolloutSummary:
        """Attempt each task `group_size` times and return when all attempts have ended.

        Attempts that ended in an earlier call with the same purpose and step are not made again; their rewards count.
        again_without_reward: those of them that have no reward (failed, abandoned) are, once a call.
        `on_progress(ended, all)` is called after each. Raises VerbatimError if the gateway itself cannot be used.
        """
        started = time.monotonic()
        labels = {"run": self._run_name, "purpose": purpose, "step": str(step)}
        ended = await self._ended_earlier(labels)
        attempts = self._attempts(tasks, group_size, labels)
        if again_without_reward:
            attempts = [_not_in_vain(attempt, ended) for attempt in attempts]
        results: dict[str, float | None] = {
            a.session_id: ended[a.session_id] for a in attempts if a.session_id in ended
        }
        slots = asyncio.Semaphore(self._settings.concurrency)

        async def run(attempt: _Attempt, client: AsyncOpenAI) -> None:
            async with slots:
                results[attempt.session_id] = await self._run_attempt(attempt, client, group_size, labels)
            if on_progress is not None:
                on_progress(len(results), len(attempts))

        try:
            async with self._shared_client() as client, asyncio.TaskGroup() as group:
                for attempt in attempts:
                    if attempt.session_id not in ended:
                        group.create_task(run(attempt, client))
        except ExceptionGroup as failures:
            raise _first_of_ours(failures) from failures
        rewards = [results[attempt.session_id] for attempt in attempts]
        known = tuple(reward for reward in rewards if reward is not None)
        session_ids = tuple(attempt.session_id for attempt in attempts)
        return RolloutSummary(session_ids, known, len(rewards) - len(known), time.monotonic() - started)

    async def abandon_open_sessions(self) -> int:
        """Finish what an interrupted process of this run left open, without a reward; returns how many there were."""
        sessions = await self._sessions({"run": self._run_name})
        open_ids = [session["session_id"] for session in sessions if session["state"] == "open"]
        for session_id in open_ids:
            await self._gateway.finish_session(session_id, reward=None, outcome=Outcome.ABANDONED, metadata={})
        return len(open_ids)

    def _shared_client(self) -> AsyncOpenAI:
        """One HTTP client for all: each agent's is a copy of it that shares its connections."""
        return AsyncOpenAI(
            base_url="http://set.for.each.session.invalid",
            api_key="none",
            timeout=self._settings.request_timeout_seconds,
            max_retries=_CALL_RETRIES,
        )

    def _attempts(self, tasks: Sequence[Task], group_size: int, labels: Mapping[str, str]) -> list[_Attempt]:
        prefix = f"{labels['run']}.{labels['purpose']}.{labels['step']}"
        return [
            _Attempt(f"{prefix}.{index}.{attempt}", f"{prefix}.{index}", task)
            for index, task in enumerate(tasks)
            for attempt in range(group_size)
        ]

    async def _ended_earlier(self, labels: Mapping[str, str]) -> dict[str, float | None]:
        sessions = await self._sessions(labels)
        return {session["session_id"]: session["reward"] for session in sessions if session["state"] == "finished"}

    async def _sessions(self, labels: Mapping[str, str]) -> list[dict[str, JsonValue]]:
        """All sessions with these labels, page by page."""
        found: list[dict[str, JsonValue]] = []
        while page := await self._gateway.sessions(
            labels=labels, limit=_PAGE, after=found[-1]["session_id"] if found else None
        ):
            found += page
        return found

    async def _run_attempt(
        self, attempt: _Attempt, client: AsyncOpenAI, group_size: int, labels: Mapping[str, str]
    ) -> float | None:
        """One rollout from its session's creation to its finish; returns its reward."""
        session = await self._gateway.create_session(
            session_id=attempt.session_id,
            group=attempt.group,
            group_size=group_size,
            task={"task_id": attempt.task.task_id, "facts": attempt.task.facts},
            labels=labels,
        )
        own_client = client.with_options(base_url=session.base_url, api_key=session.api_key or "none")
        started = time.monotonic()
        reward: float | None = None
        metadata: dict[str, JsonValue] = {}
        try:
            conversation = await self._converse(attempt, own_client)
            score = self._recipe.score(attempt.task, conversation.messages)
        except VerbatimError as error:
            outcome, metadata = Outcome.FAILED, _failure(error.code, error)
        except OpenAIError as error:
            outcome, metadata = Outcome.FAILED, _failure(getattr(error, "code", None) or "chat_failed", error)
        else:
            reward, outcome = score.reward, conversation.outcome
            metadata = {"num_turns": conversation.num_turns, "verdict": verdict_of(score.verdict, outcome)}
        metadata["seconds"] = time.monotonic() - started
        await self._gateway.finish_session(session.session_id, reward=reward, outcome=outcome, metadata=metadata)
        return reward

    async def _converse(self, attempt: _Attempt, client: AsyncOpenAI) -> Conversation:
        """The agent's conversation, in a sandbox of its own if the recipe has tools."""
        spec = SandboxSpec(key=attempt.session_id, files=self._recipe.sandbox_files)
        if self._recipe.tools:
            async with self._sandboxes.take(spec) as sandbox:
                return await self._agent(attempt.task, client, sandbox)
        return await self._agent(attempt.task, client, None)

    async def _agent(self, task: Task, client: AsyncOpenAI, sandbox: Sandbox | None) -> Conversation:
        async def run_tool(name: str, arguments: Any) -> str:
            if sandbox is None:  # a model may call what nobody offered; that is its error, not ours
                return f"error: no tool {name!r}"
            return await self._recipe.run_tool(sandbox, name, arguments)

        return await converse(
            client,
            task.messages,
            model=self._settings.model,
            tools=self._recipe.tools,
            run_tool=run_tool,
            limits=AgentLimits(self._settings.max_turns, self._settings.max_new_tokens),
            sampling=Sampling(self._settings.temperature, self._settings.top_p),
        )


def verdict_of(verdict: str, outcome: str) -> str:
    """A recipe's verdict on a rollout that ended so: what was cut and is not correct counts as truncated."""
    return Verdict.TRUNCATED if outcome == Outcome.TRUNCATED and verdict != Verdict.CORRECT else verdict


def _not_in_vain(attempt: _Attempt, ended: Mapping[str, float | None]) -> _Attempt:
    """The attempt under the first name of its that no session without a reward has: NAME, NAME.again1, …"""
    tries, session_id = 0, attempt.session_id
    while session_id in ended and ended[session_id] is None:
        tries += 1
        session_id = f"{attempt.session_id}.again{tries}"
    return replace(attempt, session_id=session_id)


def _failure(code: str, error: Exception) -> dict[str, JsonValue]:
    return {"error": code, "message": str(error)}


def _first_of_ours(failures: ExceptionGroup[Exception]) -> Exception:
    """What one line can say of a group of failures: the first error of our tree, else the first of all."""
    ours = failures.subgroup(VerbatimError) or failures
    first: Exception = ours.exceptions[0]
    return _first_of_ours(first) if isinstance(first, ExceptionGroup) else first
