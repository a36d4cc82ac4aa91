"""Rollouts against a real gateway process with a scripted engine: real OpenAI client, tools in real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from engines.launch import free_port
from gateway.client import GatewayClient
from gateway.contracts.errors import RewardError
from gateway.contracts.generation import JsonValue
from sandbox.plain import PlainProcessDriver
from sandbox.pool import SandboxPool
from trainer.recipes.calculator import SYSTEM_PROMPT, CalculatorRecipe
from trainer.rollouts.controller import RolloutController
from trainer.rollouts.settings import RolloutSettings
from trainer.rollouts.tasks import Score, Task

GATEWAY = Path(__file__).parent / "gateway" / "gateway_with_script.py"


def call(expression: str, name: str = "calculator") -> str:
    function = json.dumps({"name": name, "arguments": {"expression": expression}})
    return f"<tool_call>\n{function}\n</tool_call>"


RULES: list[dict[str, Any]] = [
    {"after": "48/2, then", "reply": call("48/2")},
    {"after": "tool\n24<", "reply": call("48+24")},
    {"after": "tool\n72<", "reply": "#### 72"},
    {"after": "7*5", "reply": "#### 35"},
    {"after": "for ever", "reply": call("1+")},
    {"after": "abacus", "reply": call("1+1", name="abacus")},
    {"after": "no tool", "reply": "#### 2"},
]


def task(task_id: str, question: str, answer: str) -> Task:
    messages = ({"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question})
    return Task(task_id, messages, {"answer": answer})


CHAIN = task("chain", "48/2, then 48+x", "72")
DIRECT = task("direct", "7*5", "35")
ENDLESS = task("endless", "for ever", "1")
ABACUS = task("abacus", "abacus", "2")


class PickyRecipe(CalculatorRecipe):
    """Has no reward for one task."""

    def score(self, task: Task, messages: Sequence[JsonValue]) -> Score:
        if task.task_id == "direct":
            raise RewardError("no reward for direct answers")
        return super().score(task, messages)


@pytest.fixture(scope="module")
def gateway_url(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("rollouts")
    (folder / "rules.json").write_text(json.dumps(RULES))
    process = subprocess.Popen(
        [
            *(sys.executable, str(GATEWAY), "--engine", f"scripted={folder / 'rules.json'}"),
            *("--model", str(tiny_model), "--data", str(folder / "ledger"), "--port", str(free_port())),
        ],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.communicate(timeout=20)


@asynccontextmanager
async def controller(
    gateway_url: str, run_name: str, recipe: CalculatorRecipe | None = None
) -> AsyncIterator[tuple[RolloutController, GatewayClient]]:
    settings = RolloutSettings(recipe="calculator", max_turns=4, max_new_tokens=200)
    driver = PlainProcessDriver()
    pool = SandboxPool(driver, size=4)
    async with GatewayClient(gateway_url) as gateway:
        try:
            yield (
                RolloutController(
                    gateway=gateway,
                    sandboxes=pool,
                    recipe=recipe or CalculatorRecipe(),
                    settings=settings,
                    run_name=run_name,
                ),
                gateway,
            )
        finally:
            await pool.aclose()
            await driver.aclose()


async def test_rollouts_use_their_tool_and_finish_as_whole_groups_with_rewards(gateway_url: str) -> None:
    """I3: every attempt of a group reaches the feed once, with its reward."""
    seen: list[tuple[int, int]] = []
    async with controller(gateway_url, "good") as (rollouts, gateway):
        summary = await rollouts.run_groups(
            [CHAIN, DIRECT], group_size=2, purpose="train", step=0, on_progress=lambda *at: seen.append(at)
        )
        lease = await gateway.lease(consumer="test", limit=8, labels={"run": "good", "purpose": "train"})
        assert lease is not None
        chain = [r for r in lease.rollouts if r.group == "good.train.0.0"]
        rollout = await gateway.rollout(chain[0].session_id, chain[0].snapshot)
    assert summary.rewards == (1.0, 1.0, 0.0, 0.0)
    assert (summary.num_rollouts, summary.num_failed, summary.mean_reward) == (4, 0, 0.5)
    assert sorted(seen) == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert len(lease.rollouts) == 4
    assert [r.reward for r in chain] == [1.0, 1.0]
    assert rollout.reports["turns"] == 3
    assert len(rollout.segments) == 1, "the agent's echo of its own replies extends the recorded tokens (I1)"
    assert rollout.session.task == {"task_id": "chain", "facts": {"answer": "72"}}
    assert rollout.finish.outcome == "completed"


async def test_a_rollout_that_runs_out_of_turns_is_truncated_and_has_a_reward(gateway_url: str) -> None:
    async with controller(gateway_url, "endless") as (rollouts, gateway):
        summary = await rollouts.run_groups([ENDLESS, ABACUS], group_size=1, purpose="train", step=0)
        sessions = await gateway.sessions(labels={"run": "endless"})
        details = [await gateway.session(session["session_id"]) for session in sessions]
    assert summary.rewards == (0.0, 0.0)
    assert {session["outcome"] for session in sessions} == {"truncated"}
    assert [detail["reports"]["turns"] for detail in details] == [4, 4]


async def test_a_failed_rollout_is_data_and_does_not_stop_its_siblings(gateway_url: str) -> None:
    too_long = task("too long", "1+" * 3000, "1")
    async with controller(gateway_url, "failing", PickyRecipe()) as (rollouts, gateway):
        summary = await rollouts.run_groups([DIRECT, CHAIN, too_long], group_size=1, purpose="train", step=3)
        sessions = await gateway.sessions(labels={"run": "failing"})
        failed = [await gateway.session(s["session_id"]) for s in sessions if s["outcome"] == "failed"]
    assert summary.rewards == (1.0,)
    assert summary.num_failed == 2
    assert [f["finish"]["reward"] for f in failed] == [None, None]
    assert failed[0]["finish"]["metadata"]["error"] == "reward_error"
    assert failed[1]["finish"]["metadata"]["error"] == "context_length_exceeded"


async def test_an_interrupted_step_is_completed_and_not_repeated(gateway_url: str) -> None:
    """I3: what ended before the interruption is not sampled again, what was open is closed without a reward."""
    async with controller(gateway_url, "again") as (rollouts, gateway):
        first = await rollouts.run_groups([CHAIN], group_size=1, purpose="train", step=0)
        await gateway.create_session(
            session_id="again.train.0.1.0", group="again.train.0.1", group_size=1,
            labels={"run": "again", "purpose": "train", "step": "0"},
        )  # fmt: skip
        assert await rollouts.abandon_open_sessions() == 1
        assert await rollouts.abandon_open_sessions() == 0
        both = await rollouts.run_groups([CHAIN, CHAIN, CHAIN], group_size=1, purpose="train", step=0)
        sessions = await gateway.sessions(labels={"run": "again"})
    assert first.rewards == (1.0,)
    assert (both.rewards, both.num_failed) == ((1.0, 1.0), 1)
    assert [session["outcome"] for session in sessions] == ["completed", "abandoned", "completed"]
