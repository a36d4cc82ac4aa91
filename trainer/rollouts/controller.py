"""Runs the attempts of a training step or an evaluation: a session, a sandbox and an agent each, several at once.

An attempt that fails is data: its session is finished without a reward and with the error's code, its siblings go on.
Names are made from (run, purpose, step, task, attempt), so that a step that was interrupted is completed, not repeated.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from openai import AsyncOpenAI, OpenAIError

from gateway.client import GatewayClient
from gateway.contracts.errors import SandboxLost, VerbatimError
from gateway.contracts.generation import JsonValue
from gateway.contracts.ports import Sandbox, SandboxSpec
from gateway.contracts.records import Outcome
from trainer.rollouts.agent import AgentLimits, Conversation, converse
from trainer.rollouts.recipe import Recipe
from trainer.rollouts.settings import RolloutSettings
from trainer.rollouts.tasks import Task

_PAGE = 1000
_CALL_RETRIES = 20
"""Of a chat call whose gateway is away; the pauses of OpenAI's client add up to two minutes."""


class Sandboxes(Protocol):
    """Lends a fresh sandbox for the length of a rollout."""

    def take(self, spec: SandboxSpec) -> AbstractAsyncContextManager[Sandbox]: ...


@dataclass(frozen=True, slots=True)
class RolloutSummary:
    """Of one call of `run_groups`: `rewards` of the rollouts that have one, in order of task and attempt."""

    num_rollouts: int
    rewards: tuple[float, ...]
    num_failed: int
    seconds: float

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
    ) -> RolloutSummary:
        """Attempt each task `group_size` times and return when all attempts have ended.

        Attempts that ended in an earlier call with the same purpose and step are not made again; their rewards count.
        `on_progress(ended, all)` is called after each. Raises VerbatimError if the gateway itself cannot be used.
        """
        started = time.monotonic()
        labels = {"run": self._run_name, "purpose": purpose, "step": str(step)}
        attempts = self._attempts(tasks, group_size, labels)
        ended = await self._ended_earlier(labels)
        results: dict[str, float | None] = {
            a.session_id: ended[a.session_id] for a in attempts if a.session_id in ended
        }
        slots = asyncio.Semaphore(self._settings.concurrency)

        async def run(attempt: _Attempt, client: AsyncOpenAI) -> None:
            async with slots:
                results[attempt.session_id] = await self._run_attempt(attempt, client, group_size, labels)
            if on_progress is not None:
                on_progress(len(results), len(attempts))

        # One HTTP client for all: each agent's is a copy of it that shares its connections.
        timeout = self._settings.request_timeout_seconds
        async with (
            AsyncOpenAI(
                base_url="http://set.for.each.session.invalid",
                api_key="none",
                timeout=timeout,
                max_retries=_CALL_RETRIES,
            ) as client,
            asyncio.TaskGroup() as group,
        ):
            for attempt in attempts:
                if attempt.session_id not in ended:
                    group.create_task(run(attempt, client))
        rewards = [results[attempt.session_id] for attempt in attempts]
        known = tuple(reward for reward in rewards if reward is not None)
        return RolloutSummary(len(attempts), known, len(rewards) - len(known), time.monotonic() - started)

    async def abandon_open_sessions(self) -> int:
        """Finish what an interrupted process of this run left open, without a reward; returns how many there were."""
        sessions = await self._sessions({"run": self._run_name})
        open_ids = [session["session_id"] for session in sessions if session["state"] == "open"]
        for session_id in open_ids:
            await self._gateway.finish_session(session_id, reward=None, outcome=Outcome.ABANDONED, metadata={})
        return len(open_ids)

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
        reward: float | None = None
        metadata: dict[str, JsonValue] = {}
        try:
            conversation = await self._converse(attempt, own_client)
            reward = self._recipe.reward(attempt.task, conversation.messages)
        except VerbatimError as error:
            outcome, metadata = Outcome.FAILED, _failure(error.code, error)
        except OpenAIError as error:
            outcome, metadata = Outcome.FAILED, _failure(getattr(error, "code", None) or "chat_failed", error)
        else:
            outcome, metadata = conversation.outcome, {"num_turns": conversation.num_turns}
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
            if sandbox is None:
                raise SandboxLost(f"the model called {name!r}, but recipe {self._recipe.name} has no tools")
            return await self._recipe.run_tool(sandbox, name, arguments)

        return await converse(
            client,
            task.messages,
            model=self._settings.model,
            tools=self._recipe.tools,
            run_tool=run_tool,
            limits=AgentLimits(self._settings.max_turns, self._settings.max_new_tokens),
            temperature=self._settings.temperature,
        )


def _failure(code: str, error: Exception) -> dict[str, JsonValue]:
    return {"error": code, "message": str(error)}
