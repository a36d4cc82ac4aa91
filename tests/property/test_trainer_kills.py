"""The training loop killed anywhere between lease, read, checkpoint and acknowledgement: nothing lost, nothing twice.

The loop, its source and its checkpoints are the real ones, over real HTTP from a real ledger; the policy that it trains
is the list of tokens that it was given. Hypothesis chooses where each life ends and what happens before the next one.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from engines.weights.disk import DiskTransport
from gateway.client import GatewayClient
from gateway.contracts.examples import example_turn
from gateway.contracts.generation import Finish, FinishReason
from gateway.contracts.records import SessionOrigin, SessionRecord
from gateway.contracts.versions import VersionSpan
from gateway.ledger.sqlite import SqliteLedger
from tests.feed_server import serve_feed
from trainer.algorithms.policy_objective import PolicyObjective
from trainer.backends.protocol import Measured, Policy, Update
from trainer.backends.settings import ModelSettings
from trainer.data.packing import PackedBatch, ScoredBatch
from trainer.data.settings import BatchSettings
from trainer.loop import train
from trainer.main import make_parts, open_metrics
from trainer.metrics import Evaluation
from trainer.progress import PlainProgress
from trainer.publish import Publisher
from trainer.replay.verify import RoutingReport
from trainer.rollouts.settings import RolloutSettings
from trainer.settings import (
    EvaluationSettings,
    GatewaySettings,
    ReplayMode,
    ReplaySettings,
    RunSettings,
    TrainSettings,
)

STEPS, GROUPS_PER_STEP, GROUP_SIZE, TOKENS = 3, 2, 2, 3
NUM_ROLLOUTS = STEPS * GROUPS_PER_STEP * GROUP_SIZE
FIRST_TOKEN = 100


class Killed(Exception):
    """Stands for SIGKILL: nothing after it runs."""


@dataclass(slots=True)
class Fate:
    """Ends a life at the `steps`-th point that it comes to."""

    steps: int

    def reach(self) -> None:
        self.steps -= 1
        if self.steps == 0:
            raise Killed


class MortalClient(GatewayClient):
    """Dies before a call, or after it and before its reply was of any use."""

    def __init__(self, url: str, fate: Fate) -> None:
        super().__init__(url, retry_seconds=20.0)
        self._fate = fate

    async def lease(self, **options: Any) -> Any:
        self._fate.reach()
        lease = await super().lease(**options)
        self._fate.reach()
        return lease

    async def rollout(self, session_id: str, snapshot: str, *, pick: str | None = None) -> Any:
        self._fate.reach()
        return await super().rollout(session_id, snapshot, pick=pick)

    async def acknowledge(self, lease_id: str) -> list[str]:
        self._fate.reach()
        acknowledged = await super().acknowledge(lease_id)
        self._fate.reach()
        return acknowledged

    async def release_consumer(self, consumer: str) -> int:
        self._fate.reach()
        released = await super().release_consumer(consumer)
        self._fate.reach()
        return released


class Tally:
    """A backend whose parameters are the tokens that it was trained on, in order."""

    routed = None
    packs_samples = True

    def __init__(self, fate: Fate) -> None:
        self._fate = fate
        self.tokens: list[int] = []

    def measure(self, batches: Sequence[PackedBatch], *, replay: bool, policy: Policy = Policy.ACTOR) -> Measured:
        logprobs = [batch.layout.rollout_logprobs[batch.layout.trained] for batch in batches]
        values = torch.from_numpy(np.concatenate(logprobs))
        return Measured(values, values, torch.zeros_like(values), RoutingReport())

    def record(self, batches: Sequence[PackedBatch]) -> tuple[tuple[PackedBatch, ...], Measured]:
        raise AssertionError("nothing is replayed")

    def update(self, batches: Sequence[ScoredBatch], objective: Any) -> Update:
        self._fate.reach()
        packed = [scored.batch for scored in batches]
        for batch in packed:
            self.tokens += batch.layout.labels[batch.layout.trained].tolist()
        return Update(0.0, 0.0, 0.0, {}, self.measure(packed, replay=False))

    def save(self, folder: Path) -> None:
        self._fate.reach()
        (folder / "tokens.json").write_text(json.dumps(self.tokens))
        self._fate.reach()

    def load(self, folder: Path) -> None:
        self.tokens = json.loads((folder / "tokens.json").read_text())

    def export(self, folder: Path) -> None:
        raise AssertionError("the publisher does not ask")

    def close(self) -> None:
        """Nothing is held."""


class Unpublished(Publisher):
    """There are no engines here."""

    async def publish(self, backend: Any, *, policy_version: int) -> str:
        return ""


class AllThere:
    """All rollouts are in the feed already."""

    async def produce(self, *, step: int) -> None:
        raise AssertionError("nothing is missing")

    async def evaluate(self, policy_version: int) -> Evaluation:
        raise AssertionError("no evaluation was asked for")


async def one_life(url: str, model: Path, folder: Path, fate: Fate) -> list[int]:
    """The tokens that the trainer was trained on, if it lives to the end."""
    where = TrainSettings(
        run=RunSettings(dir=folder, name="kills", steps=STEPS),
        model=ModelSettings(path=model),
        gateway=GatewaySettings(url=url),
        replay=ReplaySettings(mode=ReplayMode.OFF),
        batch=BatchSettings(max_staleness=100),
        evaluation=EvaluationSettings(num_tasks=0),
        rollouts=RolloutSettings("none", groups_per_step=GROUPS_PER_STEP, group_size=GROUP_SIZE),
    )

    async with MortalClient(url, fate) as gateway:
        backend = Tally(fate)
        parts = make_parts(
            where,
            backend=backend,
            objective=PolicyObjective(where.loss),
            gateway=gateway,
            transport=DiskTransport(pause=None),
            rollouts=AllThere(),
            metrics=open_metrics(where),
            watcher=PlainProgress(STEPS),
        )
        parts = replace(parts, publisher=Unpublished(gateway=gateway, transport=DiskTransport(), folder=folder))
        await train(where, parts, stop=asyncio.Event())
        return backend.tokens


async def finished_rollouts(data: Path) -> None:
    """All rollouts of the run, each with tokens of its own."""
    ledger = SqliteLedger.open(data)
    for number in range(NUM_ROLLOUTS):
        session_id, group = f"s{number:02}", f"g{number // GROUP_SIZE:02}"
        labels = {"run": "kills", "purpose": "train"}
        await ledger.create_session(
            SessionRecord(
                session_id, group, GROUP_SIZE, None, labels, {}, {}, None, "", SessionOrigin.CREATED, True, 1.0
            )
        )
        first = FIRST_TOKEN + number * TOKENS
        turn = example_turn(
            session_id=session_id,
            prompt_token_ids=np.array([1, 2], dtype=np.int32),
            output_token_ids=np.arange(first, first + TOKENS, dtype=np.int32),
            output_logprobs=np.full(TOKENS, -0.5, dtype=np.float32),
            version_spans=(VersionSpan(0, TOKENS, 0),),
            finish=Finish(FinishReason.STOP, first),
            sampling={"temperature": 1.0},
            created_at=1.0,
            delivered_at=1.5,
        )
        await ledger.append_turn(turn, None)
        await ledger.finish(
            session_id, reward=float(number % 2), outcome="completed", metadata={}, finished_at=2.0 + number
        )
    await ledger.aclose()


async def lives_and_deaths(model: Path, lives: Sequence[tuple[int, str]]) -> list[int]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        await finished_rollouts(folder / "ledger")
        async with serve_feed(folder / "ledger") as feed:
            for steps, then in lives:
                try:
                    async with asyncio.timeout(30):
                        tokens = await one_life(feed.url, model, folder / "run", Fate(steps))
                except Killed:
                    pass
                else:
                    return tokens
                if then == "restart":
                    await feed.restart()
                elif then == "release":
                    async with GatewayClient(feed.url) as operator:
                        await operator.release_consumer("kills")
            async with asyncio.timeout(30):
                return await one_life(feed.url, model, folder / "run", Fate(10**9))


EVENTS = st.sampled_from(["nothing", "restart", "release"])


@given(lives=st.lists(st.tuples(st.integers(1, 40), EVENTS), max_size=5))
@example(lives=[(steps, "nothing") for steps in range(1, 30)])
@example(lives=[(steps, "release") for steps in range(1, 30)])
@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
def test_every_token_is_trained_exactly_once_wherever_trainer_and_gateway_end(
    tiny_model: Path, lives: list[tuple[int, str]]
) -> None:
    """I3; an operator who gives a dead trainer's leases back in between changes nothing."""
    tokens = asyncio.run(lives_and_deaths(tiny_model, lives))
    assert sorted(tokens) == list(range(FIRST_TOKEN, FIRST_TOKEN + NUM_ROLLOUTS * TOKENS))
